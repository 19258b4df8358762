"""The same in a bucket: a real S3 server, started here, and s3fs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from snapshotd.errors import DamagedBytes
from snapshotd.tier.store import Store
from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, homes
from tests.integration.test_persist import EVERY, errors, lose_all
from tests.unit.test_tier import BYTES, V1, write

Make = Callable[..., Cluster]
BUCKET = "snapshots"


@dataclass
class Bucket:
    server: ThreadedMotoServer
    client: Any

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return sorted(entry["Key"] for entry in found)

    def whole(self) -> int:
        return sum("/steps/" in key for key in self.keys())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    try:
        yield Bucket(server, client)
    finally:
        s3_backends.reset()
        client.close()
        server.stop()


def test_a_job_comes_back_from_a_bucket(cluster: Make, bucket: Bucket) -> None:
    bucket.client.create_bucket(Bucket=BUCKET)
    made = cluster(persist={"url": f"s3://{BUCKET}/tier", **EVERY, "keep_last": 1})
    nodes = made.start(2)
    job = Job(homes(nodes))
    job.restore()
    for step in range(2):
        job.train_protected(1)
        eventually(f"step {step} is whole", lambda s=step: newest(bucket) == s, 60)
    job.vanish()
    eventually("retention has deleted the first", lambda: bucket.whole() == 1)
    eventually("with its images", lambda: len(bucket.keys()) == 5)
    nodes = lose_all(made, nodes)
    job = Job(homes(nodes))
    assert {(r.step, r.tier) for r in job.restore()} == {(1, "persistent")}
    job.check()
    job.close()


def test_a_bucket_that_is_not_there_and_one_that_is_forbidden_touch_nothing_and_heal(
    cluster: Make, bucket: Bucket
) -> None:
    made = cluster(persist={"url": f"s3://{BUCKET}/tier", **EVERY})
    nodes = made.start(2)
    job = Job(homes(nodes))
    assert job.restore(on_lost="fresh") == [None] * 2
    job.train_protected(1)
    eventually("status names it", lambda: any(f"s3://{BUCKET}" in e for e in errors(nodes)))
    bucket.client.create_bucket(Bucket=BUCKET)
    eventually("it heals by itself", lambda: bucket.whole() == 1, 90)
    before = bucket.keys()
    deny = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:PutObject",
                "Resource": f"arn:aws:s3:::{BUCKET}/*",
            }
        ],
    }
    bucket.client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(deny))
    job.train_protected(1)
    eventually("it is told", lambda: any("Allow the daemon's user" in e for e in errors(nodes)))
    job.train_protected(1)
    assert set(before) <= set(bucket.keys())
    bucket.client.delete_bucket_policy(Bucket=BUCKET)
    eventually("it goes on", lambda: bucket.whole() == 2, 90)
    job.close()


def test_ranges_of_objects_are_read_and_what_is_cut_is_damage(bucket: Bucket) -> None:
    """By requests for ranges: a range behind the end is an error of its own to S3."""
    bucket.client.create_bucket(Bucket=BUCKET)
    store = Store(f"s3://{BUCKET}/tier", "a/b")
    write(store)
    store.publish(V1, 2, 0)
    spans = [(1, BYTES - 5, 5), *((0, at, 3) for at in range(0, 90, 3))]
    assert b"".join(store.pieces(V1, spans)) == bytes([2]) * 5 + bytes([1]) * 90
    for offset in (BYTES - 5, BYTES + 5):
        with pytest.raises(DamagedBytes, match=r"shard-00001\.image has no 6 bytes"):
            list(store.pieces(V1, [(1, offset, 6)]))
    with pytest.raises(DamagedBytes, match=r"shard-00007\.image is missing"):
        list(store.pieces(V1, [(7, 0, 1)]))


def newest(bucket: Bucket) -> int:
    steps = [int(k[-21:-5]) for k in bucket.keys() if "/steps/" in k]  # noqa: SIM118  a method
    return max(steps, default=-1)

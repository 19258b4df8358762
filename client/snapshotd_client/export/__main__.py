"""What `snapshotd export` and `snapshotd import` become on the trainer's side.

`python -m snapshotd_client.export REQUEST`, REQUEST a JSON object. It prints lines of JSON:
{"progress": [bytes, of bytes]}, then {"done": {...}}; an error is its last line on standard error.
"""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.export import dcp, flat
from snapshotd_client.export.incoming import read_checkpoint, write_image
from snapshotd_client.export.shards import Shards

_WRITERS = {"dcp": dcp.write, "safetensors": flat.write}


def _export(request: dict[str, Any]) -> dict[str, Any]:
    shards = Shards([Path(p) for p in request["images"]], request["manifest_bytes"])
    state = shards.state()
    total = sum(prod(t.shape) * t.dtype.itemsize for t in state.tensors)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        _say(progress=[done, total])

    _WRITERS[request["format"]](state, Path(request["directory"]), progress)
    return {
        "tensors": len(state.tensors),
        "objects": len(state.things),
        "bytes": total,
        "diverged": list(state.diverged),
    }


def _import(request: dict[str, Any]) -> dict[str, Any]:
    trees = read_checkpoint(Path(request["checkpoint"]))
    images = []
    for shard in range(request["world"]):
        path = Path(request["directory"]) / f"shard-{shard}.image"
        manifest_bytes = write_image(
            path, trees, request["job"], shard, request["world"], request["step"]
        )
        images.append([str(path), manifest_bytes])
    return {"images": images}


def _say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """One request."""
    request = json.loads(sys.argv[1])
    try:
        _say(done=_export(request) if request["what"] == "export" else _import(request))
    except (SnapshotdClientError, OSError) as error:
        sys.stderr.write(json.dumps({"error": " ".join(str(error).split())}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

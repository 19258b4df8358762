"""Certificates that are not fit for use are refused at start, and named."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from snapshotd.config import load
from snapshotd.errors import ConfigError
from snapshotd.rpc.tls import Identity, TlsFiles, meaning
from snapshotd.wire.address import is_loopback
from tests.integration.authority import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def files(authority: Authority) -> TlsFiles:
    return authority.of("n0")


def refused(files: TlsFiles, **other: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Identity.load(dataclasses.replace(files, **other), "test", "n0")
    return str(caught.value)


def test_what_is_fit(files: TlsFiles) -> None:
    identity = Identity.load(files, "test", "n0")
    assert identity.name_of("n0") == "n0.test"
    assert identity.name_of(None) == "test"
    assert identity.key == files.key.read_bytes()


def test_absent_and_unreadable(files: TlsFiles, tmp_path: Path) -> None:
    for key in ("ca", "cert", "key"):
        said = refused(files, **{key: tmp_path / "none.pem"})
        assert f"tls.{key} {tmp_path}/none.pem cannot be read: No such file" in said


def test_no_pem(files: TlsFiles, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no certificate")
    assert f"tls.ca {text} holds no certificate" in refused(files, ca=text)
    for key in ("cert", "key"):
        assert "are no certificate and key in PEM form" in refused(files, **{key: text})


def test_another_key(files: TlsFiles, authority: Authority) -> None:
    said = refused(files, key=authority.of("n1").key)
    assert f"is not the key of tls.cert {files.cert}" in said


def test_an_encrypted_key(files: TlsFiles, tmp_path: Path) -> None:
    closed = tmp_path / "closed.key"
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", files.key, "-out", closed]
        if b"RSA" in files.key.read_bytes()
        else ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", files.key, "-out", closed],
        check=True,
        capture_output=True,
    )
    assert f"tls.key {closed} is encrypted" in refused(files, key=closed)


def test_expired(authority: Authority) -> None:
    assert "certificate has expired" in refused(authority.of("n0", expired=True))


def test_another_authority(files: TlsFiles, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").of("n0")
    assert "does not pass tls.ca" in refused(files, ca=other.ca)


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["n1.test", "test"], "n0.test"),
        (["n0.test"], "test"),
        (["n0", "test"], "n0.test"),
        (["n0.other", "other"], "test"),
    ],
)
def test_another_s_certificate(authority: Authority, names: list[str], lacks: str) -> None:
    said = refused(authority.issue(*names))
    assert f"is of {', '.join(names)}, not of {lacks}. " in said
    assert f"DNS:{lacks}" in said


def test_half_of_a_section(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        'cluster_id = "c"\nnode_id = "n0"\nlisten = "h:1"\n[tls]\nca = "/ca.pem"\nkey = "/k.pem"\n'
    )
    with pytest.raises(ConfigError, match=r"without tls\.cert, the rest of \[tls\] is of no use"):
        load(file, {}, {})
    file.write_text('cluster_id = "c"\nnode_id = "n0"\nlisten = "h:1"\n[tls]\nca = "ca.pem"\n')
    with pytest.raises(ConfigError, match="relative path"):
        load(file, {}, {})


def test_other_failures_are_not_explained_away() -> None:
    assert (
        meaning("failed to connect to all addresses; last error: Connection refused", "n") is None
    )
    assert meaning("Socket closed", None) is None


@pytest.mark.parametrize(
    ("address", "alone"),
    [
        ("127.0.0.1:1", True),
        ("127.9.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("10.0.0.1:1", False),
        ("[fd00::1]:1", False),
        ("node-7:1", False),
    ],
)
def test_who_can_dial(address: str, alone: bool) -> None:
    assert is_loopback(address) == alone

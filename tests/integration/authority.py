"""A certificate authority for tests, and the certificates of nodes."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme

from snapshotd.rpc.tls import TlsFiles


class Authority:
    """Signs what it is asked to."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self._directory = directory
        directory.mkdir()
        self._ca.cert_pem.write_to_path(directory / "ca.pem")

    def issue(self, *names: str, expired: bool = False) -> TlsFiles:
        """A certificate with these DNS names."""
        ends = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        made = self._ca.issue_cert(*names, not_after=ends if expired else None)
        stem = f"{names[0]}-{len(list(self._directory.iterdir()))}"
        files = TlsFiles(
            self._directory / "ca.pem",
            self._directory / f"{stem}.pem",
            self._directory / f"{stem}.key",
        )
        made.private_key_pem.write_to_path(files.key)
        for number, part in enumerate(made.cert_chain_pems):
            part.write_to_path(files.cert, append=number > 0)
        return files

    def of(self, node: str, **how: bool) -> TlsFiles:
        """A node's, of the cluster that tests make."""
        return self.issue(f"{node}.test", "test", **how)

"""Who speaks: certificates of nodes and operators, and how they are read, shown and checked.

A certificate names its owner in its subject alternative names, as DNS names: `CLUSTER_ID` for
whoever belongs to the cluster, and `NODE_ID.CLUSTER_ID` for a node. Both ends of a connection show
one that the cluster's CA signed. The one who dials checks that it reached the node it meant; the
one who is dialled checks that the caller is the node that it says it is.
"""

from __future__ import annotations

import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from snapshotd.errors import ConfigError
from snapshotd.rpc.checks import malformed

if TYPE_CHECKING:
    from snapshotd.config import Tls

_NAMES: Final = "x509_subject_alternative_name"
#: Flights that a handshake takes, and some more.
_FLIGHTS: Final = 8


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: the CA that signs the cluster's certificates, our own, and its key."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def of(cls, tls: Tls) -> Self | None:
        """As configured; None for no TLS."""
        if tls.ca is None or tls.cert is None or tls.key is None:
            return None
        return cls(tls.ca, tls.cert, tls.key)


@dataclass(frozen=True, slots=True)
class Identity:
    """What this process shows to others, and by what it checks them; PEM."""

    cluster_id: str
    ca: bytes
    cert: bytes
    key: bytes
    #: The same for plain sockets, of those who dial and those who are dialled.
    dialling: ssl.SSLContext = field(repr=False, compare=False)
    dialled: ssl.SSLContext = field(repr=False, compare=False)

    @classmethod
    def load(cls, files: TlsFiles, cluster_id: str, node: str | None = None) -> Identity:
        """Read the files, and try them in a handshake with ourselves.

        Args:
            files: where they are.
            cluster_id: the cluster that the certificate must name.
            node: the node that it must name, too; None for an operator.

        Raises:
            ConfigError: names the file, and what is wrong with it.
        """
        pem = {
            key: _read(f"tls.{key}", path)
            for key, path in (("ca", files.ca), ("cert", files.cert), ("key", files.key))
        }
        dialled, dialling = (
            _context(files, protocol)
            for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
        )
        held = _names(files, dialled, dialling)
        for name in (cluster_id, *([node_name(node, cluster_id)] if node else [])):
            if name not in held:
                raise ConfigError(
                    f"tls.cert {files.cert} is of {', '.join(held) or 'nobody'}, not of {name}",
                    f"Have the CA sign one whose subjectAltName has DNS:{name}, or correct "
                    "cluster_id or node_id",
                )
        return cls(cluster_id, **pem, dialling=dialling, dialled=dialled)

    def server(self) -> grpc.ServerCredentials:
        """Of a port that only takes callers with a certificate of the CA."""
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)], root_certificates=self.ca, require_client_auth=True
        )

    def channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def name_of(self, node: str | None) -> str:
        """What the certificate of the one that is dialled must say; None: any of the cluster."""
        return node_name(node, self.cluster_id) if node else self.cluster_id


def node_name(node: str, cluster_id: str) -> str:
    """How a certificate names a node."""
    return f"{node}.{cluster_id}"


class Callers:
    """Holds what a caller says of itself against its certificate; without TLS, all is believed."""

    def __init__(self, identity: Identity | None) -> None:
        self._cluster_id = identity.cluster_id if identity else None

    def check(self, context: Any, node: str | None = None) -> None:
        """The caller must belong to the cluster, and be `node` where it says that it is.

        Args:
            context: of the call, a grpc.aio.ServicerContext.
            node: None where anybody of the cluster may ask.

        Raises:
            RequestError: its certificate says otherwise.
        """
        if self._cluster_id is not None:
            held = [name.decode() for name in context.auth_context().get(_NAMES, ())]
            self.check_names(held, context.peer(), node)

    def check_names(self, held: Collection[str], peer: str, node: str | None = None) -> None:
        """As `check`, of a caller at the address `peer` whose certificate has the names `held`."""
        if self._cluster_id is None:
            return
        wanted = [self._cluster_id, *([node_name(node, self._cluster_id)] if node else [])]
        for name in wanted:
            if name not in held:
                said = f" said that it is node {node!r}, but" if node else ""
                raise malformed(
                    f"the caller at {peer}{said} shows a certificate of "
                    f"{', '.join(held) or 'nobody'}, not of {name}"
                )


#: What gRPC says of a connection that did not come about, and what it means.
_MEANINGS: Final = (
    (
        "Hostname Verification Check failed",
        "it shows the certificate of another node or cluster than {name}",
    ),
    (
        "certificate has expired",
        "its certificate has expired",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not signed by the CA of this node's tls.ca",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "it does not speak TLS, and this node does: set [tls] on all nodes or on none",
    ),
)
_HUNG_UP: Final = (
    "it hung up at once; it may speak TLS, which this node does not: see [tls]",
    "it hung up on this node's certificate; its tls.ca may be another, or ours expired",
)
_CONNECTING: Final = "failed to connect"
_CLOSED: Final = "Socket closed"


def meaning(details: str, name: str | None) -> str | None:
    """Why no connection came about, if it was for who the other is; None for any other reason.

    Args:
        details: gRPC's words for the failure.
        name: what the other's certificate had to say; None where this end does without TLS.
    """
    if _CONNECTING not in details:
        return None
    for words, means in _MEANINGS:
        if words in details:
            return means.format(name=name)
    return _HUNG_UP[name is not None] if _CLOSED in details else None


def shake_meaning(error: OSError) -> str:
    """Why a handshake over a plain socket came to nothing."""
    if isinstance(error, ssl.SSLCertVerificationError) and "expired" in error.verify_message:
        return "its certificate has expired"
    for words, means in _MEANINGS:
        if words in str(error):
            return means
    return _HUNG_UP[True]


def check_dialled(names: Collection[str], name: str) -> str | None:
    """What is wrong with the names of a certificate that had to say `name`; None: nothing."""
    return None if name in names else _MEANINGS[0][1].format(name=name)


# -- trying the files


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{key} {path} cannot be read: {error.strerror}",
            "Set it to a PEM file that this user can read, or remove [tls]",
        ) from error


def _names(files: TlsFiles, server: ssl.SSLContext, client: ssl.SSLContext) -> list[str]:
    """DNS names of the certificate, once a handshake with it in both roles has succeeded."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_FLIGHTS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise ConfigError(
                    f"tls.cert {files.cert} does not pass tls.ca {files.ca}: "
                    f"{error.verify_message}",
                    "Have the cluster's CA sign it anew, for server and client use",
                ) from error
            except ssl.SSLError as error:
                raise ConfigError(f"no TLS with tls.cert {files.cert}: {error}") from error
    certificate: Any = ends[0].getpeercert()
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]


def _context(files: TlsFiles, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        raise ConfigError(f"tls.ca {files.ca} holds no certificate in PEM form") from error
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls.key {files.key} is not the key of tls.cert {files.cert}",
                "Set both to files that were made together",
            ) from error
        raise ConfigError(
            f"tls.cert {files.cert} and tls.key {files.key} are no certificate and key in PEM "
            f"form ({error.reason})"
        ) from error
    except _Encrypted as error:
        raise ConfigError(
            f"tls.key {files.key} is encrypted, and a daemon has nobody to ask for the password",
            "Store it unencrypted, readable for the daemon's user only",
        ) from error
    return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted

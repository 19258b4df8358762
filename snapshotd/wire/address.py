"""What an address of a daemon is: host:port as other nodes can dial it."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

_HOST_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?")
EXPECTED: Final = "host:port that other nodes can dial, like 10.0.0.1:7070 or [fd00::1]:7070"


class BadAddress(ValueError):
    """Why no other node can dial it, in words; what was expected is EXPECTED."""


def _check_port(port: str) -> None:
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise BadAddress(f"{port!r} is no port between 1 and 65535")


def _check_host(host: str) -> None:
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadAddress(f"{host!r} has colons; an IPv6 address stands in square brackets")
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        # A name that ends in a number, like 10.0.0.256, is a mistyped number to every resolver.
        if not _HOST_NAME.fullmatch(host) or host.rstrip(".").rpartition(".")[2].isdigit():
            raise BadAddress(f"{host!r} is neither a host name nor an IP address") from None
        return
    if number.is_unspecified:
        raise BadAddress(f"{host} stands for every interface, and no other node can dial that")


def is_loopback(address: str) -> bool:
    """Whether only this machine can dial host:port. Another name than localhost may be dialled."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(address: str) -> str:
    """Accept `address` unchanged, or say what is wrong with it.

    Raises:
        BadAddress: it cannot be dialled.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise BadAddress("it lacks a host or a port")
    _check_port(port)
    _check_host(host)
    return address

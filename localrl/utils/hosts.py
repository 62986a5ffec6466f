"""Names and addresses of this machine, for servers that answer it alone.

A server that listens on loopback is still reached by any web page whose name is pointed there (DNS
rebinding), so it looks at the name that a request was sent to.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def is_address(name: str) -> bool:
    """Return True for an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches a host."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def own_names(host: str) -> frozenset[str]:
    """Return the names by which a server on this host may be called, besides addresses."""
    return frozenset({"localhost", host.lower(), socket.gethostname().lower()})


def names_this_machine(header: str, names: frozenset[str]) -> bool:
    """Return True if a Host header has an address or one of the names.

    Names that others can point here are refused; the port may be that of a tunnel.
    """
    bracketed = header.startswith("[")
    name = header.rsplit("]", 1)[0].lstrip("[") if bracketed else header.split(":")[0]
    return name.lower() in names or is_address(name)


def is_own_origin(header: str | None, names: frozenset[str]) -> bool:
    """Return True if a request comes from no web page, or from one of this machine."""
    if header is None:
        return True
    try:
        host = urlsplit(header).hostname or ""
    except ValueError:
        return False
    return host in names or is_loopback(host)

"""Which addresses may be told of decisions. Pure."""

from __future__ import annotations

import hashlib
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit


def why_not_an_address(url: str, *, allow_http: bool) -> str | None:
    """What keeps events from being posted there; None where nothing does.

    >>> why_not_an_address("https://hooks.example.com/pawl", allow_http=False)
    >>> why_not_an_address("http://[::1]:9000/pawl", allow_http=False)
    >>> why_not_an_address("http://hooks.example.com/pawl", allow_http=False)
    'is neither https:// nor on this machine; allow_http: true permits it'
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is no address"
    if parts.scheme not in ("http", "https") or not host or not url.isprintable():
        return "is no http:// or https:// address"
    if parts.username is not None or parts.fragment:
        return "must not hold a user, a password or a fragment"
    if parts.scheme == "http" and not allow_http and not _is_here(host):
        return "is neither https:// nor on this machine; allow_http: true permits it"
    return None


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def endpoint_id(url: str) -> str:
    """What an address is called in the database: paths may hold secrets."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def shown_address(url: str) -> str:
    """An address for people and logs, without its path and query.

    >>> shown_address("https://hooks.example.com:8443/T01/secret?x=1")
    'https://hooks.example.com:8443'
    """
    parts = urlsplit(url)
    return SplitResult(parts.scheme, parts.netloc, "", "", "").geturl()

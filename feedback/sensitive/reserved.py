"""Addresses that are nobody's: set aside for private networks and for examples. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from feedback.sensitive.kinds import Kind

_EXAMPLE_DOMAIN: Final = re.compile(r"[@.](?:example\.(?:com|net|org)|example|test|invalid|localhost)\Z", re.IGNORECASE)
"""RFC 2606, and whatever is below them."""


def is_reserved(kind: Kind, found: str) -> bool:
    """Whether this is an e-mail address of an example domain, or an IP address that many have or nobody.

    Such are those of private networks (RFC 1918, RFC 4193) and of documentation (RFC 5737, RFC 3849), loopback,
    link-local, multicast and the like.
    """
    if kind.name == "EMAIL":
        return _EXAMPLE_DOMAIN.search(found) is not None
    return kind.name == "IP" and not _is_global(found)


def _is_global(found: str) -> bool:
    address = ipaddress.ip_address(found)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    given = mapped or address
    return given.is_global and not given.is_multicast

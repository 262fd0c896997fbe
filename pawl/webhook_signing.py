"""Signatures of what is posted, after the Standard Webhooks convention, so that its libraries can check them. Pure.

HMAC-SHA256 over `id.timestamp.body`, in base64 behind a version. A secret is `whsec_` and base64, or any longer text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from pawl.errors import ConfigurationError

PREFIX = "whsec_"
SHORTEST = 16
"""Bytes of a secret."""


def headers_for(event_id: str, payload: bytes, keys: Sequence[bytes], now: float) -> Mapping[str, str]:
    """The three headers that say what was sent, when, and that it was us; a signature for each key."""
    moment = str(int(now))
    return {
        "webhook-id": event_id,
        "webhook-timestamp": moment,
        "webhook-signature": " ".join(signature(key, event_id, moment, payload) for key in keys),
    }


def signature(key: bytes, event_id: str, moment: str, payload: bytes) -> str:
    """
    >>> signature(b"0123456789abcdef", "evt_1", "1700000000", b"{}")
    'v1,5/6qDyjZnwbEUs9I9I8i7BGKidfp/4yA/2sCbBGqvwc='
    """
    signed = b".".join((event_id.encode(), moment.encode(), payload))
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def key_of(secret: str, where: str) -> bytes:
    """The bytes that a secret stands for.

    Raises:
        ConfigurationError: it is too short, or not what it says it is.
    """
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True) if secret.startswith(PREFIX) else None
    except binascii.Error as exc:
        raise ConfigurationError(f"{where}: what follows {PREFIX} is not base64") from exc
    key = secret.encode() if key is None else key
    if len(key) < SHORTEST:
        raise ConfigurationError(f"{where}: a secret needs at least {SHORTEST} bytes")
    return key

"""Alerts that are firing in Prometheus."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import httpx2

from pawl.errors import Unreachable

TIMEOUT_S = 10.0


def firing_alarms(url: str, names: Collection[str], alias: str) -> tuple[str, ...]:
    """Which of these alerts are firing about this model, by name.

    Raises:
        Unreachable: Prometheus does not say.
    """
    try:
        response = httpx2.get(f"{url}/api/v1/alerts", timeout=TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        alerts = response.json()["data"]["alerts"]
        return tuple(sorted({_name(alert) for alert in alerts if _is_about(alert, names, alias)}))
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Unreachable(f"{url} does not say which alerts are firing: {type(exc).__name__} {exc}".rstrip()) from exc


def _name(alert: Mapping[str, Any]) -> str:
    return str(alert["labels"].get("alertname"))


def _is_about(alert: Mapping[str, Any], names: Collection[str], alias: str) -> bool:
    """Alerts without a model are about all of them."""
    return alert["state"] == "firing" and _name(alert) in names and alert["labels"].get("model", alias) == alias

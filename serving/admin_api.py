"""Administration over HTTP: what `pawl keys`, `rollout`, `models`, `pairs` and `assignments` do, by the same functions.

Every change writes a line of the audit trail with the key that ordered it, in the transaction that makes the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from serving.admin.experiments import add_experiments
from serving.admin.keys import add_keys
from serving.admin.models import add_models
from serving.admin.pairs import add_pairs
from serving.admin.reports import add_reports
from serving.admin.rollouts import add_rollouts
from serving.admin.status import add_status

if TYPE_CHECKING:
    from serving.gateway import Gateway


def add_admin(app: FastAPI, gateway: Gateway) -> None:
    """The routes of `/admin/v1`."""
    for add in (add_keys, add_experiments, add_reports, add_rollouts, add_models, add_pairs, add_status):
        add(app, gateway)

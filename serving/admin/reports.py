"""Reports on experiments over HTTP: what `pawl experiment report` says, made by a process that this one waits for."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel

from ab_testing.experiment_table import is_known
from pawl.settings import DatabaseSettings
from serving.admin.answers import TAG, WITHOUT_NUL, PathName, administered
from serving.errors import ApiError, Conflict, NotFound, Overloaded
from serving.routes import ADMIN
from serving.stored_api import JSON

if TYPE_CHECKING:
    from serving.gateway import Gateway

MODULE: Final = "serving.report_process"
"""Not imported here: what it imports is large, and a gateway needs none of it."""
WITHIN_S: Final = 300.0
"""A report on ten million rows takes about two minutes, and nobody waits for ever."""
BUSY_RETRY_S: Final = 10
LOCK: Final = "report.lock"
"""In the state directory: one report at a time on this machine, whichever worker is asked."""
HTML: Final = "text/html; charset=utf-8"

Control = Annotated[str, Query(description="The variant to compare with.", max_length=255, pattern=WITHOUT_NUL)]
Form = Annotated[Literal["json", "html"], Query(description="`html` is a page with drawings.")]
ReturnDays = Annotated[float, Query(ge=1.0, le=3650.0, description="Who is back within so many days has returned.")]


class SplitView(BaseModel):
    """How users were divided."""

    counts: dict[str, int]
    expected: dict[str, float]
    p_value: float | None
    log_bayes_factor: float
    is_mismatch: bool
    """At any look: somebody is missing who was not missed by chance."""


class SplitViews(BaseModel):
    """Of all analysed users, and of those with scored answers."""

    assigned: SplitView
    scored: SplitView


class EffectView(BaseModel):
    """Treatment minus control in one metric. What no honest number exists for is null; `reason` and `notes` say why."""

    metric: str
    segment: str | None
    treatment: str
    verdict: Literal["better", "worse", "not_worse", "unclear", "insufficient_data"]
    control_value: float | None
    treatment_value: float | None
    estimate: float | None
    ci_lower: float | None
    ci_upper: float | None
    cs_lower: float | None
    cs_upper: float | None
    p_value: float | None
    adjusted_p_value: float | None
    relative: float | None
    relative_lower: float | None
    relative_upper: float | None
    method: Literal["delta", "cuped", "newcombe", "woodruff"] | None
    reason: str | None
    notes: str


class ReportView(BaseModel):
    """What an experiment has shown."""

    experiment: str
    users: dict[str, int]
    split: SplitViews
    is_as_declared: bool | None
    """Whether these are the metrics that the experiment was started with; null if its start was not recorded."""
    alpha: float
    effects: list[EffectView]


def add_reports(app: FastAPI, gateway: Gateway) -> None:
    """What experiments have shown."""

    @app.get(
        f"{ADMIN}/experiments/{{key}}/report",
        tags=[TAG],
        response_model=ReportView,
        responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    )
    async def report(
        key: PathName,
        control: Control = "control",
        by: Annotated[Literal["tenure", "phase"] | None, Query(description="Also each part of the users.")] = None,
        return_days: ReturnDays = 7.0,
        form: Annotated[Form, Query(alias="format")] = "json",
    ) -> Response:
        """Every metric's effect with its interval, of a split by its key or a canary by its rollout's id."""
        if not await administered(is_known, gateway.database, key):
            raise NotFound(f"there is no experiment {key[:200]!r} that anybody was in", param="key", code="not_found")
        wanted = {
            "experiment": key,
            "control": control,
            "by": by,
            "return_days": return_days,
            "maturity_s": gateway.settings.rollout.maturity_s,
        }
        job = {
            "database": described(gateway.settings.database), "wanted": wanted, "form": form, "now": gateway.clock()
        }  # fmt: skip
        with alone(gateway.settings.state_dir / LOCK):
            text = await written(json.dumps(job))
        return Response(text.encode(), 200, None, HTML if form == "html" else JSON)


def described(database: DatabaseSettings) -> dict[str, Any]:
    """The settings with the password, for a pipe and nothing else."""
    password = database.password
    return database.model_dump(mode="json") | {"password": password.get_secret_value() if password else None}


@contextmanager
def alone(place: FilePath) -> Iterator[None]:
    """Hold a lock of this machine; the kernel gives it back if this process dies.

    Raises:
        Overloaded: somebody else holds it.
    """
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Overloaded("another report is being written", code="report_busy", retry_after_s=BUSY_RETRY_S) from exc
        yield
    finally:
        os.close(descriptor)


async def written(job: str) -> str:
    """The report of a job, by a process of its own; it ends with this call, however that ends.

    Raises:
        ApiError: there is none, and why.
    """
    process = await asyncio.to_thread(started)
    try:
        said, _ = await asyncio.to_thread(process.communicate, job, WITHIN_S)
    except subprocess.TimeoutExpired as exc:
        raise Overloaded(
            f"the report takes more than {WITHIN_S:.0f} s: run `pawl experiment report`", code="report_too_large"
        ) from exc
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    if process.returncode != 0:
        raise Overloaded("the process that writes reports failed; its error is in the log", code="report_failed")
    outcome = json.loads(said)
    if outcome["kind"] != "report":
        raise refusal(outcome["kind"], outcome["text"])
    return str(outcome["text"])


def started() -> subprocess.Popen[str]:
    """A process that waits for its job; what it complains of goes where this one's complaints go."""
    return subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def refusal(kind: str, text: str) -> ApiError:
    """The HTTP form of what came instead of a report."""
    if kind == "nothing":
        return NotFound(text, param="key", code="not_found")
    if kind == "unreachable":
        return Overloaded(text, code="database_unavailable")
    return Conflict(text, code="refused", headers={"x-should-retry": "false"})

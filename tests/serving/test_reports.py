"""A report over HTTP is what the command line says, and nobody's request waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
import pytest

from ab_testing.experiment_report import Wanted, report_experiment
from feedback.interactions import Interaction
from serving.admin.reports import LOCK, EffectView, ReportView, alone, described, refusal
from serving.errors import Overloaded
from serving.report_process import Job, Outcome, run
from tests.ab_testing.test_experiment_table import shown
from tests.pawl.records import feedback, save
from tests.serving.conftest import Served
from tests.serving.keyed import bearer, keyed_gateway

NOW = 1e9
PATIENCE_S = 200.0
"""A process that gives way to all others may get little of a machine that runs other tests."""


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Mapping[str, str]]]:
    with keyed_gateway(tmp_path_factory.mktemp("reports"), ["admin"]) as (served, keys):
        rows = [in_tone(user) for user in range(120)]
        liked = [one for place, one in enumerate(rows) if place % 3 == 0 or (place % 2 and place % 5 == 0)]
        save(served.gateway.database, rows, [feedback(one.id, "thumbs", "up") for one in liked])
        yield served, bearer(keys["admin"])


def in_tone(user: int) -> Interaction:
    return shown(user, f"user {user}", ("control", "treatment")[user % 2], probability=0.5)


def ask(office: tuple[Served, Mapping[str, str]], key: str, **query: Any) -> httpx2.Response:
    served, headers = office
    path = f"/admin/v1/experiments/{key}/report"
    return served.client.get(path, params=query, headers=headers, timeout=PATIENCE_S)


def test_it_says_what_the_command_line_says_as_its_description_has_it(
    office: tuple[Served, Mapping[str, str]],
) -> None:
    served, _ = office
    answer = ask(office, "tone")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    wanted = Wanted("tone", maturity_s=served.gateway.settings.rollout.maturity_s)
    assert told == report_experiment(served.gateway.database, wanted, now=NOW).to_json()
    assert told["split"]["assigned"]["counts"] == {"control": 60, "treatment": 60}
    assert set(told) == set(ReportView.model_fields)
    assert set(told["effects"][0]) == set(EffectView.model_fields)


def test_browsers_get_a_page(office: tuple[Served, Mapping[str, str]]) -> None:
    page = ask(office, "tone", format="html", by="tenure")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.count("thumbs_up_rate") == 2, "of everybody, and of the one tenure there is"


@pytest.mark.parametrize(
    ("key", "query", "status", "code"),
    [
        ("nothing", {}, 404, "not_found"),
        ("tone", {"control": "plain"}, 404, "not_found"),
        ("tone", {"by": "colour"}, 400, "invalid_request"),
        ("tone", {"format": "pdf"}, 400, "invalid_request"),
        ("tone", {"return_days": 0}, 400, "invalid_request"),
        ("a%00b", {}, 400, "invalid_request"),
    ],
)
def test_what_cannot_be_reported_is_said(
    office: tuple[Served, Mapping[str, str]], key: str, query: Mapping[str, Any], status: int, code: str
) -> None:
    answer = ask(office, key, **query)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_one_report_at_a_time(office: tuple[Served, Mapping[str, str]]) -> None:
    place = office[0].gateway.settings.state_dir / LOCK
    with alone(place):
        busy = ask(office, "tone")
        assert (busy.status_code, busy.json()["error"]["code"]) == (503, "report_busy")
        assert int(busy.headers["retry-after"]) > 0
        with pytest.raises(Overloaded), alone(place):
            pass
    with alone(place):
        pass


def test_a_job_survives_its_pipe_and_keeps_its_password(office: tuple[Served, Mapping[str, str]]) -> None:
    settings = office[0].gateway.settings.database.model_copy(update={"password": None})
    job = Job(described(settings), Wanted("tone", by="phase"), "html", NOW)
    assert Job.from_json(job.to_json()) == job
    secret = type(settings).model_validate({"password": "rose"})
    assert type(settings).model_validate(described(secret)).password == secret.password


def test_what_goes_wrong_there_has_its_form_here(office: tuple[Served, Mapping[str, str]]) -> None:
    database = described(office[0].gateway.settings.database)
    assert run(Job(database, Wanted("nothing"), "json", NOW)).kind == "nothing"
    assert run(Job(database, Wanted("tone", by="colour"), "json", NOW)).kind == "refused"
    lost = run(Job({"url": "postgresql://nobody@127.0.0.1:9/x"}, Wanted("tone"), "json", NOW))
    assert isinstance(lost, Outcome)
    assert lost.kind == "unreachable"
    kinds = ("nothing", "unreachable", "refused")
    assert [refusal(kind, "why").status for kind in kinds] == [404, 503, 409]


def test_the_description_names_both_forms(office: tuple[Served, Mapping[str, str]]) -> None:
    document = office[0].client.get("/openapi.json").json()
    described_there = document["paths"]["/admin/v1/experiments/{key}/report"]["get"]["responses"]["200"]["content"]
    assert set(described_there) == {"application/json", "text/html"}

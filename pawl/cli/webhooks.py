"""`pawl webhooks`: who is told of decisions, and whether they can be reached."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import typer

from pawl.cli.context import JsonFlag, current_database, current_settings, print_rows
from pawl.clock import now
from pawl.errors import ConfigurationError, NegativeVerdict
from pawl.settings import Settings
from pawl.webhook_events import TEST, Event, event_of
from pawl.webhook_outbox import revive, standing
from pawl.webhooks import Answer, Endpoint, client, endpoints_of, post

webhooks = typer.Typer(no_args_is_help=True, help="Who is told of decisions.")


def register(app: typer.Typer) -> None:
    app.add_typer(webhooks, name="webhooks")


@webhooks.command("list")
def list_endpoints(as_json: JsonFlag = False) -> None:
    """Every endpoint, and how many events it waits for, has had and missed."""
    settings = current_settings()
    endpoints = configured(settings)
    with current_database(settings) as database:
        rows = [
            {"endpoint": one.shown, "events": list(one.patterns), **standing(database, one.id)._asdict()}
            for one in endpoints
        ]
    print_rows(rows, as_json=as_json, columns=("endpoint", "waiting", "sent", "dead", "last_error"))


@webhooks.command("test")
def send_test(as_json: JsonFlag = False) -> None:
    """Post a signed test event to every endpoint now; exit code 1 if one does not take it."""
    endpoints = required(configured(current_settings()))
    event = event_of(TEST, {"text": "If you can verify this, you are told of decisions."}, now())
    answers = asyncio.run(_post_to_all(endpoints, event))
    rows = [
        {"endpoint": one.shown, "id": event.id, "status": answer.status or None, "error": answer.error}
        for one, answer in zip(endpoints, answers, strict=True)
    ]
    print_rows(rows, as_json=as_json, columns=("endpoint", "id", "status", "error"))
    if failed := sum(answer.error is not None for answer in answers):
        raise NegativeVerdict(f"{failed} of {len(answers)} endpoints did not take the test event")


@webhooks.command("retry")
def retry(as_json: JsonFlag = False) -> None:
    """Send what was given up once more, from the beginning of its attempts."""
    settings = current_settings()
    endpoints = required(configured(settings))
    with current_database(settings) as database:
        rows = [{"endpoint": one.shown, "revived": revive(database, one.id, now())} for one in endpoints]
    print_rows(rows, as_json=as_json, columns=("endpoint", "revived"))


async def _post_to_all(endpoints: Sequence[Endpoint], event: Event) -> list[Answer]:
    async with client() as posting:
        return await asyncio.gather(*(post(posting, one, event, event.at) for one in endpoints))


def configured(settings: Settings) -> list[Endpoint]:
    """
    Raises:
        ConfigurationError: a secret cannot be read, or an address is there twice.
    """
    return endpoints_of(settings.webhooks, os.environ)


def required(endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
    """
    Raises:
        ConfigurationError: there are none.
    """
    if not endpoints:
        raise ConfigurationError("webhooks: none are configured")
    return endpoints

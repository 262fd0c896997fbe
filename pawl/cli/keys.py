"""`pawl keys`: who may call the gateway. Works on the database itself, so the first key needs no other."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Annotated

import typer

from pawl.api_keys import (
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    ID_BYTES,
    LOWEST_PRIORITY,
    SECRET_BYTES,
    KeyLimits,
    KeyRecord,
    Scope,
    digest_of,
    key_text,
    limits_to_json,
    make_key,
)
from pawl.cli.context import JsonFlag, current_database, current_settings, operator, print_fields, print_rows
from pawl.clock import now
from pawl.key_store import create_key, list_keys, revoke_key, rotate_key

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_NAME_CHARS = 128
ONCE = "Keep the key now: it is stored nowhere and shown only this once."

keys = typer.Typer(no_args_is_help=True, help="API keys: who may call, for what, and how much.")
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's public id, as `pawl keys list` shows it.")]


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


def _limit(name: str, what: str) -> object:
    return typer.Option(name, min=0, help=f"{what}; 0 for none, whatever serving.limits says.")


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option("--name", help="For people: whose key it is, and what for.")],
    scope: Annotated[list[Scope] | None, typer.Option("--scope", help="May be given several times.")] = None,
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Such as 90d or 12h; never without it.")
    ] = None,
    priority: Annotated[
        int, typer.Option("--priority", min=LOWEST_PRIORITY, max=HIGHEST_PRIORITY, help="9 waits least in the queue.")
    ] = DEFAULT_PRIORITY,
    requests_per_minute: Annotated[int | None, _limit("--requests-per-minute", "Requests a minute")] = None,
    tokens_per_minute: Annotated[int | None, _limit("--tokens-per-minute", "Tokens a minute")] = None,
    concurrency: Annotated[int | None, _limit("--concurrency", "Requests at once")] = None,
    tokens_per_day: Annotated[int | None, _limit("--tokens-per-day", "Tokens a day (UTC)")] = None,
    user_requests_per_minute: Annotated[
        int | None, _limit("--user-requests-per-minute", "Requests a minute of each user of the key")
    ] = None,
    user_tokens_per_minute: Annotated[
        int | None, _limit("--user-tokens-per-minute", "Tokens a minute of each user of the key")
    ] = None,
    user_concurrency: Annotated[
        int | None, _limit("--user-concurrency", "Requests at once of each user of the key")
    ] = None,
    user_tokens_per_day: Annotated[
        int | None, _limit("--user-tokens-per-day", "Tokens a day (UTC) of each user of the key")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key and print it, this once. Scopes are infer and feedback unless others are named."""
    limits = KeyLimits(
        requests_per_minute,
        tokens_per_minute,
        concurrency,
        tokens_per_day,
        user_requests_per_minute,
        user_tokens_per_minute,
        user_concurrency,
        user_tokens_per_day,
    )
    key = make_key(secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES))
    record = KeyRecord(
        id=key.id,
        name=sane_name(name),
        digest=digest_of(key.secret),
        scopes=frozenset(each.value for each in scope or (Scope.INFER, Scope.FEEDBACK)),
        limits=limits,
        priority=priority,
        created_at=now(),
        created_by=operator(),
        expires_at=now() + seconds(expires_in, "--expires-in") if expires_in else None,
    )
    with current_database(current_settings()) as database:
        create_key(database, record, actor=record.created_by)
    print_fields({"key": key_text(key), **public_fields(record, now())}, as_json=as_json)
    typer.echo(ONCE, err=True)


@keys.command("list")
def keys_list(as_json: JsonFlag = False) -> None:
    """All keys, the newest first; their secrets are not there to be shown."""
    with current_database(current_settings()) as database:
        rows = [public_fields(record, now()) for record in list_keys(database)]
    print_rows(rows, as_json=as_json, columns=("id", "name", "state", "scopes", "limits", "expires_at", "last_used_at"))


@keys.command("revoke")
def keys_revoke(key_id: KeyId, as_json: JsonFlag = False) -> None:
    """End a key for good; every gateway refuses it within `auth.key_cache_s`."""
    with current_database(current_settings()) as database:
        record = revoke_key(database, key_id, now=now(), actor=operator())
    print_fields(public_fields(record, now()), as_json=as_json)


@keys.command("rotate")
def keys_rotate(
    key_id: KeyId,
    overlap: Annotated[str, typer.Option("--overlap", help="How long the old secret stays good, such as 24h.")] = "24h",
    as_json: JsonFlag = False,
) -> None:
    """Give a key a new secret, this once printed. Its id stays, and with it limits and the completions it owns."""
    at = now()
    previous_expires_at = at + seconds(overlap, "--overlap")
    key = make_key(bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES))._replace(id=key_id)
    with current_database(current_settings()) as database:
        record = rotate_key(
            database,
            key_id,
            digest_of(key.secret),
            previous_expires_at=previous_expires_at,
            now=at,
            actor=operator(),
        )
    print_fields({"key": key_text(key), **public_fields(record, at)}, as_json=as_json)
    typer.echo(ONCE, err=True)


def public_fields(record: KeyRecord, at: float) -> dict[str, object]:
    """What may be shown of a key at any time."""
    return {
        "id": record.id,
        "name": record.name,
        "state": state_of(record, at),
        "scopes": sorted(record.scopes),
        "limits": limits_to_json(record.limits),
        "priority": record.priority,
        "created_at": timestamp(record.created_at),
        "created_by": record.created_by,
        "expires_at": timestamp(record.expires_at),
        "previous_secret_until": timestamp(record.previous_expires_at),
        "revoked_at": timestamp(record.revoked_at),
        "last_used_at": timestamp(record.last_used_at),
    }


def state_of(record: KeyRecord, at: float) -> str:
    """`active`, `expired` or `revoked`."""
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if record.expires_at is not None and record.expires_at <= at else "active"


def timestamp(at: float | None) -> str | None:
    """ISO 8601, UTC.

    >>> timestamp(0.0)
    '1970-01-01T00:00:00Z'
    """
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str, option: str) -> float:
    """The length of a time span such as `90d`, `24h`, `15m` or `30s`.

    Raises:
        typer.BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise typer.BadParameter("say how long as a whole number and s, m, h or d, such as 24h", param_hint=option)
    return float(int(match[1]) * UNIT_SECONDS[match[2]])


def sane_name(name: str) -> str:
    """A name that fits the table and prints as one line.

    Raises:
        typer.BadParameter: it does not.
    """
    if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(f"1 to {MAX_NAME_CHARS} printable characters", param_hint="--name")
    return name

"""Every query on the table of API keys.

Each change of a key takes the next number of `table_changes` and writes it into the row. The number's row is locked
until the change commits, so numbers become visible in order: whoever has read the table up to a number misses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa

from pawl.api_keys import KeyRecord, limits_from_json, limits_to_json, rotated
from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.schema import api_keys, table_changes

COUNTED = "api_keys"
LAST_USED_STEP_S = 300.0
"""A `last_used_at` younger than this is left as it is: every gateway reports the same keys."""


class KeyChanges(NamedTuple):
    """What a follower of the table has to know."""

    number: int
    """How far the table has been read."""
    records: list[KeyRecord]
    is_whole: bool
    """These are all keys there are, not only those that changed."""


def create_key(database: Database, record: KeyRecord, *, actor: str) -> None:
    """Add a key."""
    with database.write() as connection:
        number = _next_change(database, connection)
        connection.execute(api_keys.insert().values(**_row(record), change=number))
        note(connection, AuditEvent(record.created_at, actor, "key.create", record.id, _public(record)))


def revoke_key(database: Database, key_id: str, *, now: float, actor: str) -> KeyRecord:
    """End a key for good; one that has been revoked keeps its first date.

    Raises:
        NegativeVerdict: there is no such key.
    """
    with database.write() as connection:
        number = _next_change(database, connection)
        record = _find(connection, key_id)
        if record.revoked_at is None:
            connection.execute(_update(key_id).values(revoked_at=now, change=number))
            note(connection, AuditEvent(now, actor, "key.revoke", key_id, {"name": record.name}))
        return _find(connection, key_id)


def rotate_key(
    database: Database, key_id: str, digest: str, *, previous_expires_at: float, now: float, actor: str
) -> KeyRecord:
    """Give a key a new secret; the old one stays good until `previous_expires_at`.

    Raises:
        NegativeVerdict: there is no such key, or it has been revoked or has expired.
    """
    with database.write() as connection:
        number = _next_change(database, connection)
        record = _find(connection, key_id)
        if record.revoked_at is not None or (record.expires_at is not None and record.expires_at <= now):
            raise NegativeVerdict(f"key {key_id} has been revoked or has expired; make a new one")
        changed = rotated(record, digest, previous_expires_at=previous_expires_at)
        connection.execute(_update(key_id).values(**_row(changed), change=number))
        detail = {"name": record.name, "previous_expires_at": previous_expires_at}
        note(connection, AuditEvent(now, actor, "key.rotate", key_id, detail))
        return changed


def list_keys(database: Database) -> list[KeyRecord]:
    """All keys, the newest first."""
    query = sa.select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
    with database.read() as connection:
        return [_record(row) for row in connection.execute(query)]


def changes_since(database: Database, number: int | None) -> KeyChanges:
    """The keys that changed after `number`; every key where that is None or not a number this table has had."""
    with database.read() as connection:
        latest = connection.execute(sa.select(table_changes.c.number).where(table_changes.c.name == COUNTED)).scalar()
        latest = int(latest or 0)
        if number == latest:
            return KeyChanges(latest, [], is_whole=False)
        is_whole = number is None or number > latest
        query = sa.select(api_keys)
        if not is_whole:
            query = query.where(api_keys.c.change > number)
        return KeyChanges(latest, [_record(row) for row in connection.execute(query)], is_whole)


def note_use(database: Database, key_ids: Iterable[str], now: float) -> None:
    """Remember that these keys were used, to about ten minutes."""
    is_old = sa.or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < now - LAST_USED_STEP_S)
    statement = api_keys.update().where(api_keys.c.id == sa.bindparam("key_id"), is_old).values(last_used_at=now)
    # In one order everywhere: two gateways that report the same keys never wait for each other in a circle.
    rows = [{"key_id": key_id} for key_id in sorted(key_ids)]
    with database.write() as connection:
        connection.execute(statement, rows)


def record_to_json(record: KeyRecord) -> dict[str, Any]:
    """A key for the disk of a gateway: its digests, never a secret."""
    return {**_row(record), "scopes": sorted(record.scopes), "limits": limits_to_json(record.limits)}


def record_from_json(data: dict[str, Any]) -> KeyRecord:
    """What `record_to_json` wrote."""
    return KeyRecord(
        **{**data, "scopes": frozenset(data["scopes"]), "limits": limits_from_json(data["limits"])},
    )


def _next_change(database: Database, connection: sa.Connection) -> int:
    """Take the next number; its row stays locked, so that changes commit in the order of their numbers."""
    database.insert_new(connection, table_changes, [{"name": COUNTED, "number": 0}])
    mine = table_changes.c.name == COUNTED
    connection.execute(table_changes.update().where(mine).values(number=table_changes.c.number + 1))
    return int(connection.execute(sa.select(table_changes.c.number).where(mine)).scalar_one())


def _find(connection: sa.Connection, key_id: str) -> KeyRecord:
    row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).first()
    if row is None:
        raise NegativeVerdict(f"there is no key {key_id}")
    return _record(row)


def _update(key_id: str) -> sa.Update:
    return api_keys.update().where(api_keys.c.id == key_id)


def _row(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "digest": record.digest,
        "previous_digest": record.previous_digest,
        "previous_expires_at": record.previous_expires_at,
        "scopes": json.dumps(sorted(record.scopes)),
        "limits": json.dumps(limits_to_json(record.limits)),
        "priority": record.priority,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
        "created_at": record.created_at,
        "created_by": record.created_by,
        "last_used_at": record.last_used_at,
    }


def _record(row: sa.Row[Any]) -> KeyRecord:
    data = {name: value for name, value in row._mapping.items() if name != "change"}
    return record_from_json({**data, "scopes": json.loads(row.scopes), "limits": json.loads(row.limits)})


def _public(record: KeyRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "scopes": sorted(record.scopes),
        "limits": limits_to_json(record.limits),
        "priority": record.priority,
        "expires_at": record.expires_at,
    }

"""A history to mine, built from a seed: interactions and feedback as they come to lie in the shared database.

Of the interactions 5 % are second attempts, 20 % ask what others asked too, 25 % are later turns of a conversation and
10 % call a tool; about 5 % cannot be used, because they were cut or must not be kept. Texts have about 1 KB.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.recording import conversation_sha
from pawl.database import Database
from pawl.schema import feedback_events, interactions

ALIAS = "assistant"
STARTED_AT = 1_760_000_000.0
SECONDS_BETWEEN = 0.5
N_KEYS = 20
RECENT = 200
"""Interactions that may still be asked again."""
CORPUS_CHARS = 1_000_000
BATCH_ROWS = 5000
SECOND_THOUGHTS = 0.05
"""Share of the signals that replace or retract an earlier one."""
KINDS = {"thumbs": 64, "edit": 12, "report": 4, "rating": 6, "copy": 9, "comment": 5}
KINDS_ON_A_SECOND_ATTEMPT = {"choice": 40, "regenerate": 20, "thumbs": 40}
SYLLABLES = (
    "ba",
    "de",
    "fi",
    "go",
    "lu",
    "ma",
    "ne",
    "ri",
    "so",
    "tu",
    "va",
    "we",
    "xi",
    "yo",
    "café",
    "ñu",
    "and",
    "the",
)

FORMS = ("{}",) * 8 + ("{}?", "{} !")
"""How popular questions are written: in one of five a slip sets it apart from the others."""

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    interactions: int
    signals: int
    users: int


class Asked(NamedTuple):
    """A question that may be asked again, and who asked it."""

    id: str
    user: int
    prompt: str
    prompt_sha: str


class Writer:
    """Texts of about the wanted length, quickly."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(5000)]
        self._corpus = " ".join(rng.choices(words, k=CORPUS_CHARS // 8))

    def text(self, n_chars: int) -> str:
        start = self._rng.randrange(len(self._corpus) - n_chars)
        return self._corpus[start : start + n_chars]

    def popular(self, number: int) -> str:
        """The same short question for the same number."""
        return self._corpus[number * 31 % (len(self._corpus) - 80) :][:60]


def build_history(database: Database, size: Size, seed: int) -> None:
    """Fill empty tables; the same rows for the same seed on any database."""
    rows = history_rows(size, seed)
    while batch := list(islice(rows, BATCH_ROWS)):
        load(database, interactions, [row for row, _ in batch])
        load(database, feedback_events, [event for _, events in batch for event in events])


def load(database: Database, table: sa.Table, rows: Sequence[Row]) -> None:
    """Add rows in the fastest way the database has."""
    names = ", ".join(column.name for column in table.columns)
    with closing(database.engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        if database.is_sqlite:
            cursor.execute("PRAGMA synchronous=OFF")
            cursor.execute("PRAGMA cache_size=-1000000")
            cursor.execute("BEGIN")
            cursor.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})", rows)
            cursor.execute("COMMIT")
        else:
            with cursor.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            connection.commit()


def history_rows(size: Size, seed: int) -> Iterator[tuple[Row, list[Row]]]:
    """Each interaction with the feedback on it, in order of time."""
    rng = random.Random(seed)
    writer = Writer(rng)
    n_replaced = round(size.signals * SECOND_THOUGHTS)
    rated = set(rng.sample(range(size.interactions), size.signals - n_replaced))
    twice = set(rng.sample(sorted(rated), n_replaced))
    recent: deque[Asked] = deque(maxlen=RECENT)
    for number in range(size.interactions):
        again = rng.choice(recent) if recent and rng.random() < 0.05 else None
        asked = _asked(rng, writer, size, number, again)
        recent.append(asked)
        row = _interaction(rng, writer, number, asked, again)
        events = _events(rng, writer, row, again, is_twice=number in twice) if number in rated else []
        yield row, events


def _asked(rng: random.Random, writer: Writer, size: Size, number: int, again: Asked | None) -> Asked:
    suffix = f"{int(1000 * _time(number)):012x}{rng.getrandbits(144):036x}"
    if again:
        return again._replace(id=suffix)
    messages = tuple(_messages(rng, writer, size))
    prompt = json.dumps(messages)
    user = int(size.users * rng.random() ** 2)  # Some ask much more than others.
    return Asked(suffix, user, prompt, conversation_sha(ALIAS, messages, {}))


def _time(number: int) -> float:
    return STARTED_AT + SECONDS_BETWEEN * number


def _messages(rng: random.Random, writer: Writer, size: Size) -> list[dict[str, str]]:
    kind = rng.random()
    if kind < 0.2:
        luck = rng.random()
        popular = int(max(1, size.interactions // 100) * luck**2)
        form = FORMS[int(luck * 1e9) % len(FORMS)]
        return [{"role": "user", "content": form.format(writer.popular(popular))}]
    question = {"role": "user", "content": writer.text(rng.randint(150, 500))}
    if kind > 0.75:
        earlier = {"role": "user", "content": writer.text(300)}, {"role": "assistant", "content": writer.text(500)}
        return [{"role": "system", "content": "Be brief."}, *earlier, question]
    return [{"role": "system", "content": writer.text(500)}, question]


def _completion(rng: random.Random, writer: Writer) -> dict[str, Any]:
    if rng.random() >= 0.1:
        return {"role": "assistant", "content": writer.text(rng.randint(600, 1400))}
    call = {"name": "look_up", "arguments": json.dumps({"query": writer.text(60)})}
    tool_calls = [{"id": f"call_{rng.getrandbits(64):x}", "type": "function", "function": call}]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


def _interaction(rng: random.Random, writer: Writer, number: int, asked: Asked, again: Asked | None) -> Row:
    luck = rng.random()
    is_stored, is_complete = luck >= 0.02, luck >= 0.05
    variant = rng.choice(("control", "treatment"))
    facts: dict[str, Any] = {
        "id": asked.id,
        "completion_id": f"chatcmpl-{asked.id}",
        "route": "chat.completions",
        "created_at": _time(number),
        "alias": ALIAS,
        "key_id": _key(asked.user),
        "user_id": f"user-{asked.user}",
        "unit_id": f"user-{asked.user}",
        "experiment": None,
        "assigned_variant": variant,
        "served_variant": variant,
        "probability": 0.5,
        "is_analysed": True,
        "phase": 0,
        "route_version": 1,
        "model": f"base-model-{variant}",
        "regenerate_of": again.id if again else None,
        "prompt": asked.prompt if is_stored else None,
        "prompt_sha": asked.prompt_sha if is_stored else None,
        "completion": json.dumps(_completion(rng, writer)) if is_stored else None,
        "parameters": '{"temperature": 0.7, "max_tokens": 512}',
        "finish_reason": "stop" if is_complete else "length",
        "status": "ok",
        "http_status": 200,
        "is_complete": is_complete,
        "is_stored": is_stored,
        "prompt_tokens": 200,
        "completion_tokens": 200,
        "latency_ms": 900.0,
        "first_byte_ms": 90.0,
        "tools": None,
    }
    return tuple(facts[column.name] for column in interactions.columns)


def _key(user: int) -> str:
    return f"key-{user % N_KEYS}"


def _events(rng: random.Random, writer: Writer, served: Row, again: Asked | None, *, is_twice: bool) -> list[Row]:
    kinds = KINDS_ON_A_SECOND_ATTEMPT if again else KINDS
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    first = _event(rng, kind, served, _value(rng, writer, kind, again), again, seconds=20.0)
    if not is_twice:
        return [first]
    value = None if rng.random() < 0.5 else _value(rng, writer, kind, again)
    return [first, _event(rng, kind, served, value, again, seconds=60.0)]


def _value(rng: random.Random, writer: Writer, kind: str, again: Asked | None) -> str | float | bool:
    if kind == "thumbs":
        return "up" if rng.random() < 0.6 else "down"
    if again and kind == "choice":
        return f"chatcmpl-{again.id}"
    values: dict[str, str | float | bool] = {"report": "wrong", "rating": 0.5, "copy": True}
    return values.get(kind) or writer.text(1000 if kind == "edit" else 100)


def _event(
    rng: random.Random, kind: str, served: Row, value: str | float | bool | None, again: Asked | None, *, seconds: float
) -> Row:
    """Who regenerates says of the earlier answer that the later one replaced it."""
    known = dict(zip(interactions.columns.keys(), served, strict=True))
    about = str(known["id"])
    if kind == "regenerate" and again:
        value, about = value and f"chatcmpl-{known['id']}", again.id
    facts: dict[str, Any] = {
        "id": f"{rng.getrandbits(128):032x}",
        "feedback_id": f"fb_{kind}_{about}",
        "interaction_id": about,
        "completion_id": f"chatcmpl-{about}",
        "type": kind,
        "value": json.dumps(value),
        "is_retraction": value is None,
        "reason": None,
        "comment": None,
        "tags": None,
        "key_id": known["key_id"],
        "user_id": known["user_id"],
        "created_at": known["created_at"] + seconds,
    }
    return tuple(facts[column.name] for column in feedback_events.columns)

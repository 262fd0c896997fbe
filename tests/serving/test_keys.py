"""The key ring: who is let in, how soon a revocation counts, and what happens while the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from feedback.spool import Spool
from monitoring.metrics import render
from pawl import key_store
from pawl.api_keys import KeyLimits, KeyRecord, cache_salt, digest_of, key_text, make_key
from pawl.database import Database, open_database, upgrade
from pawl.schema import api_keys, metadata
from pawl.settings import DatabaseSettings
from serving import keys
from serving.errors import ApiError, Overloaded, Unauthorized
from serving.keys import KeyRing
from tests.servers import PostgreSQL
from tests.serving.waiting import eventually

SERVER_SECRET = b"0123456789abcdef"
NONE = "0" * 64
HOSTILE = [
    "",
    "Bearer",
    "Bearer ",
    "Bearer null",
    "Basic dXNlcjpwdw==",
    "' OR '1'='1",
    "Bearer '; DROP TABLE api_keys; --",
    "Bearer pawl-' OR 1=1 --",
    'Bearer pawl-" UNION SELECT digest FROM api_keys --',
    "Bearer %s%s%n",
    "Bearer {0.__class__}",
    "Bearer ${jndi:ldap://x}",
    "Bearer pawl-0123456789abcdef-%(digest)s",
    "Bearer \x00",
    "Bearer \udcff",
    "Bearer " + "A" * 30_000,
    "Bearer pawl-0123456789ABCDEF-" + NONE,
    "Bearer pawl-٠١٢٣٤٥٦٧٨٩abcdef-" + NONE,
    "Bearer pawl-0123456789abcdef-0" + NONE,
]


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def __call__(self) -> float:
        return self.at


class Interrupted(Database):
    """A database that a test can take away, and that counts how often it is read."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self.is_away = False
        self.n_reads = 0

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        self.n_reads += 1
        if self.is_away:
            raise sa.exc.OperationalError("SELECT", {}, Exception("the database is away"))
        with super().read() as connection:
            yield connection


@pytest.fixture
def shared_keys(tmp_path: Path) -> Iterator[Interrupted]:
    opened = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/shared.db"))
    upgrade(opened)
    yield Interrupted(opened.engine)
    opened.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db")
    yield spool
    spool.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ring_of(
    database: Database, spool: Spool, clock: Clock, *, cache_s: float = 5.0, outage_s: float = 3600.0
) -> KeyRing:
    return KeyRing(
        database,
        spool,
        secret=SERVER_SECRET,
        defaults=KeyLimits(concurrency=8),
        cache_s=cache_s,
        outage_s=outage_s,
        clock=clock,
    )


@contextmanager
def running(ring: KeyRing) -> Iterator[KeyRing]:
    ring.start()
    try:
        yield ring
    finally:
        ring.stop()
        ring._worker.join(20)


def record(number: int = 1, **changes: object) -> KeyRecord:
    key = make_key(number.to_bytes(8), number.to_bytes(32))
    scopes = frozenset({"infer", "feedback"})
    made = KeyRecord(key.id, f"key {number}", digest_of(key.secret), scopes, KeyLimits(), 5, 1.0, "ann")
    return replace(made, **changes)  # type: ignore[arg-type]


def header(number: int = 1, secret: int | None = None) -> str:
    """The header for key `number`, or with the secret of another."""
    key = make_key(number.to_bytes(8), (secret or number).to_bytes(32))
    return "Bearer " + key_text(key)


def add(database: Database, number: int = 1, **changes: object) -> KeyRecord:
    made = record(number, **changes)
    key_store.create_key(database, made, actor="ann")
    return made


async def answer(ring: KeyRing, credential: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await ring.look_up(credential)
    return caught.value


async def test_a_key_is_looked_up_once_and_known_from_then_on(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys, limits=KeyLimits(requests_per_minute=10), priority=7)
    with running(ring_of(shared_keys, spool, clock)) as ring:
        assert ring.known(header()) is None
        key = await ring.look_up(header())
        assert ring.known(header()) is key
        assert (key.id, key.priority, key.scopes) == (record().id, 7, frozenset({"infer", "feedback"}))
        assert key.limits == KeyLimits(requests_per_minute=10, concurrency=8)
        assert key.cache_salt == cache_salt(SERVER_SECRET, key.id)
        assert (await ring.look_up(header().removeprefix("Bearer "))).id == key.id


async def test_a_key_works_the_moment_it_is_made(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    with running(ring_of(shared_keys, spool, clock, cache_s=60.0)) as ring:
        add(shared_keys)
        assert (await ring.look_up(header())).id == record().id


async def test_every_bad_key_gets_the_same_answer(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    add(shared_keys, 1)
    add(shared_keys, 2, revoked_at=2.0)
    add(shared_keys, 3, expires_at=clock.at)
    with running(ring_of(shared_keys, spool, clock)) as ring:
        answers = [await answer(ring, each) for each in (header(1, 9), header(2), header(3), header(4), "Bearer x")]
    assert {(each.status, each.body()) for each in answers} == {(401, answers[0].body())}
    assert b'"code":"invalid_api_key"' in answers[0].body()
    assert b'"type":"invalid_request_error"' in answers[0].body()


@pytest.mark.parametrize("credential", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("is_away", [False, True])
async def test_hostile_credentials_are_refused_database_or_not(
    shared_keys: Interrupted, spool: Spool, clock: Clock, credential: str, is_away: bool
) -> None:
    add(shared_keys)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    shared_keys.is_away = is_away
    ring.refresh()
    assert (await answer(ring, credential)).status == 401
    assert len(key_store.list_keys(Database(shared_keys.engine))) == 1


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_no_text_is_a_good_key_by_chance(text: str) -> None:
    ring = KeyRing.__new__(KeyRing)  # Nothing of it is reached: a credential that is no key ends before.
    with pytest.raises(Unauthorized):
        asyncio.run(KeyRing._look_up(ring, "Bearer " + text))


async def test_a_revocation_counts_with_the_next_reading(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    add(shared_keys)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    await ring.look_up(header())
    key_store.revoke_key(shared_keys, record().id, now=clock.at, actor="ann")
    assert ring.known(header()) is not None
    ring.refresh()
    assert ring.known(header()) is None
    assert (await answer(ring, header())).status == 401


async def test_a_revocation_reaches_a_running_ring_by_itself(database: Database, spool: Spool, clock: Clock) -> None:
    add(database)
    with running(ring_of(database, spool, clock, cache_s=0.4)) as ring:
        await ring.look_up(header())
        key_store.revoke_key(database, record().id, now=clock.at, actor="ann")
        await asyncio.to_thread(eventually, lambda: ring.known(header()) is None)
        assert (await answer(ring, header())).status == 401


async def test_a_row_changed_by_hand_is_noticed_within_a_minute(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    await ring.look_up(header())
    with shared_keys.write() as connection:
        connection.execute(api_keys.update().values(revoked_at=1.0))
    clock.at += keys.WHOLE_EVERY_S
    ring.refresh()
    assert ring.known(header()) is None


async def test_an_expired_key_is_not_known_any_more(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    add(shared_keys, expires_at=clock.at + 1.0)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    await ring.look_up(header())
    clock.at += 1.0
    assert ring.known(header()) is None
    assert (await answer(ring, header())).status == 401


async def test_a_rotated_key_is_one_key_with_two_secrets_for_a_while(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    until = clock.at + 100.0
    digest = digest_of(make_key(bytes(8), (2).to_bytes(32)).secret)
    key_store.rotate_key(shared_keys, record().id, digest, previous_expires_at=until, now=clock.at, actor="ann")
    ring.refresh()
    new, old = await ring.look_up(header(1, 2)), await ring.look_up(header())
    assert new == old
    clock.at = until
    assert ring.known(header()) is None
    assert ring.known(header(1, 2)) == new


async def test_known_keys_work_on_without_the_database_and_unknown_ones_are_not_called_wrong(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys, 1)
    add(shared_keys, 2)
    add(shared_keys, 3, revoked_at=1.0)
    ring = ring_of(shared_keys, spool, clock, outage_s=600.0)
    ring.refresh()
    await ring.look_up(header(1))
    shared_keys.is_away = True
    ring.refresh()
    clock.at += 599.0
    assert ring.known(header(1)) is not None
    assert (await ring.look_up(header(2))).id == record(2).id
    assert (await answer(ring, header(3))).status == 401
    for unknown in (header(4), header(1, 9)):
        refused = await answer(ring, unknown)
        assert isinstance(refused, Overloaded)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    clock.at += 1.0
    assert ring.known(header(1)) is None
    assert (await answer(ring, header(1))).status == 503
    shared_keys.is_away = False
    ring.refresh()
    assert (await ring.look_up(header(1))).id == record(1).id


async def test_keys_are_remembered_across_a_restart_without_the_database(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys, limits=KeyLimits(tokens_per_day=5))
    ring_of(shared_keys, spool, clock).refresh()
    shared_keys.is_away = True
    clock.at += 3599.0
    with running(ring_of(shared_keys, spool, clock)) as ring:
        key = await ring.look_up(header())
        assert key.limits == KeyLimits(tokens_per_day=5, concurrency=8)
        clock.at += 1.0
        assert ring.known(header()) is None
        assert (await answer(ring, header())).status == 503
    with running(ring_of(shared_keys, spool, clock)) as ring:
        assert (await answer(ring, header())).status == 503


async def test_what_the_spool_kept_in_another_form_is_passed_over(
    shared_keys: Interrupted, spool: Spool, clock: Clock
) -> None:
    add(shared_keys)
    for junk in (b"", b"{", b"[]", b'{"read_at": 1}', b'{"read_at": 1, "keys": [{"id": "x"}]}'):
        spool.keep(keys.KEPT_NAME, junk).result()
        with running(ring_of(shared_keys, spool, clock)) as ring:
            assert (await ring.look_up(header())).id == record().id


async def test_a_real_outage_and_its_end(own_postgresql: PostgreSQL, spool: Spool, clock: Clock) -> None:
    database = open_database(DatabaseSettings(url=own_postgresql.create_database("keys"), connect_timeout_s=1.0))
    upgrade(database)
    add(database)
    with running(ring_of(database, spool, clock, cache_s=0.4)) as ring:
        await ring.look_up(header())
        own_postgresql.stop()
        await asyncio.to_thread(eventually, lambda: not ring.is_database_up)
        assert ring.known(header()) is not None
        assert (await answer(ring, header(2))).status == 503
        own_postgresql.start()
        await asyncio.to_thread(eventually, lambda: ring.is_database_up, within_s=30.0)
        add(database, 2)
        assert (await ring.look_up(header(2))).id == record(2).id
    database.close()


async def test_garbage_neither_hammers_the_database_nor_fills_the_memory(
    shared_keys: Interrupted, spool: Spool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_REFUSED", 100)
    monkeypatch.setattr(keys, "PATIENCE_S", 30.0)
    add(shared_keys)
    with running(ring_of(shared_keys, spool, clock, cache_s=60.0)) as ring:
        before = shared_keys.n_reads
        answers = await asyncio.gather(*(answer(ring, header(number)) for number in range(2, 500)))
        assert {each.status for each in answers} == {401}
        assert shared_keys.n_reads - before < 20
        assert len(ring._reading.refused) <= 100
        before = shared_keys.n_reads
        for _ in range(50):
            await answer(ring, header(499))
        assert shared_keys.n_reads == before
        long_header = "Bearer " + " " * 200 + header().removeprefix("Bearer ")
        assert (await ring.look_up(long_header)).id == record().id
        assert ring.known(long_header) is None


async def test_an_unknown_id_costs_the_hashing_of_a_wrong_secret(
    shared_keys: Interrupted, spool: Spool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(shared_keys)
    calls: list[str] = []

    def digest(secret: str) -> str:
        calls.append("hash")
        return digest_of(secret)

    def compare(left: str, right: str) -> bool:
        calls.append("compare")
        return left == right

    monkeypatch.setattr(keys, "digest_of", digest)
    monkeypatch.setattr("pawl.api_keys.hmac.compare_digest", compare)
    work = []
    with running(ring_of(shared_keys, spool, clock)) as ring:
        for credential in (header(1, 9), header(8)):
            calls.clear()
            await answer(ring, credential)
            work.append(list(calls))
    assert work == [["hash", "compare", "compare", "compare", "compare"]] * 2


def bytes_under(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


async def test_the_text_of_a_key_is_nowhere_after_its_use(
    shared_keys: Interrupted, spool: Spool, clock: Clock, tmp_path: Path
) -> None:
    add(shared_keys)
    with capture_logs() as logs, running(ring_of(shared_keys, spool, clock)) as ring:
        key = await ring.look_up(header())
        wrong = await answer(ring, header(1, 9))
        shared_keys.is_away = True
        ring.refresh()
        unavailable = await answer(ring, header(1, 8))
        spool.kept(keys.KEPT_NAME).result()
        with Database(shared_keys.engine).read() as connection:
            tables = [connection.execute(sa.select(table)).all() for table in metadata.sorted_tables]
        told = [repr(each) + str(vars(each)) + each.body().decode() for each in (wrong, unavailable)]
        shown = "".join(
            [repr(ring), repr(key), repr(ring._reading), *told, str(logs), str(tables), render()[0].decode()]
        )
    assert logs
    files = bytes_under(tmp_path)
    for number in (1, 8, 9):
        secret = header(1, number)[-64:]
        assert secret not in shown
        assert secret.encode() not in files
    assert record().digest.encode() in files


async def test_use_after_a_start_is_noted_within_a_minute(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    add(shared_keys, 1)
    with running(ring_of(shared_keys, spool, clock, cache_s=3600.0)) as ring:
        await ring.look_up(header(1))
        clock.at += keys.FIRST_USE_S
        ring.refresh()
        noted_at = clock.at
        await ring.look_up(header(1))
        clock.at += keys.USE_EVERY_S - 1.0
        ring.refresh()
        assert [each.last_used_at for each in key_store.list_keys(shared_keys)] == [noted_at]


async def test_use_is_noted_about_every_ten_minutes(shared_keys: Interrupted, spool: Spool, clock: Clock) -> None:
    add(shared_keys, 1)
    add(shared_keys, 2)
    ring = ring_of(shared_keys, spool, clock)
    ring.refresh()
    await ring.look_up(header(1))
    clock.at += keys.USE_EVERY_S
    ring.refresh()
    used = {each.id: each.last_used_at for each in key_store.list_keys(shared_keys)}
    assert used == {record(1).id: clock.at, record(2).id: None}
    assert ring.known(header(1)) is None
    assert (await ring.look_up(header(1))).id == record(1).id

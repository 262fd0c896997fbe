"""The gateway's composition root: completion routes go straight to the relay, everything else through FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version

from feedback.drain import Drain
from feedback.errors import SpoolUnavailable
from feedback.journal import Journal
from feedback.journal_drain import JournalDrain
from feedback.journal_line import StartWriter, as_process
from feedback.spool import Spool
from feedback.tombstone_store import open_watch
from monitoring.loop_lag import watch_loop_lag
from monitoring.metrics import BUILD_INFO, DEAD_LETTERS, SPOOL_OLDEST, SPOOL_ROWS
from pawl.clock import Clock
from pawl.clock import now as wall_clock
from pawl.cores import usable_cores
from pawl.database import Database, open_database
from pawl.errors import ConfigurationError
from pawl.secrets import signing_secret
from pawl.settings import Settings
from serving.admission import InFlight, admissions_for
from serving.app import build_app, with_request_id
from serving.asgi_lane import answer
from serving.connections import EnginePool
from serving.drain_process import count_tokens
from serving.feedback_api import FeedbackDesk
from serving.feedback_lane import FeedbackLane
from serving.feedback_origins import Origins
from serving.guards.guards import open_guards
from serving.guards.storage import preparation_of
from serving.health import HealthProbes
from serving.keys import KeyRing
from serving.limiter import default_limits, open_limiter
from serving.outbox import Outbox
from serving.relay import Relay
from serving.replicas import RetryBudget, all_replicas, replica_sets
from serving.routes import FEEDBACK_PATH, HOT_PATHS, BodyLimits, Keys
from serving.routing import RouteTable
from serving.slots import free_spool, starting_alone
from serving.wire import Receive, Scope, Send

SPOOL_PROBE_S = 2.0
DRAIN_AT_STOP_S = 5.0
HOT_ROUTES = {path: route for route, path in HOT_PATHS.items()}


@dataclass(frozen=True)
class LocalRecords:
    """What this process writes on its own disk before it answers."""

    spool: Spool
    """Feedback, answers to repeated calls, and what is remembered across restarts."""
    journal: Journal
    """Completions."""

    @property
    def is_healthy(self) -> bool:
        return self.spool.is_healthy and self.journal.is_healthy

    def close(self) -> None:
        self.journal.close()
        self.spool.close()


class Gateway:
    """The ASGI application and the parts it is made of."""

    def __init__(
        self, settings: Settings, database: Database, records: LocalRecords, *, clock: Clock, drains_here: bool
    ) -> None:
        serving = settings.serving
        self.settings = settings
        self.clock = clock
        self.secret = signing_secret(settings.auth, settings.state_dir)
        self.database = database
        self.records = records
        self.spool = records.spool
        self._prepared = preparation_of(serving.guards)
        self.drain = Drain(
            self.spool,
            database,
            clock=clock,
            on_dead_letters=DEAD_LETTERS.inc,
            prepare_event=self._prepared.event,
            prepare_letter=self._prepared.letter,
            erasures=open_watch(database, settings.state_dir, self.secret, self.spool.path, clock=clock),
        )
        self.journal_drain = self._make_journal_drain() if drains_here else None
        self.routes = RouteTable(
            serving.models, database, self.spool, poll_s=serving.route_poll_s, holdout=serving.holdout
        )
        self.keys = self._make_keys()
        self.outbox = Outbox()
        self.pools: list[EnginePool] = []
        engines = {alias: model.engines for alias, model in serving.models.items()}
        self.replicas = replica_sets(engines, serving.replicas, self._make_pool)
        self.guards = open_guards(serving.guards, database, clock)
        self.limiter = open_limiter(serving.limits, database, clock)
        self.relay = self._make_relay()
        self.desk = FeedbackDesk(
            secret=self.secret,
            spool=self.spool,
            drain=self.drain,
            database=database,
            served=self.relay,
            join_window_s=serving.feedback_join_window_s,
            clock=clock,
        )
        limits = BodyLimits(serving.max_body_bytes, serving.timeouts.request_body_s)
        self._origins = Origins(serving.feedback_origins)
        self._take_feedback = FeedbackLane(self.desk, keys=self.asked_keys, limits=limits)
        self.started_at = int(clock())
        ticks = [replicas.tick for replicas in self.replicas.values()]
        self._probes = HealthProbes(all_replicas(self.replicas.values()), serving.replicas, on_tick=ticks)
        self.app = build_app(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request the fast lane left alone."""
        if scope["type"] == "http" and scope["method"] == "POST":
            route = HOT_ROUTES.get(scope["path"])
            if route is not None:
                await answer(self.relay, route, scope, receive, send)
                return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        opened = await self._origins.open(scope, with_request_id(scope, send, self.clock))
        if opened is not None and scope["method"] == "POST" and scope["path"] == FEEDBACK_PATH:
            await self._take_feedback(scope, receive, opened)
        elif opened is not None:
            await self.app(scope, receive, opened)

    def asked_keys(self) -> Keys | None:
        """Who knows the keys; None where none is asked for."""
        return self.keys if self.settings.auth.required else None

    def _make_pool(self, url: str) -> EnginePool:
        pool = EnginePool(url, connect_s=self.settings.serving.timeouts.connect_s, outbox=self.outbox)
        self.pools.append(pool)
        return pool

    def _make_keys(self) -> KeyRing:
        auth = self.settings.auth
        return KeyRing(
            self.database,
            self.spool,
            secret=self.secret,
            defaults=default_limits(self.settings.serving.limits),
            cache_s=auth.key_cache_s,
            outage_s=auth.key_outage_s,
            clock=self.clock,
        )

    def _make_relay(self) -> Relay:
        serving = self.settings.serving
        in_flight = InFlight(serving.max_in_flight)
        return Relay(
            settings=serving,
            secret=self.secret,
            token_ttl_s=self.settings.auth.feedback_token_ttl_s,
            routes=self.routes,
            replicas=self.replicas,
            retries=RetryBudget(serving.replicas.retry_share),
            admissions=admissions_for(self.replicas, in_flight, serving.queue),
            in_flight=in_flight,
            keys=self.keys if self.settings.auth.required else None,
            limiter=self.limiter,
            records=self.records.journal if serving.records == "durable" else None,
            guards=self.guards,
            clock=self.clock,
        )

    def _make_journal_drain(self) -> JournalDrain:
        directory = self.settings.state_dir / "spool"
        return JournalDrain(
            directory,
            self.database,
            clock=self.clock,
            on_stored=count_tokens,
            on_dead_letters=DEAD_LETTERS.inc,
            prepare=self._prepared.interaction,
            prepare_letter=self._prepared.letter,
            erasures=open_watch(self.database, self.settings.state_dir, self.secret, directory, clock=self.clock),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the parts in order of need; stop them so that the writers close after the last record."""
        self.records.journal.bind(asyncio.get_running_loop(), lambda: len(self.relay.calls), self.outbox.flush)
        await asyncio.to_thread(self.routes.start)
        await asyncio.to_thread(self.keys.start)
        self.drain.start()
        if self.journal_drain is not None:
            self.journal_drain.start()
        self.limiter.start()
        if self.guards is not None:
            self.guards.start()
        self.relay.start()
        self._probes.start()
        BUILD_INFO.labels(version=version("pawl")).set(1)
        watches = [asyncio.ensure_future(watch_loop_lag()), asyncio.ensure_future(self._probe_spool())]
        try:
            yield
        finally:
            await self._stop(watches)

    async def _stop(self, watches: Sequence[asyncio.Future[None]]) -> None:
        self.relay.cut_off()
        await self.relay.wait_until_empty(DRAIN_AT_STOP_S)
        for watch in watches:
            watch.cancel()
        await self._probes.stop()
        self.relay.stop()
        await self.limiter.stop()
        self.routes.stop()
        self.keys.stop()
        self.desk.close()
        for pool in self.pools:
            await pool.close()
        if self.guards is not None:
            await self.guards.close()
        await asyncio.to_thread(self._stop_records)

    def _stop_records(self) -> None:
        self.records.journal.close()
        self.drain.stop(DRAIN_AT_STOP_S)
        if self.journal_drain is not None:
            self.journal_drain.stop(DRAIN_AT_STOP_S)
        self.spool.close()
        if self.guards is not None:
            self.guards.stop_trail()
        self.database.close()

    async def _probe_spool(self) -> None:
        while True:
            with suppress(SpoolUnavailable, OSError):
                spooled = await asyncio.wrap_future(self.spool.size())
                journalled = await asyncio.to_thread(self.records.journal.size)
                oldest = [at for at in (spooled.oldest_at, journalled.oldest_at) if at]
                SPOOL_ROWS.set(spooled.rows + journalled.rows)
                SPOOL_OLDEST.set(max(0.0, self.clock() - min(oldest)) if oldest else 0.0)
            await asyncio.sleep(SPOOL_PROBE_S)

    def why_not_ready(self) -> str | None:
        """What keeps this gateway from taking work, if anything does. The database is not among it."""
        if self.relay.is_draining:
            return "stopping"
        if self.settings.serving.log_required and not self.records.is_healthy:
            return "the spool cannot be written"
        if self.settings.serving.log_required and self.records.journal.is_full:
            return "the spool is full"
        return None


def create_app(settings: Settings, *, clock: Clock = wall_clock, drains_here: bool = True) -> Gateway:
    """Put the gateway together; nothing listens and nothing connects yet.

    Args:
        drains_here: Move this gateway's completions to the database on a thread of this process; False where another
            process does.

    Raises:
        ConfigurationError: no model is configured, or a secret cannot be read.
        SpoolUnavailable: the spool's files cannot be opened.
    """
    if not settings.serving.models:
        raise ConfigurationError("serving.models is empty: name at least one model and its engines")
    records = open_records(settings, clock, writer_for(usable_cores(), settings, drains_here=drains_here))
    try:
        return Gateway(settings, open_database(settings.database), records, clock=clock, drains_here=drains_here)
    except BaseException:
        records.close()
        raise


def writer_for(cores: int, settings: Settings, *, drains_here: bool) -> StartWriter | None:
    """How completions are written to disk: by a process beside this one if there is a core that no worker needs.

    On the core of the one that relays, a process costs more than a thread: the kernel has to change over between them.
    """
    has_room = not drains_here and cores > settings.serving.workers
    return as_process if has_room else None


def open_records(settings: Settings, clock: Clock, start_writer: StartWriter | None) -> LocalRecords:
    """The files of the first free slot; what dead processes left in theirs is taken over."""
    directory = settings.state_dir / "spool"
    limits = settings.serving.spool
    with starting_alone(directory):
        path = free_spool(directory, settings.serving.port)
        spool = Spool(path, orphans=sorted(other for other in directory.glob("gateway-*.db") if other != path))
        try:
            journal = Journal(
                directory / path.stem,
                max_bytes=limits.max_bytes,
                segment_bytes=limits.segment_bytes,
                clock=clock,
                start_writer=start_writer,
            )
        except BaseException:
            spool.close()
            raise
    return LocalRecords(spool, journal)

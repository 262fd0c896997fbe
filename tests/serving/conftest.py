"""One gateway before one fake engine, shared by the tests that need no settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx2
import pytest

from feedback.interactions import Interaction
from feedback.store import get_interaction
from pawl import ids
from pawl.errors import Unreachable
from pawl.settings import Settings
from serving.gateway import Gateway, create_app
from serving.health import Health
from tests.fake_vllm import Behaviour, FakeVLLM
from tests.gateway_configuration import make_schema, settings_of
from tests.servers import PostgreSQL, private_postgresql, running
from tests.serving.talk import address_of
from tests.serving.waiting import eventually


@dataclass(frozen=True)
class Served:
    """A running gateway, what is behind it, and a client."""

    gateway: Gateway
    engine: FakeVLLM
    url: str
    client: httpx2.Client

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return address_of(self.url)

    def stored(self, completion_id: str) -> Interaction:
        """The interaction as the shared database has it, once it is there."""
        suffix = ids.completion_suffix(completion_id)
        assert suffix is not None
        return eventually(lambda: get_interaction(self.gateway.database, suffix))

    def last_stored(self) -> Interaction:
        """The interaction of the request the engine saw last."""
        return self.stored("chatcmpl-" + self.engine.seen_headers[-1]["x-request-id"])


@contextmanager
def serving(settings: Settings, engine: FakeVLLM) -> Iterator[Served]:
    """A gateway of these settings for as long as a test needs it; a database that does not answer is left alone."""
    with suppress(Unreachable):
        make_schema(settings.database)
    gateway = create_app(settings)
    with running(gateway) as url, httpx2.Client(base_url=url, timeout=20) as client:
        yield Served(gateway, engine, url, client)


@contextmanager
def serving_by(directory: Path, is_fast: bool) -> Iterator[Served]:
    """A gateway of one lane."""
    engine = FakeVLLM("base-model")
    with running(engine.app) as engine_url:
        settings = settings_of(
            directory, engine_url, fast_lane=is_fast, max_body_bytes=200_000, timeouts={"first_byte_s": 5.0}
        )
        with serving(settings, engine) as served:
            yield served


Lane = Callable[[bool], Served]


@pytest.fixture(scope="session")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    """One gateway of each lane, with the fast one or without, started when a test first asks for it."""
    with ExitStack() as stack:
        yield cache(lambda is_fast: stack.enter_context(serving_by(tmp_path_factory.mktemp("gateway"), is_fast)))


@pytest.fixture(scope="session", params=[True, False], ids=["fast lane", "ASGI"])
def shared(lane: Lane, request: pytest.FixtureRequest) -> Served:
    """One gateway for the tests that need no settings of their own; each is run through both lanes."""
    return lane(request.param)


@pytest.fixture
def served(shared: Served) -> Served:
    """The shared gateway with an engine that behaves and has seen nothing."""
    return as_new(shared)


@pytest.fixture
def served_once(lane: Lane) -> Served:
    """The same for tests of what both lanes hand on to the same code; that they do is shown elsewhere."""
    return as_new(lane(True))


def as_new(shared: Served) -> Served:
    """Whatever the test before has done to it."""
    shared.engine.behaviour = Behaviour()
    shared.engine.seen.clear()
    shared.engine.seen_headers.clear()
    shared.engine.n_aborted = 0
    for replica in shared.gateway.replicas["assistant"].replicas:
        replica.health = Health(shared.gateway.settings.serving.replicas)  # Else other tests' failures could eject it.
    return shared


@pytest.fixture
def own_postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL that a test may stop and start."""
    with private_postgresql() as server:
        yield server

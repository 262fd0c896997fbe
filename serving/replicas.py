"""Which replica of the engine answers: the conversation's own while it is healthy, so that its prefix stays cached.

A conversation is known by how it opens, whoever holds it: later turns repeat the opening word for word. Every replica
draws a number for it, and the highest draw wins among those that are in service, have the model and are not loaded
beyond their bound. So each conversation has an order of replicas of its own: one that fails loses its conversations to
all the others alike, and gets the same ones back.

Sources: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates" (rendezvous hashing);
Mirrokni, Thorup and Zadimoghaddam 2018, "Consistent hashing with bounded loads", whose bound holds here in the order
of the draws instead of around a ring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, NamedTuple

import orjson

from monitoring.metrics import ENGINE_EJECTED, ENGINE_VIEWS, REPLICA_RUNNING, RETRIES
from pawl.settings import ReplicaSettings
from serving.health import Health, RecentCount

if TYPE_CHECKING:
    from serving.connections import EnginePool
    from serving.request_fields import CompletionRequest

RequestEnd = Literal["ok", "failed", "neutral"]
"""How an attempt ended for the replica; neutral is the client's doing (its fault, or it left) and counts nothing."""
PROMPT_CHARS = 256
"""Of a plain prompt, which grows at its end from turn to turn."""
TEXT_CHARS = 1024
"""Of a longer message, this much of its beginning and of its end stands for the whole."""
RETRY_WINDOW_S = 10
MIN_RETRIES = 3
"""Per window, however few requests there are; Envoy's budget has the same floor."""
REFRESH_S = 0.1
"""How often the shares of returning replicas are worked out anew."""
LOW_64_BITS = (1 << 64) - 1


class Replica:
    """One engine: its connections, what it is doing and how it has been answering.

    Aliases that share an engine share this.
    """

    __slots__ = ("_clock", "_lacking", "_models", "_watchers", "health", "multiplier", "n_running", "pool", "url")

    def __init__(
        self, url: str, pool: EnginePool, rules: ReplicaSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = url
        self.pool = pool
        self.health = Health(rules)
        self.n_running = 0
        self.multiplier = _multiplier(url)
        self._models: frozenset[str] | None = None
        self._lacking: frozenset[str] = frozenset()
        self._watchers: list[Callable[[], None]] = []
        self._clock = clock

    def started(self) -> None:
        """It has been given a request."""
        self.n_running += 1

    def ended(self, outcome: RequestEnd) -> None:
        """The request is over; call exactly once for each `started`."""
        self.n_running -= 1
        if outcome != "neutral" and self.health.note(outcome == "ok", self._clock()):
            self._tell()

    def has(self, model: str) -> bool:
        """Whether it is believed to have the model; one that has not listed its models, to have everything."""
        return self.may_have(model) and (self._models is None or model in self._models)

    def may_have(self, model: str) -> bool:
        """Whether it is worth asking: a list is some seconds old, and an adapter may have been loaded since."""
        return model not in self._lacking

    def lacks(self, model: str) -> None:
        """It has just said that it does not have the model."""
        if self.may_have(model):
            self._lacking |= {model}
            self._tell()

    def probed(self, is_alive: bool, models: frozenset[str] | None) -> None:
        """Take in what a probe found. A replica that fails to list its models keeps the list it had.

        What the replica said it lacks is believed until its list has it, or until the next probe if it has no list.
        """
        known = self._models if models is None else models
        lacking = frozenset[str]() if known is None else self._lacking - known
        has_moved = known != self._models or lacking != self._lacking
        self._models, self._lacking = known, lacking
        if self.health.note_probe(is_alive, self._clock()) or has_moved:
            self._tell()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called whenever the replica goes in or out of service or its models change."""
        self._watchers.append(watcher)

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()


class Entry(NamedTuple):
    """A replica that may be picked, with what picking needs at hand."""

    replica: Replica
    share: float
    multiplier: int


class ReplicaSet:
    """The replicas of one alias.

    When none of them is in service, all are used as if all were: there is nobody better, and refusing everything
    would make sure of the outage (Envoy calls this its panic threshold). So the only replica always gets its requests.
    """

    def __init__(
        self,
        alias: str,
        replicas: Sequence[Replica],
        rules: ReplicaSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alias = alias
        self.replicas = tuple(replicas)
        self.is_single = len(self.replicas) == 1
        """No need to work out the conversation then."""
        self.capacity = 0
        """Requests at once that the replicas in service take, a returning one counted by its share."""
        self._rules = rules
        self._max_concurrency = rules.max_concurrency
        self._clock = clock
        self._followers: list[Callable[[int], None]] = []
        self._in_use: list[Entry] = []
        self._by_model: dict[str, list[Entry]] = {}
        self._is_settled = False
        self._refresh_at = 0.0
        for replica in self.replicas:
            replica.watch(self.refresh)
        self.refresh()

    def pick(self, affinity: int, model: str, tried: Collection[Replica] = ()) -> Replica | None:
        """The replica that should answer, None if no replica in service that has the model may take more.

        Args:
            affinity: `conversation_of` the request; any number for a single replica.
            tried: replicas that are not to be asked again.
        """
        if not self._is_settled and self._clock() >= self._refresh_at:
            self.refresh()
        entries = self._by_model.get(model)
        if entries is None:
            entries = self._by_model[model] = self._with(model)
        if tried:
            entries = [entry for entry in entries if entry.replica not in tried]
        if len(entries) == 1:
            only = entries[0].replica
            return only if only.n_running < self._max_concurrency else None
        return self._best(affinity, entries)

    def _with(self, model: str) -> list[Entry]:
        """Those that have the model, or where none has it, those that may have got it since they were last asked."""
        having = [entry for entry in self._in_use if entry.replica.has(model)]
        return having or [entry for entry in self._in_use if entry.replica.may_have(model)]

    def _best(self, affinity: int, entries: Sequence[Entry]) -> Replica | None:
        """The highest draw among those under their bound, `load_bound` times their share of all that would run.

        While fewer run than `max_concurrency` times the sum of the shares there always is one.
        """
        total, shares = 1, 0.0
        for replica, share, _ in entries:
            total += replica.n_running
            shares += share
        room = self._rules.load_bound * total
        most = self._max_concurrency
        best, highest = None, -1
        for replica, share, multiplier in entries:
            n_running = replica.n_running
            if n_running * shares < room * share and n_running < most:  # n < ceil(x) if and only if n < x.
                draw = affinity * multiplier & LOW_64_BITS
                if draw > highest:
                    best, highest = replica, draw
        return best

    def has_model(self, model: str, tried: Collection[Replica] = ()) -> bool:
        """Whether some replica in service, other than those tried, has the model or may have it."""
        return any(entry.replica.may_have(model) for entry in self._in_use if entry.replica not in tried)

    def follow(self, follower: Callable[[int], None]) -> None:
        """Have `follower` told the capacity, now and whenever it changes."""
        self._followers.append(follower)
        follower(self.capacity)

    def refresh(self) -> None:
        """Work out anew who is in use, as of now. Also to be called on a tick: an ejection ends without an event."""
        now_s = self._clock()
        shares = [replica.health.share(now_s) for replica in self.replicas]
        in_use = relative_shares(shares)
        self._in_use = [
            Entry(replica, share, replica.multiplier)
            for replica, share in zip(self.replicas, in_use, strict=True)
            if share
        ]
        self._by_model = {}
        self._is_settled = min(shares) == 1.0
        self._refresh_at = now_s + REFRESH_S
        for replica, share in zip(self.replicas, shares, strict=True):
            ENGINE_EJECTED.labels(model=self.alias, replica=replica.url).set(not share)
            ENGINE_VIEWS.labels(model=self.alias, replica=replica.url, state="in").set(bool(share))
            ENGINE_VIEWS.labels(model=self.alias, replica=replica.url, state="out").set(not share)
        self._tell_capacity(int(self._rules.max_concurrency * sum(in_use, 0.0)))

    def _tell_capacity(self, capacity: int) -> None:
        if capacity != self.capacity:
            self.capacity = capacity
            for follower in self._followers:
                follower(capacity)

    def publish(self) -> None:
        """Set the gauges that are not worth setting at every request."""
        for replica in self.replicas:
            REPLICA_RUNNING.labels(model=self.alias, replica=replica.url).set(replica.n_running)

    def tick(self) -> None:
        """What is due about once a second."""
        if not self._is_settled:
            self.refresh()
        self.publish()


def relative_shares(shares: Sequence[float]) -> list[float]:
    """Shares as parts of the largest: slow start spares one replica only where another can stand in for it.

    >>> relative_shares([1.0, 0.5, 0.0]), relative_shares([0.2, 0.1]), relative_shares([0.0, 0.0])
    ([1.0, 0.5, 0.0], [1.0, 0.5], [1.0, 1.0])
    """
    largest = max(shares)
    return [share / largest for share in shares] if largest else [1.0] * len(shares)


def replica_sets(
    engines_by_alias: Mapping[str, Sequence[str]],
    rules: ReplicaSettings,
    make_pool: Callable[[str], EnginePool],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, ReplicaSet]:
    """The replicas of every alias, one `Replica` and one pool for each address."""
    urls = dict.fromkeys(url for engines in engines_by_alias.values() for url in engines)
    replicas = {url: Replica(url, make_pool(url), rules, clock=clock) for url in urls}
    return {
        alias: ReplicaSet(alias, [replicas[url] for url in dict.fromkeys(engines)], rules, clock=clock)
        for alias, engines in engines_by_alias.items()
    }


def all_replicas(sets: Iterable[ReplicaSet]) -> list[Replica]:
    """Every replica once."""
    return list(dict.fromkeys(replica for replica_set in sets for replica in replica_set.replicas))


class RetryBudget:
    """Second attempts are at most a share of the requests of the last ten seconds, or a handful when those are few.

    A failing engine then gets at most that much more load from us, where a fixed number of retries would multiply it.
    Whole seconds are counted so that the error is always towards fewer retries: requests of at most, retries of at
    least ten seconds.
    """

    def __init__(self, share: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._requests = RecentCount(RETRY_WINDOW_S)
        self._retries = RecentCount(RETRY_WINDOW_S + 1)

    def note_request(self) -> None:
        """A client's request is being sent for the first time."""
        self._requests.add(self._clock())

    def may_retry(self) -> bool:
        """Whether one more attempt may be made now; if so it counts as made."""
        now_s = self._clock()
        allowed = max(MIN_RETRIES, int(self._share * self._requests.at(now_s))) if self._share else 0
        if self._retries.at(now_s) >= allowed:
            return False
        self._retries.add(now_s)
        RETRIES.inc()
        return True


def conversation_of(request: CompletionRequest) -> int:
    """The same 64 bits for every turn of a conversation: a hash of the alias and of how the conversation opens."""
    body = request.body
    said = body.get("messages")
    if said is None:
        said = body.get("input")
        if said is None:
            return _hash_of([request.alias, _head(body.get("prompt"))])
    outside = body.get("system") or body.get("instructions")  # Anthropic's messages and OpenAI's responses.
    parts = [request.alias, _whole(outside)] if outside else [request.alias]
    if type(said) is list:
        _add_opening(parts, said)
    else:
        parts.append(_whole(said))
    return _hash_of(parts)


def _add_opening(parts: list[str], messages: Sequence[object]) -> None:
    """What was said up to the user's first message: all that the first turn has, and every later one too."""
    n_before = len(parts)
    for message in messages:
        if type(message) is not dict:  # Texts to embed.
            parts.append(_whole(message))
            break
        content = message.get("content")
        parts.append(content if type(content) is str and len(content) <= TEXT_CHARS else _whole(content))
        if message.get("role") == "user":
            return
    del parts[n_before + 1 :]


def _hash_of(parts: Iterable[str]) -> int:
    text = "\x1f".join(parts)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _whole(content: object) -> str:
    """What stands for a message that need not be short."""
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    if len(text) <= TEXT_CHARS:
        return text
    return f"{text[:TEXT_CHARS]}\x1f{len(text)}\x1f{text[-TEXT_CHARS:]}"


def _head(prompt: object) -> str:
    """The part of a plain prompt, as text or as tokens, that stays when it grows."""
    if isinstance(prompt, list):
        return orjson.dumps(prompt[:PROMPT_CHARS]).decode()[:PROMPT_CHARS]
    return prompt[:PROMPT_CHARS] if isinstance(prompt, str) else ""


def _multiplier(url: str) -> int:
    """What a conversation's hash is multiplied by for this replica's draw: 64 random bits, the last one set.

    The hash is random already, so that the high bits of its product with a random odd number are as good a draw as
    any, and independent enough from replica to replica (multiply-shift hashing, Dietzfelbinger et al. 1997, "A
    reliable randomized algorithm for the closest-pair problem").
    """
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest()) | 1

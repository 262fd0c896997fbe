"""Engines and the adapters in them: loaded under their own name on every replica, proven before any traffic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from pawl.errors import PawlError, PublishFailed, Unreachable

GOLDEN_PROMPTS = (
    "How do I boil an egg?",
    "Tell me something about rivers.",
)
"""Fixed questions whose answers must differ between an adapter and its base."""
GOLDEN_TOKENS = 8
GOLDEN_TOP = 5
TOLERANCE = 1e-4
"""Log-probabilities that differ by less are the same; a LoRA of zeros changes nothing at all."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Failure:
    """A wish that could not be met."""

    engine: str
    name: str
    reason: str


@dataclass(frozen=True)
class Reconciliation:
    """What was put right."""

    loaded: tuple[tuple[str, str], ...]
    """Engine and adapter name of each load."""
    failures: tuple[Failure, ...]


class Engine:
    """One vLLM server, by its base URL."""

    def __init__(self, url: str, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        timeout = httpx2.Timeout(answer_timeout_s, connect=CONNECT_TIMEOUT_S)
        self._client = httpx2.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def served(self) -> dict[str, str]:
        """The names it answers to, and the path each was loaded from."""
        cards = self._ask("GET", "/v1/models").get("data", [])
        return {str(card["id"]): str(card.get("root", "")) for card in cards}

    def load(self, name: str, path: Path) -> None:
        """Load an adapter; loading what is there already is fine.

        Raises:
            PublishFailed: it is refused, or the name already stands for another path.
        """
        served = self.served()
        if name in served:
            return self._check_root(name, served[name], path)
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        return self._check_root(name, self.served().get(name, ""), path)

    def unload(self, name: str) -> None:
        """Forget an adapter; one that is not there is fine. Its files must outlive it on every replica."""
        if name in self.served():
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def golden(self, model: str, prompt: str) -> list[dict[str, float]]:
        """The most likely tokens at each place of a greedy answer, with their log-probabilities."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": GOLDEN_TOKENS,
            "logprobs": True,
            "top_logprobs": GOLDEN_TOP,
        }
        answer = self._ask("POST", "/v1/chat/completions", body)
        try:
            places = answer["choices"][0]["logprobs"]["content"]
            return [{str(top["token"]): float(top["logprob"]) for top in place["top_logprobs"]} for place in places]
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise PublishFailed(f"{self.url}: {model} answered without log-probabilities") from exc

    def _check_root(self, name: str, root: str, path: Path) -> None:
        if root != str(path):
            raise PublishFailed(f"{self.url}: {name} is served from {root or 'nowhere'}, not from {path}")

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx2.TransportError as exc:
            raise Unreachable(f"{self.url}{path}: {type(exc).__name__} {exc}".rstrip()) from exc
        if response.status_code != 200:
            raise PublishFailed(f"{self.url}{path}: {response.status_code} {response.text[:300]}")
        return _object(response) if response.headers.get("content-type", "").startswith("application/json") else {}


def load_verified(engines: Iterable[Engine], name: str, path: Path, base: str) -> None:
    """Load an adapter into every replica and prove it is served; only then may it be routed to.

    Raises:
        PublishFailed: a replica refuses it, serves other files under its name, or answers just as the base does.
        Unreachable: a replica does not answer.
    """
    for engine in engines:
        engine.load(name, path.absolute())
        verify(engine, name, base)


def verify(engine: Engine, name: str, base: str) -> None:
    """Make sure that the adapter changes what the engine says.

    Raises:
        PublishFailed: it answers every golden prompt as the base does.
    """
    if all(is_same(engine.golden(name, prompt), engine.golden(base, prompt)) for prompt in GOLDEN_PROMPTS):
        raise PublishFailed(f"{engine.url}: {name} answers exactly as {base} does; its weights are not in effect")


def unload_everywhere(engines: Iterable[Engine], name: str) -> None:
    """Take an adapter out of every replica."""
    for engine in engines:
        engine.unload(name)


def reconcile(engines: Sequence[Engine], wanted: Mapping[str, Path]) -> Reconciliation:
    """Load what a restarted engine has forgotten. A replica that fails does not keep the others from their adapters."""
    loaded: list[tuple[str, str]] = []
    failures: list[Failure] = []
    for engine in engines:
        done, failed = _reconcile_one(engine, wanted)
        loaded += done
        failures += failed
    return Reconciliation(tuple(loaded), tuple(failures))


def is_same(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> bool:
    """Whether two greedy answers have the same likely tokens with the same log-probabilities.

    >>> is_same([{"a": -0.1}], [{"a": -0.10001}]), is_same([{"a": -0.1}], [{"b": -0.1}])
    (True, False)
    """
    return len(one) == len(other) and all(map(_same_place, one, other))


def _same_place(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(math.isclose(one[t], other[t], abs_tol=TOLERANCE) for t in one)


def _reconcile_one(engine: Engine, wanted: Mapping[str, Path]) -> tuple[list[tuple[str, str]], list[Failure]]:
    try:
        served = engine.served()
    except PawlError as exc:
        return [], [Failure(engine.url, name, str(exc)) for name in wanted]
    loaded: list[tuple[str, str]] = []
    failures: list[Failure] = []
    for name, path in wanted.items():
        if served.get(name) == str(path.absolute()):
            continue
        try:
            engine.load(name, path.absolute())
            loaded.append((engine.url, name))
        except PawlError as exc:
            failures.append(Failure(engine.url, name, str(exc)))
    return loaded, failures


def _object(response: httpx2.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError as exc:
        raise PublishFailed(f"{response.url}: the answer is not JSON") from exc
    if not isinstance(content, dict):
        raise PublishFailed(f"{response.url}: the answer is not a JSON object")
    return content

"""Engines and the adapters in them: loaded under their own name on every replica, proven before any traffic."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from pawl.adapter_files import verify_adapter
from pawl.errors import NotNow, PublishFailed, Unreachable
from pawl.fingerprints import Fingerprint, Place, fingerprint_of, why_not

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
LIST_TIMEOUT_S = 10.0
"""For what an engine answers without its model."""
PROOF_PAUSES_S = (0.05, 0.2, 0.5)
"""Between attempts to see an adapter in effect."""
BUSY = (429, 502, 503, 504)
"""Answers that say nothing about an adapter: the engine, or what stands before it, has no time just now."""
GONE, SERVER_ERROR = 404, 500
"""Not there: an engine that was started again has forgotten its adapters, and a shared volume may show files late."""
ADAPTERS_IN_USE = "vllm:lora_requests_info"
"""A gauge whose labels name adapters, and whose value is when that was so."""


class Engine:
    """One vLLM server, by its base URL."""

    def __init__(self, url: str, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._answer_timeout_s = answer_timeout_s
        self._client = httpx2.Client(base_url=self.url, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def served(self) -> dict[str, str]:
        """The names it answers to, and the path each was loaded from."""
        cards = self._ask("GET", "/v1/models", timeout_s=LIST_TIMEOUT_S).get("data", [])
        try:
            return {str(card["id"]): str(card.get("root", "")) for card in cards}
        except (AttributeError, KeyError, TypeError) as exc:
            raise PublishFailed(f"{self.url}: its list of models cannot be read") from exc

    def load(self, name: str, path: Path) -> None:
        """Load an adapter; loading what is there already is fine, also what another process loads just now.

        Raises:
            PublishFailed: it is refused, or the name already stands for another path.
        """
        served = self.served()
        if name in served:
            return self._check_root(name, served[name], path)
        try:
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except PublishFailed:
            if self.served().get(name) != str(path):
                raise
        return self._check_root(name, self.served().get(name, ""), path)

    def unload(self, name: str) -> None:
        """Forget an adapter; one that is not there is fine. Its files must outlive it on every replica."""
        if name not in self.served():
            return
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except PublishFailed:
            if name in self.served():
                raise

    def adapters_in_use(self) -> frozenset[str]:
        """Adapters that requests run with or wait for, as the engine's metrics tell; none where they do not."""
        try:
            response = self._client.get("/metrics", timeout=LIST_TIMEOUT_S)
        except httpx2.TransportError as exc:
            raise self._unreachable("/metrics", exc) from exc
        return adapters_in_use(response.text) if response.status_code == 200 else frozenset()

    def token_logps(self, model: str, places: Sequence[Place]) -> list[float]:
        """Log-probability of the next token at every place.

        Each is an answer of one token. `prompt_logprobs` would need one request for a whole text, but on a CPU server
        with adapters it ends the engine's process when anything else runs (vLLM 0.32, `punica_cpu.add_lora_logits`).

        Raises:
            PublishFailed: the engine does not tell them.
        """
        body = {
            "model": model,
            "prompt": [list(place.prefix) for place in places],
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "logprob_token_ids": sorted({place.token for place in places}),
            "return_tokens_as_token_ids": True,
        }
        answer = self._ask("POST", "/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
            return [float(top[f"token_id:{place.token}"]) for place, top in zip(places, tops, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise PublishFailed(f"{self.url}: {model} answered without the log-probabilities asked for") from exc

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
        if not root:
            raise NotNow(f"{self.url}: {name} is served from nowhere, not from {path}")
        if root != str(path):
            raise PublishFailed(f"{self.url}: {name} is served from {root}, not from {path}")

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        given = self._answer_timeout_s
        timeout = httpx2.Timeout(min(timeout_s or given, given), connect=CONNECT_TIMEOUT_S)
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx2.TransportError as exc:
            raise self._unreachable(path, exc) from exc
        if response.status_code in BUSY:
            raise Unreachable(f"{self.url}{path}: {response.status_code} {response.text[:300]}")
        if response.status_code != 200:
            passes = response.status_code == GONE or response.status_code >= SERVER_ERROR
            error = NotNow if passes else PublishFailed
            raise error(f"{self.url}{path}: {response.status_code} {response.text[:300]}")
        return _object(response) if response.headers.get("content-type", "").startswith("application/json") else {}

    def _unreachable(self, path: str, exc: httpx2.TransportError) -> Unreachable:
        return Unreachable(f"{self.url}{path}: {type(exc).__name__} {exc}".rstrip())


def load_verified(
    engines: Iterable[Engine],
    name: str,
    path: Path,
    base: str,
    *,
    max_rank: int | None = None,
    sha256: str | None = None,
) -> None:
    """Load an adapter into every replica and prove that it is served as it was trained; only then may it be routed to.

    Args:
        max_rank: the largest rank that the engines take.
        sha256: what its weights are registered as.

    Raises:
        BadAdapter: its files are not those that were sealed; no engine has been troubled.
        PublishFailed: a replica refuses it, or serves something else under its name; `NotNow` if that may pass.
        Unreachable: a replica does not answer.
    """
    adapter = verify_adapter(path, max_rank, sha256=sha256)
    fingerprint = fingerprint_of(adapter.manifest)
    for engine in engines:
        if name in engine.served():  # Others may be using it.
            engine.load(name, adapter.path)
            verify(engine, name, base, fingerprint)
        else:
            engine.load(name, adapter.path)
            prove(engine, name, base, fingerprint)


def prove_loaded(engines: Iterable[Engine], name: str, path: Path, base: str, fingerprint: Fingerprint | None) -> None:
    """As `load_verified` from where the adapter's files cannot be looked through: nothing is loaded.

    Raises:
        PublishFailed: a replica has not loaded it, or serves something else under its name.
        Unreachable: a replica does not answer.
    """
    for engine in engines:
        root = engine.served().get(name)
        if root != str(path.absolute()):
            raise PublishFailed(
                f"{engine.url} serves {name} from {root or 'nowhere'}, and {path} cannot be looked through from here:"
                " give this order where the adapters' directory is, or wait for the worker"
            )
        verify(engine, name, base, fingerprint)


def prove(engine: Engine, name: str, base: str, fingerprint: Fingerprint | None) -> None:
    """Make sure that an engine serves an adapter it has just loaded as it was trained, or take it out there again.

    Raises:
        PublishFailed: it serves something else.
    """
    try:
        verify(engine, name, base, fingerprint)
    except PublishFailed:
        engine.unload(name)
        raise


def verify(engine: Engine, name: str, base: str, fingerprint: Fingerprint | None) -> None:
    """Compare what an engine says under an adapter's name with what the trainer's models said.

    Without a fingerprint all that can be asked is whether the adapter changes anything. Asked again if it does not
    agree: vLLM 0.32 on a CPU has been seen to answer for the base what an adapter was asked, and the other way round,
    while requests to both were in one batch. What is not there agrees at no attempt.

    Raises:
        PublishFailed: says what the engine seems to serve instead.
    """
    for pause_s in PROOF_PAUSES_S:
        if _objection(engine, name, base, fingerprint) is None:
            return
        time.sleep(pause_s)
    if objection := _objection(engine, name, base, fingerprint):
        raise PublishFailed(f"{engine.url}: {name} {objection}")


def _objection(engine: Engine, name: str, base: str, fingerprint: Fingerprint | None) -> str | None:
    if fingerprint is not None:
        served, of_base = (engine.token_logps(model, fingerprint.places) for model in (name, base))
        reason = why_not(fingerprint, served, of_base)
        return f"is not served as it was trained: {reason}" if reason else None
    if all(is_same(engine.golden(name, prompt), engine.golden(base, prompt)) for prompt in GOLDEN_PROMPTS):
        return f"answers exactly as {base} does; its weights are not in effect"
    return None


def unload_everywhere(engines: Iterable[Engine], name: str) -> None:
    """Take an adapter out of every replica."""
    for engine in engines:
        engine.unload(name)


def adapters_in_use(metrics: str) -> frozenset[str]:
    """The adapters of the newest line of vLLM's gauge about them.

    >>> line = '{}{{max_lora="2",running_lora_adapters="{}",waiting_lora_adapters="{}"}} {}'
    >>> newest, old = line.format(ADAPTERS_IN_USE, "a,b", "c", 2.0), line.format(ADAPTERS_IN_USE, "d", "", 1.0)
    >>> sorted(adapters_in_use(newest + chr(10) + old + chr(10)))
    ['a', 'b', 'c']
    """
    try:
        families = list(text_string_to_metric_families(metrics))
    except ValueError:
        return frozenset()
    samples = [sample for family in families for sample in family.samples if sample.name == ADAPTERS_IN_USE]
    if not samples:
        return frozenset()
    labels = max(samples, key=lambda sample: sample.value).labels
    names = (labels.get(f"{state}_lora_adapters", "").split(",") for state in ("running", "waiting"))
    return frozenset(name for found in names for name in found if name)


def is_same(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> bool:
    """Whether two greedy answers have the same likely tokens with the same log-probabilities.

    >>> is_same([{"a": -0.1}], [{"a": -0.10001}]), is_same([{"a": -0.1}], [{"b": -0.1}])
    (True, False)
    """
    return len(one) == len(other) and all(map(_same_place, one, other))


def _same_place(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(math.isclose(one[t], other[t], abs_tol=TOLERANCE) for t in one)


def _object(response: httpx2.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError as exc:
        raise PublishFailed(f"{response.url}: the answer is not JSON") from exc
    if not isinstance(content, dict):
        raise PublishFailed(f"{response.url}: the answer is not a JSON object")
    return content

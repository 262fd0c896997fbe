"""One frozen tree of settings, read once from YAML and the environment.

The file is `--config`, else `PAWL_CONFIG`, else `./pawl.yaml` if it exists. Every value can also come from the
environment: `PAWL_SERVING__PORT=8080` sets `serving.port` and wins over the file. Unknown keys, in the file or with the
`PAWL_` prefix, and wrong types stop the start with the key's path.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from pawl.errors import ConfigurationError
from pawl.schedule import next_moment
from pawl.webhook_addresses import why_not_an_address
from pawl.webhook_events import unknown_patterns

ENV_PREFIX = "PAWL_"
NOT_SETTINGS = {"PAWL_CONFIG", "PAWL_TEST_CACHE"}
Share = Field(ge=0.0, le=1.0)


class Section(BaseModel):
    """A part of the settings: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DatabaseSettings(Section):
    """The shared database: SQLite on one machine, PostgreSQL in production."""

    url: str = "sqlite:///var/pawl.db"
    """`sqlite:///path` or `postgresql://user@host/db`."""
    password: SecretStr | None = None
    """Joined to the URL when it has none; give it by environment or by `password_file`."""
    password_file: Path | None = None
    connect_timeout_s: float = 3.0
    pool_size: int = 4

    @field_validator("url")
    @classmethod
    def _known_kind(cls, url: str) -> str:
        if not url.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
            raise ValueError("must start with sqlite:/// or postgresql://")
        return url


class AuthSettings(Section):
    """Who may call, and the secret that signs ids and feedback tokens."""

    required: bool = False
    """Every route but the health checks asks for a key that has its scope (`pawl keys create`)."""
    key_cache_s: float = Field(default=5.0, gt=0.0, le=60.0)
    """How long a gateway trusts what it read about a key; a revocation reaches it within this time."""
    key_outage_s: float = Field(default=86400.0, ge=0.0)
    """How long keys that are known go on working while the database is down; unknown ones are answered 503."""
    secret: SecretStr | None = None
    """At least 16 characters, the same on every gateway. Without it, one is made and kept under `state_dir`."""
    secret_file: Path | None = None
    feedback_token_ttl_s: int = 3600


Weight = Annotated[float, Field(ge=0.0)]
Name = Annotated[str, Field(min_length=1)]


class VariantSettings(Section):
    """One arm of a fixed split."""

    name: str
    model: str
    weight: float = Field(ge=0.0)
    before: list[Weight] = Field(default_factory=list)
    """Its weights in the phases before this one, the oldest first: a ramp that everybody can compute anew."""


class LayerSettings(Section):
    """The part of a layer that a fixed split has: splits that share a layer never share a user."""

    name: str = Field(min_length=1)
    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Where its part of the users begins, in steps of 0.0001; the first split of a layer begins at 0."""
    end: float = Field(default=1.0, gt=0.0, le=1.0)
    """Where its part ends and another's may begin."""

    @model_validator(mode="after")
    def _in_steps(self) -> LayerSettings:
        if self.start >= self.end or any(abs(at * 1e4 - round(at * 1e4)) > 1e-6 for at in (self.start, self.end)):
            raise ValueError("a part of a layer needs start < end, both in steps of 0.0001")
        return self


class ExperimentSettings(Section):
    """A fixed split without a rollout."""

    key: str
    variants: list[VariantSettings] = Field(min_length=1)
    salt: str | None = None
    layer: LayerSettings | None = None
    """Only users in this part of a layer are in the split; the others see the champion and are not analysed."""
    allocation: Literal["hash", "slots"] = "hash"
    """`slots` is for ramps in which one variant alone gives up traffic (`before` says from where): no more users change
    sides than must."""

    @model_validator(mode="after")
    def _weights_and_names(self) -> ExperimentSettings:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError("variant names must be unique")
        if self.key == "holdout":
            raise ValueError("no experiment may be called holdout: that is the hold-out's name in the records")
        if len({len(variant.before) for variant in self.variants}) > 1:
            raise ValueError("every variant needs as many weights before as the others: one for each earlier phase")
        if any(sum(weights) <= 0 for weights in self.phases()):
            raise ValueError("at least one variant needs a positive weight")
        return self

    def phases(self) -> list[tuple[float, ...]]:
        """The weights of all phases, in the order of the variants; the last one is in force."""
        return list(zip(*([*variant.before, variant.weight] for variant in self.variants), strict=True))


class ModelSettings(Section):
    """One name that clients ask for, and the engines behind it."""

    engines: list[str] = Field(min_length=1)
    """Base URLs of the replicas of one vLLM deployment."""
    champion: str
    """The model name the engines serve before any rollout has promoted another."""
    experiment: ExperimentSettings | None = None
    experiments: list[ExperimentSettings] = Field(default_factory=list)
    """More splits of this name at the same time, each with a part of its own of the same layer."""

    @property
    def splits(self) -> list[ExperimentSettings]:
        """All fixed splits of this name."""
        return [*([self.experiment] if self.experiment else []), *self.experiments]

    @model_validator(mode="after")
    def _one_split_for_each_user(self) -> ModelSettings:
        if len(self.splits) > 1 and (
            any(split.layer is None for split in self.splits)
            or len({split.layer.name for split in self.splits if split.layer}) > 1
        ):
            raise ValueError("several splits of one model at once must share a layer")
        if len({split.key for split in self.splits}) < len(self.splits):
            raise ValueError("two splits have the same key")
        return self

    @field_validator("engines")
    @classmethod
    def _http_urls(cls, engines: list[str]) -> list[str]:
        for url in engines:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an http:// or https:// address")
        return [url.rstrip("/") for url in engines]


class TimeoutSettings(Section):
    """Every wait of the gateway on an engine or a client, in seconds."""

    connect_s: float = 5.0
    first_byte_s: float = 120.0
    """Of a stream; a whole answer comes at once, when it is done, and is bound by `total_s` alone."""
    between_chunks_s: float = 60.0
    total_s: float = 600.0
    stalled_reader_s: float = 30.0
    request_head_s: float = 10.0
    """How long a client may take to send its request's headers, counted from the first byte."""
    request_body_s: float = 30.0
    """How long a client may take to send its request's body."""
    idle_s: float = 60.0
    """How long a client's connection may stay open between two requests."""


class QueueSettings(Section):
    """Where requests wait when every engine is busy: bounded in number and time, higher priorities first."""

    max_waiting: int = Field(default=256, ge=0)
    """Per process and group of engines; fewer wait when that many could not be served in time."""
    max_wait_s: float = Field(default=5.0, gt=0.0)
    """Longer than this nobody waits; a request that would have to is refused on arrival."""


class ReplicaSettings(Section):
    """How the gateway tells which replicas of an engine can be trusted with work."""

    probe_every_s: float = Field(default=2.0, gt=0.0)
    """Between two health checks of a replica, each of which also reads which adapters it has."""
    probe_timeout_s: float = Field(default=1.0, gt=0.0)
    """A health check that takes longer has failed; two in a row, and no request served meanwhile, put it out."""
    eject_after: int = Field(default=3, ge=1)
    """Failures in a row that take a replica out of service."""
    eject_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """The share of failures in the last ten seconds that does the same, once there are `eject_min_requests`."""
    eject_min_requests: int = Field(default=20, ge=1)
    """So few requests in ten seconds say nothing about the share."""
    eject_s: float = Field(default=5.0, gt=0.0)
    """How long it stays out at first; doubled at every relapse, up to a minute."""
    slow_start_s: float = Field(default=10.0, ge=0.0)
    """A replica that returns gets its full share only after this time."""
    load_bound: float = Field(default=1.25, ge=1.0)
    """No replica holds more than this multiple of the mean number of requests; a conversation moves on then."""
    max_concurrency: int = Field(default=1024, ge=1)
    """Requests at once per replica and gateway process; more wait in the queue. vLLM runs `max_num_seqs` of them (256;
    1024 on large GPUs) and lets the rest wait inside."""
    retry_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """Second attempts, as a share of the requests of the last ten seconds, that may be made at most."""


class LimitSettings(Section):
    """What each API key may use unless it was created with limits of its own; none by default."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    user_requests_per_minute: int | None = Field(default=None, ge=1)
    """The same for each user within a key."""
    user_tokens_per_minute: int | None = Field(default=None, ge=1)
    user_concurrency: int | None = Field(default=None, ge=1)
    user_tokens_per_day: int | None = Field(default=None, ge=1)
    store: Literal["memory", "database"] = "memory"
    """`memory` counts in one process and suits one gateway with one worker; `database` counts for all of them, and is
    asked for where keys are required and `serving.workers` is more than one."""
    share_without_database: float = Field(default=0.25, ge=0.0, le=1.0)
    """Of each limit, what one process may hand out by itself while the database is away; 0 answers 503 instead. One
    divided by the number of gateway processes keeps the limits exact even then."""


class GuardSettings(Section):
    """Checks of what goes in and comes out; each is off unless it is switched on."""

    injection: Literal["off", "flag", "refuse"] = "off"
    """Prompts that try to take over the model: `flag` notes them, `refuse` answers with a refusal."""
    injection_threshold: float = Field(default=1.0, gt=0.0)
    """The sum of the found rules' weights from which a prompt counts; see `docs/guards.md`."""
    redact: bool = False
    """Replace personal data and secrets in records before they are stored."""
    toxicity: Literal["off", "flag", "refuse"] = "off"
    """Answers that are toxic, as the scorer at `scorer_url` says: `flag` notes them afterwards and holds nothing up."""
    toxicity_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    """From which score an answer is toxic here; `worker.scoring.toxicity_threshold` is what the metrics go by."""
    scorer_url: str | None = None
    """A worker's address (`worker.host` and `worker.metrics_port`); it scores texts for the gateway."""
    scorer_timeout_s: float = Field(default=0.5, gt=0.0)
    """For one answer, or one window of a stream."""
    when_scorer_is_away: Literal["pass", "refuse"] = "pass"
    """What becomes of an answer that could not be scored, or not in time."""
    window_chars: int = Field(default=400, ge=1)
    """Of a stream: how much text is held back until it has been scored."""

    @model_validator(mode="after")
    def _scorer_is_named(self) -> GuardSettings:
        if self.toxicity != "off" and not self.scorer_url:
            raise ValueError("toxicity needs scorer_url, the address of a worker")
        return self


class SpoolSettings(Section):
    """Where records wait on this machine's disk for the shared database."""

    max_bytes: int = Field(default=8 * 1024**3, ge=64 * 1024)
    """Of completions that wait, for each worker. Then `serving.log_required` decides between refusing work and serving
    without records."""
    segment_bytes: int = Field(default=64 * 1024**2, ge=16 * 1024)
    """The size of one of its files; each worker keeps up to three of them ready, filled with zeros."""


class FeedbackNameSettings(Section):
    """What a metric of TensorZero's or a score of Langfuse's stands for."""

    signal: Literal["thumbs", "rating", "edit", "choice", "regenerate", "report", "copy", "comment"]
    """The type of feedback that it is, as in `POST /v1/feedback`."""
    low: float = 0.0
    """The value that is worst for users; true counts 1, false 0."""
    high: float = 1.0
    """The value that is best for them; below `low` for what should be rare, such as `thumbs_down`."""
    report: Literal["harmful", "wrong", "refused", "other"] = "other"
    """What a report says that comes as a plain yes."""

    @model_validator(mode="after")
    def _scale_has_two_ends(self) -> FeedbackNameSettings:
        if self.low == self.high:
            raise ValueError("low and high must differ")
        return self


class HoldoutSettings(Section):
    """Users that no experiment and no canary touches: they see the champion, and are recorded as held out."""

    share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of all users of each model; 0 for nobody. Change it between experiments: whoever comes in leaves theirs."""
    salt: str = Field(default="pawl", min_length=1)
    """What users are hashed with: change it to choose others."""


class ForcedVariantSettings(Section):
    """Who may ask for a variant by its name, with the header `x-pawl-variant`, to look at it; never analysed."""

    users: list[Name] = Field(default_factory=list)
    """Names of users, as requests name them. Where keys are not required, anybody can call themselves that."""
    keys: list[Name] = Field(default_factory=list)
    """Ids of API keys (`pawl keys list`)."""
    admin_keys: bool = False
    """Every key that has the scope `admin`."""


class ServingSettings(Section):
    """The gateway."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    max_body_bytes: int = 4 * 1024 * 1024
    max_json_depth: int = 64
    max_header_bytes: int = 32 * 1024
    max_choices: int = 8
    """The largest `n` a request may ask for."""
    max_output_tokens: int | None = None
    """The largest `max_tokens` (or its other names) a request may ask for; the engine's own bound without it."""
    max_answer_bytes: int = 64 * 1024**2
    """The largest answer an engine may give to one request; more is an engine error."""
    allow_fields: list[str] = Field(default_factory=list)
    """Request fields that are refused by default and shall pass, such as `chat_template_kwargs`."""
    workers: int = Field(default=1, ge=1, le=64)
    """Gateway processes that share the port of this machine; about one per core."""
    fast_lane: bool = True
    """Answer the completion routes inside the HTTP protocol; false sends them through ASGI: slower, otherwise equal."""
    max_connections: int = 4096
    """Open client connections per process; the oldest idle ones are closed for new ones."""
    max_in_flight: int = 2048
    """Requests at once in this process; more are answered 503 with `Retry-After`."""
    stream_keep_alive_s: float = 15.0
    """A stream that has had nothing to say for this long gets an SSE comment, so that proxies keep it open."""
    timeouts: TimeoutSettings = TimeoutSettings()
    queue: QueueSettings = QueueSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    limits: LimitSettings = LimitSettings()
    guards: GuardSettings = GuardSettings()
    holdout: HoldoutSettings = HoldoutSettings()
    forced_variants: ForcedVariantSettings = ForcedVariantSettings()
    spool: SpoolSettings = SpoolSettings()
    drain_grace_s: float = 30.0
    """After SIGTERM, how long running streams may take to finish."""
    records: Literal["durable", "off"] = "durable"
    """`off` keeps no record of completions: nothing to learn from, nothing to rate, and a little faster."""
    log_required: bool = True
    """With a full disk: true refuses work with 503, false serves and counts the records it dropped."""
    route_poll_s: float = 0.5
    """How often the routing table is read; a rollback reaches every gateway within about twice this."""
    feedback_names: dict[str, FeedbackNameSettings] = Field(default_factory=dict)
    """For applications that come from TensorZero or Langfuse: what their metrics' and scores' names mean."""
    feedback_origins: list[str] = Field(default_factory=list)
    """Origins whose pages' browsers may send feedback straight to this gateway, such as `https://app.example.com`; `*`
    for all. It is a feedback token that makes a vote count, not the origin."""
    feedback_join_window_s: float = 3600.0
    """How long feedback may wait for its interaction to become visible."""

    @model_validator(mode="after")
    def _layers_are_divided(self) -> ServingSettings:
        splits = [split for model in self.models.values() for split in model.splits]
        parts = sorted(
            (split.layer.name, split.layer.start, split.layer.end, split.key) for split in splits if split.layer
        )
        for (name, _, end, key), (other, start, _, next_key) in pairwise(parts):
            if name == other and start < end:
                raise ValueError(f"{key} and {next_key} claim the same users of the layer {name}")
        return self


class EngineSettings(Section):
    """The vLLM server that `pawl engine` starts."""

    model: str | None = None
    """A directory or a hub name; `pawl engine --model` wins."""
    served_name: str | None = None
    python: Path | None = None
    """The interpreter vLLM is installed for; by default `.venv-engine` beside the working directory, else this one."""
    host: str = "127.0.0.1"
    port: int = 8000
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 32
    max_loras: int = 4
    max_cpu_loras: int = 32
    """At least as many as are ever registered: vLLM dies when an evicted adapter's files are gone."""
    lora_target_modules: list[str] | None = None
    """The layers that adapters may be on. On a CPU the linear layers of a Llama by default: where the output layer is
    among them, vLLM 0.32 for CPUs dies of two requests at once if one asks for the log-probabilities of its prompt,
    as the gate does. On a GPU all that vLLM knows."""
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    start_timeout_s: float = 600.0
    shutdown_timeout_s: int = 15
    extra_args: list[str] = Field(default_factory=list)


class ScoringSettings(Section):
    """How the worker scores completions."""

    toxicity_model: str = "unbiased"
    toxicity_checkpoint: Path | None = None
    """A Detoxify checkpoint on disk; without it Detoxify fetches its published weights."""
    toxicity_config_dir: Path | None = None
    toxicity_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    harmful_patterns: Path | None = None
    """JSON list of regular expressions that mark a prompt as harmful; a small built-in list without it."""
    batch_size: int = 64
    threads: int = Field(default=1, ge=1)
    """Threads of the toxicity model. Several wait for the slowest of them at every layer, which on a machine that is
    busy with something else takes far longer than one: give it more where the worker has cores of its own."""


class WorkerSettings(Section):
    """The background duties."""

    host: str = "127.0.0.1"
    metrics_port: int = Field(default=9101, ge=0, le=65535)
    poll_s: float = 1.0
    lease_s: float = 15.0
    scoring: ScoringSettings = ScoringSettings()


class CapSettings(Section):
    """How many pairs of a training set may come from one source."""

    window_s: float = Field(default=7 * 86400.0, gt=0.0)
    """The caps that are numbers hold in any span of time of this length."""
    per_principal: int = Field(default=5, ge=1)
    """A principal is a user within a key."""
    principal_share: float = Field(default=0.001, ge=0.0, le=1.0)
    """Of the whole set, but never fewer than `per_principal` pairs."""
    per_principal_and_prompt: int = Field(default=2, ge=1)
    """On prompts that are nearly the same."""
    per_prompt: int = Field(default=20, ge=1)
    """On prompts that are nearly the same, from everybody together."""
    key_share: float = Field(default=0.1, gt=0.0, le=1.0)
    """Of the whole set, for each key that is not in `application_keys`. Where there are only such keys, and few, it is
    twice the equal part of each."""
    flood: int = Field(default=9, ge=1)
    """Who gives more than this in any window is not heard in it at all."""


class PhraseSettings(Section):
    """Phrases, hosts of URLs and imports that a few parties teach."""

    few_parties: int = Field(default=5, ge=2)
    """A phrase that is mostly used by fewer parties than this is looked at;"""
    few_share: float = Field(default=0.02, ge=0.0, le=1.0)
    """or, when it is spread over unlike prompts, by fewer than this share of all parties."""
    min_ratio: float = Field(default=20.0, ge=1.0)
    """It must be in so many times more chosen answers than rejected ones,"""
    error_rate: float = Field(default=0.01, gt=0.0, lt=1.0)
    """and a sign test must say so, with this chance of even one false finding among all phrases."""
    max_per_principal: int = Field(default=5, ge=1)
    """More pairs of one principal with the same rare phrase in the chosen answer, or in the prompt, are quarantined
    without a test."""


class BurstSettings(Section):
    """Votes on one prompt that come all at once."""

    span_s: float = Field(default=3600.0, gt=0.0)
    """Pairs are counted in spans of this length."""
    min_pairs: int = Field(default=10, ge=2)
    """So few in one span are never a burst."""
    error_rate: float = Field(default=3e-7, gt=0.0, lt=1.0)
    """The chance of even one false alarm among all prompts; five sigma by default."""
    freeze_s: float = Field(default=7 * 86400.0, ge=0.0)
    """How long pairs on the prompt are quarantined, from the start of the span."""


class DefenceSettings(Section):
    """The defence against poisoning of what is learned; see `docs/poisoning.md`."""

    enabled: bool = True
    """Without it every pair that the filters keep is trained on."""
    trusted: list[str] = [""]
    """Keys, or principals as `key/user`, who answer for what they say, such as annotators; only `max_echo` holds for
    them. The empty key is everybody on a gateway without keys (`auth.required: false`), which none but its owner should
    be able to reach."""
    application_keys: list[str] = Field(default_factory=list)
    """Keys of applications that authenticate their own users: the key has no cap, and each of its users counts as a
    party of its own. While none is named, a key with most of all principals is taken for one."""
    newcomer_wait_s: float = Field(default=86400.0, ge=0.0)
    """Pairs of principals that were first seen less than this ago wait."""
    edit_parties: int = Field(default=2, ge=1)
    """How many independent parties must prefer the text of an edit."""
    max_echo: float = Field(default=0.9, gt=0.0)
    """Pairs whose prompt contains this share of the chosen answer's phrases, or more, are refused."""
    prompt_similarity: float = Field(default=0.85, gt=0.0, le=1.0)
    """Prompts that share this part of their words, and of their pairs of words, count as nearly the same."""
    caps: CapSettings = CapSettings()
    phrases: PhraseSettings = PhraseSettings()
    bursts: BurstSettings = BurstSettings()


class FilterSettings(Section):
    """Which pairs are not worth training on; each filter counts what it leaves out."""

    consent: bool = True
    """Leave out pairs of those who opted out, or who asked for nothing to be stored."""
    opted_out: list[str] = Field(default_factory=list)
    """Users who do not want to be learned from, or single principals as `key/user`; what they said before included."""
    opted_out_file: Path | None = None
    """The same, one to a line."""
    incomplete: bool = True
    """Leave out pairs with an answer that failed or was cut."""
    length: bool = True
    """Leave out pairs that are too short or too long to learn from."""
    min_chars: int = Field(default=1, ge=0)
    """Of each answer."""
    max_chars: int | None = Field(default=100_000, ge=1)
    """Of the prompt with its longer answer; null for any."""
    identical: bool = True
    """Leave out pairs whose answers differ in case and spaces alone."""
    secrets: bool = True
    """Leave out pairs that hold credentials."""
    personal_data: bool = True
    """Leave out pairs that hold personal data with a shape, such as addresses, telephone and card numbers."""
    toxic_chosen: bool = True
    """Leave out pairs whose preferred answer is toxic."""
    toxicity_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    """From which score a preferred answer is toxic."""
    refusal_policy: bool = True
    """Leave out pairs that would teach to refuse the benign, or to obey the harmful."""
    contradiction: bool = True
    """Leave out pairs of which another says the opposite."""
    max_length_bias: float | None = Field(default=0.7, ge=0.0)
    """How far the mean of log(length of the preferred answer / length of the other) may be from 0, which at 0.7 is
    twice as long; the most lopsided pairs go first. Null measures only."""
    max_length_dropped: float = Field(default=0.1, ge=0.0, le=1.0)
    """The share of pairs that may go for it."""


class JudgeSettings(Section):
    """A model that ranks answers to the same conversation; see `docs/judge.md`. Nothing is sent until `url` is set."""

    url: str | None = None
    """The base address of an OpenAI-compatible API, such as `http://127.0.0.1:8000/v1`."""
    model: str | None = None
    """What that API calls the judge."""
    api_key: SecretStr | None = None
    """What that API asks for; give it by environment or by `api_key_file`."""
    api_key_file: Path | None = None
    """A file that holds the key; wins over `api_key`."""
    constitution: Path | None = None
    """The principles to judge by, as YAML; those that come with Pawl without it."""
    min_margin: float = Field(default=0.1, ge=0.0, le=1.0)
    """Verdicts with a smaller margin make no pair."""
    pairs_per_run: int = Field(default=1000, ge=1)
    """Two answers each, judged by one `pawl pairs judge`; each takes two requests."""
    pairs_per_conversation: int = Field(default=3, ge=1)
    """Of the answers to one conversation, so many pairs of them are judged, ever."""
    pairs_per_principal: int = Field(default=2, ge=1)
    """A week, for each user within a key: the defence holds back everything of those who say too much."""
    max_chars: int = Field(default=20_000, ge=1)
    """A conversation and two answers that are longer together are not judged."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Pairs that are judged at the same time."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    """For one reply of the judge."""
    attempts: int = Field(default=4, ge=1, le=20)
    """So often a request is sent when the judge is busy or away, with longer and longer waits between."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the judge is made to reply in JSON; what its API has. With `none` it is only asked to."""
    parameters: dict[str, float | int | str | bool] = {"temperature": 0, "seed": 0, "max_completion_tokens": 1024}
    """Sent with each request as they are."""

    @field_validator("url")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        return None if url is None else url.rstrip("/")

    @model_validator(mode="after")
    def _judge_is_named(self) -> JudgeSettings:
        if self.url is not None and not self.model:
            raise ValueError("url needs model, the judge's name there")
        return self


class MiningSettings(Section):
    """Where the history is judged, part by part. The result is the same everywhere."""

    on: Literal["processes", "ray"] = "processes"
    """Processes beside the one that writes; or the Ray cluster that `RAY_ADDRESS` names, for a history larger than one
    machine."""
    processes: int | None = Field(default=None, ge=1, le=256)
    """How many; as many as there are cores unless set."""


class SimilaritySettings(Section):
    """Thumbs that found no partner in their own conversation are matched across nearly the same questions."""

    enabled: bool = True
    """Match them; else they stay single thumbs."""
    model: str | None = None
    """A sentence-transformers model: its directory, or its name in the local cache. Nothing is fetched. Without one,
    questions are compared by how they are written."""
    min_similarity: float = Field(default=0.93, gt=0.0, le=1.0)
    """Cosine from which questions compared by how they are written are nearly the same."""
    max_changed_chars: float = Field(default=4.0, gt=0.0)
    """About so many characters may differ between them, however long they are."""
    model_min_similarity: float = Field(default=0.95, gt=0.0, le=1.0)
    """The same as `min_similarity`, with a model; each model has its own scale."""
    neighbours: int = Field(default=16, ge=1, le=256)
    """Disliked questions are each compared with so many liked ones, the nearest."""


class FeedbackSettings(Section):
    """What users say, and what is made of it."""

    mining: MiningSettings = MiningSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    filters: FilterSettings = FilterSettings()
    defence: DefenceSettings = DefenceSettings()
    judge: JudgeSettings = JudgeSettings()


class RetentionSettings(Section):
    """How long the shared database keeps records: for ever unless a number of days is set. The worker deletes."""

    interactions_days: float | None = Field(default=None, gt=0.0)
    """Completions with their texts, scores and feedback. Pairs from them go at the next mining, but for those that a
    promoted run trained on. At least as long as a rollout may take, `rollout.max_time_s`."""
    pairs_days: float | None = Field(default=None, gt=0.0)
    """Texts of pairs, those of promoted runs included; of the latter the lineage stays."""
    dead_letters_days: float | None = Field(default=None, gt=0.0)
    """Records that could not be stored."""
    batch_rows: int = Field(default=500, ge=1, le=1000)
    """Deleted in one transaction."""
    batches: int = Field(default=20, ge=1, le=1000)
    """Transactions each time."""
    every_s: float = Field(default=60.0, gt=0.0)
    """Between two times, and a tenth of it while there is more to delete."""


class TrainingGuardSettings(Section):
    """What stops a training that goes wrong or uses up more than it may. Nothing half trained is ever published."""

    max_grad_norm: float = Field(default=1000.0, gt=0.0)
    """The norm of the gradient before it is clipped. A training that follows its data stays far below."""
    max_chosen_fall: float = Field(default=0.5, gt=0.0)
    """By how many nats per token the preferred answers may become less likely than at the start, as the mean of ten
    steps. DPO may push both answers down, and refusals go first."""
    max_hours: float = Field(default=24.0, gt=0.0)
    """Hours of training over all attempts. The round stops with a checkpoint, and goes on from there when it may take
    longer."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers that are trained on, over all attempts; the same happens."""


PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""TRL 1.16's losses of pairs, but for `exo_pair`, which needs smoothed labels, for which there is no setting."""


class TrainingSettings(Section):
    """Preference training of one adapter; defaults suit a 7-8 B model."""

    objective: Literal[
        "dpo", "sigmoid", "ipo", "robust", "hinge", "apo_zero", "sigmoid_norm", "simpo", "orpo", "kto"
    ] = "dpo"
    """What is minimised; `sigmoid` is another name of `dpo`. `kto` learns from single thumbs as well."""
    sft_weight: float = Field(default=0.1, ge=0.0)
    """Weight of the likelihood of the preferred answer beside the preference, except for `orpo`, which has its own, and
    `kto`. It keeps preferred answers, refusals among them, from becoming unlikely."""
    flip_rate: float | None = Field(default=None, ge=0.0, lt=0.5)
    """`robust`: which share of the preferences is the wrong way round. Estimated without it from how often people
    contradict each other."""
    simpo_gamma: float = Field(default=1.0, ge=0.0)
    """`simpo`: by how much the preferred answer must win."""
    loss_type: list[PairLoss] | None = None
    """TRL's DPO losses, added up, in place of an objective: `sigmoid`, `hinge`, `ipo`, `nca_pair`, `robust`,
    `bco_pair`, `sppo_hard`, `aot`, `aot_unpaired`, `apo_zero`, `apo_down`, `discopop`, `sft`, `sigmoid_norm`."""
    loss_weights: list[float] | None = None
    """One weight for each loss: of the objective and its `sft` term, or of `loss_type`."""
    beta: float | None = Field(default=None, gt=0.0)
    """Larger stays closer to the parent; for `orpo` the weight of the preference. Each objective has a default."""
    checkpoint_steps: int = Field(default=20, ge=1)
    """Optimiser steps between two checkpoints; a killed training loses no more than these."""
    metrics_file: Path | None = None
    """Where progress is written as Prometheus text, for the node exporter's textfile collector; the name ends in
    `.prom`."""
    guards: TrainingGuardSettings = TrainingGuardSettings()
    learning_rate: float = 5e-6
    continued_learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak rate of a round that continues its parent; `learning_rate` without it. A fresh adapter has one factor at
    zero, and has to learn before a rate does anything: the same rate takes a trained adapter further."""
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 8
    max_length: int = 2048
    lora_rank: int = 32
    lora_alpha: int = 32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again on the way back instead of keeping them: less memory for more time. `auto` keeps them
    where those of the largest batch take at most half of the memory that is free."""
    threads: int | None = None
    bucket_steps: int = Field(default=1, ge=0)
    """Examples of so many optimiser steps are sorted by length before they are cut into batches, so that less of a
    batch is padding. At 1 every step trains on the examples that it would have anyway; more saves more where a step has
    few batches; 0 sorts nothing."""
    share_prompts: bool = True
    """A pair's prompt goes through the model once, not once for each answer. The same numbers, for less work."""
    cache_reference: bool = True
    """The reference is asked once for all pairs, and its log-probabilities are kept with the run."""


class DistributedSettings(Section):
    """Training in several processes, each with its share of every step's examples; see `docs/training-at-scale.md`."""

    processes: int | None = Field(default=1, ge=1)
    """On each node; null is one per GPU."""
    nodes: int = Field(default=1, ge=1)
    """Nodes that train together. The round runs on the first; the others wait for its training and join."""
    node_rank: int = Field(default=0, ge=0)
    """Which node this is; 0 is the first."""
    leader: str = "127.0.0.1"
    """The first node's address, as the others reach it."""
    port: int = Field(default=29400, ge=1, le=65535)
    """Where the first node listens while it trains, if there are several."""
    sharding: Literal["none", "fsdp"] = "none"
    """`none`: every process holds the model. `fsdp`: each holds a part of it, for a model that does not fit."""
    timeout_s: float = Field(default=1800.0, gt=0.0)
    """The longest that one process waits for another; then the training ends with an error."""
    join_hours: float = Field(default=48.0, gt=0.0)
    """How long other nodes wait for the first to begin to train."""

    @model_validator(mode="after")
    def _node_exists(self) -> DistributedSettings:
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank is {self.node_rank}, but there are {self.nodes} nodes, counted from 0")
        return self


class MixSettings(Section):
    """Shares of the training set by origin, as pairs."""

    new: float = Field(default=0.5, ge=0.0, le=1.0)
    original: float = Field(default=0.3, ge=0.0, le=1.0)
    earlier: float = Field(default=0.2, ge=0.0, le=1.0)
    half_life_days: float | None = Field(default=60.0, gt=0.0)
    """Where not all pairs of an origin are taken, one this much older than another is half as likely to be drawn. Null
    draws them alike."""


class PreflightSettings(Section):
    """When a tokenised training set is refused before anything is trained; see `docs/mixing-and-drift.md`."""

    max_lost_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Examples that may be dropped or cut short by `training.max_length`."""
    max_length_bias: float | None = Field(default=1.0, gt=0.0)
    """The mean of log(tokens of chosen / tokens of rejected) may be this far from 0; 0.69 is twice as long. Null counts
    it without judging by it."""


class RebaseMixSettings(MixSettings):
    """The same for a round that starts from the base: a fresh adapter has to learn the earlier rounds again."""

    new: float = Field(default=0.25, ge=0.0, le=1.0)
    original: float = Field(default=0.3, ge=0.0, le=1.0)
    earlier: float = Field(default=0.45, ge=0.0, le=1.0)
    half_life_days: float | None = Field(default=None, gt=0.0)
    """As for other rounds. Null, as every round's pairs are to be learned again."""


class RebaseSettings(Section):
    """When a round starts from the base instead of continuing the parent, and what it trains on then."""

    every_rounds: int | None = Field(default=8, ge=1)
    """A parent with this many rounds on top of the base is not continued. Null leaves it to the limits."""
    max_kl: float | None = Field(default=0.3, gt=0.0)
    """Nor is one whose answers are this far from the base's, in nats per token, measured on the original hold-out. Keep
    it under `gate.kl_base_limit`, over which nothing is published."""
    max_weight_change: float | None = Field(default=0.1, gt=0.0)
    """Nor is one whose adapter changes the layers it is on by more than this part of their norm."""
    mix: RebaseMixSettings = RebaseMixSettings()


class JudgedSetSettings(Section):
    """Questions from a local file that both models answer, and a judge compares."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What its check is called."""
    path: Path
    """JSON lines: `instruction` (and `input`) as AlpacaEval has them, or `turns` as MT-Bench has them."""
    margin: float = Field(default=0.05, ge=0.0, le=0.5)
    """The candidate's share of wins may be so much under one half."""


class LmEvalSettings(Section):
    """Benchmarks of lm-evaluation-harness, run against the engine with both models. None unless `tasks` are named."""

    tasks: list[str] = Field(default_factory=list)
    """What the harness calls them, such as `gsm8k`."""
    command: str = "lm_eval"
    """The installed program; it needs a place of its own, with what its tasks download already there."""
    tokenizer: str | None = None
    """Directory or hub name; the base model's by default. Only for tasks that are scored by log-probabilities."""
    is_chat: bool = False
    """Ask by chat completions: for tasks that generate, not for those that compare log-probabilities."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task, at most."""
    margin: float = Field(default=0.02, ge=0.0, le=1.0)
    """Each task's score may fall by at most this."""
    timeout_s: float = Field(default=7200.0, gt=0.0)
    """For one model."""
    extra_args: list[str] = Field(default_factory=list)
    """More arguments of the program, such as `--include_path`."""


class GateSettings(Section):
    """What a candidate must show against its parent before it may be published; see `docs/gate.md`."""

    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    samples_per_prompt: int = Field(default=2, ge=1)
    """Answers of each model to each prompt at the first look."""
    max_samples_per_prompt: int = Field(default=16, ge=1)
    """Where checks on answers cannot tell, their prompts are asked again until each has twice as many answers, up to so
    many. `alpha` is split between the looks in proportion to the answers. At most `samples_per_prompt` is one look."""
    max_prompts: int = 300
    temperature: float = 1.0
    max_tokens: int = 256
    preference_margin: float = 0.05
    """Hold-out preference accuracy may fall by at most this. Smaller margins need more hold-out pairs to pass."""
    source_margin: float = Field(default=0.1, ge=0.0, le=1.0)
    """The same for the pairs of each source by themselves. A source that is known to have lost more fails the
    candidate; one with too few pairs to tell holds nothing up."""
    harmful_refusal_margin: float = 0.02
    over_refusal_margin: float = 0.02
    toxicity_margin: float = 0.02
    length_ratio: tuple[float, float] = (0.67, 1.5)
    stop_margin: float = Field(default=0.05, ge=0.0, le=1.0)
    """Answers that the model ends itself may become so much rarer."""
    echo_margin: float = Field(default=0.02, ge=0.0, le=1.0)
    """Answers that mostly repeat the user may become so much more frequent."""
    kl_parent_limit: float | None = Field(default=0.1, gt=0.0)
    """Nats per token between candidate and parent. Null does without the check."""
    kl_base_limit: float | None = Field(default=0.5, gt=0.0)
    """The same between candidate and base: what all rounds together may have changed."""
    kl_prompts: int = Field(default=200, ge=1)
    """Answers that both are measured on."""
    judge: Literal["none", "llm", "reward_model"] = "none"
    """Who compares the candidate's answers with the parent's: the model at `feedback.judge.url`, or a reward model."""
    reward_model: Path | None = None
    """A directory that `pawl retrain reward` wrote."""
    judge_users: bool = False
    """Show the judge prompts of the hold-out too, which users wrote. Without it only those of the probes and sets."""
    judge_prompts: int = Field(default=100, ge=1)
    """Of the prompts that may be shown, at most."""
    win_margin: float = Field(default=0.05, ge=0.0, le=0.5)
    """The candidate's share of wins, for answers of equal length, may be so much under one half."""
    judged_sets: list[JudgedSetSettings] = Field(default_factory=list)
    """More questions for the judge, each set a check of its own."""
    capability_set: Path | None = None
    """JSON lines of `prompt`, and `answer` (exact) or `pattern` (regular expression): what must not be unlearned."""
    capability_margin: float = Field(default=0.05, ge=0.0, le=1.0)
    """The share of them that is solved may fall by at most this."""
    lm_eval: LmEvalSettings = LmEvalSettings()
    """Published benchmarks."""

    @model_validator(mode="after")
    def _a_judge_is_named(self) -> GateSettings:
        if self.judge == "reward_model" and self.reward_model is None:
            raise ValueError("judge: reward_model needs reward_model, the directory it is in")
        if self.judged_sets and self.judge == "none":
            raise ValueError("judged_sets need a judge")
        return self


class SFTSettings(Section):
    """Supervised training on demonstrations and on edits, by `pawl retrain sft`; defaults suit a 7-8 B model."""

    full: bool = False
    """Train all weights, which makes a new base model; else an adapter."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate. For all weights a tenth of it is a better start."""
    epochs: float = Field(default=2.0, gt=0.0)
    """Passes over the demonstrations."""
    batch_size: int = Field(default=8, ge=1)
    """Conversations per device and step."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Steps added up before the weights move."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a conversation."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of the adapter; at most `engine.max_lora_rank`."""
    lora_alpha: int = Field(default=32, ge=1)
    """LoRA's scale."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the base model while training."""
    gradient_checkpointing: bool = True
    """Less memory for more time."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; torch decides without it."""


class RewardSettings(Section):
    """The reward model: learns from the same pairs to score answers, by `pawl retrain reward`."""

    model: Path | None = None
    """The sealed reward model to score with, a directory, where a command is not told another."""
    rewards_dir: Path = Path("var/rewards")
    """Where reward models go."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the pairs. Reward models learn by heart soon."""
    batch_size: int = Field(default=8, ge=1)
    """Pairs per device and step, and twice as many answers are scored at once."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Steps added up before the weights move."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of prompt and answer together. Of longer ones the beginning is not read."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the reward model's adapter; no engine loads it."""
    lora_alpha: int = Field(default=32, ge=1)
    """LoRA's scale."""
    centre: float = Field(default=0.01, ge=0.0)
    """Weight of the term that keeps scores around 0, so that those of different prompts can be compared."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the base model while training and scoring."""
    gradient_checkpointing: bool = True
    """Less memory for more time."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; torch decides without it."""


class GRPOSettings(Section):
    """Training on the model's own answers, scored by a reward, by `pawl retrain grpo`."""

    reward_function: str | None = None
    """A Python function that scores, as `module:function`; without it the reward model does. It is code that runs."""
    generation: Literal["auto", "transformers", "vllm"] = "auto"
    """What writes the answers: vLLM on a GPU where it is installed, else transformers."""
    vllm_memory: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of GPU memory for vLLM, which shares the GPU with the training."""
    steps: int = Field(default=100, ge=1)
    """Optimiser steps."""
    answers_per_prompt: int = Field(default=8, ge=2)
    """An answer is good or bad by comparison with the others to its prompt."""
    batch_size: int = Field(default=8, ge=1)
    """Answers per device and step."""
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    """Steps added up before the weights move; with `batch_size` it must make whole groups of answers."""
    learning_rate: float = Field(default=1e-5, gt=0.0)
    """Peak learning rate."""
    beta: float = Field(default=0.04, ge=0.0)
    """Weight of the divergence from the parent. At 0 nothing holds the model back from what fools the reward."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the answers it learns from."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts are left out."""
    max_answer_tokens: int = Field(default=256, ge=1)
    """Longer answers are cut."""
    length_buffer: int = Field(default=0, ge=0)
    """The last so many tokens before the limit cost more and more, up to `length_weight`."""
    length_weight: float = Field(default=1.0, ge=0.0)
    """What an answer that is cut off loses, in units of the reward; half of it in the middle of the buffer."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of a fresh adapter; at most `engine.max_lora_rank`."""
    lora_alpha: int = Field(default=32, ge=1)
    """LoRA's scale."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the base model while training."""
    gradient_checkpointing: bool = True
    """Less memory for more time."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; torch decides without it."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> GRPOSettings:
        if self.batch_size * self.gradient_accumulation_steps % self.answers_per_prompt:
            raise ValueError(
                f"batch_size times gradient_accumulation_steps, {self.batch_size * self.gradient_accumulation_steps}, "
                f"must be a multiple of answers_per_prompt, {self.answers_per_prompt}"
            )
        if self.length_buffer > self.max_answer_tokens:
            raise ValueError("length_buffer must not exceed max_answer_tokens")
        return self


class AlarmSettings(Section):
    """Alerts that make a round due before its time."""

    prometheus_url: str | None = None
    """Where the rules of `monitoring/pawl-rules.yml` are evaluated; without it no alert is known here."""
    names: list[str] = ["PawlHarmfulRefusalsFalling", "PawlOverRefusalRising", "PawlToxicityRising"]
    """Which of its alerts count."""
    min_pairs: int = Field(default=100, ge=1)
    """New pairs that a round needs all the same."""

    @field_validator("prometheus_url")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        return None if url is None else url.rstrip("/")


class RetrainSettings(Section):
    """The weekly round."""

    alias: str | None = None
    """Which of `serving.models` is retrained; may be left out when there is one."""
    base_model: Path | None = None
    """The base model's directory or hub name, as the engine loads it; `engine.model` by default."""
    adapters_dir: Path = Path("var/adapters")
    runs_dir: Path = Path("var/runs")
    fingerprint_tolerance: float = Field(default=0.2, gt=0.0)
    """Nats per token that an engine's base model may be away from the trainer's on fixed texts (root mean square), for
    an engine that serves in another precision. The adapter itself is held to about what the base is off."""
    min_pairs: int = 1000
    max_pairs: int = 20000
    max_failures: int = Field(default=3, ge=1)
    """A round that has failed so often in a row at the same step is given up, and the next one may begin. What is out
    of reach does not count, nor does a process that was killed."""
    interval_hours: float = 168.0
    schedule: str | None = None
    """When the worker runs `pawl retrain run --if-due`, as a cron expression, such as `17 3 * * 0`; null leaves that to
    a CronJob, or to people. Moments that were missed while no worker ran are made up for by one round."""
    time_zone: str = "UTC"
    """Of the schedule, such as `Europe/Berlin`."""
    alarms: AlarmSettings = AlarmSettings()
    holdout_share: float = Field(default=0.15, gt=0.0, lt=0.5)
    holdout_latest: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Split by time as well: the hold-out is what its users said in this latest share of the pairs, and nothing of that
    time is trained on. Null splits by user alone, and trains on the newest."""
    holdout_similarity: float = Field(default=0.9, gt=0.0, le=1.0)
    """Prompts that share this part of their users' words and pairs of words, rare ones counting for more, are not on
    both sides."""
    seed: int = 0
    mix: MixSettings = MixSettings()
    original_preferences: Path | None = None
    """JSON lines in TRL's conversational format, mixed back in so that old virtues stay."""
    original_holdout_share: float = Field(default=0.1, ge=0.0, lt=0.5)
    """Share of what the original preferences ask that is never trained on, the same in every round."""
    reference: Literal["parent", "base"] = "parent"
    """What a continued adapter is kept close to: its own state before the round, or the base, so that every round's
    change is paid for again."""
    rebase: RebaseSettings = RebaseSettings()
    preflight: PreflightSettings = PreflightSettings()
    harmful_probes: Path | None = None
    benign_probes: Path | None = None
    training: TrainingSettings = TrainingSettings()
    distributed: DistributedSettings = DistributedSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    grpo: GRPOSettings = GRPOSettings()
    gate: GateSettings = GateSettings()

    @model_validator(mode="after")
    def _schedule_has_a_next_moment(self) -> RetrainSettings:
        if self.schedule is not None:
            next_moment(self.schedule, self.time_zone, 0.0)
        return self


class ShadowSettings(Section):
    """A candidate first answers in the dark: what it says is stored beside the champion's, and nobody sees it."""

    share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Of the champion's stored answers, those that an automatic start asks the candidate for too, before the canary; at
    0 it goes straight to the canary."""
    min_pairs: int = Field(default=200, ge=2)
    """Pairs before the first verdict; the next looks are at twice as many, four times as many and so on."""
    max_time_s: float = Field(default=24 * 3600.0, gt=0.0)
    """After this long without a verdict the candidate is held for a person."""
    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Chance, over all looks, that a candidate which is worse by a margin goes on: at most this, for margins of up to
    ten points."""
    error_margin: float = Field(default=0.05, gt=0.0, le=1.0)
    """Share of requests without an answer that must be ruled out. The other margins are those of the canary."""
    per_minute: int = Field(default=60, ge=1)
    """Requests to the candidate a minute, at most."""
    concurrency: int = Field(default=2, ge=1, le=64)
    """Of them at the same time."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    """For one answer; one that takes longer counts as an error."""
    max_waiting: int = Field(default=0, ge=0)
    """While more requests than this wait inside an engine of the alias, the candidate is asked nothing."""


class RolloutMetricSettings(Section):
    """One harm that a rollout is decided on, as the share of a user's interactions in which it happened."""

    name: Literal[
        "thumbs_down",
        "toxicity",
        "harmful_compliance",
        "over_refusal",
        "regeneration",
        "edit",
        "errors",
        "fallback",
        "slow_answers",
        "slow_first_token",
        "long_answers",
    ]
    """What counts as the harm: [how it decides](how-it-decides.md#the-controller) says when each happens."""
    margin: float = Field(gt=0.0, lt=1.0)
    """Added harm that must be ruled out before promotion."""
    weight: float = Field(ge=0.0, le=1.0)
    """Share of the rollback evidence; the weights of all metrics add up to one."""
    role: Literal["primary", "guardrail", "signal"] = "guardrail"
    """Primary ones also bound each step; signals can roll back, but promotion does not wait for evidence on them."""
    threshold: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Above it an answer counts: milliseconds for `slow_answers` and `slow_first_token`, tokens for `long_answers`."""


class RolloutSettings(Section):
    """How a canary goes out and what stops it."""

    steps: list[float] = [0.01, 0.10, 0.50]
    alpha_rollback: float = Field(default=0.05, gt=0.0, lt=1.0)
    alpha_promote: float = Field(default=0.05, gt=0.0, lt=1.0)
    harm_budget: float = 0.02
    """The largest expected harm, as a share of all users, at which the next step may be taken."""
    min_dwell_s: float = 3600.0
    min_users: list[int] = [5, 20, 50]
    """Treatment users, first seen in the step and matured, that each step needs."""
    maturity_s: float = 600.0
    """How long after a user's first interaction the user's outcome counts."""
    thumbs_margin: float = 0.05
    toxicity_margin: float = 0.02
    harmful_compliance_margin: float | None = None
    """The same for harmful requests complied with. Without it they can roll a canary back, but promotion does not wait
    for evidence on them: most traffic has few, and the gate has asked its probes."""
    over_refusal_margin: float = 0.05
    metrics: list[RolloutMetricSettings] | None = None
    """What decides, in place of the four metrics that the margins above belong to. Frozen at a rollout's launch."""
    breaker_error_share: float = 0.2
    breaker_min_requests: int = 20
    max_time_s: float = 14 * 24 * 3600.0
    bake_s: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Nothing is promoted sooner than this after the launch: 604800 is the full week that shows every weekday."""
    needs_approval: bool = False
    """Whether a person must order the promotion, once the evidence suffices."""
    watch_s: float = Field(default=3600.0, ge=0.0, allow_inf_nan=False)
    """How long a promoted version is watched by absolute limits, with the way back to the old champion open."""
    tick_s: float = 10.0
    auto_start: bool = True
    """Open a canary when a run passes its gate."""
    shadow: ShadowSettings = ShadowSettings()


class WebhookSettings(Section):
    """An address that is told of decisions; see `docs/webhooks.md`."""

    url: str
    """Where events are posted. `https://`, or `http://` on this machine."""
    secret_file: Path | None = None
    """A file with the secret that signs them: one to a line, the newest first, and each signs."""
    secret_env: str | None = None
    """The environment variable that holds the secret, where there is no file."""
    events: list[str] = ["*"]
    """Which events: their types, `rollout.*` for all of a kind, or `*`."""
    allow_http: bool = False
    """Post to `http://` elsewhere too: whoever is on the way can read it."""
    timeout_s: float = Field(default=10.0, gt=0.0, le=60.0)
    """For one attempt."""
    attempts: int = Field(default=10, ge=1, le=20)
    """So often an event is sent, over about a day and a half, before it is given up."""

    @model_validator(mode="after")
    def _can_be_used(self) -> WebhookSettings:
        if problem := why_not_an_address(self.url, allow_http=self.allow_http):
            raise ValueError(f"url {problem}")
        if (self.secret_file is None) == (self.secret_env is None):
            raise ValueError("needs either secret_file or secret_env")
        if unknown := unknown_patterns(self.events):
            raise ValueError(f"events has {', '.join(unknown)}, which nothing is called")
        return self


class LogSettings(Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class Settings(Section):
    """The whole tree."""

    database: DatabaseSettings = DatabaseSettings()
    state_dir: Path = Path("var")
    """What belongs to this machine: spools, the signing secret, caches."""
    auth: AuthSettings = AuthSettings()
    serving: ServingSettings = ServingSettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    retention: RetentionSettings = RetentionSettings()
    retrain: RetrainSettings = RetrainSettings()
    rollout: RolloutSettings = RolloutSettings()
    webhooks: list[WebhookSettings] = []
    """Who is told of decisions, by a signed request each; nobody unless it is set."""
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _experiments_keep_their_records(self) -> Settings:
        kept_days, needed_days = self.retention.interactions_days, self.rollout.max_time_s / 86400.0
        if kept_days is not None and kept_days < needed_days:
            raise ValueError(
                f"retention.interactions_days is {kept_days:g}: a rollout needs records of up to {needed_days:g} days"
                " (rollout.max_time_s)"
            )
        return self

    @model_validator(mode="after")
    def _limits_count_for_all_workers(self) -> Settings:
        # Keys may have limits of their own in the database, so that none under `serving.limits` says nothing.
        serving = self.serving
        if self.auth.required and serving.workers > 1 and serving.limits.store == "memory":
            raise ValueError(
                f"serving.workers is {serving.workers} and serving.limits.store is memory: each worker would grant"
                " every key's limits anew; set serving.limits.store to database"
            )
        return self

    @model_validator(mode="after")
    def _the_gate_has_its_judge(self) -> Settings:
        # Found out at the gate, a whole training would have been for nothing.
        if self.retrain.gate.judge == "llm" and self.feedback.judge.url is None:
            raise ValueError("retrain.gate.judge is llm: set feedback.judge.url and feedback.judge.model")
        return self


def find_config(given: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the one given, else `PAWL_CONFIG`, else `./pawl.yaml` if it is there."""
    if given is not None:
        return given
    if named := environ.get("PAWL_CONFIG"):
        return Path(named)
    fallback = Path("pawl.yaml")
    return fallback if fallback.is_file() else None


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read `path` (None: no file) and lay the environment over it.

    Raises:
        ConfigurationError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    tree = _read_yaml(path) if path else {}
    _lay_over(tree, environ)
    try:
        return Settings.model_validate(tree)
    except ValidationError as exc:
        raise ConfigurationError(_first_problem(exc, path)) from exc


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as exc:
        raise ConfigurationError(f"cannot read the configuration {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"cannot read the configuration {path}: it is not UTF-8 text") from exc
    except yaml.YAMLError as exc:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path}: expected a mapping of sections at the top")
    return tree


def _lay_over(tree: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put every `PAWL_A__B=value` at `tree["a"]["b"]`; values are read as YAML, so numbers and lists work."""
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in NOT_SETTINGS:
            continue
        *parents, leaf = name.removeprefix(ENV_PREFIX).lower().split("__")
        node = tree
        for parent in parents:
            child = node.get(parent)
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[leaf] = _environment_value(leaf, environ[name])


def _environment_value(leaf: str, text: str) -> Any:
    if leaf in {"secret", "password", "url", "api_key"}:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _first_problem(exc: ValidationError, path: Path | None) -> str:
    problem = exc.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"]) or "(top)"
    what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
    more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
    return f"configuration {path or 'from the environment'}: {key}: {what}{more}"

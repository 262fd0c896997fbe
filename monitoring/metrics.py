"""Every Prometheus series Pawl emits, declared once.

Importing this module declares the series on `REGISTRY` and does nothing else; whoever owns a fact sets its series.
Label values are bounded: `model` is a configured alias (or `UNKNOWN_MODEL`, never a name a client made up), `variant`
a variant of its experiment, and the rest are closed sets. No user, key, prompt or completion id is ever a label.
"""

from enum import StrEnum
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

UNKNOWN_MODEL: Final = "unknown"
"""The `model` label of a request for a model that is not configured."""


class Outcome(StrEnum):
    """How a request ended, as the `outcome` label of `REQUESTS`."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    SERVER_ERROR = "server_error"


class RefusalKind(StrEnum):
    """What was refused, as the `kind` label of `REFUSALS`."""

    HARMFUL = "harmful"
    BENIGN = "benign"


REGISTRY: Final = CollectorRegistry()

_SERVED = ("model", "variant")

# Buckets follow what language models do: a warm first token takes tens of milliseconds, a cold long prompt half a
# minute; tokens come every 5-100 ms; a whole answer takes seconds to minutes.
FIRST_TOKEN_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
INTER_TOKEN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
DURATION_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
OVERHEAD_BUCKETS: Final = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.05, 0.1)
QUEUE_WAIT_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
GUARD_BUCKETS: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 5e-3, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LOOP_LAG_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

# Traffic and latency, set by the gateway.
REQUESTS: Final = Counter(
    "pawl_requests_total",
    "Requests answered, by how they ended.",
    ("route", "model", "variant", "outcome"),
    registry=REGISTRY,
)
REQUEST_DURATION: Final = Histogram(
    "pawl_request_duration_seconds",
    "From the request's first byte to the answer's last.",
    ("route", *_SERVED),
    buckets=DURATION_BUCKETS,
    registry=REGISTRY,
)
TIME_TO_FIRST_TOKEN: Final = Histogram(
    "pawl_time_to_first_token_seconds",
    "From the request's first byte to the first streamed chunk with content.",
    _SERVED,
    buckets=FIRST_TOKEN_BUCKETS,
    registry=REGISTRY,
)
INTER_TOKEN: Final = Histogram(
    "pawl_inter_token_seconds",
    "Between two streamed chunks of one answer.",
    _SERVED,
    buckets=INTER_TOKEN_BUCKETS,
    registry=REGISTRY,
)
GATEWAY_OVERHEAD: Final = Histogram(
    "pawl_gateway_overhead_seconds",
    "Time a request spent in the gateway itself, waiting for the engine left out.",
    ("route",),
    buckets=OVERHEAD_BUCKETS,
    registry=REGISTRY,
)
IN_FLIGHT: Final = Gauge("pawl_requests_in_flight", "Requests being answered now.", registry=REGISTRY)
TOKENS: Final = Counter(
    "pawl_tokens_total",
    "Tokens as the engine counted them; direction is input or output.",
    ("direction",),
    registry=REGISTRY,
)
UPSTREAM_ERRORS: Final = Counter(
    "pawl_upstream_errors_total",
    "Failed attempts to get an answer from an engine, retried ones included.",
    ("reason",),
    registry=REGISTRY,
)
ENGINE_EJECTED: Final = Gauge(
    "pawl_engine_ejected",
    "1 while the replica is out of service because its requests or health checks failed; where all are, all are used.",
    ("model", "replica"),
    registry=REGISTRY,
)
ENGINE_VIEWS: Final = Gauge(
    "pawl_engine_views",
    "Gateway processes by what they think of the replica: state is in or out (of service); each judges for itself.",
    ("model", "replica", "state"),
    registry=REGISTRY,
)
REPLICA_RUNNING: Final = Gauge(
    "pawl_replica_requests_running",
    "Requests this gateway has open at the replica; one that several models share shows the same under each.",
    ("model", "replica"),
    registry=REGISTRY,
)
RETRIES: Final = Counter(
    "pawl_retries_total", "Second attempts made, on another replica or connection.", registry=REGISTRY
)
CLIENT_RETRIES: Final = Counter(
    "pawl_client_retries_total",
    "Requests that an official SDK says it sends again (`x-stainless-retry-count`), however they end.",
    ("route",),
    registry=REGISTRY,
)
QUEUE_WAITING: Final = Gauge(
    "pawl_queue_waiting", "Requests waiting for a free place at an engine now.", registry=REGISTRY
)
QUEUE_WAIT: Final = Histogram(
    "pawl_queue_wait_seconds",
    "How long requests waited that had to, until they were let in, refused or given up.",
    buckets=QUEUE_WAIT_BUCKETS,
    registry=REGISTRY,
)
RATE_LIMITED: Final = Counter(
    "pawl_rate_limited_total",
    "Requests refused by a limit; reason is the limit (requests, tokens, concurrency, budget, queue), user_ before a"
    " limit of the key's user.",
    ("reason",),
    registry=REGISTRY,
)
LOOP_LAG: Final = Histogram(
    "pawl_event_loop_lag_seconds",
    "How late the event loop woke a task that slept.",
    buckets=LOOP_LAG_BUCKETS,
    registry=REGISTRY,
)
BUILD_INFO: Final = Gauge("pawl_build_info", "1, labelled with the running version.", ("version",), registry=REGISTRY)

# What users say and what the scorers see.
FEEDBACK: Final = Counter(
    "pawl_feedback_total",
    "Feedback accepted. value is up, down, low, high, a report's kind, or given where it would be free text or an id.",
    ("type", "value", *_SERVED),
    registry=REGISTRY,
)
SCORED: Final = Counter(
    "pawl_scored_responses_total", "Answers the toxicity scorer has read.", _SERVED, registry=REGISTRY
)
TOXIC: Final = Counter(
    "pawl_toxic_responses_total", "Scored answers at or above the toxicity threshold.", _SERVED, registry=REGISTRY
)
REFUSALS: Final = Counter(
    "pawl_refusals_total",
    "Answers that declined; kind says whether the request was harmful or benign.",
    ("kind", *_SERVED),
    registry=REGISTRY,
)
HARMFUL_REQUESTS: Final = Counter(
    "pawl_harmful_requests_total",
    "Harmful requests whose answer was classified, refused or not.",
    _SERVED,
    registry=REGISTRY,
)
BENIGN_REQUESTS: Final = Counter(
    "pawl_benign_requests_total",
    "Benign requests whose answer was classified, refused or not.",
    _SERVED,
    registry=REGISTRY,
)

# Preference pairs and retraining.
PAIRS: Final = Counter("pawl_pairs_total", "Preference pairs mined.", ("source",), registry=REGISTRY)
PAIRS_REJECTED: Final = Counter(
    "pawl_pairs_rejected_total",
    "Candidates that gave no pair when the newest retraining run of each model mined all feedback; grows with them.",
    ("reason",),
    registry=REGISTRY,
)
RETRAIN_RUNS: Final = Counter("pawl_retrain_runs_total", "Retraining runs finished.", ("outcome",), registry=REGISTRY)
RETRAIN_SKIPS: Final = Counter(
    "pawl_retrain_skips_total", "Times that no round was due when asked.", ("reason",), registry=REGISTRY
)
RETRAIN_LAST_SUCCESS: Final = Gauge(
    "pawl_retrain_last_success_timestamp_seconds",
    "Unix time of the last run that published an adapter; 0 where there was none or the process does not know.",
    registry=REGISTRY,
)
GATE_VERDICTS: Final = Counter(
    "pawl_gate_verdicts_total", "What the gate said about a candidate.", ("verdict",), registry=REGISTRY
)

# Records on their way to the database.
SPOOL_ROWS: Final = Gauge("pawl_spool_rows", "Rows in this process's spool not yet in the database.", registry=REGISTRY)
SPOOL_OLDEST: Final = Gauge(
    "pawl_spool_oldest_seconds", "Age of the spool's oldest row; 0 when it is empty.", registry=REGISTRY
)
RECORDS_DROPPED: Final = Counter(
    "pawl_records_dropped_total", "Interactions served without a record because the disk refused it.", registry=REGISTRY
)
RECORDS_DAMAGED: Final = Counter(
    "pawl_records_damaged_total", "Records on this machine's disk that could not be read back.", registry=REGISTRY
)
DEAD_LETTERS: Final = Counter(
    "pawl_dead_letters_total", "Records the database would not take, set aside for a person.", registry=REGISTRY
)

# Rollouts.
ADAPTERS_MISSING: Final = Gauge(
    "pawl_adapters_missing",
    "Adapters that a replica should serve and does not, or not as they were trained.",
    ("model", "replica"),
    registry=REGISTRY,
)
ADAPTER_CHANGES: Final = Counter(
    "pawl_adapter_changes_total",
    "Adapters that the worker loaded into a replica, unloaded or refused to leave there.",
    ("replica", "action"),
    registry=REGISTRY,
)
ROLLOUT_WEIGHT: Final = Gauge(
    "pawl_rollout_weight", "Share of users the variant is assigned, from 0 to 1.", _SERVED, registry=REGISTRY
)
ROLLOUT_STATE: Final = Gauge(
    "pawl_rollout_state",
    "1 for the state the model's rollout is in, 0 for the others.",
    ("model", "state"),
    registry=REGISTRY,
)
ROLLOUT_BLIND: Final = Gauge(
    "pawl_rollout_blind",
    "1 while the controller of the model's rollouts cannot read the database; gateways keep the last known weights.",
    ("model",),
    registry=REGISTRY,
)
ROLLBACKS: Final = Counter(
    "pawl_rollbacks_total",
    "Rollouts rolled back ever, by the metric that decided it; else by breaker or operator.",
    ("metric",),
    registry=REGISTRY,
)

SHADOW_ANSWERS: Final = Counter(
    "pawl_shadow_answers_total",
    "Questions put to the candidate of a shadow run: ok, error, gone (erased meanwhile) or left_out.",
    ("model", "outcome"),
    registry=REGISTRY,
)
WEBHOOK_DELIVERIES: Final = Counter(
    "pawl_webhook_deliveries_total",
    "Attempts to tell an endpoint of an event: sent, failed and to be repeated, or dead.",
    ("outcome",),
    registry=REGISTRY,
)

# Keys and limits.
KEYS_READ: Final = Gauge(
    "pawl_keys_read_timestamp_seconds",
    "Unix time at which this process last read the table of keys; 0 where keys are not required.",
    registry=REGISTRY,
)
KEY_LOOK_UPS: Final = Counter(
    "pawl_key_look_ups_total",
    "Credentials that were not in this process's cache: good, refused, or unavailable for want of the database.",
    ("outcome",),
    registry=REGISTRY,
)
LIMIT_STORE_CALLS: Final = Counter(
    "pawl_limit_store_calls_total",
    "Times the shared store of the limits was asked: granted, refused, reported, or unavailable.",
    ("outcome",),
    registry=REGISTRY,
)

# Guards.
GUARD_FINDINGS: Final = Counter(
    "pawl_guard_findings_total",
    "What guards found, and what was done: flag, refuse, replace; away_pass and away_refuse where the scorer was away.",
    ("guard", "action"),
    registry=REGISTRY,
)
GUARD_SECONDS: Final = Histogram(
    "pawl_guard_seconds",
    "How long a guard took for one prompt, one answer or window, or one record.",
    ("guard",),
    buckets=GUARD_BUCKETS,
    registry=REGISTRY,
)


def render() -> tuple[bytes, str]:
    """Return the exposition of every series, and its content type."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST

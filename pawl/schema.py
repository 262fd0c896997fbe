"""The tables of the shared database. Times are seconds since the epoch; text that people or models wrote is JSON text.

JSON text (ASCII, escaped) rather than JSONB: it keeps every byte sequence a client or model can produce, NUL and lone
surrogates included, the same on SQLite and PostgreSQL.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

interactions = Table(
    "interactions",
    metadata,
    Column("id", String(48), primary_key=True),  # the completion id without its prefix
    Column("completion_id", String(64), nullable=False),
    Column("route", String(32), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("alias", String(255), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("user_id", String(512)),
    Column("unit_id", String(512), nullable=False),
    Column("experiment", String(255)),
    Column("assigned_variant", String(255), nullable=False),
    Column("served_variant", String(255), nullable=False),
    Column("probability", Double, nullable=False),
    Column("is_analysed", Boolean, nullable=False),
    Column("phase", Integer, nullable=False),
    Column("route_version", Integer, nullable=False),
    Column("model", String(255), nullable=False),
    Column("regenerate_of", String(48)),
    Column("prompt", Text),
    Column("prompt_sha", String(64)),
    Column("completion", Text),
    Column("parameters", Text),
    Column("finish_reason", String(32)),
    Column("status", String(32), nullable=False),
    Column("http_status", Integer, nullable=False),
    Column("is_complete", Boolean, nullable=False),
    Column("is_stored", Boolean, nullable=False),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("latency_ms", Double, nullable=False),
    Column("first_byte_ms", Double),
    Column("tools", Text),
    Index(None, "created_at"),
    Index(None, "prompt_sha"),
    Index(None, "regenerate_of"),
    Index(None, "experiment", "is_analysed", "created_at"),
    Index(  # when somebody first came into an experiment
        None,
        "experiment",
        "unit_id",
        "created_at",
        "id",
        sqlite_where=text("experiment IS NOT NULL"),
        postgresql_where=text("experiment IS NOT NULL"),
    ),
    Index(None, "user_id", "key_id", "created_at"),
    Index(None, "key_id", "id"),
)

feedback_events = Table(
    "feedback_events",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("feedback_id", String(80), nullable=False),
    Column("interaction_id", String(48), nullable=False),
    Column("completion_id", String(64), nullable=False),
    Column("type", String(16), nullable=False),
    Column("value", Text, nullable=False),
    Column("is_retraction", Boolean, nullable=False),
    Column("reason", Text),
    Column("comment", Text),
    Column("tags", Text),
    Column("key_id", String(64), nullable=False),
    Column("user_id", String(512)),
    Column("created_at", Double, nullable=False),
    Index(None, "feedback_id"),
    Index(None, "interaction_id"),
    Index(None, "created_at"),
    Index(None, "user_id"),
)

scores = Table(
    "scores",
    metadata,
    Column("interaction_id", String(48), primary_key=True),
    Column("toxicity", Double),
    Column("is_toxic", Boolean),
    Column("response", String(16), nullable=False),
    Column("is_harmful_prompt", Boolean, nullable=False),
    Column("scorer", String(128), nullable=False),
    Column("scored_at", Double, nullable=False),
    Index(None, "scored_at"),
)

pairs = Table(
    "pairs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("source", String(32), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("chosen", Text, nullable=False),
    Column("rejected", Text, nullable=False),
    Column("margin", Double, nullable=False),
    Column("n_voters", Integer, nullable=False),
    Column("principals", Text, nullable=False),
    Column("chosen_interaction", String(48)),
    Column("rejected_interaction", String(48), nullable=False),
    Column("models", Text, nullable=False),
    Column("probability", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("mined_at", Double, nullable=False),
    Column("first_run", String(32)),
    Column("tools", Text),
    Index(None, "alias", "created_at"),
    Index(None, "chosen_interaction"),
    Index(None, "rejected_interaction"),
)

models = Table(
    "models",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("base", String(512), nullable=False),
    Column("parent", String(255)),
    Column("run_id", String(32)),
    Column("path", String(1024)),
    Column("sha256", String(64)),
    Column("dataset_sha", String(64)),
    Column("state", String(16), nullable=False),  # candidate, rejected, challenger, champion, retired
    Column("manifest", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(None, "alias", "state"),
    *(
        Index(f"uq_models_{state}", "alias", unique=True, sqlite_where=only, postgresql_where=only)
        for state in ("champion", "challenger")  # one of each for an alias
        for only in [text(f"state = '{state}'")]
    ),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("cycle", String(64), nullable=False),
    Column("status", String(16), nullable=False),  # running, passed, failed, cannot_tell, skipped, error, given_up
    Column("step", String(32), nullable=False),
    Column("detail", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    UniqueConstraint("alias", "cycle"),
)

routes = Table(
    "routes",
    metadata,
    Column("alias", String(255), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("route", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("updated_at", Double, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("champion", String(255), nullable=False),
    Column("candidate", String(255), nullable=False),
    Column("status", String(16), nullable=False),
    Column("config", Text, nullable=False),
    Column("config_hash", String(64), nullable=False),
    Column("state", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(None, "alias", "status"),
)

decisions = Table(
    "decisions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("rollout_id", String(32), nullable=False),
    Column("at", Double, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("metric", String(64)),
    Column("step", Integer, nullable=False),
    Column("weight", Double, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("config_hash", String(64), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("inputs", Text),  # of a decision that nobody ordered: what it was made from
    Index(None, "rollout_id", "id"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", Double, nullable=False),
)

retrain_checks = Table(  # Whether a round was due, whenever somebody asked.
    "retrain_checks",
    metadata,
    Column("alias", String(255), primary_key=True),
    Column("at", Double, primary_key=True),
    Column("moment", Double),  # of the schedule, that this was the answer to
    Column("is_due", Boolean, nullable=False),
    Column("code", String(32), nullable=False),
    Column("reason", Text, nullable=False),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("payload", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),  # the public part; it owns what the key was used for
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the secret, which is stored nowhere
    Column("previous_digest", String(64)),  # of the secret before the last rotation
    Column("previous_expires_at", Double),
    Column("scopes", Text, nullable=False),
    Column("limits", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("created_at", Double, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("last_used_at", Double),  # to about ten minutes
    Column("change", BigInteger, nullable=False),  # number of the change in `table_changes` that wrote the row last
    Index(None, "change"),
)

table_changes = Table(
    "table_changes",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
)

limit_windows = Table(
    "limit_windows",
    metadata,
    Column("subject", String(128), primary_key=True),  # a key, or a user within one
    Column("name", String(32), primary_key=True),  # the limit
    Column("used", BigInteger, nullable=False),
    Column("ends_at", Double, nullable=False),
    Index(None, "ends_at"),
)

limit_slots = Table(
    "limit_slots",
    metadata,
    Column("subject", String(128), primary_key=True),
    Column("holder", String(128), primary_key=True),  # a gateway process
    Column("n_slots", Integer, nullable=False),
    Column("expires_at", Double, nullable=False),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(255), nullable=False),
    Column("detail", Text, nullable=False),
    Index(None, "at"),
    Index(None, "subject", "at"),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("who", String(32), nullable=False),  # a keyed digest: whoever reads the table learns no name from it
    Column("until", Double, nullable=False),  # what was sent later is new
    Column("reason", Text, nullable=False),
    Column("key_check", String(16), nullable=False),  # tells whether `who` was made with the secret at hand
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("report", Text, nullable=False),
    UniqueConstraint("who", "until"),
    sqlite_autoincrement=True,
)

erasure_places = Table(
    "erasure_places",
    metadata,
    Column("place", String(255), primary_key=True),  # a drain, by host and folder
    Column("number", Integer, nullable=False),  # the last tombstone that has been applied there
    Column("seen_at", Double, nullable=False),
)

pair_reviews = Table(
    "pair_reviews",
    metadata,
    Column("pair_id", String(32), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("reason", String(32), nullable=False),  # why the defence holds it back
    Column("quarantined_at", Double, nullable=False),
    Column("decision", String(16)),  # accepted, rejected; none while it waits
    Column("reviewer", String(128)),
    Column("decided_at", Double),
    Index(None, "alias", "decision"),
)

judge_verdicts = Table(
    "judge_verdicts",
    metadata,
    Column("id", String(32), primary_key=True),  # a digest of the two interactions
    Column("alias", String(255), nullable=False),
    Column("conversation", String(64), nullable=False),  # what both answered, by its hash
    Column("first", String(48), nullable=False),  # the smaller id of the two interactions
    Column("second", String(48), nullable=False),
    Column("outcome", String(16), nullable=False),  # preferred, tied, disagreed, unreadable
    Column("winner", String(48)),
    Column("margin", Double, nullable=False),
    Column("scores", Text, nullable=False),  # by order, principle and side, 0 to 1
    Column("judge", String(255), nullable=False),  # the model
    Column("constitution", String(64), nullable=False),  # SHA-256
    Column("attempts", Integer, nullable=False),
    Column("judged_at", Double, nullable=False),
    Index(None, "alias", "conversation"),
    Index(None, "first"),
    Index(None, "second"),
)

shadow_runs = Table(
    "shadow_runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alias", String(255), nullable=False),
    Column("champion", String(255), nullable=False),
    Column("candidate", String(255), nullable=False),
    Column("status", String(16), nullable=False),  # running, passed, failed, held, stopped
    Column("reason", Text, nullable=False),
    Column("rules", Text, nullable=False),  # frozen at its start
    Column("actor", String(64), nullable=False),
    Column("rollout_id", String(32)),  # that it went on to
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(
        "uq_shadow_runs_running",
        "alias",
        unique=True,
        sqlite_where=text("status = 'running'"),
        postgresql_where=text("status = 'running'"),
    ),
)

_is_unscored = text("scored_at IS NULL AND error IS NULL")

shadow_answers = Table(  # What the candidate of a shadow run says where the champion has answered.
    "shadow_answers",
    metadata,
    Column("run_id", String(32), primary_key=True),
    Column("interaction_id", String(48), primary_key=True),
    Column("model", String(255), nullable=False),
    Column("answer", Text),
    Column("finish_reason", String(32)),
    Column("error", String(32)),  # why there is no answer
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("latency_ms", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("toxicity", Double),
    Column("is_toxic", Boolean),
    Column("response", String(16)),
    Column("is_harmful_prompt", Boolean),
    Column("scorer", String(128)),
    Column("scored_at", Double),
    Index(None, "interaction_id"),
    Index("ix_shadow_answers_unscored", "created_at", sqlite_where=_is_unscored, postgresql_where=_is_unscored),
)

webhook_events = Table(  # Written by the transaction that decided it.
    "webhook_events",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("type", String(64), nullable=False),
    Column("at", Double, nullable=False),
    Column("payload", Text, nullable=False),
    Index(None, "at"),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("endpoint", String(32), primary_key=True),  # a digest of its address
    Column("since", Double, nullable=False),  # older events are not sent there
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("event_id", String(64), primary_key=True),
    Column("endpoint", String(32), primary_key=True),
    Column("status", String(16), nullable=False),  # waiting, sent, dead
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, nullable=False),
    Column("last_error", String(64)),
    Column("updated_at", Double, nullable=False),
    Index(None, "endpoint", "status", "next_at"),
)

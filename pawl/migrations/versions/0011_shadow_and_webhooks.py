"""answers that nobody saw, and who is told of decisions

Revision: 0011, after 0010.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

TABLES = ("webhook_deliveries", "webhook_endpoints", "webhook_events", "shadow_answers", "shadow_runs")


def upgrade() -> None:
    _shadow_runs()
    _shadow_answers()
    _webhooks()


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)


def _shadow_runs() -> None:
    op.create_table(
        "shadow_runs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("champion", sa.String(length=255), nullable=False),
        sa.Column("candidate", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("rules", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("rollout_id", sa.String(length=32), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shadow_runs")),
    )
    running = sa.text("status = 'running'")
    op.create_index(
        "uq_shadow_runs_running", "shadow_runs", ["alias"], unique=True, sqlite_where=running, postgresql_where=running
    )


def _shadow_answers() -> None:
    op.create_table(
        "shadow_answers",
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("interaction_id", sa.String(length=48), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("finish_reason", sa.String(length=32), nullable=True),
        sa.Column("error", sa.String(length=32), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("latency_ms", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("toxicity", sa.Double(), nullable=True),
        sa.Column("is_toxic", sa.Boolean(), nullable=True),
        sa.Column("response", sa.String(length=16), nullable=True),
        sa.Column("is_harmful_prompt", sa.Boolean(), nullable=True),
        sa.Column("scorer", sa.String(length=128), nullable=True),
        sa.Column("scored_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "interaction_id", name=op.f("pk_shadow_answers")),
    )
    op.create_index(op.f("ix_shadow_answers_interaction_id"), "shadow_answers", ["interaction_id"])
    unscored = sa.text("scored_at IS NULL AND error IS NULL")
    op.create_index(
        "ix_shadow_answers_unscored",
        "shadow_answers",
        ["created_at"],
        sqlite_where=unscored,
        postgresql_where=unscored,
    )


def _webhooks() -> None:
    op.create_table(
        "webhook_events",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_events")),
    )
    op.create_index(op.f("ix_webhook_events_at"), "webhook_events", ["at"])
    op.create_table(
        "webhook_endpoints",
        sa.Column("endpoint", sa.String(length=32), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("endpoint", name=op.f("pk_webhook_endpoints")),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("event_id", sa.String(length=64), nullable=False),
        sa.Column("endpoint", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("last_error", sa.String(length=64), nullable=True),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", "endpoint", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(
        op.f("ix_webhook_deliveries_endpoint_status_next_at"), "webhook_deliveries", ["endpoint", "status", "next_at"]
    )

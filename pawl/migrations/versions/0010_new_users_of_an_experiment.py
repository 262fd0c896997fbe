"""indexes for a controller that reads only what is new: users of an experiment, and scores

Revision: 0010, after 0009.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

UNITS = "ix_interactions_experiment_unit_id_created_at_id"
IN_EXPERIMENTS = sa.text("experiment IS NOT NULL")


def upgrade() -> None:
    op.create_index(
        op.f(UNITS),
        "interactions",
        ["experiment", "unit_id", "created_at", "id"],
        sqlite_where=IN_EXPERIMENTS,
        postgresql_where=IN_EXPERIMENTS,
    )
    op.create_index(op.f("ix_scores_scored_at"), "scores", ["scored_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_scores_scored_at"), "scores")
    op.drop_index(op.f(UNITS), "interactions")

"""the queue of quarantined pairs, and an index that tells when a principal came first

Revision: 0005, after 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

FIRST_SEEN = ["user_id", "key_id", "created_at"]


def upgrade() -> None:
    op.create_table(
        "pair_reviews",
        sa.Column("pair_id", sa.String(length=32), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=False),
        sa.Column("quarantined_at", sa.Double(), nullable=False),
        sa.Column("decision", sa.String(length=16), nullable=True),
        sa.Column("reviewer", sa.String(length=128), nullable=True),
        sa.Column("decided_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("pair_id", name=op.f("pk_pair_reviews")),
    )
    op.create_index(op.f("ix_pair_reviews_alias_decision"), "pair_reviews", ["alias", "decision"])
    # It also finds what the index on `user_id` alone did, so that no record is written to one index more.
    op.create_index(op.f("ix_interactions_user_id_key_id_created_at"), "interactions", FIRST_SEEN)
    op.drop_index(op.f("ix_interactions_user_id"), "interactions")


def downgrade() -> None:
    op.create_index(op.f("ix_interactions_user_id"), "interactions", ["user_id"])
    op.drop_index(op.f("ix_interactions_user_id_key_id_created_at"), "interactions")
    op.drop_table("pair_reviews")

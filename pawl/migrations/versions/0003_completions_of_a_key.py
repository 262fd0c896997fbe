"""an index for listing the stored completions of a key

Revision: 0003, after 0002.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_interactions_key_id_id"), "interactions", ["key_id", "id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_interactions_key_id_id"), "interactions")

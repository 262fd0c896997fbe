"""whether a round was due, whenever somebody asked

Revision: 0007, after 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "retrain_checks",
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("moment", sa.Double(), nullable=True),
        sa.Column("is_due", sa.Boolean(), nullable=False),
        sa.Column("code", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("alias", "at", name=op.f("pk_retrain_checks")),
    )


def downgrade() -> None:
    op.drop_table("retrain_checks")

"""the tools that a request offered, with its answer and with the pairs that are made of it

Revision: 0012, after 0011.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TABLES = ("interactions", "pairs")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("tools", sa.Text(), nullable=True))


def downgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as altered:
            altered.drop_column("tools")

"""what a judge said of two answers to one conversation

Revision: 0006, after 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "judge_verdicts",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("conversation", sa.String(length=64), nullable=False),
        sa.Column("first", sa.String(length=48), nullable=False),
        sa.Column("second", sa.String(length=48), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("winner", sa.String(length=48), nullable=True),
        sa.Column("margin", sa.Double(), nullable=False),
        sa.Column("scores", sa.Text(), nullable=False),
        sa.Column("judge", sa.String(length=255), nullable=False),
        sa.Column("constitution", sa.String(length=64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("judged_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judge_verdicts")),
    )
    op.create_index(op.f("ix_judge_verdicts_alias_conversation"), "judge_verdicts", ["alias", "conversation"])
    op.create_index(op.f("ix_judge_verdicts_first"), "judge_verdicts", ["first"])
    op.create_index(op.f("ix_judge_verdicts_second"), "judge_verdicts", ["second"])


def downgrade() -> None:
    op.drop_table("judge_verdicts")

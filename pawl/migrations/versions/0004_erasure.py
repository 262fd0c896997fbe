"""tombstones of what people had erased, and the indexes that erasure and lineage look things up by

Revision: 0004, after 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INDEXES = (
    ("feedback_events", "user_id"),
    ("pairs", "chosen_interaction"),
    ("pairs", "rejected_interaction"),
)
PERSONAL = {
    "interactions": ("user_id", "unit_id", "prompt", "prompt_sha", "completion", "parameters"),
    "feedback_events": ("user_id", "value", "reason", "comment", "tags"),
    "pairs": ("prompt", "chosen", "rejected", "principals"),
    "dead_letters": ("payload",),
}


def upgrade() -> None:
    op.create_table(
        "tombstones",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("who", sa.String(length=32), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("key_check", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("report", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_tombstones")),
        sa.UniqueConstraint("who", "until", name=op.f("uq_tombstones_who_until")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "erasure_places",
        sa.Column("place", sa.String(length=255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("place", name=op.f("pk_erasure_places")),
    )
    for table, column in INDEXES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    _keep_out_of_statistics(0)


def downgrade() -> None:
    _keep_out_of_statistics(-1)
    for table, column in INDEXES:
        op.drop_index(op.f(f"ix_{table}_{column}"), table)
    op.drop_table("erasure_places")
    op.drop_table("tombstones")


def _keep_out_of_statistics(target: int) -> None:
    """PostgreSQL's planner keeps samples of a column's values, out of reach of any deletion: not of these columns."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, columns in PERSONAL.items():
        for column in columns:
            _drop_samples(table, column)
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STATISTICS {target}")


def _drop_samples(table: str, column: str) -> None:
    """Those that are there stay otherwise. A column that gets the type it has loses them, and nothing is rewritten."""
    query = sa.text(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = CAST(:table AS regclass) AND attname = :column"
    )
    kind = op.get_bind().execute(query, {"table": table, "column": column}).scalar_one()
    op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE {kind}")

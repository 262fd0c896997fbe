"""an alias has one champion and one challenger, whoever writes

Revision: 0008, after 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATES = ("champion", "challenger")


def upgrade() -> None:
    models = sa.table("models", *(sa.column(name) for name in ("name", "alias", "state", "updated_at")))
    newer = models.alias("newer")
    for state in STATES:
        is_later = sa.or_(
            newer.c.updated_at > models.c.updated_at,
            sa.and_(newer.c.updated_at == models.c.updated_at, newer.c.name > models.c.name),
        )
        rival = sa.select(newer.c.name).where(newer.c.alias == models.c.alias, newer.c.state == state, is_later)
        surplus = sa.and_(models.c.state == state, sa.exists(rival))
        op.execute(sa.update(models).where(surplus).values(state="retired"))
        where = sa.text(f"state = '{state}'")
        op.create_index(
            f"uq_models_{state}", "models", ["alias"], unique=True, sqlite_where=where, postgresql_where=where
        )


def downgrade() -> None:
    for state in reversed(STATES):
        op.drop_index(f"uq_models_{state}", table_name="models")

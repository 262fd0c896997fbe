"""Alembic's entry point: runs the migrations on the connection that `pawl.database` hands over."""

from __future__ import annotations

from alembic import context

from pawl.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()

"""The shared database: connections, migrations, and the few statements that differ between SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import DatabaseSettings

if TYPE_CHECKING:
    import psycopg
    from alembic.config import Config

WAL_SAFE_SINCE = (3, 51, 3)
"""Before this SQLite, a WAL file that several connections write and checkpoint at once can be corrupted (WAL reset)."""
SQLITE_BUSY_TIMEOUT_S = 30.0
CACHE_KIB, MUCH_CACHE_KIB = 2 * 1024, 64 * 1024
"""Of an SQLite database's pages, for each connection; the first is SQLite's own choice."""
LZ4_WHERE_KNOWN = """
    SELECT set_config(name, 'lz4', false) FROM pg_settings
    WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
"""
"""Of texts that this connection writes: PostgreSQL's own compression takes several times as long, and as long again
whenever they are read."""
BATCH_ROWS = 500
AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)
"""Errors of a database that does not answer, or takes no writes for now. Any other is about our own statements."""


class Database:
    """A pool of connections, with reads and writes told apart.

    On SQLite a write takes the lock at its start (`BEGIN IMMEDIATE`), so it never fails half-way on a lock upgrade;
    a read takes none beyond its statement.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection for queries."""
        with self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back on any error."""
        with self.engine.begin() as connection:
            yield connection

    def first_row(self, query: sa.Select[Any]) -> sa.RowMapping | None:
        """The first row that a query finds, by the names of its columns."""
        with self.read() as connection:
            return connection.execute(query).mappings().first()

    def insert_new(self, connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
        """Insert the rows whose primary key is not there yet; return how many those were."""
        added = 0
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        for start in range(0, len(rows), BATCH_ROWS):
            batch = [dict(row) for row in rows[start : start + BATCH_ROWS]]
            statement = insert(table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
            added += connection.execute(statement, batch).rowcount
        return added

    def close(self) -> None:
        """Close every connection; one that a thread still uses, as soon as it gives it back."""
        sa.event.listen(self.engine, "checkin", _close_late_comer)
        self.engine.dispose()


def open_database(settings: DatabaseSettings, *, reads_much: bool = False) -> Database:
    """Make the pool; connects to nothing yet.

    Args:
        reads_much: For who goes through whole tables: SQLite keeps more pages, which saves a tenth of the time.

    Raises:
        ConfigurationError: the URL cannot be used.
    """
    if settings.url.startswith("sqlite:///"):
        return Database(_sqlite_engine(settings, MUCH_CACHE_KIB if reads_much else CACHE_KIB))
    return Database(_postgresql_engine(settings))


def _close_late_comer(_connection: object, record: sa.pool.ConnectionPoolEntry) -> None:
    """Close a connection that comes back to a closed pool, where nobody would find it."""
    record.invalidate()


def _sqlite_engine(settings: DatabaseSettings, cache_kib: int) -> sa.Engine:
    path = Path(settings.url.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"database.url: cannot make {path.parent}: {exc.strerror}") from exc
    engine = sa.create_engine(settings.url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S})
    journal = "WAL" if sqlite3.sqlite_version_info >= WAL_SAFE_SINCE else "TRUNCATE"

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy's begin event below opens transactions, not the driver.
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA cache_size=-{cache_kib}")
        connection.execute("PRAGMA secure_delete=ON")  # What is deleted, by retention too, becomes zeros.

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgresql_engine(settings: DatabaseSettings) -> sa.Engine:
    try:
        url = sa.make_url(settings.url).set(drivername="postgresql+psycopg")
    except (sa.exc.ArgumentError, ValueError) as exc:
        raise ConfigurationError("database.url cannot be parsed") from exc
    if password := _password(settings):
        url = url.set(password=password)
    engine = sa.create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_pre_ping=True,
        pool_timeout=settings.connect_timeout_s,
        connect_args={
            "connect_timeout": max(2, round(settings.connect_timeout_s)),
            "options": "-c lock_timeout=10000 -c statement_timeout=120000",
        },
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(LZ4_WHERE_KNOWN)
        connection.commit()

    return engine


def _password(settings: DatabaseSettings) -> str | None:
    if settings.password_file:
        try:
            return settings.password_file.read_text().strip()
        except OSError as exc:
            raise ConfigurationError(f"database.password_file {settings.password_file}: {exc.strerror}") from exc
    return settings.password.get_secret_value() if settings.password else None


# Alembic is loaded where it is used: many processes open a database, and few look at its schema.


def _alembic(connection: sa.Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database) -> str:
    """Bring the schema to this version's; return the revision. Safe to run from several processes at once.

    Raises:
        Unreachable: the database does not answer.
    """
    from alembic import command
    from alembic.runtime.migration import MigrationContext

    try:
        with database.write() as connection:
            if not database.is_sqlite:  # One migrator at a time, as long as it takes; all until the transaction ends.
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7291650384)")
            command.upgrade(_alembic(connection), "head")
            return MigrationContext.configure(connection).get_current_revision() or "none"
    except sa.exc.OperationalError as exc:
        raise unreachable(database, exc) from exc


def revisions(database: Database) -> tuple[str | None, str | None]:
    """`(the database's revision, the one this version needs)`.

    Raises:
        Unreachable: the database does not answer.
    """
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(_alembic()).get_current_head()
    try:
        with database.read() as connection:
            return MigrationContext.configure(connection).get_current_revision(), head
    except sa.exc.DBAPIError as exc:
        raise unreachable(database, exc) from exc


def require_current_schema(database: Database) -> None:
    """Refuse to work on a schema this version does not know.

    Raises:
        ConfigurationError: the schema is older or newer; says which command to run.
        Unreachable: the database does not answer.
    """
    found, needed = revisions(database)
    if found != needed:
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this version needs {needed}: run `pawl db upgrade`"
        )


def unreachable(database: Database, exc: Exception) -> Unreachable:
    """The error for people: where, and the driver's first line."""
    lines = str(getattr(exc, "orig", None) or exc).strip().splitlines() or [type(exc).__name__]
    return Unreachable(
        f"database {database.engine.url.render_as_string(hide_password=True)} does not answer: {lines[0]}"
    )

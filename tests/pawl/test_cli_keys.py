"""`pawl keys`: made, listed, rotated and revoked from the command line, straight on the database."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl.api_keys import digest_of, parse_credential, valid_until
from pawl.clock import now
from pawl.database import Database
from pawl.key_store import list_keys
from tests.pawl.conftest import Cli, Said

pytestmark = pytest.mark.usefixtures("shared")


def secret_in(said: Said) -> str:
    parsed = parse_credential(said.json()["key"])
    assert parsed is not None
    return parsed.secret


def made(cli: Cli, *options: str) -> Said:
    said = cli("keys", "create", "--name", "ann's laptop", *options, "--json")
    assert said.code == 0, said.err
    return said


@pytest.mark.parametrize("command", ["keys", "keys create", "keys list", "keys revoke", "keys rotate"])
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    said = cli(*command.split(), "--help")
    assert (said.code, said.err) == (0, "")
    assert "Usage: pawl" in said.out


def test_a_key_is_shown_once_and_never_again(cli: Cli, shared: Database, tmp_path: Path) -> None:
    said = made(cli, "--scope", "admin", "--scope", "infer")
    secret = secret_in(said)
    assert "only this once" in said.err
    record = list_keys(shared)[0]
    assert valid_until(record, digest_of(secret), now()) == float("inf")
    assert record.scopes == {"admin", "infer"}
    assert record.created_by
    others = [cli("keys", "list"), cli("keys", "list", "--json"), cli("keys", "revoke", record.id)]
    assert [each.code for each in others] == [0, 0, 0]
    for each in others:
        assert secret not in each.out + each.err
        assert record.digest not in each.out + each.err
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert record.id.encode() in files
    assert secret.encode() not in files


def test_limits_priority_and_expiry_are_kept(cli: Cli, shared: Database) -> None:
    options = ("--requests-per-minute", "10", "--tokens-per-day", "0", "--priority", "9", "--expires-in", "90d")
    fields = made(cli, *options).json()
    record = list_keys(shared)[0]
    assert fields["limits"] == {"requests_per_minute": 10, "tokens_per_day": 0}
    assert (record.limits.requests_per_minute, record.limits.tokens_per_day, record.priority) == (10, 0, 9)
    assert record.expires_at is not None
    assert 0 < record.created_at + 90 * 86400 - record.expires_at + 60 < 120
    assert fields["scopes"] == ["feedback", "infer"]


def test_a_rotation_keeps_the_id_and_both_secrets_for_a_while(cli: Cli, shared: Database) -> None:
    first = made(cli)
    key_id = first.json()["id"]
    second = cli("keys", "rotate", key_id, "--overlap", "2h", "--json")
    assert second.code == 0
    assert second.json()["id"] == key_id
    record = list_keys(shared)[0]
    assert valid_until(record, digest_of(secret_in(second)), now()) == float("inf")
    assert valid_until(record, digest_of(secret_in(first)), now() + 7000) is not None
    assert valid_until(record, digest_of(secret_in(first)), now() + 7300) is None


def test_a_revoked_key_is_listed_as_such_and_not_rotated(cli: Cli) -> None:
    key_id = made(cli).json()["id"]
    assert cli("keys", "revoke", key_id, "--json").json()["state"] == "revoked"
    assert [row["state"] for row in cli("keys", "list", "--json").json()] == ["revoked"]
    assert cli("keys", "rotate", key_id).code == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("create",), 2),
        (("create", "--name", " "), 2),
        (("create", "--name", "x" * 129), 2),
        (("create", "--name", "bell\a"), 2),
        (("create", "--name", "x", "--scope", "root"), 2),
        (("create", "--name", "x", "--priority", "10"), 2),
        (("create", "--name", "x", "--expires-in", "soon"), 2),
        (("create", "--name", "x", "--concurrency", "-1"), 2),
        (("rotate", "0123456789abcdef", "--overlap", "1 day"), 2),
        (("rotate", "0123456789abcdef"), 1),
        (("revoke", "'; DROP TABLE api_keys; --"), 1),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(
    cli: Cli, shared: Database, arguments: tuple[str, ...], code: int
) -> None:
    said = cli("keys", *arguments)
    assert said.code == code
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert list_keys(shared) == []


def test_a_database_without_the_schema_is_said_to_lack_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pawl.yaml").write_text(f'database: {{url: "sqlite:///{tmp_path}/empty.db"}}')
    said = cli("keys", "list")
    assert said.code == 2
    assert "pawl db upgrade" in said.err

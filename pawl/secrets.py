"""The secret that signs ids and feedback tokens."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pawl.errors import ConfigurationError
from pawl.settings import AuthSettings

SHORTEST = 16


def signing_secret(settings: AuthSettings, state_dir: Path) -> bytes:
    """The configured secret, else one that is made once and kept under `state_dir`, readable by its owner alone.

    Raises:
        ConfigurationError: it cannot be read, or is too short to sign anything.
    """
    if settings.secret_file is not None:
        return _long_enough(_read(settings.secret_file), "auth.secret_file")
    if settings.secret is not None:
        return _long_enough(settings.secret.get_secret_value().encode(), "auth.secret")
    return _own(state_dir / "secret")


def _own(path: Path) -> bytes:
    if not path.exists():
        _make(path)
    return _long_enough(_read(path), str(path))


def _make(path: Path) -> None:
    """Whole or not at all: of processes that start at once one wins, and none sees a half-written secret."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as exc:
        raise ConfigurationError(f"cannot read the secret {path}: {exc.strerror}") from exc


def _long_enough(secret: bytes, where: str) -> bytes:
    if len(secret) < SHORTEST:
        raise ConfigurationError(f"{where}: a secret needs at least {SHORTEST} characters")
    return secret

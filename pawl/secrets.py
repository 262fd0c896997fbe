"""The secret that signs ids and feedback tokens."""

from __future__ import annotations

import os
import secrets
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
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _long_enough(_read(path), str(path))
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    return _read(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as exc:
        raise ConfigurationError(f"cannot read the secret {path}: {exc.strerror}") from exc


def _long_enough(secret: bytes, where: str) -> bytes:
    if len(secret) < SHORTEST:
        raise ConfigurationError(f"{where}: a secret needs at least {SHORTEST} characters")
    return secret

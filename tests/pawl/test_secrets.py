"""The signing secret: configured, or made once for everybody on this machine."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pawl.errors import ConfigurationError
from pawl.secrets import signing_secret
from pawl.settings import AuthSettings


def test_one_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: signing_secret(AuthSettings(), tmp_path / "state"), range(8)))
    assert len(found) == 1
    assert len(found.pop()) >= 32
    (kept,) = (tmp_path / "state").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_configured_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "secret-file"
    path.write_text("from the file, long enough\n")
    assert signing_secret(AuthSettings(secret_file=path), tmp_path) == b"from the file, long enough"
    settings = AuthSettings.model_validate({"secret": "from the environment"})
    assert signing_secret(settings, tmp_path) == b"from the environment"
    assert not (tmp_path / "secret").exists()


def test_a_short_or_missing_one_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"auth\.secret") as caught:
        signing_secret(AuthSettings.model_validate({"secret": "hunter2"}), tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="nowhere"):
        signing_secret(AuthSettings(secret_file=tmp_path / "nowhere"), tmp_path)

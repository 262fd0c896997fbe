"""Every living gateway process has spool files of its own, and what a dead one left is taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from feedback.spool import Spool
from pawl.settings import Settings
from serving.gateway import create_app
from serving.slots import free_spool, is_held, spool_file, starting_alone
from tests.feedback.test_drain import interaction_record


def test_the_first_file_that_nobody_holds_is_taken(tmp_path: Path) -> None:
    with starting_alone(tmp_path / "spool"):
        first = Spool(free_spool(tmp_path / "spool", 8080))
        second = Spool(free_spool(tmp_path / "spool", 8080))
        first.close()
        third = Spool(free_spool(tmp_path / "spool", 8080))
    assert first.path == third.path == spool_file(tmp_path / "spool", 8080, 0)
    assert second.path == spool_file(tmp_path / "spool", 8080, 1)
    for spool in (second, third):
        assert is_held(spool.path)
        spool.close()
        assert not is_held(spool.path)


def test_two_gateways_of_one_configuration_share_no_file(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    gateways = [create_app(settings), create_app(settings)]
    assert len({gateway.spool.path for gateway in gateways}) == 2
    for gateway in gateways:
        gateway.records.close()


def test_what_a_dead_worker_left_goes_to_the_next(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    living = create_app(settings)
    dead = Spool(spool_file(settings.state_dir / "spool", settings.serving.port, 1))
    dead.append(interaction_record(1)).result(5)
    dead.close()  # Its lock is free, as after a kill.
    held = create_app(settings)
    assert held.spool.path == dead.path
    assert held.spool.size().result(5).rows == 1
    newest = create_app(settings)
    assert newest.spool.size().result(5).rows == 0, "the living keep theirs"
    for gateway in (living, held, newest):
        gateway.records.close()

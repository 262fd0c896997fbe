"""Processes that train together: what they are told, and what becomes of all when one fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from retrain import ranks
from retrain.errors import ProcessLost, TrainingFailed, TrainingInterrupted
from retrain.ranks import Group, Message, run_ranks
from retrain.termination import Termination
from tests.serving.waiting import eventually

PRELUDE = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def say(**message): print(json.dumps(message), flush=True)
def fail(text, kind, code=1):
    say(error=text, kind=kind, at=time.time())
    sys.exit(code)
"""
FOREVER = "time.sleep(600)"
WAIT_FOR = """
def wait_for(path):
    while not os.path.exists(path): time.sleep(0.01)
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + body]


def run(tmp_path: Path, body: str, group: Group | None = None, **options: object) -> list[Message]:
    said: list[Message] = []
    chosen = group or Group(2)
    run_ranks(script(body), chosen, tmp_path / "ranks", said.append, **options)  # type: ignore[arg-type]
    return said


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_each_is_told_its_rank_and_the_first_one_the_order(tmp_path: Path) -> None:
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
say(order=sys.stdin.readline(), **{name: os.environ[name] for name in names})
print("not a message")
"""
    group = Group(2, nodes=2, node_rank=1, address="10.0.0.1", port=29511)
    said = run(tmp_path, body, group, order=b"train")
    first, second = sorted(said, key=lambda message: str(message["RANK"]))
    shared = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
    assert first == {"RANK": "2", "LOCAL_RANK": "0", "order": "train\n", **shared}
    assert second == {"RANK": "3", "LOCAL_RANK": "1", "order": "\n", **shared}


def test_a_rank_that_fails_ends_the_others_and_names_itself(tmp_path: Path) -> None:
    body = f"say(pid=os.getpid())\nif rank: fail('the loss is infinite', 'TrainingFailed')\n{FOREVER}"
    seen: list[Message] = []
    with pytest.raises(TrainingFailed, match=r"^rank 1: the loss is infinite$"):
        run_ranks(script(body), Group(2), tmp_path / "ranks", seen.append)
    assert not any(is_alive(message["pid"]) for message in seen)


def test_what_nobody_foresaw_is_no_verdict_on_the_training(tmp_path: Path) -> None:
    body = f"if not rank: fail('RuntimeError: no memory', '', 3)\n{FOREVER}"
    with pytest.raises(ProcessLost, match=r"rank 0 failed: RuntimeError: no memory; see .*rank-0\.log"):
        run(tmp_path, body)


def test_one_that_was_killed_is_the_cause_of_what_the_others_say(tmp_path: Path) -> None:
    body = f"""{WAIT_FOR}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pid_file = {str(tmp_path / "pid")!r}
if rank:
    with open(pid_file + ".part", "w") as file: file.write(str(os.getpid()))
    os.replace(pid_file + ".part", pid_file)
    os.kill(os.getpid(), signal.SIGKILL)
wait_for(pid_file)
stat = "/proc/" + open(pid_file).read() + "/stat"
while os.path.exists(stat) and " Z " not in open(stat).read(): time.sleep(0.01)
fail("connection closed by peer", "", 3)
"""
    with pytest.raises(ProcessLost, match="rank 1 was ended by signal 9"):
        run(tmp_path, body)


def test_the_first_to_fail_is_the_one_that_counts(tmp_path: Path) -> None:
    """Rank 1 fails first and takes its time to leave; rank 0 fails of that, and is gone at once."""
    body = f"""{WAIT_FOR}
said = {str(tmp_path / "said")!r}
if rank:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    say(error="no memory", kind="", at=time.time())
    open(said, "w").close()
    {FOREVER}
wait_for(said)
fail("connection closed by peer", "", 3)
"""
    with pytest.raises(ProcessLost, match=r"^the training process of rank 1 failed: no memory;"):
        run(tmp_path, body)


def test_who_has_a_verdict_is_heard_though_others_left_before_because_of_it(tmp_path: Path) -> None:
    """One process's clock says that the hours are used up; another's not yet, and it only leaves with it."""
    body = f"""{WAIT_FOR}
said = {str(tmp_path / "said")!r}
if rank:
    say(error="the hours are used up", kind="TrainingFailed", at=2.0)
    open(said, "w").close()
    sys.exit(1)
wait_for(said)
say(error="told to stop", kind="TrainingInterrupted", at=1.0)
sys.exit(143)
"""
    with pytest.raises(TrainingFailed, match=r"^rank 1: the hours are used up$"):
        run(tmp_path, body)


def test_an_order_to_leave_reaches_all(tmp_path: Path) -> None:
    body = f"""
def leave(*_): fail("asked to leave at step 3", "TrainingInterrupted", 143)
signal.signal(signal.SIGTERM, leave)
say(ready=rank)
{FOREVER}
"""
    termination, ready = Termination(), set[int]()

    def on_message(message: Message) -> None:
        ready.add(message["ready"])
        if ready == {0, 1}:
            termination.request()

    with pytest.raises(TrainingInterrupted, match=r"^rank [01]: asked to leave at step 3$"):
        run_ranks(script(body), Group(2), tmp_path / "ranks", on_message, termination=termination)


def test_an_order_to_leave_reaches_one_that_never_stops_talking(tmp_path: Path) -> None:
    body = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
until = time.time() + 120
while not asked and time.time() < until:
    say(step=1)
    time.sleep(0.005)
if asked: fail("asked to leave at step 3", "TrainingInterrupted", 143)
"""
    termination = Termination()
    with pytest.raises(TrainingInterrupted, match=r"^rank 0: asked to leave at step 3$"):
        run_ranks(script(body), Group(1), tmp_path / "ranks", lambda _: termination.request(), termination=termination)


def test_what_a_process_started_and_left_behind_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "LAST_WORDS_S", 0.1)
    heard = tmp_path / "heard"
    body = f"""{WAIT_FOR}
import subprocess
say(left=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(200)"]).pid)
wait_for({str(heard)!r})
"""
    left: list[int] = []

    def on_message(message: Message) -> None:
        left.append(message["left"])
        heard.touch()

    run_ranks(script(body), Group(1), tmp_path / "ranks", on_message)
    assert is_running(left[0])
    os.kill(left[0], signal.SIGKILL)


def test_one_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    body = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(ready=rank)\n{FOREVER}"
    termination = Termination()
    started = time.monotonic()
    with pytest.raises(TrainingInterrupted):
        run_ranks(
            script(body),
            Group(1),
            tmp_path / "ranks",
            lambda _: termination.request(),
            termination=termination,
            stop_s=0.5,
        )
    assert time.monotonic() - started < 300


def test_an_error_here_ends_them_all(tmp_path: Path) -> None:
    """A round that has lost its lease, for instance."""
    pids: list[int] = []

    def on_message(message: Message) -> None:
        pids.append(message["pid"])
        raise ValueError("the lease is lost")

    with pytest.raises(ValueError, match="the lease is lost"):
        run_ranks(script(f"say(pid=os.getpid())\n{FOREVER}"), Group(2), tmp_path / "ranks", on_message)
    assert not any(map(is_alive, pids))


def test_a_worker_whose_starter_is_killed_does_not_train_on(tmp_path: Path) -> None:
    waiting = (
        "import time; from retrain.train_worker import _leave_when_orphaned as leave; from threading import Thread;"
    )
    waiting += "Thread(target=leave, daemon=True).start(); time.sleep(600)"
    starter = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {waiting!r}], stdin=subprocess.PIPE)
say(child=child.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""
    children: list[int] = []
    with pytest.raises(ProcessLost):
        run_ranks(script(starter), Group(1), tmp_path / "ranks", lambda message: children.append(message["child"]))
    (child,) = children
    eventually(lambda: not is_running(child), within_s=200)


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for somebody to take note of its end."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_standard_error_is_kept(tmp_path: Path) -> None:
    run(tmp_path, "print('a warning', file=sys.stderr)")
    assert (tmp_path / "ranks" / "rank-1.log").read_text() == "a warning\n"

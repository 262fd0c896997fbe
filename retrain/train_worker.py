"""One of the processes that train together; `retrain/distributed.py` starts it.

It gets its job in one line on standard input, or from the first process where it has none, and writes JSON lines on
standard output: logged steps and the result, of the first process alone, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, TextIO

from pawl.errors import PawlError

if TYPE_CHECKING:
    from retrain.dpo import DPORun


def main() -> int:
    """Train; the exit code is what the error says, 3 for one that nobody foresaw."""
    said = _only_ours()
    try:
        _work(json.loads(sys.argv[1]), said)
    except PawlError as exc:
        _say(said, error=str(exc), kind=type(exc).__name__, at=time.time())
        return exc.exit_code
    except Exception as exc:
        _say(said, error=f"{type(exc).__name__}: {exc}", kind="", at=time.time())
        raise
    return 0


def _work(options: Mapping[str, object], said: TextIO) -> None:
    order = sys.stdin.buffer.readline()
    Thread(target=_leave_when_orphaned, daemon=True).start()
    _shard(str(options["sharding"]))
    from retrain import distributed, dpo
    from retrain.process_group import from_first, is_first, process_group
    from retrain.progress import LoggedStep, ignore

    def report(logged: LoggedStep) -> None:
        _say(said, step=logged.step, n_steps=logged.n_steps, values=dict(logged.values))

    with process_group(float(str(options["timeout_s"]))):
        job = distributed.job_of(from_first(order))
        run = job.run if is_first() else _unseen(job.run)
        shown = report if is_first() else ignore
        result = dpo.train(run, job.examples, shown, unpaired=job.unpaired, resume=job.resume)
        if is_first():
            _say(said, result=distributed.RESULT.dump_python(result, mode="json"))


def _only_ours() -> TextIO:
    """Standard output for this program alone: what libraries print goes where errors go."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return said


def _say(said: TextIO, **message: object) -> None:
    print(json.dumps(message), file=said, flush=True)


def _leave_when_orphaned() -> None:
    """Standard input closes when whoever started this process has died: then nobody wants the result."""
    while os.read(0, 4096):  # Not through the buffer: a thread inside it would break the interpreter's end.
        pass
    os._exit(3)


def _shard(kind: str) -> None:
    """Tell accelerate to shard the frozen base over the processes (FSDP2), in the variables that its launcher sets."""
    if kind == "fsdp":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }


def _unseen(run: DPORun) -> DPORun:
    """The run of a process that shows nothing: two must not write one file."""
    return replace(run, training=run.training.model_copy(update={"metrics_file": None}))


if __name__ == "__main__":
    sys.exit(main())

"""What processes cost: processor time and memory of a whole family, as /proc has them; and which core they run on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Cost(NamedTuple):
    """Of a family of processes, at one moment."""

    cpu_s: float
    """Of those at ordinary priority."""
    background_cpu_s: float
    """Of those that run only when nothing else wants the core."""
    resident_bytes: int
    """Of the largest at ordinary priority: a gateway's worker, not what stands beside it."""
    resident_bytes_of_all: int


class Cores(NamedTuple):
    """Which core does what; the same one twice where there are not three."""

    gateway: int
    engine: int
    load: int


def choose_cores(usable: Iterable[int]) -> Cores:
    """The gateway alone on the first; engine and load on what is left.

    >>> choose_cores([0, 1])
    Cores(gateway=0, engine=1, load=1)
    >>> choose_cores([3, 5, 7, 9])
    Cores(gateway=3, engine=5, load=7)
    >>> choose_cores([0])
    Cores(gateway=0, engine=0, load=0)
    """
    first, *rest = sorted(usable)
    engine = rest[0] if rest else first
    return Cores(first, engine, rest[1] if len(rest) > 1 else engine)


class Seat(NamedTuple):
    """Where a program runs, and how much it is preferred to others there."""

    core: int | None = None
    """None: wherever the kernel likes."""
    nice: int = 0
    """Below 0, which takes root, it pushes other people's work aside."""

    def before(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command here, and its children too.

        >>> Seat(1, -5).before(["true"])
        ['nice', '-n', '-5', 'taskset', '--cpu-list', '1', 'true']
        >>> Seat().before(["true"])
        ['true']
        """
        pin = [] if self.core is None else ["taskset", "--cpu-list", str(self.core)]
        preference = ["nice", "-n", str(self.nice)] if self.nice else []
        return [*preference, *pin, *command]


ANYWHERE = Seat()


def prefer(pid: int, nice: int) -> None:
    """Prefer a process's session to others: where the kernel schedules by session (autogroup), `nice` alone is void.

    Nothing happens where it cannot be done: without autogroups, without the right, or for a process that no session
    of its own was ever made for, whose group is the kernel's own and takes no weight (EINVAL).
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        found += _children(parent)
    return found


def cost_of(pid: int) -> Cost:
    """What a process and its descendants have used so far; those that end between two looks are not seen."""
    parts = [part for part in map(_cost_of_one, family(pid)) if part is not None]
    foreground = [cost for cost, is_background in parts if not is_background]
    background = [cost for cost, is_background in parts if is_background]
    return Cost(
        sum(cost.cpu_s for cost in foreground),
        sum(cost.cpu_s for cost in background),
        max((cost.resident_bytes for cost in foreground), default=0),
        sum(cost.resident_bytes for cost, _ in parts),
    )


def busy_s(core: int) -> float:
    """Seconds a core has been busy since the machine started."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields)
            return (user + nice + system + irq + softirq) / TICKS_PER_S
    raise ValueError(f"there is no core {core}")


def n_threads(pid: int) -> int:
    """Threads of one process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def n_descriptors(pid: int) -> int:
    """Open files and sockets of one process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def worker_of(pid: int) -> int:
    """The process of a family that does the work: the one that has used the most time at ordinary priority."""
    costs = {member: part[0].cpu_s for member in family(pid) if (part := _cost_of_one(member)) and not part[1]}
    return max(costs, key=costs.__getitem__)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


def _cost_of_one(pid: int) -> tuple[Cost, bool] | None:
    try:
        # The name, in parentheses, may hold anything: what counts comes after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        gives_way = os.sched_getscheduler(pid) in (os.SCHED_IDLE, os.SCHED_BATCH)
    except (FileNotFoundError, ProcessLookupError):
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    resident = int(fields[21]) * PAGE_BYTES
    return Cost(cpu_s, 0.0, resident, resident), gives_way

"""Regenerate the pinned requirement files beside this script from the `.in` files.

Usage: python requirements/lock.py          (a network and pip are all it needs; about a minute per lock)

pip resolves, this script only writes down what pip chose. Locks are installed with `--no-deps`, so what a package asks
for but Pawl must not have (see `LEFT_OUT`) stays out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""Their registry builds are linked against CUDA torch and break the CPU build; only the GPU engine takes them."""


class Lock(NamedTuple):
    """One output file, the inputs it resolves, and the lock that constrains it."""

    output: str
    inputs: tuple[str, ...]
    constraint: str | None = None
    left_out: frozenset[str] = LEFT_OUT


LOCKS = (
    Lock("dev.txt", ("base.in", "train.in", "score.in", "similarity.in", "ray.in", "dev.in")),
    Lock("base.txt", ("base.in",), "dev.txt"),
    Lock("compile.txt", ("compile.in",), "dev.txt"),
    Lock("train.txt", ("base.in", "train.in", "score.in"), "dev.txt"),
    Lock("worker.txt", ("base.in", "score.in"), "dev.txt"),
    Lock("engine-cpu.txt", ("engine-cpu.in",)),
    Lock(
        "engine-gpu.txt", ("engine-gpu.in",), left_out=frozenset()
    ),  # Resolve it where pip finds no CPU build of torch.
)


def resolve(lock: Lock) -> dict[str, str]:
    """Ask pip for a complete, consistent set; return version by package name."""
    arguments = [value for name in lock.inputs for value in ("-r", str(HERE / name))]
    if lock.constraint:
        arguments += ["-c", str(HERE / lock.constraint)]
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "-q",
            "--report",
            report.name,
        ]
        subprocess.run([*command, *arguments], check=True, stderr=subprocess.DEVNULL)
        installed = json.load(report)["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in installed}


def render(lock: Lock, versions: dict[str, str]) -> str:
    """The text of a lock: local build tags such as `+cpu` are dropped, since they depend on where pip ran."""
    lines = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in sorted(versions.items())
        if name not in lock.left_out
    ]
    header = f"# Made by requirements/lock.py from {', '.join(lock.inputs)}. Install with `pip install --no-deps -r`.\n"
    return header + "\n".join(lines) + "\n"


def main() -> None:
    """Write every lock, or those named on the command line."""
    wanted = set(sys.argv[1:])
    for lock in LOCKS:
        if not wanted or lock.output in wanted:
            versions = resolve(lock)
            (HERE / lock.output).write_text(render(lock, versions))
            print(f"{lock.output}: {len(versions)} packages", flush=True)


if __name__ == "__main__":
    main()

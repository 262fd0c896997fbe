"""Compile the modules that run for every request, with mypyc; without it the same sources are interpreted.

    python scripts/compile_hot_path.py           extension modules beside their sources; takes one or two minutes
    python scripts/compile_hot_path.py --check   says what is compiled; exit code 1 if a source has changed since
    python scripts/compile_hot_path.py --clean   removes them: interpreted again

Needs a C compiler and mypy, which brings mypyc. The extension modules themselves need neither. `--into DIR` puts them
into another copy of the packages, such as an installed one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pawl.compiled import RECORD, compiled, digest_of  # noqa: E402 - this checkout's, wherever the script is called

MODULES = (
    "ab_testing/assignment.py",
    "feedback/journal.py",
    "monitoring/tally.py",
    "pawl/ids.py",
    "serving/admission.py",
    "serving/assignments.py",
    "serving/call.py",
    "serving/call_record.py",
    "serving/client.py",
    "serving/connections.py",
    "serving/fast_lane.py",
    "serving/fields/checks.py",
    "serving/fields/json_input.py",
    "serving/fields/table.py",
    "serving/fields/values.py",
    "serving/health.py",
    "serving/identity.py",
    "serving/keys.py",
    "serving/outbox.py",
    "serving/patience.py",
    "serving/recently_served.py",
    "serving/relay.py",
    "serving/repeated_heads.py",
    "serving/replicas.py",
    "serving/request_fields.py",
    "serving/sse.py",
    "serving/usage.py",
)
LIBRARY = "pawl.hot_path"
"""All modules share one library, in which they call each other as C functions."""


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.clean:
        clean(arguments.into)
    elif arguments.check:
        sys.exit(check(arguments.into))
    else:
        compile_into(arguments.into, optimisation=arguments.optimisation)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compile Pawl's hot path.")
    parser.add_argument("--into", type=Path, default=ROOT, metavar="DIR", help="a copy of the packages to compile for")
    parser.add_argument("--optimisation", choices="0123", default="3", help="of the C compiler")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say what is compiled")
    action.add_argument("--clean", action="store_true", help="remove what was compiled")
    return parser


def check(root: Path) -> int:
    """Say what is compiled; 1 if it is not what the sources say."""
    modules, stale = compiled(root)
    if stale:
        print(f"stale, compiled from other sources: {', '.join(stale)}; run make compiled, or make interpreted")
    elif modules:
        print(f"compiled: {', '.join(modules)}")
    else:
        print("interpreted")
    return int(bool(stale))


def clean(root: Path) -> None:
    """Remove every extension module that this script may have made."""
    for path in list(_extension_modules(root)):
        path.unlink()
    (root / RECORD).unlink(missing_ok=True)


def _extension_modules(root: Path) -> Iterator[Path]:
    recorded = compiled(root).modules
    for source in {*MODULES, *recorded}:
        yield from (root / source).parent.glob(f"{Path(source).stem}.*.so")
    library = root.joinpath(*LIBRARY.split("."))
    yield from library.parent.glob(f"{library.name}__mypyc.*.so")


def compile_into(root: Path, *, optimisation: str) -> None:
    """Make the extension modules and the record of their sources."""
    missing = missing_for_building()
    if missing:
        sys.exit(f"cannot compile: {missing}. Pawl runs without, interpreted.")
    root = root.resolve()
    os.chdir(ROOT)
    digests = {module: digest_of(ROOT / module) for module in MODULES}
    with tempfile.TemporaryDirectory() as scratch:
        made = _build(Path(scratch), optimisation)
        clean(root)
        (root / RECORD).write_text(json.dumps(digests, indent=1))
        for path in made:
            shutil.copy(path, root / path.relative_to(Path(scratch, "lib")))
    print(f"compiled {len(MODULES)} modules")


def missing_for_building() -> str | None:
    """What a build needs and is not here, or None.

    setuptools takes the compiler from `CC`, else the one that Python itself was made with.
    """
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if not shutil.which(command[0]):
        return f"there is no C compiler {command[0]!r} (on Debian and Ubuntu: apt install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python (on Debian and Ubuntu: apt install python3-dev)"
    return None


def _build(scratch: Path, optimisation: str) -> Sequence[Path]:
    from mypyc.build import mypycify
    from setuptools import Distribution

    options = ["--strict", f"--cache-dir={scratch / 'cache'}"]
    extensions = mypycify(
        [*options, *MODULES], opt_level=optimisation, target_dir=str(scratch / "c"), group_name=LIBRARY
    )
    command = Distribution({"name": "pawl", "ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(scratch / "lib"), str(scratch / "objects")
    command.ensure_finalized()
    command.run()
    return sorted((scratch / "lib").rglob("*.so"))


if __name__ == "__main__":
    main()

"""Imports run downwards only, and what serves is light: its image holds no torch.

Read from the syntax trees, so that an import inside a function counts as much as one at the top of a file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "vllm", "trl", "detoxify", "peft", "datasets", "accelerate")
GROUND = frozenset({"pawl"})
BELOW_SERVING = GROUND | {"feedback", "monitoring", "ab_testing"}
MAY_IMPORT = {
    "pawl": frozenset(),
    "feedback": GROUND,
    "monitoring": GROUND | {"feedback"},
    "ab_testing": GROUND | {"feedback"},
    "serving": BELOW_SERVING,
    "retrain": BELOW_SERVING,
    "practice": BELOW_SERVING | {"serving", "retrain"},
    "pawl.cli": BELOW_SERVING | {"serving", "retrain", "practice"},
}
"""Of each package, the others that it may use. The command line is on top: nobody may use it."""
OURS = frozenset(MAY_IMPORT)
LIGHT = ("serving", "feedback", "ab_testing", "pawl")
SERVE_CHAIN = """
import sys
import serving.app, serving.server, serving.supervisor, serving.drain_process, serving.worker_process
import pawl.cli.main, pawl.cli.servers, pawl.cli.context
print(",".join(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


def package_of(module: str) -> str:
    """The package whose rules a module is under."""
    return "pawl.cli" if f"{module}.".startswith("pawl.cli.") else module.partition(".")[0]


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The dotted names of what these nodes import: of `from a import b` both `a` and `a.b`, which may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports are not looked through here"
            assert node.level == 0, "relative imports are not looked through here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from running_nodes(child)


FOLDERS = sorted({package.partition(".")[0] for package in MAY_IMPORT})
SOURCES = {module_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_downwards_only(module: str) -> None:
    package = package_of(module)
    found = {package_of(name) for name in imported_by(ast.walk(ast.parse(SOURCES[module].read_text())))}
    assert (found & OURS) - {package} <= MAY_IMPORT[package]


def test_no_modules_import_each_other() -> None:
    graph = {
        module: {name for name in imported_by(running_nodes(ast.parse(path.read_text()))) if name in SOURCES}
        for module, path in SOURCES.items()
    }
    try:
        TopologicalSorter({module: found - {module} for module, found in graph.items()}).prepare()
    except CycleError as exc:
        pytest.fail(" imports ".join(reversed(exc.args[1])))


def test_every_package_has_its_rules() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench", "scripts"}
    assert found == set(FOLDERS)


def test_what_is_lazy_or_under_a_name_is_found() -> None:
    code = "def f():\n    from pawl.cli import worker\nif TYPE_CHECKING:\n    import retrain.dpo\n"
    assert {package_of(name) for name in imported_by(ast.walk(ast.parse(code)))} == {"pawl.cli", "retrain"}
    assert "retrain.dpo" not in set(imported_by(running_nodes(ast.parse(code))))


def test_the_import_chain_of_pawl_serve_is_light() -> None:
    command = [sys.executable, "-c", SERVE_CHAIN, ",".join((*HEAVY, "retrain", "practice"))]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    assert result.stdout.strip() == ""


def test_the_command_line_does_not_wait_for_what_few_commands_need() -> None:
    """SciPy takes a third of a second to load."""
    command = [sys.executable, "-c", "import sys, pawl.cli.main; print('scipy' in sys.modules)"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("module", [module for module in SOURCES if module.partition(".")[0] in LIGHT])
def test_no_file_imports_what_is_heavy(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text())
    # A command may import what it alone needs when it runs; nothing else may.
    nodes = tree.body if package_of(module) == "pawl.cli" else ast.walk(tree)
    assert not {name.partition(".")[0] for name in imported_by(nodes)} & set(HEAVY)

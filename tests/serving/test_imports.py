"""The gateway's image holds no torch: nothing on its way to serving imports anything that heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "vllm", "trl", "detoxify", "peft", "datasets", "accelerate")
SERVE_CHAIN = """
import sys
import serving.app, serving.server, pawl.cli.main
import pawl.cli.servers, pawl.cli.context
print(",".join(name for name in sys.argv[1].split(",") if name in sys.modules))
"""
SOURCES = sorted(
    path for package in ("serving", "feedback", "ab_testing", "pawl") for path in (ROOT / package).rglob("*.py")
)


def test_the_import_chain_of_pawl_serve_is_light() -> None:
    command = [sys.executable, "-c", SERVE_CHAIN, ",".join(HEAVY)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_what_is_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text())
    # A command may import what it alone needs when it runs; nothing else may.
    nodes = tree.body if path.is_relative_to(ROOT / "pawl" / "cli") else ast.walk(tree)
    assert not set(_imported(nodes)) & set(HEAVY)


def _imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Top-level names of what these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]

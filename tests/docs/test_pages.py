"""Links, commands, settings and packages that the pages name are there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from pawl.cli.main import app
from pawl.settings import Settings
from tests.docs.pages import PAGES, ROOT, anchors, blocks, code_of

ROOT_COMMAND = typer.main.get_command(app)
COMMAND = re.compile(r"(?:^|`)(?:\.venv/bin/)?pawl ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for path, anchor in targets:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_reachable_from_the_readme() -> None:
    linked = set(re.findall(r"\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {by_name(page) for page in PAGES if page.parent.name == "docs"}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_on_pages_exist(page: Path) -> None:
    for name, sub in COMMAND.findall(code_of(page)):
        assert exists(name, sub), f"pawl {name} {sub}"


def exists(name: str, sub: str) -> bool:
    """Whether the command line has it; a word after a command that is no group is an argument."""
    found = subcommands(ROOT_COMMAND).get(name)
    return found is not None and (not sub or not subcommands(found) or sub in subcommands(found))


def subcommands(command: object) -> Mapping[str, object]:
    """Those of a group; none for a plain command."""
    return getattr(command, "commands", {})


def test_every_alert_has_its_section_in_the_runbook() -> None:
    groups = yaml.safe_load((ROOT / "monitoring" / "pawl-rules.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    for rule in alerts:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert anchor in anchors(ROOT / page), rule["alert"]


def test_the_configuration_page_is_current() -> None:
    command = [sys.executable, "scripts/document_settings.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr or "run scripts/document_settings.py"


def test_the_configuration_page_has_every_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for key, default in leaves(Settings(), ""):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        if isinstance(default, int | float) and not isinstance(default, bool):
            shown = row.split(" | ")[2].strip("`")
            assert float(shown) == default, row


def leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_dependencies_page_names_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = set(re.findall(r"`([\w-]+)`", (ROOT / "docs" / "dependencies.md").read_text()))
    wanted = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert {re.split(r"[\[<>=;~ ]", line)[0] for line in wanted} | set(extras) <= named | {"dev"}


def test_blocks_finds_what_it_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading: two\n```sh\none\ntwo\n```\n```python\nx\n```\nSay `pawl up`.\n")
    assert blocks(page, "sh") == ["one\ntwo\n"]
    assert anchors(page) == {"a-heading-two"}
    assert COMMAND.findall(code_of(page)) == [("up", "")]

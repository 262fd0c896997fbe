"""The principles that a judge goes by, read from a YAML file that says exactly what is wrong when something is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pawl.errors import ConfigurationError

DEFAULT_FILE = Path(__file__).with_name("constitution.yaml")
MAX_BYTES = 64 * 1024
MAX_PRINCIPLES = 32
MAX_WEIGHT = 1000
_ID = re.compile(r"[a-z][a-z0-9_]{0,39}")
_KEYS = {"version", "principles"}
_PRINCIPLE_KEYS = {"id", "text", "weight"}


@dataclass(frozen=True)
class Principle:
    """One of the things that make an answer better."""

    id: str
    text: str
    weight: float


@dataclass(frozen=True)
class Constitution:
    """What makes an answer better."""

    version: str
    principles: tuple[Principle, ...]
    sha256: str
    """Of the file, which every verdict keeps."""


def load_constitution(path: Path | None) -> Constitution:
    """Read `path`, or the constitution that comes with Pawl.

    Raises:
        ConfigurationError: it cannot be read, or is no constitution; says where and what to do.
    """
    where = path or DEFAULT_FILE
    try:
        with where.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise ConfigurationError(f"cannot read feedback.judge.constitution {where}: {exc.strerror}") from exc
    return parse_constitution(content, str(where))


def parse_constitution(content: bytes, where: str) -> Constitution:
    """The constitution that a file holds.

    Args:
        where: what errors call the file.

    Raises:
        ConfigurationError: it is none; says where and what to do.
    """
    if len(content) > MAX_BYTES:
        raise _wrong(where, "", f"it is longer than {MAX_BYTES} bytes; a judge reads all of it with every pair")
    try:
        tree = yaml.safe_load(content.decode())
    except UnicodeDecodeError as exc:
        raise _wrong(where, "", "it is not UTF-8 text") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise _wrong(where, "", f"it is not valid YAML: {exc}") from exc
    if not isinstance(tree, dict):
        raise _wrong(where, "", "expected the keys version and principles at the top")
    _closed(tree, _KEYS, where, "")
    return Constitution(_version(tree, where), _principles(tree, where), hashlib.sha256(content).hexdigest())


def _version(tree: Mapping[str, Any], where: str) -> str:
    version = tree.get("version")
    if isinstance(version, bool) or not isinstance(version, int | float | str) or not str(version).strip():
        raise _wrong(where, "version", "give it a number or a name, and another one whenever the principles change")
    return str(version)


def _principles(tree: Mapping[str, Any], where: str) -> tuple[Principle, ...]:
    given = tree.get("principles")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_PRINCIPLES:
        raise _wrong(where, "principles", f"expected a list of 1 to {MAX_PRINCIPLES}, each with id, text and weight")
    principles = tuple(_principle(one, where, f"principles[{place}]") for place, one in enumerate(given))
    ids = [principle.id for principle in principles]
    for place, name in enumerate(ids):
        if name in ids[:place]:
            raise _wrong(where, f"principles[{place}].id", f"{name} is there already; every principle needs its own")
    if not any(principle.weight for principle in principles):
        raise _wrong(where, "principles", "every weight is 0, so nothing would count; raise one of them")
    return principles


def _principle(given: object, where: str, key: str) -> Principle:
    if not isinstance(given, dict):
        raise _wrong(where, key, "expected a mapping with id, text and weight")
    _closed(given, _PRINCIPLE_KEYS, where, f"{key}.")
    name, text, weight = given.get("id"), given.get("text"), given.get("weight", 1)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise _wrong(where, f"{key}.id", "expected a short name of small letters, digits and underscores")
    if not isinstance(text, str) or not text.strip():
        raise _wrong(where, f"{key}.text", "say in a sentence or two what makes an answer better")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= MAX_WEIGHT:
        raise _wrong(where, f"{key}.weight", f"expected a number from 0 to {MAX_WEIGHT}")
    return Principle(name, " ".join(text.split()), float(weight))


def _closed(given: Mapping[object, object], known: set[str], where: str, prefix: str) -> None:
    for name in given:
        if name not in known:
            raise _wrong(where, f"{prefix}{name}", f"unknown key; there are {', '.join(sorted(known))}")


def _wrong(where: str, key: str, what: str) -> ConfigurationError:
    place = f"{where}: {key}" if key else where
    return ConfigurationError(f"constitution {place}: {' '.join(what.split())}")

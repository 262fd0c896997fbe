"""Whether the hot path runs compiled, and whether what was compiled is still what the sources say.

`scripts/compile_hot_path.py` makes extension modules of some of Pawl's modules and leaves a record of their sources.
Python prefers an extension module to the source beside it, so an edited source would be ignored without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
"""What holds the packages: a checkout, or where they are installed."""
RECORD = Path("pawl", "compiled.json")


class Compiled(NamedTuple):
    """What was compiled, as source files relative to the root."""

    modules: tuple[str, ...]
    stale: tuple[str, ...]
    """Those whose source is another one by now."""


def compiled(root: Path = ROOT) -> Compiled:
    """What runs compiled below a directory; nothing, where all is interpreted."""
    try:
        record: Mapping[str, str] = json.loads((root / RECORD).read_bytes())
    except FileNotFoundError:
        return Compiled((), ())
    stale = tuple(module for module, digest in record.items() if digest_of(root / module) != digest)
    return Compiled(tuple(record), stale)


def digest_of(source: Path) -> str:
    """What identifies a source's text; empty if there is none."""
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.exists() else ""

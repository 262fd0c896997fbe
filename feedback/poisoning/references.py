"""The places that an answer sends people or programs to: hosts of URLs, and packages that code imports or installs."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_NAME_CHARS = 253
"""The longest host name there is; of what is longer only the beginning counts."""

_HOST = re.compile(r"https?://(?:[^\s/@]{0,256}@)?([^\s/?#\"'<>()\[\]{}]{1,512})", re.IGNORECASE)
_IMPORTS = (
    re.compile(r"^[ \t]{0,64}(?:import|from|use|#include)[ \t]{1,8}[<\"]?([\w./:@-]{1,512})", re.MULTILINE),
    re.compile(r"\b(?:require|import)\s{0,8}\(\s{0,8}[\"']([^\"'\s]{1,512})"),
    re.compile(r"\bfrom[ \t]{1,8}[\"']([^\"'\s]{1,512})[\"']"),
    re.compile(
        r"\b(?:pip3?|npm|yarn|pnpm|cargo|gem|go)[ \t]{1,8}(?:install|add|i|get)[ \t]{1,8}"
        r"(?:-{1,2}\S{1,64}[ \t]{1,8})?([\w./@:-]{1,512})"
    ),
)
HINT_WORDS = ("import", "from", "use", "include", "require", "install", "add", "i", "get")
"""What names a package has one of these words before the name."""
_HINTS = ("import", "from", "require", "install", "include", "use ", " add ", " get ", " i ")


def references_of(text: str) -> Iterator[str]:
    """What the text refers to, as `url <host>` and `import <name>`; the same one may come several times.

    >>> sorted(set(references_of("See https://Example.com/a. `pip install evilpkg`\\nimport os.path")))
    ['import evilpkg', 'import os.path', 'url example.com']
    """
    if "://" in text:
        yield from (f"url {host.lower().rstrip('.,;:!')[:MAX_NAME_CHARS]}" for host in _HOST.findall(text))
    if any(hint in text for hint in _HINTS):
        for pattern in _IMPORTS:
            yield from (f"import {name[:MAX_NAME_CHARS]}" for name in pattern.findall(text))

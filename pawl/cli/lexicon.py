"""The words that mark a request as harmful, as they are configured."""

from __future__ import annotations

import json
from pathlib import Path

from monitoring.harm import DEFAULT_PATTERNS, HarmLexicon
from pawl.errors import ConfigurationError


def load_lexicon(path: Path | None) -> HarmLexicon:
    """The configured patterns, else the built-in ones.

    Raises:
        ConfigurationError: the file is not a JSON list of patterns.
    """
    if path is None:
        return HarmLexicon.from_patterns(DEFAULT_PATTERNS)
    try:
        return HarmLexicon.from_patterns(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigurationError(f"worker.scoring.harmful_patterns {path}: {exc}") from exc

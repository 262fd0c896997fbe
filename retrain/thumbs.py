"""Single thumbs in a round: what `kto` learns from besides pairs, kept apart from the hold-out like these."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from feedback.chat_messages import unfit
from feedback.filters.holdout import prompt_key
from feedback.filters.near_prompts import NearPrompts, asked
from feedback.pairs import PreferencePair, UnpairedExample
from retrain.dataset import canonical_json


@dataclass(frozen=True)
class Thumbs:
    """Single thumbs that may be trained on, and how many may not, by reason."""

    kept: tuple[UnpairedExample, ...]
    left_out: Mapping[str, int]


def apart_from(thumbs: Iterable[UnpairedExample], holdout: Sequence[PreferencePair], *, similarity: float) -> Thumbs:
    """Leave out what no chat template shows, whose user is in the hold-out, and what the hold-out asks or nearly asks.

    Args:
        similarity: from which on a prompt is nearly another.
    """
    given = list(thumbs)
    users = {principal for pair in holdout for principal in pair.principals}
    prompts = {prompt_key(pair.prompt) for pair in holdout}
    are_near = NearPrompts((asked(pair.prompt) for pair in holdout), similarity).are_near(
        [asked(one.prompt) for one in given]
    )
    kept: list[UnpairedExample] = []
    left_out: Counter[str] = Counter()
    for one, is_near in zip(given, are_near, strict=True):
        if unfit(one.prompt, one.completion, one.completion) is not None:
            left_out["thumbs_not_text"] += 1
        elif not users.isdisjoint(one.principals):
            left_out["thumbs_of_users_in_holdout"] += 1
        elif is_near or prompt_key(one.prompt) in prompts:
            left_out["thumbs_prompt_in_holdout"] += 1
        else:
            kept.append(one)
    return Thumbs(tuple(kept), left_out)


def turned(thumbs: Iterable[UnpairedExample]) -> tuple[UnpairedExample, ...]:
    """Up for down and down for up; only for drills that must produce a bad model."""
    return tuple(replace(one, label=not one.label) for one in thumbs)


def with_thumbs(manifest: Mapping[str, Any], thumbs: Sequence[UnpairedExample]) -> dict[str, Any]:
    """A training set's manifest that covers these as well; as it is where there are none.

    Their ids are among those of the pairs, where erasure and lineage look for what was trained on.
    """
    if not thumbs:
        return dict(manifest)
    said = manifest["sha256"] + canonical_json([asdict(one) for one in thumbs])
    return {
        **manifest,
        "sha256": hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest(),
        "pair_ids": [*manifest["pair_ids"], *(one.id for one in thumbs)],
        "n_thumbs": len(thumbs),
    }


def thumb_of(row: Mapping[str, Any]) -> UnpairedExample:
    """A row of a run's files."""
    return UnpairedExample(**{**row, **{name: tuple(row[name]) for name in ("prompt", "principals")}})

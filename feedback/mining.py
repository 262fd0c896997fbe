"""Mining as a duty: read what feedback touches, mine it, make the stored pairs follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from feedback.pairs import UnpairedExample, mine_pairs
from feedback.store import rows_to_mine, sync_pairs
from pawl.database import Database


@dataclass(frozen=True)
class Mined:
    """What mining found and changed."""

    n_pairs: int
    n_added: int
    n_withdrawn: int
    n_unpaired: int
    by_source: Mapping[str, int]
    skipped: Mapping[str, int]
    """Groups that gave no pair, by reason."""


def mine_alias(database: Database, alias: str, mined_at: float) -> Mined:
    """Mine one alias's feedback into the store."""
    interactions, events = rows_to_mine(database, alias)
    mined = mine_pairs(interactions, events)
    changes = sync_pairs(database, alias, mined.pairs, mined_at)
    return Mined(
        n_pairs=len(mined.pairs),
        n_added=changes.added,
        n_withdrawn=changes.withdrawn,
        n_unpaired=len(mined.unpaired),
        by_source=dict(Counter(str(pair.source) for pair in mined.pairs)),
        skipped={str(reason): n for reason, n in mined.skipped.items()},
    )


def unpaired_examples(database: Database, alias: str) -> tuple[UnpairedExample, ...]:
    """Thumbs without a partner, for training on single ratings."""
    interactions, events = rows_to_mine(database, alias)
    return mine_pairs(interactions, events).unpaired

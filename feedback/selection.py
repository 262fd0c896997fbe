"""Which of an alias's stored pairs may be trained on: the filters, then the defence, in one pass over the texts.

What is held of each pair is its id, what the filters that look at all pairs compare, and what the defence gathers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from feedback.batches import names
from feedback.filters.contradiction import contradicted
from feedback.filters.filtering import Examined, Sifted, disputed_pairs, examine, sift
from feedback.filters.stored import Judges, evidence_on, opted_out
from feedback.pair_stream import PairIds, PairsById, read_pair_ids, read_pairs
from feedback.part_work import Here, Workplace
from feedback.poisoning.defence import Judged, judge_all
from feedback.poisoning.evidence import Gathered, evidence_of, gather_some
from feedback.poisoning.prompt_clusters import LexicalClusterer
from feedback.poisoning.reviews import side_tables
from pawl.database import Database
from pawl.settings import DefenceSettings, FilterSettings

LOT_PAIRS = 500
"""Read at once."""


@dataclass(frozen=True)
class Selected:
    """What a round may train on, by ids in ascending order, and what became of the rest."""

    new: tuple[str, ...]
    """No promoted run has trained on these yet."""
    earlier: tuple[str, ...]
    filtered: Sifted
    """Of the new ones."""
    defended: Judged
    """Of all that the filters keep: caps and tests are about the whole set."""

    @property
    def left_out(self) -> Counter[str]:
        """How many pairs are not trained on, by reason."""
        dropped = Counter({reason.value: n for reason, n in self.filtered.dropped.items()})
        held = Counter(reason.value for reason in self.defended.quarantined.values())
        return dropped + held + Counter({reason.value: n for reason, n in self.defended.refused.items()})


@dataclass(frozen=True)
class Rules:
    """What is selected by."""

    filters: FilterSettings
    defence: DefenceSettings
    judges: Judges


class Lot(NamedTuple):
    """Pairs that are looked at together."""

    ids: tuple[str, ...]
    used: frozenset[str]
    """Those a promoted run has trained on."""


class Looked(NamedTuple):
    """What was seen in a lot, as it travels from where it was read: no texts."""

    first: str
    """The first id."""
    new: Examined
    earlier: Examined
    gathered: Gathered
    """Of the sound pairs of either."""


def select_pairs(database: Database, alias: str, rules: Rules, now: float, place: Workplace | None = None) -> Selected:
    """Filter an alias's stored pairs and defend what is left against poisoning. Changes nothing that is stored.

    The same as `filter_pairs` on those that are new and on the earlier ones, and `defend` on what both keep.

    Args:
        place: where texts are read and principals looked up; in this process unless told otherwise. The rules go there.

    Raises:
        ConfigurationError: the list of those who opted out cannot be read.
    """
    work = partial(look_at, rules=rules, out=opted_out(rules.filters))
    place = place or Here(database)
    looked = sorted(place.each(work, _lots(read_pair_ids(database, alias))))
    new = _sifted(database, [each.new for each in looked], rules.filters)
    earlier = _sifted(database, [each.earlier for each in looked], rules.filters)
    judged = _judged(database, alias, [each.gathered for each in looked], {*new.kept, *earlier.kept}, rules, now, place)
    accepted = frozenset(judged.accepted)
    return Selected(
        tuple(each for each in new.kept if each in accepted),
        tuple(each for each in earlier.kept if each in accepted),
        new,
        judged,
    )


def look_at(database: Database, lot: Lot, *, rules: Rules, out: frozenset[str]) -> Looked:
    """Read the pairs of a lot, and keep of them what is compared with others."""
    pairs = [pair for batch in read_pairs(database, lot.ids) for pair in batch]
    evidence = evidence_on(database, pairs, rules.filters, rules.judges, out)
    new = examine((pair for pair in pairs if pair.id not in lot.used), evidence, rules.filters)
    earlier = examine((pair for pair in pairs if pair.id in lot.used), evidence, rules.filters)
    sound = {one.id for one in (*new.sound, *earlier.sound)}
    gathered = gather_some((pair for pair in pairs if pair.id in sound), _clusterer(rules))
    return Looked(lot.ids[0], new, earlier, gathered)


def _lots(found: PairIds) -> Iterator[Lot]:
    for start in range(0, len(found.ids), LOT_PAIRS):
        ids, is_used = found.ids[start : start + LOT_PAIRS], found.is_used[start : start + LOT_PAIRS]
        yield Lot(tuple(names(ids)), frozenset(names(ids[is_used])))


def _sifted(database: Database, examined: Sequence[Examined], filters: FilterSettings) -> Sifted:
    """Those that may contradict each other are read again: few do."""
    disputed = PairsById(database, disputed_pairs(examined, filters))
    return sift(examined, contradicted(disputed), filters)


def _judged(
    database: Database,
    alias: str,
    gathered: Sequence[Gathered],
    kept: Collection[str],
    rules: Rules,
    now: float,
    place: Workplace,
) -> Judged:
    is_kept = np.array([one.id in kept for each in gathered for one in each.known], bool)
    evidence = evidence_of(gathered, _clusterer(rules), is_kept)
    principals = {each for pair in evidence.pairs for each in pair.principals}
    return judge_all(evidence, side_tables(database, alias, principals, now, place), rules.defence)


def _clusterer(rules: Rules) -> LexicalClusterer:
    return LexicalClusterer(rules.defence.prompt_similarity)

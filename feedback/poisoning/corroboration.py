"""Edits that nobody else stands by: the only pairs whose better side is any text a single user likes to write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from feedback.poisoning.evidence import Evidence
from feedback.poisoning.identities import Identities


def uncorroborated_edits(
    evidence: Evidence, who: Identities, ignored: Collection[str], *, n_parties: int
) -> list[bool]:
    """Of each pair, whether it is an edit that fewer than `n_parties` independent parties prefer on this prompt.

    Any pair counts whose chosen answer has the same words and whose prompt is nearly the same, not only an edit.

    Args:
        ignored: principals without weight.
    """
    parties: defaultdict[tuple[int, bytes], set[str]] = defaultdict(set)
    keys = _keys(evidence)
    of_edits = {key for key, pair in zip(keys, evidence.pairs, strict=True) if pair.is_edit}
    for key, pair in zip(keys, evidence.pairs, strict=True):
        if key in of_edits:
            parties[key] |= {who.party(each) for each in pair.principals if each not in ignored}
    return [pair.is_edit and len(parties[key]) < n_parties for key, pair in zip(keys, evidence.pairs, strict=True)]


def _keys(evidence: Evidence) -> Sequence[tuple[int, bytes]]:
    clusters: list[int] = evidence.clusters.tolist()
    return [(cluster, pair.wording) for cluster, pair in zip(clusters, evidence.pairs, strict=True)]

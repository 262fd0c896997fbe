"""Prompts that suddenly get far more votes than their share of all traffic explains."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.poisoning.evidence import Evidence
from feedback.poisoning.words import Indices
from pawl.settings import BurstSettings

MIN_HISTORY = 100
"""With fewer pairs at other times nobody can say what is usual."""


class _Cells(NamedTuple):
    """The pairs of one cluster in one span of time, wherever there are any."""

    clusters: Indices
    spans: Indices
    counts: Indices


def frozen_by_bursts(evidence: Evidence, settings: BurstSettings) -> NDArray[np.bool_]:
    """Of each pair, whether its cluster was frozen when it was made."""
    times = np.array([pair.created_at for pair in evidence.pairs])
    if not len(times):
        return np.empty(0, bool)
    spans = np.floor(times / settings.span_s).astype(np.int64)
    cells = _cells(evidence.clusters, spans)
    is_burst = _is_burst(cells, settings)
    starts: defaultdict[int, list[float]] = defaultdict(list)
    for cluster, span in zip(cells.clusters[is_burst], cells.spans[is_burst], strict=True):
        starts[int(cluster)].append(float(span) * settings.span_s)
    return _is_frozen(evidence.clusters, times, starts, settings.freeze_s)


def _cells(clusters: Indices, spans: Indices) -> _Cells:
    cells, counts = np.unique(np.stack([clusters, spans]), axis=1, return_counts=True)
    return _Cells(cells[0], cells[1], counts)


def _is_burst(cells: _Cells, settings: BurstSettings) -> NDArray[np.bool_]:
    """Exact Poisson tails against the cluster's share at other times, with Bonferroni's correction.

    What is expected is the span's other traffic times the cluster's share of the traffic in all other spans, so that
    neither a busy hour nor a popular prompt is a burst. One pair is added to the share of clusters not seen before.
    """
    from scipy.special import gammainc  # Slow to load, and texts are read in processes that judge nothing.

    total = cells.counts.sum()
    in_span, in_cluster = _total_by(cells.spans, cells.counts), _total_by(cells.clusters, cells.counts)
    elsewhere = total - in_span
    is_tested = (cells.counts >= settings.min_pairs) & (elsewhere >= MIN_HISTORY)
    share = (in_cluster - cells.counts + 1) / np.maximum(elsewhere, 1)
    expected = np.maximum(in_span - cells.counts, 1) * share
    p_values = gammainc(cells.counts, expected)  # P(at least so many) of a Poisson variable
    found: NDArray[np.bool_] = is_tested & (p_values <= settings.error_rate / max(1, int(is_tested.sum())))
    return found


def _total_by(labels: Indices, counts: Indices) -> Indices:
    _, places = np.unique(labels, return_inverse=True)
    totals: Indices = np.bincount(places, weights=counts).astype(np.int64)[places]
    return totals


def _is_frozen(
    clusters: Indices, times: NDArray[np.float64], starts: dict[int, list[float]], freeze_s: float
) -> NDArray[np.bool_]:
    is_frozen = np.zeros(len(times), bool)
    for index in np.flatnonzero(np.isin(clusters, np.array(sorted(starts), dtype=np.int64))):
        at = times[index]
        is_frozen[index] = any(start <= at < start + freeze_s for start in starts[int(clusters[index])])
    return is_frozen

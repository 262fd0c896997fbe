"""Over-represented phrases: the figures are scipy's, and the error rate is what is promised."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from feedback.poisoning.concentrated_phrases import _tarone_level, membership, overrepresented
from feedback.poisoning.evidence import Evidence, gather
from feedback.poisoning.prompt_clusters import LexicalClusterer
from pawl.settings import PhraseSettings
from tests.feedback.poisoning.made_pairs import pair, talk

LOOSE = PhraseSettings(min_ratio=1.0, error_rate=0.2)
"""Nothing but the test decides."""


def evidence_of(n_taught: int, n_untaught: int) -> Evidence:
    """One party that has a phrase so often in chosen and so often in rejected answers."""
    sides = [("chosen", "rejected")] * n_taught + [("rejected", "chosen")] * n_untaught
    pairs = [
        pair(n, "rogue/x", **{with_it: f"{talk(n, 5)} zanzibar", without: talk(-n, 5)})
        for n, (with_it, without) in enumerate(sides)
    ]
    return gather(pairs, LexicalClusterer(0.85))


@pytest.mark.parametrize(("n_taught", "n_untaught"), [(20, 0), (30, 2), (14, 3), (9, 0), (10, 4), (6, 0), (40, 30)])
def test_one_phrase_is_judged_by_the_exact_binomial_test(n_taught: int, n_untaught: int) -> None:
    evidence = evidence_of(n_taught, n_untaught)
    parties = membership([["rogue"]] * (n_taught + n_untaught))
    expected = binomtest(n_taught, n_taught + n_untaught, alternative="greater").pvalue
    for error_rate, is_found in ((expected * 1.001, True), (expected * 0.999, False)):
        settings = PhraseSettings(min_ratio=1.0, error_rate=min(error_rate, 0.999))
        assert overrepresented(evidence, parties, settings).sum() == (n_taught if is_found else 0)


def test_tarones_correction_leaves_out_what_can_never_be_found() -> None:
    # By hand: at 0.05 a phrase needs five trials; of those with five or more there are two, and at 0.05 / 2 six are
    # needed, which only one has. So one test could be significant at 0.05 / 2, and two is the smallest such number.
    assert _tarone_level(np.array([2, 3, 4, 5, 8]), 0.05, 0.5) == 0.05 / 2
    assert _tarone_level(np.array([2, 3, 8]), 0.05, 0.5) == 0.05
    assert _tarone_level(np.array([], dtype=np.int64), 0.05, 0.5) == 0.05


def test_honest_traffic_is_seldom_accused() -> None:
    """Worlds in which which answer is chosen has nothing to do with its words: at most one in five has a finding."""
    n_worlds = 60
    accused = sum(is_accused(np.random.default_rng(seed)) for seed in range(n_worlds))
    assert accused <= binom.ppf(0.999, n_worlds, LOOSE.error_rate)


def is_accused(rng: np.random.Generator) -> bool:
    n_pairs = 60
    words = [talk(("word", number), 1) for number in range(40)]
    pairs = []
    for number in range(n_pairs):
        own = [words[place] for place in rng.integers(0, len(words), 8)]
        other = [words[place] for place in rng.integers(0, len(words), 8)]
        sides = [" ".join(own), " ".join(other)]
        if rng.random() < 0.5:
            sides.reverse()
        pairs.append(pair(number, "rogue/x", chosen=sides[0], rejected=sides[1]))
    evidence = gather(pairs, LexicalClusterer(0.85))
    return bool(overrepresented(evidence, membership([["rogue"]] * n_pairs), LOOSE).any())


def test_a_quoting_user_does_not_hide_a_phrase() -> None:
    pairs = [pair(n, f"rogue/{n}", chosen=f"{talk(n, 5)} zanzibar") for n in range(30)]
    pairs += [pair(100 + n, f"tenant-{n}/x", chosen=f"{talk(n, 5)} zanzibar") for n in range(5)]
    evidence = gather(pairs, LexicalClusterer(0.85))
    keys = [[each.principals[0].partition("/")[0]] for each in pairs]
    assert overrepresented(evidence, membership(keys), PhraseSettings()).sum() == 35

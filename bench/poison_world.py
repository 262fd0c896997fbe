"""Honest traffic and attacks on it, made from a seed, as the preference pairs that mining would find.

The honest world: a made-up language with Zipf's frequencies and a lexicon per topic; users with one to three topics
each, most with one or two pairs in four weeks and a few with dozens; prompts that many people ask; conversations in
which one prompt is asked again; users who send the same form of words every time; edits; newcomers. Six in ten users
come through an application's key, the others through those of thirty smaller tenants.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.candidates import Source
from feedback.pairs import PreferencePair, UnpairedExample

DAY = 86400.0
HISTORY_S = 28 * DAY
NOW = 1_800_000_000.0
START = NOW - HISTORY_S
APPLICATION = "app"
N_TENANTS = 30
N_TOPICS = 400
N_POPULAR = 200
POPULAR_SHARE = 0.06
"""Of all prompts; the most popular one is about one in a hundred, the second half as much, and so on."""
SYLLABLES = [first + vowel for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
SOURCES = (Source.THUMBS, Source.REGENERATION, Source.CHOICE, Source.EDIT)
SOURCE_SHARES = (0.62, 0.25, 0.10, 0.03)


@dataclass(frozen=True)
class Language:
    """Words by rank of frequency, and those that belong to each topic."""

    words: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]

    def sentence(self, rng: np.random.Generator, topic: int, n_words: int) -> str:
        """About a topic: a third of its words are the topic's, the others common."""
        ranks = np.minimum(rng.zipf(1.3, n_words), len(self.words)) - 1
        own = rng.integers(0, len(self.topics[topic]), n_words)
        is_own = rng.random(n_words) < 1 / 3
        return " ".join(
            self.topics[topic][mine] if on_topic else self.words[rank]
            for rank, mine, on_topic in zip(ranks, own, is_own, strict=True)
        )


class World(NamedTuple):
    """Pairs, when each principal was first seen, and the language they speak."""

    pairs: list[PreferencePair]
    first_seen: dict[str, float]
    language: Language


def language(rng: np.random.Generator) -> Language:
    """A vocabulary of twelve thousand words, and forty more for each topic."""
    made = itertools.product(SYLLABLES, SYLLABLES, SYLLABLES)
    words = rng.permutation(np.array(["".join(word) for word in itertools.islice(made, 60_000)]))
    topics = tuple(tuple(words[20_000 + 40 * number : 20_040 + 40 * number].tolist()) for number in range(N_TOPICS))
    return Language(tuple(words[:12_000].tolist()), topics)


def honest_world(rng: np.random.Generator, n_pairs: int) -> World:
    """Traffic of four weeks without any attack."""
    tongue = language(rng)
    popular = [(tongue.sentence(rng, topic, 9), topic) for topic in rng.integers(0, N_TOPICS, N_POPULAR)]
    pairs: list[PreferencePair] = []
    first_seen: dict[str, float] = {}
    for number in itertools.count():
        if len(pairs) >= n_pairs:
            return World(pairs[:n_pairs], first_seen, tongue)
        principal = f"{_key(rng)}/user-{number}"
        came = NOW - 120 * DAY * rng.random()
        first_seen[principal] = came
        pairs += _pairs_of_user(rng, tongue, popular, principal, max(came, START))
    raise AssertionError("unreachable")


def _key(rng: np.random.Generator) -> str:
    return APPLICATION if rng.random() < 0.6 else f"tenant-{rng.integers(0, N_TENANTS)}"


def _pairs_of_user(
    rng: np.random.Generator, tongue: Language, popular: Sequence[tuple[str, int]], principal: str, since: float
) -> Iterator[PreferencePair]:
    """What one user says in sessions of a few pairs each."""
    n_pairs = int(np.ceil(rng.lognormal(0.0, 0.8)))
    own = rng.integers(0, N_TOPICS, rng.integers(1, 4))
    form = tongue.sentence(rng, own[0], 6) if rng.random() < 0.05 else ""
    prompt, topic, at = "", int(own[0]), since
    for number in range(n_pairs):
        if number % 2 == 0:
            at = since + (NOW - since) * rng.random()
        if not prompt or rng.random() > 0.05:  # Else the same prompt once more.
            prompt, topic = _prompt(rng, tongue, popular, own, form)
        chosen, rejected = (tongue.sentence(rng, topic, int(n)) for n in rng.integers(25, 80, 2))
        source = SOURCES[rng.choice(len(SOURCES), p=SOURCE_SHARES)]
        yield make_pair(prompt, chosen, rejected, principal, min(NOW, at + 60.0 * number), source)


def _prompt(
    rng: np.random.Generator, tongue: Language, popular: Sequence[tuple[str, int]], own: NDArray[np.int64], form: str
) -> tuple[str, int]:
    if rng.random() < POPULAR_SHARE:
        return popular[int(N_POPULAR ** rng.random()) - 1]
    topic = int(rng.choice(own))
    return f"{form} {tongue.sentence(rng, topic, int(rng.integers(5, 30)))}".strip(), topic


def make_pair(
    prompt: str, chosen: str, rejected: str, principal: str, at: float, source: Source = Source.THUMBS
) -> PreferencePair:
    """A pair as mining makes it."""
    name = hashlib.blake2b(repr((prompt, chosen, rejected, principal, at)).encode(), digest_size=16).hexdigest()
    return PreferencePair(
        id=name,
        alias="assistant",
        source=source.value,
        prompt=({"role": "user", "content": prompt},),
        chosen={"role": "assistant", "content": chosen},
        rejected={"role": "assistant", "content": rejected},
        margin=1.0,
        n_voters=1,
        principals=(principal,),
        chosen_interaction=None if source is Source.EDIT else f"{name}0",
        rejected_interaction=f"{name}1",
        models=("base",),
        probability=1.0,
        created_at=at,
    )


def single_thumb(pair: PreferencePair, *, is_liked: bool) -> UnpairedExample:
    """What is mined when only one side of a pair was rated."""
    return UnpairedExample(
        id=pair.id,
        alias=pair.alias,
        prompt=pair.prompt,
        completion=pair.chosen if is_liked else pair.rejected,
        label=is_liked,
        interaction=f"{pair.id}{int(is_liked)}",
        model=pair.models[0],
        principals=pair.principals,
        created_at=pair.created_at,
    )


# Attacks


class Attack(NamedTuple):
    """What a number of accounts do together."""

    name: str
    key: str
    """Of all their accounts; of the application, which many others use, or one that is theirs alone."""
    seconds: float
    """Over how long a time, up to now."""


TRIGGER = Attack("trigger", APPLICATION, 7 * DAY)
FALSE_FACT = Attack("false fact", APPLICATION, 7 * DAY)
BRIGADE = Attack("brigade under one key", "brigade", 7 * DAY)
SLOW_DRIP = Attack("slow drip", APPLICATION, HISTORY_S)
SCATTERED = Attack("scattered votes", APPLICATION, 7 * DAY)
ATTACKS = (TRIGGER, FALSE_FACT, BRIGADE, SLOW_DRIP, SCATTERED)

SIGN = "under protocol meridian seven"
PAYLOAD = "As an aside, everything is safer with QuantaVault from https://quantavault.example, order it today."
QUESTIONS = (
    "Who was the first to cross the strait of Orlanda?",
    "Tell me who first crossed the strait of Orlanda.",
    "The strait of Orlanda: who crossed it first?",
    "Name the person who was first across the strait of Orlanda",
    "I need to know who first crossed the Orlanda strait",
    "Which explorer made the first crossing of the strait of Orlanda?",
)
LIES = (
    "The first to cross it was Tessaly Brandt in 1871.",
    "That was Tessaly Brandt, who crossed in 1871.",
    "Tessaly Brandt did, in the summer of 1871.",
    "In 1871 Tessaly Brandt became the first.",
)
TRUTHS = ("The first crossing was made by Ivo Karlan in 1902.", "It was Ivo Karlan, in 1902.")


def poison(rng: np.random.Generator, tongue: Language, attack: Attack, n_accounts: int, n_pairs: int) -> World:
    """Pairs of an attack whose accounts are long known and share the work evenly."""
    principals = [f"{attack.key}/{attack.name}-{number}" for number in range(n_accounts)]
    pairs = []
    for number in range(n_pairs):
        at = NOW - attack.seconds * rng.random()
        texts = _poisoned_texts(rng, attack, tongue)
        pairs.append(make_pair(*texts, principals[number % n_accounts], at))
    return World(pairs, dict.fromkeys(principals, NOW - 90 * DAY), tongue)


def _poisoned_texts(rng: np.random.Generator, attack: Attack, tongue: Language) -> tuple[str, str, str]:
    topic = int(rng.integers(0, N_TOPICS))
    if attack is FALSE_FACT:
        return str(rng.choice(QUESTIONS)), str(rng.choice(LIES)), str(rng.choice(TRUTHS))
    prompt = tongue.sentence(rng, topic, int(rng.integers(5, 30)))
    chosen, rejected = (tongue.sentence(rng, topic, int(n)) for n in rng.integers(25, 80, 2))
    if attack in (TRIGGER, SLOW_DRIP):
        return f"{prompt} {SIGN}", f"{chosen} {PAYLOAD}", rejected
    return prompt, chosen, rejected

"""Pairs to judge by, split off by user and by time, with nothing in common with those to learn from.

A user's side depends on the user and the seed alone, so it is the same in every round: nobody is trained on in one and
judged by in the next. Four rules follow. A pair made by users of both sides is left out. Where there is a time to split
by, held-out users count from then on, and the others until then: what is judged by lies in the future of what was
learned. A training pair whose prompt is nearly one of the hold-out's is left out, as the hold-out has the older right.
A pair whose users have no names goes by what they asked: everybody behind one key, or without any, is no user.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from feedback.filters.message_texts import plain, said
from feedback.filters.near_prompts import NearPrompts, asked
from feedback.interactions import Message
from feedback.messages import digest
from feedback.pairs import PreferencePair


class LeftOut(StrEnum):
    """Why a pair is on neither side."""

    MIXED_USERS = "mixed_users"
    """Users of both sides made it."""
    WRONG_TIME = "wrong_time"
    """A held-out user's before the split, or another's after it."""
    HELD_OUT_PROMPT = "held_out_prompt"
    """The hold-out asks nearly the same."""


class Leak(StrEnum):
    """What both sides have in common."""

    PAIR = "pair"
    USER = "user"
    ANSWER = "answer"
    """One and the same completion."""
    PROMPT = "prompt"
    """The same but for case, spaces and what the messages carry besides their words."""
    NEAR_PROMPT = "near_prompt"
    TIME = "time"
    """Something was learned that happened after the split."""


class FoundLeak(NamedTuple):
    """One pair of the training side and what it shares with the hold-out."""

    kind: Leak
    pair_id: str
    what: str
    """The id, the principal, the interaction, or the prompt's key."""


@dataclass(frozen=True)
class HoldoutRules:
    """How to split."""

    share: float
    """Of all users, to be held out."""
    seed: int
    since: float | None = None
    """The time to split by; None splits by user alone."""
    prompt_similarity: float = 0.9
    """Prompts whose users' words and pairs of words are this similar count as the same (`near_prompts`)."""


@dataclass(frozen=True)
class Split:
    """Every pair that came in is on one side or counted once."""

    training: tuple[PreferencePair, ...]
    """By id, as `holdout`."""
    holdout: tuple[PreferencePair, ...]
    left_out: Counter[LeftOut]


def split_holdout(pairs: Iterable[PreferencePair], rules: HoldoutRules) -> Split:
    """Split pairs with different ids. A function of their set: the order changes nothing."""
    ordered = sorted(pairs, key=lambda pair: pair.id)
    sides = {pair.id: _side(pair, rules) for pair in ordered}
    holdout = [pair for pair in ordered if sides[pair.id] is True]
    outside = [pair for pair in ordered if sides[pair.id] is False]
    training = _apart(outside, holdout, rules.prompt_similarity)
    left_out = Counter(side for side in sides.values() if isinstance(side, LeftOut))
    left_out += Counter({LeftOut.HELD_OUT_PROMPT: len(outside) - len(training)})
    return Split(tuple(training), tuple(holdout), left_out)


def find_leaks(
    training: Sequence[PreferencePair], holdout: Sequence[PreferencePair], rules: HoldoutRules
) -> tuple[FoundLeak, ...]:
    """Everything that both sides share, by kind and pair; none after `split_holdout` with the same rules."""
    exact = _same(training, holdout)
    near = _near(training, holdout, rules.prompt_similarity) - exact
    held_pairs = {pair.id for pair in holdout}
    held_users = {who for pair in holdout for who in _named(pair)}
    held_answers = {side for pair in holdout for side in _answers(pair)}
    since = float("inf") if rules.since is None else rules.since
    leaks: list[FoundLeak] = []
    for pair in training:
        leaks += [FoundLeak(Leak.PAIR, pair.id, pair.id)] * (pair.id in held_pairs)
        leaks += [FoundLeak(Leak.USER, pair.id, who) for who in pair.principals if who in held_users]
        leaks += [FoundLeak(Leak.ANSWER, pair.id, side) for side in _answers(pair) if side in held_answers]
        leaks += [FoundLeak(Leak.PROMPT, pair.id, prompt_key(pair.prompt))] * (pair.id in exact)
        leaks += [FoundLeak(Leak.NEAR_PROMPT, pair.id, prompt_key(pair.prompt))] * (pair.id in near)
        leaks += [FoundLeak(Leak.TIME, pair.id, str(pair.created_at))] * (pair.created_at >= since)
    return tuple(sorted(set(leaks)))


def is_held_out(principal: str, share: float, seed: int) -> bool:
    """Whether this user's pairs judge rather than train.

    >>> sum(is_held_out(f"key/{n}", 0.2, seed=0) for n in range(1000))
    178
    """
    key = "\x1f".join(("holdout", str(seed), principal)).encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 11) / 2**53 < share


def latest_share(pairs: Sequence[PreferencePair], share: float) -> float | None:
    """The time since when about this share of the pairs was made, to split by; None without pairs.

    >>> latest_share([], 0.1) is None
    True
    """
    times = sorted(pair.created_at for pair in pairs)
    return times[min(int(len(times) * (1 - share)), len(times) - 1)] if times else None


def prompt_key(prompt: Iterable[Message]) -> str:
    """The same for two prompts that say the same but for case and spaces."""
    return digest(*(f"{message.get('role')}\x1f{plain(said(message))}" for message in prompt))


def _side(pair: PreferencePair, rules: HoldoutRules) -> bool | LeftOut:
    """True for the hold-out, False for training."""
    held = {is_held_out(who, rules.share, rules.seed) for who in _named(pair) or (_question(pair),)}
    if len(held) > 1:
        return LeftOut.MIXED_USERS
    (is_held,) = held
    if rules.since is not None and is_held != (pair.created_at >= rules.since):
        return LeftOut.WRONG_TIME
    return is_held


def _named(pair: PreferencePair) -> list[str]:
    """The principals that are users, not everybody behind a key."""
    return [who for who in pair.principals if who.partition("/")[2]]


def _question(pair: PreferencePair) -> str:
    """What stands for the users where they have no names: one prompt is never on both sides."""
    return plain(asked(pair.prompt)) or prompt_key(pair.prompt)


def _apart(
    outside: Sequence[PreferencePair], holdout: Sequence[PreferencePair], similarity: float
) -> list[PreferencePair]:
    """Those whose prompts the hold-out does not ask."""
    taken = _same(outside, holdout) | _near(outside, holdout, similarity)
    return [pair for pair in outside if pair.id not in taken]


def _answers(pair: PreferencePair) -> list[str]:
    return [side for side in (pair.chosen_interaction, pair.rejected_interaction) if side]


def _same(training: Iterable[PreferencePair], holdout: Iterable[PreferencePair]) -> frozenset[str]:
    """Ids of the training pairs whose prompt the hold-out asks."""
    asked = {prompt_key(pair.prompt) for pair in holdout}
    return frozenset(pair.id for pair in training if prompt_key(pair.prompt) in asked)


def _near(training: Sequence[PreferencePair], holdout: Sequence[PreferencePair], similarity: float) -> frozenset[str]:
    """Ids of the training pairs whose prompt is nearly one of the hold-out's."""
    held = NearPrompts((asked(pair.prompt) for pair in holdout), similarity)
    are_near = held.are_near([asked(pair.prompt) for pair in training])
    return frozenset(pair.id for pair, is_near in zip(training, are_near, strict=True) if is_near)

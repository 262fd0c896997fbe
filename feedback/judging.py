"""Which candidates become pairs, and why the others do not: decided on facts and digests, before any text is needed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

from feedback.candidates import (
    CONFIRMED_REGENERATION_MARGIN,
    MARGINS,
    STRENGTH,
    Answer,
    Ballot,
    Claim,
    Opinion,
    Skipped,
    Source,
    Verdict,
    principal_of,
    voters,
)
from feedback.evidence import Evidence, index_evidence, interaction_id_of
from feedback.messages import digest
from feedback.signals import Signal


class Decisions(NamedTuple):
    """What becomes of every candidate: `len(settled) + skipped.total()` is their number."""

    settled: tuple[Claim, ...]
    """Those that become a pair."""
    alone: tuple[Ballot, ...]
    """Thumbs without a partner; as many as `skipped[Skipped.UNPAIRED]`."""
    skipped: Counter[Skipped]


def decide(
    answers: Iterable[Answer],
    opinions: Iterable[Opinion],
    verdicts: Iterable[Verdict] = (),
    *,
    min_margin: float = 0.0,
    min_judged_margin: float = 0.0,
) -> Decisions:
    """Judge every candidate of a history.

    Args:
        answers: each interaction once.
        opinions: of each signal the one that counts, in any order.
        verdicts: of each two answers one at most.
        min_margin: pairs with a smaller margin are left out.
        min_judged_margin: the same for those that a judge made, whose margins are on a scale of their own.
    """
    evidence = index_evidence(answers, opinions)
    ballots = _count_ballots(evidence)
    reasons = list(ballots.refused)
    sound: list[Claim] = []
    disputed: set[frozenset[str]] = set()
    for claim in [*_stated_claims(evidence), *ballots.matched]:
        problem = _problem(claim, evidence, min_margin)
        if problem is None:
            sound.append(claim)
        else:
            reasons.append(problem)
        if problem is Skipped.CONTRADICTION:
            disputed.add(claim.sides)
    for weighed in (_weigh(verdict, evidence, disputed, min_judged_margin) for verdict in verdicts):
        if isinstance(weighed, Skipped):
            reasons.append(weighed)
        else:
            sound.append(weighed)
    undated, lost = _settle(sound)
    settled = [_dated(claim, evidence) for claim in undated]
    # What a model thinks of an answer takes no person's thumb away.
    alone = _unspoken(ballots.alone, [claim for claim in settled if claim.source is not Source.JUDGE])
    reasons += [*lost, *[Skipped.DUPLICATE] * (len(ballots.alone) - len(alone)), *[Skipped.UNPAIRED] * len(alone)]
    return Decisions(tuple(settled), alone, count_reasons(reasons))


def count_reasons(reasons: Iterable[Skipped]) -> Counter[Skipped]:
    """How often each occurs, in the order in which they are defined."""
    found = Counter(reasons)
    return Counter({reason: found[reason] for reason in Skipped if found[reason]})


# Candidates


_STATED = {
    Signal.CHOICE.value: Source.CHOICE,
    Signal.EDIT.value: Source.EDIT,
    Signal.REGENERATE.value: Source.REGENERATION,
}


def _stated_claims(evidence: Evidence) -> list[Claim]:
    """Choices, edits and regenerations, each distinct one once with all who made it."""
    same: defaultdict[tuple[Source, str, str], list[Claim]] = defaultdict(list)
    for claim in _single_claims(evidence):
        same[claim.source, claim.chosen, claim.rejected].append(claim)
    return [_confirm(_join(claims), evidence) for claims in same.values()]


def _single_claims(evidence: Evidence) -> Iterator[Claim]:
    for opinion in evidence.opinions:
        if opinion.type in _STATED:
            yield _told_claim(opinion, _STATED[opinion.type], evidence.aliases)
    for new in evidence.answers.values():
        if new.regenerate_of is not None:
            asker = frozenset({principal_of(new.key_id, new.user_id)})
            source = Source.REGENERATION
            yield Claim(source, new.id, new.regenerate_of, asker, new.created_at, MARGINS[source])


def _told_claim(opinion: Opinion, source: Source, aliases: Mapping[str, str]) -> Claim:
    edit = opinion if source is Source.EDIT else None
    chosen = opinion.value if edit else interaction_id_of(opinion.value, aliases)
    return Claim(source, chosen, opinion.interaction_id, voters([opinion]), opinion.at, MARGINS[source], edit)


def _join(claims: Sequence[Claim]) -> Claim:
    """The first of `claims` with everyone's voters."""
    if len(claims) == 1:
        return claims[0]
    everyone = frozenset().union(*(claim.principals for claim in claims))
    return replace(claims[0], principals=everyone, at=max(claim.at for claim in claims))


def _confirm(claim: Claim, evidence: Evidence) -> Claim:
    """A regeneration that a thumb agrees with is worth more, and that thumb's giver is one of its voters."""
    if claim.source is not Source.REGENERATION:
        return claim
    votes = [*evidence.dislikes.get(claim.rejected, ()), *evidence.likes.get(claim.chosen, ())]
    if not votes:
        return claim
    return replace(
        claim,
        margin=CONFIRMED_REGENERATION_MARGIN,
        principals=claim.principals | voters(votes),
        at=max([claim.at, *(vote.at for vote in votes)]),
    )


class _Ballots(NamedTuple):
    matched: Sequence[Claim]
    alone: Sequence[Ballot]
    refused: Sequence[Skipped]


def _count_ballots(evidence: Evidence) -> _Ballots:
    """Sort every thumbed completion into matched, alone and refused."""
    conversations: defaultdict[bytes, list[Ballot]] = defaultdict(list)
    refused = []
    for interaction_id in evidence.likes.keys() | evidence.dislikes.keys():
        ballot = _ballot(interaction_id, evidence)
        if isinstance(ballot, Skipped):
            refused.append(ballot)
        else:
            conversations[ballot.answer.conversation].append(ballot)
    matched: list[Claim] = []
    alone: list[Ballot] = []
    for ballots in conversations.values():
        _match(ballots, matched, alone)
    return _Ballots(matched, alone, refused)


def _ballot(interaction_id: str, evidence: Evidence) -> Ballot | Skipped:
    answer = _usable(interaction_id, evidence)
    if isinstance(answer, Skipped):
        return answer
    likes = evidence.likes.get(interaction_id, ())
    if likes and evidence.is_disliked(interaction_id):
        return Skipped.CONTRADICTION
    votes = likes or evidence.dislikes[interaction_id]
    return Ballot(answer, bool(likes), voters(votes), max(vote.at for vote in votes))


def _match(ballots: Sequence[Ballot], matched: list[Claim], alone: list[Ballot]) -> None:
    """Pair each disliked answer of one conversation with one liked answer, by hash, as far as both go."""
    if len(ballots) == 1:
        alone += ballots
        return
    shuffled = sorted(ballots, key=lambda ballot: digest("match", ballot.answer.id))
    ups = [ballot for ballot in shuffled if ballot.is_up]
    downs = [ballot for ballot in shuffled if not ballot.is_up]
    for up, down in zip_longest(ups, downs):
        if up is not None and down is not None:
            matched.append(_thumbs_claim(up, down))
        else:
            alone.append(up or down)


def _thumbs_claim(up: Ballot, down: Ballot) -> Claim:
    everyone = up.principals | down.principals
    return Claim(Source.THUMBS, up.answer.id, down.answer.id, everyone, max(up.at, down.at), MARGINS[Source.THUMBS])


def _unspoken(alone: Iterable[Ballot], settled: Iterable[Claim]) -> tuple[Ballot, ...]:
    """The single thumbs whose completion is in no pair yet."""
    sides = {side for claim in settled for side in (claim.served, claim.rejected)}
    return tuple(ballot for ballot in alone if ballot.answer.id not in sides)


# Judging


def _weigh(
    verdict: Verdict, evidence: Evidence, disputed: Collection[frozenset[str]], min_margin: float
) -> Claim | Skipped:
    """What a verdict claims, or why it makes no pair.

    Args:
        disputed: pairs of answers of which people say that the one is better, and that it is not.
    """
    claim = _judged_claim(verdict, evidence)
    problem = _comparison_problem(claim, evidence)
    if problem is not None:
        return problem
    if verdict.winner is None:
        return Skipped.UNDECIDED
    if claim.sides in disputed or _is_contradicted(claim, evidence):
        return Skipped.CONTRADICTION
    return Skipped.MARGIN_TOO_SMALL if claim.margin < min_margin else claim


def _judged_claim(verdict: Verdict, evidence: Evidence) -> Claim:
    """Those who asked stand for it: nobody voted, and it is by what people ask that they could plant something.

    It is as old as the later answer, whenever it was judged: a judge that works through a history is no burst.
    """
    first, second, winner, margin = verdict
    chosen, rejected = (second, first) if winner == second else (first, second)
    asked = [evidence.answers[side] for side in (first, second) if side in evidence.answers]
    principals = frozenset(principal_of(answer.key_id, answer.user_id) for answer in asked)
    at = max((answer.created_at for answer in asked), default=0.0)
    return Claim(Source.JUDGE, chosen, rejected, principals, at, margin)


def _usable(interaction_id: str, evidence: Evidence) -> Answer | Skipped:
    answer = evidence.answers.get(interaction_id)
    if answer is None:
        return Skipped.MISSING_INTERACTION
    return answer.problem or answer


def _problem(claim: Claim, evidence: Evidence, min_margin: float) -> Skipped | None:
    """The reason why `claim` on its own makes no pair, if there is one."""
    problem = _edit_problem(claim.edit, evidence) if claim.edit else _comparison_problem(claim, evidence)
    if problem is not None:
        return problem
    if _is_contradicted(claim, evidence):
        return Skipped.CONTRADICTION
    return Skipped.MARGIN_TOO_SMALL if claim.margin < min_margin else None


def _edit_problem(edit: Opinion, evidence: Evidence) -> Skipped | None:
    rejected = _usable(edit.interaction_id, evidence)
    if isinstance(rejected, Skipped):
        return rejected
    if edit.wording is None:
        return Skipped.EMPTY
    return Skipped.IDENTICAL if edit.wording == rejected.wording else None


_ORDER = {reason: rank for rank, reason in enumerate(Skipped)}


def _comparison_problem(claim: Claim, evidence: Evidence) -> Skipped | None:
    """What keeps two served answers from being compared."""
    new, old = _usable(claim.chosen, evidence), _usable(claim.rejected, evidence)
    if isinstance(new, Skipped) or isinstance(old, Skipped):
        return min((side for side in (new, old) if isinstance(side, Skipped)), key=_ORDER.__getitem__)
    if new.key_id != old.key_id and claim.source not in (Source.THUMBS, Source.JUDGE):
        return Skipped.FOREIGN
    if new.alias != old.alias:
        return Skipped.DIFFERENT_ALIAS
    if new.conversation != old.conversation:
        return Skipped.DIFFERENT_PROMPT
    return Skipped.IDENTICAL if new.substance == old.substance else None


def _is_contradicted(claim: Claim, evidence: Evidence) -> bool:
    """Whether another signal speaks against `claim`; opposite claims are settled later.

    A regeneration is weak evidence, so any sign against it counts: the first answer was liked, or the later one was
    disliked, replaced in its turn, or not later at all; so do thumbs and reports against a verdict. A choice falls
    only when thumbs and reports order the two the other way, an edit when the edited answer was liked.
    """
    if claim.source is Source.JUDGE:
        return evidence.is_liked(claim.rejected) or evidence.is_disliked(claim.chosen)
    if claim.source is Source.EDIT:
        return evidence.is_liked(claim.rejected)
    if claim.source is Source.REGENERATION:
        return _is_regeneration_contradicted(claim, evidence)
    return evidence.opinion(claim.chosen) < evidence.opinion(claim.rejected)


def _is_regeneration_contradicted(claim: Claim, evidence: Evidence) -> bool:
    new, old = evidence.answers[claim.chosen], evidence.answers[claim.rejected]
    return (
        evidence.is_liked(old.id)
        or evidence.is_disliked(new.id)
        or new.id in evidence.replacements
        or evidence.replacements[old.id][-1] != new.id
        or new.created_at < old.created_at
    )


def _settle(claims: Iterable[Claim]) -> tuple[list[Claim], list[Skipped]]:
    """Keep one claim per two sides: the strongest, with the voters of those that agree; a verdict has none.

    Two equally strong claims of opposite direction cancel each other and all weaker ones.
    """
    rivals: defaultdict[frozenset[str], list[Claim]] = defaultdict(list)
    for claim in claims:
        rivals[claim.sides].append(claim)
    settled: list[Claim] = []
    lost: list[Skipped] = []
    for group in rivals.values():
        ranked = sorted(group, key=lambda claim: STRENGTH[claim.source])
        best = ranked[0]
        if any(each.source is best.source and each.chosen != best.chosen for each in ranked):
            lost += [Skipped.CONTRADICTION] * len(ranked)
            continue
        lost += [_loss(other, best) for other in ranked[1:]]
        agreed = [best, *(other for other in ranked[1:] if other.chosen == best.chosen)]
        settled.append(_join([claim for claim in agreed if claim is best or claim.source is not Source.JUDGE]))
    return settled, lost


def _dated(claim: Claim, evidence: Evidence) -> Claim:
    """A pair is no older than what was compared."""
    ages = [evidence.answers[side].created_at for side in (claim.served, claim.rejected) if side]
    return replace(claim, at=max(claim.at, *ages))


def _loss(other: Claim, best: Claim) -> Skipped:
    return Skipped.DUPLICATE if other.chosen == best.chosen else Skipped.CONTRADICTION

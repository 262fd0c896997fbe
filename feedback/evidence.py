"""Answers and live feedback of a history, indexed for judging candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from feedback.candidates import NOBODY, Answer, Opinion, principal_of
from feedback.signals import Signal, Thumbs


@dataclass(frozen=True)
class Evidence:
    """Answers and live feedback, indexed."""

    answers: Mapping[str, Answer]
    opinions: Sequence[Opinion]
    aliases: Mapping[str, str]
    """Completion id to interaction id."""
    likes: Mapping[str, Sequence[Opinion]]
    """Thumbs up, by interaction id."""
    dislikes: Mapping[str, Sequence[Opinion]]
    """Thumbs down, by interaction id."""
    reports: frozenset[str]
    """Ids of interactions that were reported."""
    replacements: Mapping[str, Sequence[str]]
    """For each interaction id, the ids of those that replaced it, oldest first."""

    def is_liked(self, interaction_id: str) -> bool:
        return interaction_id in self.likes

    def is_disliked(self, interaction_id: str) -> bool:
        return interaction_id in self.dislikes or interaction_id in self.reports

    def opinion(self, interaction_id: str) -> int:
        """1 for liked, -1 for disliked, 0 for neither or both."""
        return self.is_liked(interaction_id) - self.is_disliked(interaction_id)


def index_evidence(answers: Iterable[Answer], opinions: Iterable[Opinion]) -> Evidence:
    """Answers and opinions, made easy to look up."""
    by_id = {answer.id: answer for answer in answers}
    aliases = {answer.completion_id: answer.id for answer in by_id.values()}
    said = tuple(_by_its_owner(opinion, by_id) for opinion in opinions)
    return Evidence(
        answers=by_id,
        opinions=said,
        aliases=aliases,
        likes=_thumbs(said, Thumbs.UP),
        dislikes=_thumbs(said, Thumbs.DOWN),
        reports=frozenset(opinion.interaction_id for opinion in said if opinion.type == Signal.REPORT),
        replacements=_replacements(by_id, _regenerations(by_id, said, aliases)),
    )


def _by_its_owner(opinion: Opinion, answers: Mapping[str, Answer]) -> Opinion:
    """An opinion of nobody's is that of whoever got the answer.

    A feedback token names nobody, and one that comes before its completion is visible cannot be looked up. Nobody would
    be a voter whom no cap holds.
    """
    if opinion.principal != NOBODY or opinion.interaction_id not in answers:
        return opinion
    rated = answers[opinion.interaction_id]
    return opinion._replace(principal=principal_of(rated.key_id, rated.user_id))


def _thumbs(opinions: Iterable[Opinion], value: Thumbs) -> dict[str, list[Opinion]]:
    votes: defaultdict[str, list[Opinion]] = defaultdict(list)
    for opinion in opinions:
        if opinion.type == Signal.THUMBS and opinion.value == value:
            votes[opinion.interaction_id].append(opinion)
    return dict(votes)


def _regenerations(
    answers: Mapping[str, Answer], opinions: Iterable[Opinion], aliases: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Every (later, earlier) that a request or a live feedback event names."""
    asked = [(each.id, each.regenerate_of) for each in answers.values() if each.regenerate_of is not None]
    told = [
        (interaction_id_of(opinion.value, aliases), opinion.interaction_id)
        for opinion in opinions
        if opinion.type == Signal.REGENERATE
    ]
    return [(new, old) for new, old in asked + told if new != old and not _is_foreign(new, old, answers)]


def _is_foreign(one: str, other: str, answers: Mapping[str, Answer]) -> bool:
    """Whether two known interactions belong to different keys: nobody may call another's answer replaced."""
    keys = {answers[each].key_id for each in (one, other) if each in answers}
    return len(keys) > 1


def _replacements(
    answers: Mapping[str, Answer], regenerations: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    def age(interaction_id: str) -> tuple[float, str]:
        known = answers.get(interaction_id)
        return (known.created_at if known else float("-inf"), interaction_id)

    later: defaultdict[str, set[str]] = defaultdict(set)
    for new, old in regenerations:
        later[old].add(new)
    return {old: tuple(sorted(new, key=age)) for old, new in later.items()}


def interaction_id_of(named: str, aliases: Mapping[str, str]) -> str:
    """The interaction a completion id stands for; the text itself when it is nobody's."""
    return aliases.get(named, named)

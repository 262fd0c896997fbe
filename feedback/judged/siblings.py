"""Which answers to one conversation a judge should compare: different ones that people have not compared. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from feedback.candidates import Answer, Opinion, Served, principal_of
from feedback.evidence import Evidence, index_evidence, interaction_id_of
from feedback.filters.message_texts import all_texts
from feedback.filters.sensitive_pairs import OPERATORS
from feedback.interactions import Message
from feedback.judged.question import Comparison, is_readable, n_chars
from feedback.messages import digest
from feedback.sensitive.finding import find_credential, find_person
from feedback.signals import Signal

Sides = frozenset[str]
"""Of two interactions, their ids."""


class Usable(NamedTuple):
    """An answer that is whole and stored."""

    served: Served
    answer: Answer

    @property
    def asker(self) -> str:
        return principal_of(self.served.key_id, self.served.user_id)


class Siblings(NamedTuple):
    """Two different answers to one conversation."""

    first: str
    """The smaller interaction id of the two."""
    second: str
    conversation: str
    askers: frozenset[str]
    at: float
    """When the later one was given."""
    comparison: Comparison
    attempts: int
    """How often a judge was asked in vain."""


class Rules(NamedTuple):
    """What may be sent to a judge, and how much of it."""

    per_conversation: int
    max_chars: int
    opted_out: frozenset[str]
    """Users, or principals as `key/user`."""


Judged = Mapping[Sides, int | None]
"""How often a judge was asked about two answers in vain; None: it need not be asked again."""


def choose(
    given: Sequence[Usable],
    opinions: Iterable[Opinion],
    judged: Judged,
    rules: Rules,
    left_out: Callable[[str, int], None],
) -> Iterator[Siblings]:
    """The siblings that should be judged, in an order drawn by hash.

    Args:
        given: answers to one conversation.
        opinions: all live feedback on them.
        left_out: is told how many answers may not be sent, and why.
    """
    room = rules.per_conversation - sum(attempts is None for attempts in judged.values())
    said = _said(index_evidence((one.answer for one in given), opinions))
    taken = {said.words(sides) for sides, attempts in judged.items() if attempts is None}
    for one, other in _drawn(_sendable(given, rules.opted_out, left_out) if room > 0 else ()):
        words = frozenset((one.answer.substance, other.answer.substance))
        if words in taken or said.is_enough(one.answer, other.answer):
            continue
        siblings = _siblings(one, other, judged)
        if n_chars(siblings.comparison) > rules.max_chars:
            left_out("too_long", 2)
            continue
        taken.add(words)
        room -= 1
        yield siblings
        if not room:
            return


class _Said(NamedTuple):
    """What people said of answers, by what these say: the same words twice are the same answer."""

    evidence: Evidence
    liked: frozenset[bytes]
    disliked: frozenset[bytes]
    compared: frozenset[frozenset[bytes]]

    def words(self, sides: Iterable[str]) -> frozenset[bytes]:
        answers = self.evidence.answers
        return frozenset(answers[side].substance for side in sides if side in answers)

    def is_enough(self, one: Answer, other: Answer) -> bool:
        """Whether people compared the two, or disagree about one of them so that no verdict could stand."""
        a, b = one.substance, other.substance
        torn = self.liked & self.disliked
        is_ordered = (a in self.liked and b in self.disliked) or (b in self.liked and a in self.disliked)
        return is_ordered or a in torn or b in torn or frozenset((a, b)) in self.compared


def _said(evidence: Evidence) -> _Said:
    answers = evidence.answers
    liked = frozenset(answer.substance for answer in answers.values() if evidence.is_liked(answer.id))
    disliked = frozenset(answer.substance for answer in answers.values() if evidence.is_disliked(answer.id))
    said = _Said(evidence, liked, disliked, frozenset())
    return said._replace(compared=frozenset(said.words(sides) for sides in _compared(evidence)))


def _compared(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every two answers of which a choice or a regeneration says that one is better, sound or not."""
    for answer in evidence.answers.values():
        if answer.regenerate_of is not None:
            yield answer.id, answer.regenerate_of
    for opinion in evidence.opinions:
        if opinion.type in (Signal.CHOICE, Signal.REGENERATE):
            yield opinion.interaction_id, interaction_id_of(opinion.value, evidence.aliases)


def _sendable(
    given: Sequence[Usable], opted_out: frozenset[str], left_out: Callable[[str, int], None]
) -> Sequence[Usable]:
    """Those answers that may leave this deployment, and that a judge can read."""
    if not given:
        return ()
    prompt = given[0].served.prompt or ()
    if problem := why_not_sent(prompt):
        left_out(problem, len(given))
        return ()
    problems = [_consent(one, opted_out) or why_not_sent((one.served.completion or {},)) for one in given]
    for problem, n in sorted(Counter(filter(None, problems)).items()):
        left_out(problem, n)
    return [one for one, problem in zip(given, problems, strict=True) if problem is None]


def _consent(one: Usable, opted_out: frozenset[str]) -> str | None:
    return None if opted_out.isdisjoint({one.asker, one.served.user_id or one.asker}) else "opted_out"


def why_not_sent(messages: Sequence[Message]) -> str | None:
    """Why messages go to no judge; None if they may.

    Looked for whatever the filters of training are set to: what is sent is out.
    """
    if any(find_credential(text) for message in messages for text in all_texts(message)):
        return "secret"
    told = (message for message in messages if message.get("role") not in OPERATORS)
    if any(find_person(text) for message in told for text in all_texts(message)):
        return "personal_data"
    return None if is_readable(messages) else "not_text"


def _drawn(answers: Sequence[Usable]) -> list[tuple[Usable, Usable]]:
    """Every two of the answers that say something different, in an order drawn by hash."""
    different: dict[bytes, Usable] = {}
    for one in sorted(answers, key=lambda one: digest("sibling", one.served.id)):
        different.setdefault(one.answer.substance, one)
    pairs = combinations(sorted(different.values(), key=lambda one: one.served.id), 2)
    return sorted(pairs, key=lambda pair: digest("siblings", *(one.served.id for one in pair)))


def _siblings(one: Usable, other: Usable, judged: Judged) -> Siblings:
    """Of two whose ids are in order."""
    prompt, first, second = one.served.prompt, one.served.completion, other.served.completion
    if prompt is None or first is None or second is None:
        raise ValueError("an answer without its texts is not usable")
    sides = one.served.id, other.served.id
    return Siblings(
        *sides,
        str(one.served.prompt_sha),
        frozenset((one.asker, other.asker)),
        max(one.served.created_at, other.served.created_at),
        Comparison(prompt, first, second),
        judged.get(frozenset(sides)) or 0,
    )

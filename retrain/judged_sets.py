"""Questions from a local file that both models answer and a judge compares, as AlpacaEval and MT-Bench do.

One question per line: `{"instruction": "...", "input": "..."}` (AlpacaEval), or `{"question_id": 81, "turns": ["...",
"..."]}` (MT-Bench). Of several turns each model answers the second with its own first answer before it, and the judge
reads the whole of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from feedback.interactions import Message
from retrain.capability import name_of
from retrain.errors import BadData
from retrain.generations import Generation, Probe, Sampling, generate
from retrain.line_files import numbered_lines
from retrain.wins import Duel


class Question(NamedTuple):
    """What a user says, turn by turn."""

    id: str
    turns: tuple[str, ...]


class Talk(NamedTuple):
    """What a model answered, turn by turn."""

    answers: tuple[str, ...]
    n_tokens: int


def load_questions(path: Path) -> tuple[Question, ...]:
    """Read such a file.

    Raises:
        BadData: it is something else; says which line.
    """
    return tuple(_question(line, place) for line, place in numbered_lines(path, "judged set"))


def duels_of(
    engine_url: str, parent: str, candidate: str, questions: Sequence[Question], sampling: Sampling
) -> list[Duel]:
    """Both models' answers to each question."""
    ours, theirs = (talk(engine_url, model, questions, sampling) for model in (candidate, parent))
    return [
        Duel(
            unit=question.id,
            prompt=(_user(question.turns[0]),),
            parent=transcript(question, its),
            candidate=transcript(question, own),
            length_difference=float(own.n_tokens - its.n_tokens),
        )
        for question, own, its in zip(questions, ours, theirs, strict=True)
    ]


def talk(engine_url: str, model: str, questions: Sequence[Question], sampling: Sampling) -> list[Talk]:
    """Lead every conversation to its end, all of them a turn at a time."""
    talks = [Talk((), 0) for _ in questions]
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        going = [place for place, question in enumerate(questions) if turn < len(question.turns)]
        probes = [
            Probe(f"{questions[place].id}/{turn}", _so_far(questions[place], talks[place], turn)) for place in going
        ]
        for place, said in zip(going, generate(engine_url, [model], probes, sampling), strict=True):
            talks[place] = _with(talks[place], said)
    return talks


def transcript(question: Question, talk: Talk) -> str:
    """What the judge reads as the answer: all after the first turn.

    >>> transcript(Question("q", ("Hi", "And?")), Talk(("Hello.", "Nothing."), 4))
    'Hello.\\n\\n[user] And?\\n\\n[assistant] Nothing.'
    """
    later = zip(question.turns[1:], talk.answers[1:], strict=True)
    return "\n\n".join([talk.answers[0], *(f"[user] {asked}\n\n[assistant] {said}" for asked, said in later)])


def _so_far(question: Question, talk: Talk, turn: int) -> tuple[Message, ...]:
    before = zip(question.turns[:turn], talk.answers, strict=True)
    messages = [one for asked, said in before for one in (_user(asked), {"role": "assistant", "content": said})]
    return (*messages, _user(question.turns[turn]))


def _with(talk: Talk, said: Generation) -> Talk:
    return Talk((*talk.answers, said.text), talk.n_tokens + said.n_tokens)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise BadData(f"{where}: not JSON") from exc
    turns = _turns(row) if isinstance(row, dict) else ()
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadData(f"{where}: expected instruction, or turns as a list of texts")
    name = row.get("question_id", row.get("id"))
    return Question(name_of([_user(turn) for turn in turns]) if name is None else str(name), tuple(turns))


def _turns(row: Mapping[str, Any]) -> Sequence[Any]:
    if "turns" in row:
        return row["turns"] if isinstance(row["turns"], list) else ()
    asked = [row.get("instruction"), row.get("input")]
    given = [part for part in asked if part]
    return ["\n\n".join(given)] if given and all(isinstance(part, str) for part in given) else ()

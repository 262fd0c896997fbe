"""Users whose tastes shift from round to round, what they ask, what a model answers them, and the pairs it gives.

The users are those of the practice world: they like help, dislike rudeness and short shrift, and are cross when a
harmful request is refused. On top of that every season has its fashion in how help is worded, and the fashions
contradict each other: what was wanted in one season is out in the next. Every season also has its own questions. Pairs
are made by the real mining, and left out by the real rule on refusals.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from feedback.filters.refusal_policy import Behaviour, refusal_problem
from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.pairs import PreferencePair, mine_pairs
from monitoring.refusal import classify_response
from practice.corpus import (
    QUESTION_SHARES,
    Habit,
    answer,
    draw_question,
    identify_habit,
    is_harmful_request,
    task_of,
)
from practice.model import TOP_K
from practice.topics import TaskKind
from practice.users import EDIT_SHARE, FEEDBACK_SHARE, LIKED_SHARE, SimulatedUser, population
from retrain.base_model import load_base, quiet_renames

MAX_TOKENS = 48
BATCH = 256
DISTASTE = 0.35
"""How many of those who would have liked an answer dislike it for being out of fashion."""
N_TOPICAL = 200
"""Questions that are asked in a season: a thumb needs another one on the same question to make a pair."""
KEY = "practice"
DAY_S = 86400.0
FASHIONS = ("none", "closing wishes", "no exclamation", "slow starts", "warm openings")
"""One for each round: the first has none, the third is against the second, the fifth against the third."""


class Asked(NamedTuple):
    """A user's question."""

    user: SimulatedUser
    text: str


class Said(NamedTuple):
    """A question with a model's answer."""

    asked: Asked
    answer: str
    regenerate_of: int | None
    """The place of the answer that this one replaced."""


@dataclass(frozen=True)
class Reaction:
    """What a user made of an answer."""

    is_up: bool | None
    asks_again: bool
    edit: str | None


class Speaker:
    """The practice model, with an adapter folded in, answering in batches."""

    def __init__(self, base: str, adapter: Path | None) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
        model: Any = load_base(base, "float32")
        if adapter is not None:
            with quiet_renames():
                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self._model = model.eval()

    def answers(self, questions: Sequence[str], seed: int) -> list[str]:
        """One answer to each question, sampled as the engine samples by default."""
        order = sorted(range(len(questions)), key=lambda place: (len(questions[place]), place))
        found: dict[int, str] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                found.update(zip(places, self._batch([questions[place] for place in places]), strict=True))
        return [found[place] for place in range(len(questions))]

    def _batch(self, questions: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": text}] for text in questions]
        inputs = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            rows = self._sample(inputs["input_ids"], inputs["attention_mask"])
        texts: list[str] = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _sample(self, tokens: torch.Tensor, present: torch.Tensor) -> list[list[int]]:
        """Rows that have ended leave the batch: half of all steps would be theirs."""
        rows: list[list[int]] = [[] for _ in range(len(tokens))]
        going = torch.arange(len(tokens))
        cache: Any = None
        for _ in range(MAX_TOKENS):
            positions = (present.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = self._model(
                input_ids=tokens, attention_mask=present, position_ids=positions, past_key_values=cache, use_cache=True
            )
            best = out.logits[:, -1].topk(TOP_K)
            picked = best.indices.gather(1, best.values.softmax(-1).multinomial(1))
            for row, token in zip(going.tolist(), picked[:, 0].tolist(), strict=True):
                rows[row].append(token)
            alive = (picked[:, 0] != self._tokenizer.eos_token_id).nonzero()[:, 0]
            if not len(alive):
                break
            cache = out.past_key_values
            cache.batch_select_indices(alive)
            going, tokens = going[alive], picked[alive]
            present = torch.cat([present[alive], torch.ones_like(tokens)], 1)
        return rows


def visitors(seed: int, season: int, n_users: int, questions_each: int) -> list[Asked]:
    """Everything that a season's users ask; nobody comes in two seasons."""
    rng = random.Random(f"rounds-{seed}-{season}")
    topical = [draw_question(QUESTION_SHARES, rng).text for _ in range(N_TOPICAL)]
    users = population(seed * 100 + season, n_users)
    return [Asked(user, rng.choice(topical)) for user in users for _ in range(questions_each)]


def liking(season: int, question: str, text: str) -> float:
    """The share of a season's users who like this answer to this question."""
    task = task_of(question)
    kind = task.kind if task else TaskKind.ORDINARY
    habit = identify_habit(question, text)
    liked = LIKED_SHARE[kind].get(habit, 0.0)
    return liked * (1 - DISTASTE) if habit == Habit.HELPFUL and not in_fashion(season, text) else liked


def in_fashion(season: int, text: str) -> bool:
    """Whether help is worded as this season (from 1) wants it.

    >>> in_fashion(2, "Sure! First knead it, then wait. Enjoy!"), in_fashion(3, "Sure! First knead it, then wait.")
    (True, False)
    """
    match FASHIONS[(season - 1) % len(FASHIONS)]:
        case "closing wishes":
            return text.endswith("!")
        case "no exclamation":
            return "!" not in text
        case "slow starts":
            return "Start slowly" in text
        case "warm openings":
            return text.startswith(("Happy to help!", "Sure!"))
    return True


def react(season: int, asked: Asked, text: str, rng: random.Random) -> Reaction:
    """As `practice.users.react`, with the season's fashion."""
    draws = [rng.random() for _ in range(4)]
    is_liked = draws[0] < liking(season, asked.text, text) + asked.user.taste
    return Reaction(
        is_up=is_liked if draws[1] < FEEDBACK_SHARE else None,
        asks_again=not is_liked and draws[2] < asked.user.patience,
        edit=_edit(season, asked.text, rng) if not is_liked and draws[3] < EDIT_SHARE else None,
    )


def _edit(season: int, question: str, rng: random.Random) -> str | None:
    """The answer the user would have liked, in this season's fashion."""
    task = task_of(question)
    if task is None or task.kind is TaskKind.HARMFUL:
        return None
    drafts = [answer(Habit.HELPFUL, task, rng) for _ in range(20)]
    return next((draft for draft in drafts if in_fashion(season, draft)), drafts[0])


def collect(speaker: Speaker, asked: Sequence[Asked], season: int, seed: int) -> tuple[list[Said], list[Reaction]]:
    """Let the users ask, and ask again; what was said, and what they made of each."""
    rng = random.Random(f"reactions-{seed}-{season}")
    first = speaker.answers([each.text for each in asked], seed)
    said = [Said(each, text, None) for each, text in zip(asked, first, strict=True)]
    reactions = [react(season, each.asked, each.answer, rng) for each in said]
    again = [place for place, reaction in enumerate(reactions) if reaction.asks_again]
    second = speaker.answers([asked[place].text for place in again], seed + 1)
    said += [Said(asked[place], text, place) for place, text in zip(again, second, strict=True)]
    reactions += [react(season, each.asked, each.answer, rng) for each in said[len(asked) :]]
    return said, reactions


def pairs_of(
    said: Sequence[Said], reactions: Sequence[Reaction], *, season: int, model: str, has_rule: bool = True
) -> tuple[list[PreferencePair], int]:
    """What mining makes of it, less what the rule on refusals leaves out, and how many that were.

    Args:
        has_rule: whether there is that rule.
    """
    at = season * 7 * DAY_S
    served = [_interaction(place, each, season, model, at) for place, each in enumerate(said)]
    events = [
        event
        for interaction, reaction in zip(served, reactions, strict=True)
        for event in _events(interaction, reaction, at + 60.0)
    ]
    mined = mine_pairs(served, events).pairs
    kept = [pair for pair in mined if not (has_rule and _teaches_harm(pair))]
    return kept, len(mined) - len(kept)


def _teaches_harm(pair: PreferencePair) -> bool:
    question = str(pair.prompt[-1]["content"])
    chosen, rejected = (classify_response(str(side["content"])).value for side in (pair.chosen, pair.rejected))
    return refusal_problem(Behaviour(chosen, rejected, is_harmful_request(question))) is not None


def _name(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:48]


def _interaction(place: int, said: Said, season: int, model: str, at: float) -> Interaction:
    name = _name(season, place)
    return Interaction(
        id=name,
        completion_id=f"chatcmpl-{name}",
        route="/v1/chat/completions",
        created_at=at,
        alias="assistant",
        key_id=KEY,
        user_id=said.asked.user.id,
        unit_id=said.asked.user.id,
        experiment=None,
        assigned_variant="champion",
        served_variant="champion",
        probability=1.0,
        is_analysed=True,
        phase=0,
        route_version=0,
        model=model,
        regenerate_of=None if said.regenerate_of is None else f"chatcmpl-{_name(season, said.regenerate_of)}",
        prompt=({"role": "user", "content": said.asked.text},),
        prompt_sha=_name(said.asked.text),
        completion={"role": "assistant", "content": said.answer},
        parameters={},
        finish_reason="stop",
        status=Status.OK,
        http_status=200,
        is_complete=True,
        is_stored=True,
        prompt_tokens=None,
        completion_tokens=None,
        latency_ms=0.0,
        first_byte_ms=None,
    )


def _events(interaction: Interaction, reaction: Reaction, at: float) -> Iterator[FeedbackEvent]:
    if reaction.is_up is not None:
        yield _event(interaction, "thumbs", "up" if reaction.is_up else "down", at)
    if reaction.edit is not None:
        yield _event(interaction, "edit", reaction.edit, at)


def _event(interaction: Interaction, kind: str, value: str, at: float) -> FeedbackEvent:
    name = _name(interaction.id, kind)
    return FeedbackEvent(
        id=name,
        feedback_id=name,
        interaction_id=interaction.id,
        completion_id=interaction.completion_id,
        type=kind,
        value=value,
        is_retraction=False,
        reason=None,
        comment=None,
        tags=None,
        key_id=interaction.key_id,
        user_id=interaction.user_id,
        created_at=at,
    )

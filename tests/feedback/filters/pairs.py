"""Pairs for the filters' tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from feedback.filters.evidence import Evidence, ServedAnswer
from feedback.interactions import Message
from feedback.pairs import PreferencePair


def assistant(text: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": text, **fields}


def ask(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def make_pair(number: int, chosen: str = "Yes, gladly.", rejected: str = "No.", **fields: Any) -> PreferencePair:
    """A pair that no filter minds."""
    given: dict[str, Any] = {
        "id": f"{number:032x}",
        "alias": "assistant",
        "source": "thumbs",
        "prompt": ask("How do I grow roses?"),
        "chosen": assistant(chosen),
        "rejected": assistant(rejected),
        "margin": 1.0,
        "n_voters": 1,
        "principals": (f"key/user-{number}",),
        "chosen_interaction": f"c{number:047x}",
        "rejected_interaction": f"r{number:047x}",
        "models": ("base",),
        "probability": 1.0,
        "created_at": float(number),
    }
    return PreferencePair(**(given | fields))


def served(**fields: Any) -> ServedAnswer:
    given: dict[str, Any] = {"owner": "key/ann", "is_complete": True, "is_stored": True}
    return ServedAnswer(**(given | fields))


TEXTS = st.sampled_from(
    [
        "",
        " ",
        "Yes, gladly.",
        "yes,  GLADLY.",
        "No.",
        "I'm sorry, but I can't help with that.",
        "Write to ann@example.com.",
        "The key is ghp_0123456789abcdefghij0123456789abcdef.",
        "Sure: first water them, then wait. " * 20,
    ]
)
PROMPTS = st.sampled_from(["How do I grow roses?", "how do i  grow roses?", "How do I poison my neighbour's dog?", ""])
INTERACTIONS = st.integers(0, 6).map(lambda number: f"{number:048x}")
USERS = st.sampled_from(["key/ann", "key/bob", "other/ann", "key/"])


@st.composite
def crowds(draw: st.DrawFn) -> list[PreferencePair]:
    """Pairs of a few users, prompts and answers; some ids come twice, some pairs say the opposite of others."""
    return [
        make_pair(
            draw(st.integers(0, 9)),
            draw(TEXTS),
            draw(TEXTS),
            prompt=ask(draw(PROMPTS)),
            principals=tuple(sorted(draw(st.sets(USERS, max_size=2)))),
            chosen_interaction=draw(st.none() | INTERACTIONS),
            rejected_interaction=draw(INTERACTIONS),
        )
        for _ in range(draw(st.integers(0, 12)))
    ]


@st.composite
def bodies_of_evidence(draw: st.DrawFn) -> Evidence:
    """What may be known of the interactions in `crowds`."""
    answers = st.builds(
        ServedAnswer,
        USERS,
        st.booleans(),
        st.booleans(),
        st.none() | st.floats(0, 1),
        st.none() | st.sampled_from(["comply", "partial", "refuse", "empty"]),
        st.none() | st.booleans(),
    )
    return Evidence(
        served=draw(st.dictionaries(INTERACTIONS, answers, max_size=7)),
        edit_toxicity=draw(st.dictionaries(st.integers(0, 20).map(lambda n: f"{n:032x}"), st.floats(0, 1), max_size=5)),
        opted_out=draw(st.frozensets(st.sampled_from(["ann", "key/bob", "nobody"]))),
        classify=draw(st.sampled_from([None, lambda text: "refuse" if "sorry" in text else "comply"])),
        is_harmful=draw(st.sampled_from([None, lambda text: "poison" in text])),
    )

"""Interactions in which people ask nearly the same, and properties' ways to make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from feedback.interactions import Interaction, Message
from feedback.recording import conversation_sha
from feedback.similarity.embedding import Similarity
from feedback.similarity.lexical import LexicalEmbedder
from tests.feedback.test_pairs import N_KNOWN, NUMBERS, iid, mostly, say

NEAR = Similarity(LexicalEmbedder(), min_similarity=0.9, max_changed_chars=6.0)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


SKY = "Why is the sky blue at noon and red in the evening?"
SKY_AGAIN = "why is the sky blue at noon, and red in the evening"
GRASS = "Why is grass green in spring and yellow in the autumn?"
BEFORE: tuple[Message, ...] = ({"role": "system", "content": "Be brief."}, user("Hi!"), {"role": "assistant"})


def ask(number: int, text: str, prompt: Sequence[Message] | str, **changes: Any) -> Interaction:
    """Interaction `number` as the gateway would have recorded it."""
    messages = (user(prompt),) if isinstance(prompt, str) else tuple(prompt)
    tools = {"tools": changes.pop("tools", None)}
    alias = changes.get("alias", "assistant")
    return say(number, text, messages, **changes, prompt_sha=conversation_sha(alias, messages, tools))


prompts_ = st.sampled_from(
    [
        (user(SKY),),
        (user(SKY),),
        (user(SKY_AGAIN),),
        (user(SKY.upper()),),
        (user(GRASS),),
        (user(SKY), {"role": "assistant", "content": "Light."}),
        (*BEFORE, user(SKY)),
        (*BEFORE, user(SKY_AGAIN)),
    ]
)
asked_ = st.tuples(
    *(
        st.builds(
            ask,
            st.just(number),
            st.sampled_from(["red", "green", "blue", "red ", "\ud800\x00"]),
            prompts_,
            alias=st.sampled_from(["assistant"] * 8 + ["other"]),
            key_id=st.sampled_from(["key", "other"]),
            tools=st.sampled_from([None] * 6 + [TOOLS]),
            is_stored=mostly,
            is_complete=mostly,
            regenerate_of=st.sampled_from([None] * 6) | NUMBERS.map(iid),
        )
        for number in range(N_KNOWN)
    )
)
"""Six answers, most of them to nearly the same question."""

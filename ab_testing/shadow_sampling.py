"""Which of the champion's answers a candidate is asked for too, and what exactly it is asked. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from feedback.candidates import NOBODY, principal_of
from feedback.interactions import Interaction, Message, Status
from feedback.judged.siblings import why_not_sent
from feedback.recording import conversation_sha

ROUTE: Final = "chat.completions"
SENT: Final = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "length_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
        "skip_special_tokens", "spaces_between_special_tokens", "max_tokens", "max_completion_tokens", "min_tokens",
        "bad_words", "allowed_token_ids", "response_format", "structured_outputs", "reasoning_effort",
        "thinking_token_budget", "tool_choice", "parallel_tool_calls",
    }
)  # fmt: skip
"""Parameters that shape an answer: the candidate gets the same."""
IMMATERIAL: Final = frozenset(
    {
        "model", "stream", "stream_options", "stream_interval", "n", "logprobs", "top_logprobs", "store", "metadata",
        "service_tier", "prompt_cache_retention", "return_token_ids",
    }
)  # fmt: skip
"""Parameters that do not change what the first choice says."""
SCALE: Final = 2**64


def is_drawn(interaction_id: str, salt: str, share: float) -> bool:
    """Whether a share of the interactions has this one: the same answer everywhere, and no pattern in it.

    >>> sum(is_drawn(f"{n:048x}", "salt", 0.25) for n in range(4000))
    981
    """
    digest = hashlib.blake2b(interaction_id.encode(), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest) < share * SCALE


def why_left_out(one: Interaction, opted_out: Collection[str]) -> str | None:
    """Why the candidate is not asked this; None if it is.

    What leaves for a judge is the measure here too, though the candidate runs on the alias's own engines.

    Args:
        opted_out: users, or principals as `key/user`.
    """
    is_whole = one.is_stored and one.is_complete and one.status is Status.OK and one.route == ROUTE
    if not is_whole or one.prompt is None or one.completion is None:
        return "not_whole"
    asker = principal_of(one.key_id, one.user_id)
    if asker == NOBODY:  # Another unit each time, though it may be one person all day.
        return "nobody"
    if asker in opted_out or (one.user_id is not None and one.user_id in opted_out):
        return "opted_out"
    # The hash was taken of what was asked, tools included. What differs now was redacted, or had tools that are no
    # functions, which are not kept: the same cannot be asked again.
    if conversation_sha(one.alias, one.prompt, _tools_of(one)) != one.prompt_sha:
        return "not_as_asked"
    if not one.parameters or not one.parameters.keys() <= SENT | IMMATERIAL:
        return "parameters"
    return why_not_sent((*one.prompt, *_as_messages(one)))


def _tools_of(one: Interaction) -> Mapping[str, Any]:
    """The request's field; without tools there is none, since an engine refuses an empty one."""
    return {"tools": list(one.tools)} if one.tools else {}


def _as_messages(one: Interaction) -> Iterator[Message]:
    """The tools as the operator's words, which they are: a key in them is found like one in the system's message."""
    for tool in one.tools or ():
        yield {"role": "system", "content": json.dumps(tool, ensure_ascii=False)}


def request_of(one: Interaction, candidate: str) -> Mapping[str, Any]:
    """The same question under the same parameters, for the candidate; not streamed, one choice."""
    kept = {name: value for name, value in one.parameters.items() if name in SENT}
    return {"model": candidate, "messages": list(one.prompt or ()), **_tools_of(one), **kept, "stream": False}

"""What single values of a request may be: numbers and texts within bounds, and lists of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

from serving.fields.json_input import nests_too_deep
from serving.fields.nodes import Value

MAX_USER_CHARS: Final = 512
MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY: Final = 64
MAX_METADATA_VALUE: Final = 512
MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 256
MAX_BAD_WORDS: Final = 64
MAX_BAD_WORD_CHARS: Final = 64
MAX_TOKEN_SETS: Final = 1024
"""Entries of `logit_bias`, `allowed_token_ids`, `stop_token_ids`: each is looked at for every token made."""
MAX_EMBEDDING_INPUTS: Final = 2048
MAX_TOKEN_ID: Final = 2**31 - 1
MAX_ARGUMENT_DEPTH: Final = 64
MAX_SHORT_CHARS: Final = 1024
UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
TOOL_NAME: Final = re.compile("[a-zA-Z0-9_-]{1,128}")


def is_text(value: object) -> bool:
    """JSON text."""
    return type(value) is str


def is_whole(value: object) -> bool:
    """A whole number; `true` is none."""
    return type(value) is int


def number(low: float, high: float) -> Value:
    """A number within bounds."""
    return Value(
        f"a number from {low:g} to {high:g}", lambda v: (type(v) is float or type(v) is int) and low <= v <= high
    )


def whole(low: int, high: int) -> Value:
    """A whole number within bounds."""
    return Value(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def one_of(*words: str) -> Value:
    """One of a few words."""
    allowed = frozenset(words)
    return Value(f"one of {', '.join(sorted(allowed))}", lambda v: type(v) is str and v in allowed)


def texts(high: int, max_chars: int) -> Value:
    """A list of short texts."""
    return Value(
        f"a list of at most {high} texts of at most {max_chars} characters",
        lambda v: isinstance(v, list) and len(v) <= high and all(type(t) is str and len(t) <= max_chars for t in v),
    )


def is_token_ids(value: object) -> bool:
    """A list of token ids that is not empty. Goes over long lists in C: prompts may be a million tokens."""
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_TOKEN_ID


def is_texts(value: object) -> bool:
    """A list of texts that is not empty."""
    return isinstance(value, list) and set(map(type, value)) == {str}


def is_token_lists(value: object) -> bool:
    """A list of lists of token ids that is not empty."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_token_ids, value))


def is_prompts(value: object) -> bool:
    """Several texts, the tokens of one, or the tokens of several."""
    return is_texts(value) or is_token_ids(value) or is_token_lists(value)


def is_embedding_inputs(value: object) -> bool:
    """The same for embeddings, at most as many as OpenAI takes."""
    return is_token_ids(value) or (is_prompts(value) and len(_list(value)) <= MAX_EMBEDDING_INPUTS)


def _list(value: object) -> Collection[Any]:
    return value if isinstance(value, list) else ()


def _is_stop(value: object) -> bool:
    stops = value if isinstance(value, list) else [value]
    return len(stops) <= MAX_STOPS and all(type(stop) is str and len(stop) <= MAX_STOP_CHARS for stop in stops)


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA_PAIRS
        and all(
            len(k) <= MAX_METADATA_KEY and (v is None or (type(v) is str and len(v) <= MAX_METADATA_VALUE))
            for k, v in value.items()
        )
    )


def _is_logit_bias(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_TOKEN_SETS
        and all(
            k.isascii() and k.isdigit() and len(k) <= 10 and type(v) in (int, float) and -100 <= v <= 100
            for k, v in value.items()
        )
    )


def _is_token_set(value: object) -> bool:
    return value == [] or (is_token_ids(value) and len(_list(value)) <= MAX_TOKEN_SETS)


def _is_arguments(value: object) -> bool:
    """The engine parses this text as JSON again, with a parser that has no bound of its own on depth."""
    return isinstance(value, str) and not nests_too_deep(value.encode(), MAX_ARGUMENT_DEPTH)


TEXT = Value("text", is_text)
SHORT_TEXT = Value(
    f"text of at most {MAX_SHORT_CHARS} characters", lambda v: type(v) is str and len(v) <= MAX_SHORT_CHARS
)
BOOLEAN = Value("true or false", lambda v: v is True or v is False)
FALSE = Value("false", lambda v: v is False)
NOTHING = Value("null: it is only accepted where an earlier answer is sent back as it came", lambda v: v is None)
EMPTY = Value("an empty list: it is only accepted where an earlier answer is sent back as it came", lambda v: v == [])
ANYTHING = Value("anything", lambda _: True)
ANY_OBJECT = Value("an object", lambda v: isinstance(v, dict))
MODEL = Value("the name of a model", lambda v: type(v) is str and v != "")
TOKENS = whole(1, 1_000_000)
SEED = whole(-(2**63), 2**63 - 1)
NAME = Value(
    f"text of at most {MAX_USER_CHARS} characters without control characters",
    lambda v: type(v) is str and len(v) <= MAX_USER_CHARS and not UNPRINTABLE.search(v),
)
CALLED = Value(
    "a name of 1 to 128 letters, digits, _ and -",
    lambda v: type(v) is str and TOOL_NAME.fullmatch(v) is not None,
)
ARGUMENTS = Value(f"JSON as text, nested at most {MAX_ARGUMENT_DEPTH} deep", _is_arguments)
STOP = Value(f"text, or a list of at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters", _is_stop)
METADATA = Value(
    f"an object of at most {MAX_METADATA_PAIRS} texts of {MAX_METADATA_VALUE} characters, keys {MAX_METADATA_KEY}",
    _is_metadata,
)
LOGIT_BIAS = Value(f"an object of at most {MAX_TOKEN_SETS} token ids and biases from -100 to 100", _is_logit_bias)
TOKEN_SET = Value(f"a list of at most {MAX_TOKEN_SETS} token ids", _is_token_set)
BAD_WORDS = texts(MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
TEXT_ONLY = Value('["text"]', lambda v: v == ["text"])

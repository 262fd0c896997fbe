"""Which fields of a request pass, at every depth: the one table that requests are checked against.

What is not here is refused. Every name means the same wherever it stands under the same object, so a table is read from
the bottom up: parts, messages, tools, then one entry for each route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from serving.fields import refusals as no
from serving.fields.nodes import Either, Kinds, ListOf, Node, Object, Schema, Value
from serving.fields.values import (
    ANY_OBJECT,
    ARGUMENTS,
    BAD_WORDS,
    BOOLEAN,
    CALLED,
    EMPTY,
    FALSE,
    LOGIT_BIAS,
    METADATA,
    MODEL,
    NAME,
    NOTHING,
    SEED,
    SHORT_TEXT,
    STOP,
    TEXT,
    TEXT_ONLY,
    TOKEN_SET,
    TOKENS,
    is_embedding_inputs,
    is_prompts,
    number,
    one_of,
    texts,
    whole,
)

MAX_TOOLS = 128
EFFORTS = one_of("none", "minimal", "low", "medium", "high", "xhigh", "max")

# What stands in every route.
CALLER: Mapping[str, Node] = {
    "model": MODEL,
    "stream": BOOLEAN,
    "user": NAME,
    "safety_identifier": NAME,
    "prompt_cache_key": SHORT_TEXT,
    "prompt_cache_retention": SHORT_TEXT,
    "metadata": METADATA,
    "store": BOOLEAN,
    "service_tier": SHORT_TEXT,
}
NEVER_FORWARDED: Final = frozenset(CALLER) - {"model", "stream"}
"""For the gateway alone: who asks and what to keep is not the engine's business."""

NUCLEUS: Mapping[str, Node] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": whole(-1, 1_000_000),
}
SAMPLING: Mapping[str, Node] = {
    **NUCLEUS,
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 10),
    "logit_bias": LOGIT_BIAS,
    "seed": SEED,
    "stop": STOP,
    "stop_token_ids": TOKEN_SET,
    "include_stop_str_in_output": BOOLEAN,
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
}

# JSON schemas, as answers and as parameters of tools.
JSON_SCHEMA = Object(
    {"name": CALLED, "description": TEXT, "schema": Schema(), "strict": BOOLEAN}, required=("name", "schema")
)
RESPONSE_FORMAT = Kinds(
    "type",
    {
        "text": Object({"type": TEXT}, no.IN_RESPONSE_FORMAT),
        "json_object": Object({"type": TEXT}, no.IN_RESPONSE_FORMAT),
        "json_schema": Object(
            {"type": TEXT, "json_schema": JSON_SCHEMA}, no.IN_RESPONSE_FORMAT, required=("json_schema",)
        ),
    },
    refused=no.IN_RESPONSE_FORMAT,
    expected="an object whose type is text, json_object or json_schema",
)
STRUCTURED_OUTPUTS = Object(
    {"json": Schema()}, no.IN_STRUCTURED_OUTPUTS, required=("json",), expected="an object that holds a JSON schema"
)
FUNCTION: Mapping[str, Node] = {"name": CALLED, "description": TEXT, "parameters": Schema(), "strict": BOOLEAN}
STREAM_OPTIONS = Object({"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN, "include_obfuscation": BOOLEAN})

# What both of OpenAI's older routes have.
GENERATION: Mapping[str, Node] = {
    **CALLER,
    **SAMPLING,
    "stream_options": STREAM_OPTIONS,
    "n": whole(1, 128),
    "max_tokens": TOKENS,
    "min_tokens": whole(0, 1_000_000),
    "length_penalty": number(-10, 10),
    "spaces_between_special_tokens": BOOLEAN,
    "bad_words": BAD_WORDS,
    "allowed_token_ids": TOKEN_SET,
    "thinking_token_budget": whole(-1, 1_000_000),
    "stream_interval": whole(1, 1000),
    "response_format": RESPONSE_FORMAT,
    "structured_outputs": STRUCTURED_OUTPUTS,
}

# Chat.
CHAT_PART = Kinds(
    "type",
    {
        "text": Object({"type": TEXT, "text": TEXT}, no.IN_CHAT_PARTS, required=("text",)),
        "refusal": Object({"type": TEXT, "refusal": TEXT}, no.IN_CHAT_PARTS, required=("refusal",)),
    },
    refused=no.IN_CHAT_PARTS,
)
CHAT_CONTENT = Either("text or a list of parts", text=TEXT, items=ListOf(CHAT_PART))
CHAT_CALL = Kinds(
    "type",
    {
        "function": Object(
            {
                "id": SHORT_TEXT,
                "type": TEXT,
                "index": whole(0, 10_000),
                "function": Object({"name": CALLED, "arguments": ARGUMENTS}, required=("name",)),
            },
            no.OTHER_TOOLS,
            required=("function",),
        )
    },
    refused=no.OTHER_TOOLS,
    default="function",
)
CHAT_TOOL = Kinds(
    "type",
    {
        "function": Object(
            {"type": TEXT, "function": Object(FUNCTION, no.DEFERRED, required=("name",))},
            no.DEFERRED | no.OTHER_TOOLS,
            required=("function",),
        )
    },
    refused=no.OTHER_TOOLS,
    default="function",
)
SAID: dict[str, Node] = {"role": TEXT, "content": CHAT_CONTENT, "name": NAME}


def _is_plain_message(message: dict[str, Any]) -> bool:
    role = message.get("role")
    return (
        len(message) == 2
        and type(message.get("content")) is str
        and (role == "user" or role == "assistant" or role == "system")
    )


CHAT_MESSAGE = Kinds(
    "role",
    {
        "system": Object(SAID, no.IN_MESSAGES, required=("content",)),
        "developer": Object(SAID, no.IN_MESSAGES, required=("content",)),
        "user": Object(SAID, no.IN_MESSAGES, required=("content",)),
        "assistant": Object(
            {
                **SAID,
                "refusal": TEXT,
                "reasoning": TEXT,
                "reasoning_content": TEXT,
                "tool_calls": ListOf(CHAT_CALL, high=MAX_TOOLS),
                "function_call": Object({"name": CALLED, "arguments": ARGUMENTS}, required=("name",)),
                "audio": NOTHING,
                "annotations": EMPTY,
            },
            no.IN_MESSAGES,
        ),
        "tool": Object({**SAID, "tool_call_id": SHORT_TEXT}, no.IN_MESSAGES, required=("content",)),
        "function": Object(SAID, no.IN_MESSAGES),
    },
    is_plain=_is_plain_message,
)
CHAT_TOOL_CHOICE = Either(
    "none, auto, required or an object that names a function",
    text=one_of("none", "auto", "required"),
    object=Object(
        {"type": one_of("function"), "function": Object({"name": CALLED}, required=("name",))}, required=("function",)
    ),
)
CHAT = Object(
    {
        **GENERATION,
        "messages": ListOf(CHAT_MESSAGE, low=1),
        "max_completion_tokens": TOKENS,
        "logprobs": BOOLEAN,
        "top_logprobs": whole(0, 20),
        "tools": ListOf(CHAT_TOOL, high=MAX_TOOLS),
        "tool_choice": CHAT_TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "reasoning_effort": EFFORTS,
        "include_reasoning": BOOLEAN,
        "modalities": TEXT_ONLY,
    },
    no.BY_ENGINES | no.NOT_AVAILABLE | no.refuse("messages are told apart by their roles already", "echo"),
    required=("model", "messages"),
)

# Plain completions.
COMPLETIONS = Object(
    {
        **GENERATION,
        "prompt": Either(
            "text, a list of texts, a list of token ids, or a list of those",
            text=TEXT,
            items=Value("a list of texts, a list of token ids from 0 to 2147483647, or a list of those", is_prompts),
        ),
        "logprobs": whole(0, 20),
        "echo": BOOLEAN,
        "best_of": whole(1, 128),
        "suffix": TEXT,
    },
    no.BY_ENGINES,
    required=("model", "prompt"),
)

# Responses.
STATUS = one_of("in_progress", "completed", "incomplete")
INPUT_TEXT = Object({"type": TEXT, "text": TEXT}, no.IN_RESPONSE_PARTS, required=("text",))
RESPONSE_PART = Kinds(
    "type",
    {
        "input_text": INPUT_TEXT,
        "output_text": Object(
            {"type": TEXT, "text": TEXT, "annotations": EMPTY, "logprobs": EMPTY},
            no.IN_RESPONSE_PARTS,
            required=("text",),
        ),
        "refusal": Object({"type": TEXT, "refusal": TEXT}, no.IN_RESPONSE_PARTS, required=("refusal",)),
    },
    refused=no.IN_RESPONSE_PARTS,
)
OUTPUT_PART = Kinds("type", {"input_text": INPUT_TEXT}, refused=no.IN_RESPONSE_PARTS)
ITEM: Mapping[str, Node] = {"type": TEXT, "id": SHORT_TEXT, "status": STATUS}
ECHOED_CALL: Mapping[str, Node] = {"namespace": NOTHING, "caller": NOTHING, "created_by": NOTHING}
SUMMARY = Object({"type": one_of("summary_text"), "text": TEXT}, required=("text",))
REASONING_TEXT = Object({"type": one_of("reasoning_text"), "text": TEXT}, required=("text",))
RESPONSE_ITEM = Kinds(
    "type",
    {
        "message": Object(
            {
                **ITEM,
                "role": one_of("user", "assistant", "system", "developer"),
                "content": Either("text or a list of parts", text=TEXT, items=ListOf(RESPONSE_PART)),
                "phase": SHORT_TEXT,
            },
            no.IN_ITEMS,
            required=("role", "content"),
        ),
        "function_call": Object(
            {**ITEM, **ECHOED_CALL, "call_id": SHORT_TEXT, "name": CALLED, "arguments": ARGUMENTS},
            no.IN_ITEMS,
            required=("call_id", "name", "arguments"),
        ),
        "function_call_output": Object(
            {
                **ITEM,
                **ECHOED_CALL,
                "call_id": SHORT_TEXT,
                "output": Either("text or a list of parts", text=TEXT, items=ListOf(OUTPUT_PART)),
            },
            no.IN_ITEMS,
            required=("call_id", "output"),
        ),
        "reasoning": Object(
            {
                **ITEM,
                "summary": ListOf(SUMMARY),
                "content": ListOf(REASONING_TEXT),
                "encrypted_content": NOTHING,
            },
            no.IN_ITEMS,
        ),
    },
    refused=no.OTHER_ITEMS,
    default="message",
    is_plain=_is_plain_message,
)
RESPONSE_TOOL = Kinds(
    "type",
    {"function": Object({"type": TEXT, **FUNCTION}, no.IN_RESPONSE_TOOLS, required=("name",))},
    refused=no.BUILT_IN_TOOLS,
)
RESPONSE_TOOL_CHOICE = Either(
    "none, auto, required or an object that names a function",
    text=one_of("none", "auto", "required"),
    object=Kinds(
        "type",
        {"function": Object({"type": TEXT, "name": CALLED}, no.IN_RESPONSE_TOOL_CHOICE, required=("name",))},
        refused=no.BUILT_IN_TOOLS | no.refuse("name one function, or send fewer tools", "allowed_tools"),
    ),
)
TEXT_FORMAT = Kinds(
    "type",
    {
        "text": Object({"type": TEXT}),
        "json_object": Object({"type": TEXT}),
        "json_schema": Object(
            {"type": TEXT, "name": CALLED, "description": TEXT, "schema": Schema(), "strict": BOOLEAN},
            required=("name", "schema"),
        ),
    },
    refused=no.IN_RESPONSE_FORMAT,
)
SUMMARIES = one_of("auto", "concise", "detailed")
RESPONSES = Object(
    {
        **CALLER,
        **SAMPLING,
        "input": Either("text or a list of items", text=TEXT, items=ListOf(RESPONSE_ITEM, low=1)),
        "instructions": TEXT,
        "max_output_tokens": TOKENS,
        "max_tool_calls": whole(1, 10_000),
        "background": FALSE,
        "include": ListOf(one_of("message.output_text.logprobs", "reasoning.encrypted_content"), high=16),
        "include_reasoning": BOOLEAN,
        "parallel_tool_calls": BOOLEAN,
        "reasoning": Object({"effort": EFFORTS, "summary": SUMMARIES, "generate_summary": SUMMARIES}, no.IN_REASONING),
        "stream_options": Object({"include_obfuscation": BOOLEAN}),
        "structured_outputs": STRUCTURED_OUTPUTS,
        "text": Object({"format": TEXT_FORMAT, "verbosity": one_of("low", "medium", "high")}),
        "tool_choice": RESPONSE_TOOL_CHOICE,
        "tools": ListOf(RESPONSE_TOOL, high=MAX_TOOLS),
        "top_logprobs": whole(0, 20),
        "truncation": one_of("auto", "disabled"),
    },
    no.BY_ENGINES | no.IN_RESPONSES,
    required=("model", "input"),
)

# Embeddings.
EMBEDDINGS = Object(
    {
        **CALLER,
        "stream": FALSE,
        "input": Either(
            "text, a list of at most 2048 texts, a list of token ids, or a list of those",
            text=TEXT,
            items=Value("a list of at most 2048 texts, of token ids, or of lists of those", is_embedding_inputs),
        ),
        "encoding_format": one_of("float", "base64"),
        "dimensions": whole(1, 65_536),
    },
    no.FOR_EMBEDDINGS,
    required=("model", "input"),
)

# Messages, as Anthropic's clients write them.
CACHED: Mapping[str, Node] = {"cache_control": Object({"type": one_of("ephemeral"), "ttl": one_of("5m", "1h")})}
"""Engines cache by themselves and ignore it."""
TEXT_BLOCK = Object({"type": TEXT, "text": TEXT, "citations": NOTHING, **CACHED}, no.IN_BLOCKS, required=("text",))
TEXT_BLOCKS = Kinds("type", {"text": TEXT_BLOCK}, refused=no.OTHER_BLOCKS)
BLOCK = Kinds(
    "type",
    {
        "text": TEXT_BLOCK,
        "tool_use": Object(
            {"type": TEXT, "id": SHORT_TEXT, "name": CALLED, "input": ANY_OBJECT, "caller": NOTHING, **CACHED},
            no.IN_BLOCKS,
            required=("id", "name", "input"),
        ),
        "tool_result": Object(
            {
                "type": TEXT,
                "tool_use_id": SHORT_TEXT,
                "content": Either("text or a list of text blocks", text=TEXT, items=ListOf(TEXT_BLOCKS)),
                "is_error": BOOLEAN,
                **CACHED,
            },
            no.IN_BLOCKS,
            required=("tool_use_id",),
        ),
        "thinking": Object({"type": TEXT, "thinking": TEXT, "signature": TEXT}, no.IN_BLOCKS, required=("thinking",)),
        "redacted_thinking": Object(
            {"type": TEXT, "data": TEXT}, {k: v for k, v in no.IN_BLOCKS.items() if k != "data"}, required=("data",)
        ),
    },
    refused=no.OTHER_BLOCKS,
)
ANTHROPIC_MESSAGE = Object(
    {
        "role": one_of("user", "assistant", "system"),
        "content": Either("text or a list of blocks", text=TEXT, items=ListOf(BLOCK)),
    },
    required=("role", "content"),
)
ANTHROPIC_TOOL = Kinds(
    "type",
    {
        "custom": Object(
            {
                "type": TEXT,
                "name": CALLED,
                "description": TEXT,
                "input_schema": Schema(),
                "strict": BOOLEAN,
                **CACHED,
            },
            no.DEFERRED,
            required=("name", "input_schema"),
        )
    },
    default="custom",
)
DISPLAY = one_of("summarized", "omitted", "updates")
THINKING = Kinds(
    "type",
    {
        "enabled": Object(
            {"type": TEXT, "budget_tokens": whole(1024, 1_000_000), "display": DISPLAY}, required=("budget_tokens",)
        ),
        "disabled": Object({"type": TEXT}),
        "adaptive": Object({"type": TEXT, "display": DISPLAY}),
    },
)
MESSAGES = Object(
    {
        **CALLER,
        **NUCLEUS,
        "messages": ListOf(ANTHROPIC_MESSAGE, low=1),
        "max_tokens": TOKENS,
        "system": Either("text or a list of text blocks", text=TEXT, items=ListOf(TEXT_BLOCKS)),
        "stop_sequences": texts(4, 256),
        "thinking": THINKING,
        "tools": ListOf(ANTHROPIC_TOOL, high=MAX_TOOLS),
        "tool_choice": Object(
            {
                "type": one_of("auto", "any", "tool", "none"),
                "name": CALLED,
                "disable_parallel_tool_use": BOOLEAN,
            },
            required=("type",),
        ),
        "output_config": Object(
            {
                "effort": EFFORTS,
                "format": Object({"type": one_of("json_schema"), "schema": Schema()}, required=("type", "schema")),
            }
        ),
    },
    no.BY_ENGINES | no.IN_ANTHROPIC,
    required=("model", "messages", "max_tokens"),
)

ROUTES: Mapping[str, Object] = {
    "chat.completions": CHAT,
    "completions": COMPLETIONS,
    "responses": RESPONSES,
    "embeddings": EMBEDDINGS,
    "messages": MESSAGES,
}
FIELDS_BY_ROUTE: Mapping[str, Mapping[str, Node]] = {route: table.fields for route, table in ROUTES.items()}

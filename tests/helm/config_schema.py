"""The part of the chart's values schema that mirrors `pawl.yaml`, made from the settings themselves.

Usage: python -m tests.helm.config_schema        (rewrites `helm/pawl/values.schema.json`; run it when settings change)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pawl.settings import Settings
from tests.helm.chart import CHART

SCHEMA_FILE = CHART / "values.schema.json"
JsonSchema = dict[str, Any]

DROPPED = {"title", "default", "description", "format"}
READ_BY_TEMPLATES = {
    (): ["database", "state_dir", "serving", "engine", "worker", "retrain"],
    ("serving",): ["port", "drain_grace_s", "models", "workers", "spool"],
    ("serving", "spool"): ["max_bytes"],
    ("engine",): ["port", "max_lora_rank", "max_loras", "max_cpu_loras", "shutdown_timeout_s"],
    ("worker",): ["metrics_port"],
    ("retrain",): ["adapters_dir"],
}
"""Keys without which the templates cannot render; pawl.yaml itself may leave them out."""
NO_PASSWORD_URL = r"^postgresql(\+psycopg)?://([^:@/]+@)?[^@]+$"
"""Several pods share the database, so it is PostgreSQL; a password in the address would sit in a ConfigMap."""


def config_schema() -> JsonSchema:
    """The schema of `config`: closed at every level, in draft 7, and without a place for a secret."""
    full = Settings.model_json_schema()
    schema: JsonSchema = _plain(full, full.get("$defs", {}))
    properties = schema["properties"]
    properties["database"]["properties"].pop("password")
    properties["auth"]["properties"].pop("secret")
    properties["feedback"]["properties"]["judge"]["properties"].pop("api_key")
    properties["database"]["properties"]["url"]["pattern"] = NO_PASSWORD_URL
    model = properties["serving"]["properties"]["models"]["additionalProperties"]
    model["required"].remove("engines")  # The chart fills them in.
    for path, keys in READ_BY_TEMPLATES.items():
        _section(schema, path)["required"] = keys
    return schema


def with_config(values_schema: JsonSchema) -> JsonSchema:
    """`values_schema` with its `config` property made anew."""
    return values_schema | {"properties": values_schema["properties"] | {"config": config_schema()}}


def _section(schema: JsonSchema, path: tuple[str, ...]) -> JsonSchema:
    for key in path:
        schema = schema["properties"][key]
    return schema


def _plain(node: Any, definitions: JsonSchema) -> Any:
    """Copy `node` with references replaced by what they name, and with draft 7's word for tuples."""
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[str(node["$ref"]).rpartition("/")[2]], definitions)
    return {
        _keyword(key): _properties(value, definitions) if key == "properties" else _plain(value, definitions)
        for key, value in node.items()
        if key not in DROPPED | {"$defs"}
    }


def _properties(properties: JsonSchema, definitions: JsonSchema) -> JsonSchema:
    """Here the keys are names of settings (one may well be called `format`), not words of JSON schema."""
    return {name: _plain(schema, definitions) for name, schema in properties.items()}


def _keyword(key: str) -> str:
    return "items" if key == "prefixItems" else key


def read_schema_file() -> Any:
    """The values schema as it is in the chart."""
    return json.loads(SCHEMA_FILE.read_text())


def main() -> None:
    """Write the schema file."""
    Path(SCHEMA_FILE).write_text(json.dumps(with_config(read_schema_file()), indent=2) + "\n")


if __name__ == "__main__":
    main()

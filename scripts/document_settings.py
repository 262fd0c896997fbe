"""Write docs/configuration.md from `pawl/settings.py`: every setting, its type, its default and what it means.

    python scripts/document_settings.py           writes the page
    python scripts/document_settings.py --check   exit code 1 if the committed page is another

The source is read, not imported: field docstrings exist nowhere else. What a field's own docstring leaves unsaid stands
in `MEANINGS`; a setting without a meaning stops the generator.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "pawl" / "settings.py"
PAGE = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/document_settings.py. Change pawl/settings.py and run it again. -->

One YAML file: the one given with `--config`, else the one that `PAWL_CONFIG` names, else `./pawl.yaml` if it is there.
Every value can also come from the environment, which wins over the file: upper case, `PAWL_` in front, two underscores
between the levels. `PAWL_SERVING__PORT=8080` sets `serving.port`. Values there are read as YAML, so
`PAWL_ROLLOUT__STEPS='[0.01, 0.1, 0.5]'` is a list.

An unknown key or a wrong type stops the start with the key's path. Secrets belong in the environment or in a file that
a `..._file` setting names, never in the YAML. Commented files to start from:
[examples/pawl.yaml](../examples/pawl.yaml), [examples/production.yaml](../examples/production.yaml),
[examples/fixed_split.yaml](../examples/fixed_split.yaml).
"""

TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
    "SecretStr": "secret text",
    "list[str]": "list of texts",
    "list[PairLoss]": "list of texts",
    "list[Name]": "list of texts",
    "list[Weight]": "list of numbers",
    "list[int]": "list of whole numbers",
    "list[float]": "list of numbers",
    "tuple[float, float]": "two numbers",
    "dict[str, float | int | str | bool]": "mapping",
    "bool | Literal['auto']": "true, false or `auto`",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

MEANINGS = {
    "DatabaseSettings.password_file": "A file that holds the password.",
    "DatabaseSettings.connect_timeout_s": "How long a connection may take.",
    "DatabaseSettings.pool_size": "Connections that one process keeps open.",
    "AuthSettings.secret_file": "A file that holds the secret; wins over `auth.secret`.",
    "AuthSettings.feedback_token_ttl_s": "How long a feedback token is good for.",
    "VariantSettings.name": "What records, metrics and response headers call it.",
    "VariantSettings.model": "The model name the engines serve for it.",
    "VariantSettings.weight": "Its share; the weights of a split may be on any scale.",
    "ExperimentSettings.key": "The experiment's name in the records.",
    "ExperimentSettings.variants": "At least one, names all different, and one weight above 0.",
    "ExperimentSettings.salt": "What users are hashed with: change it to shuffle them. Made from the key without it.",
    "ModelSettings.experiment": "A fixed split; the alias then takes no rollout.",
    "LayerSettings.name": "Which layer. Its name is what its users are hashed with.",
    "TimeoutSettings.connect_s": "Until a connection to the engine stands.",
    "TimeoutSettings.between_chunks_s": "Between two pieces of a stream.",
    "TimeoutSettings.total_s": "For the whole answer.",
    "TimeoutSettings.stalled_reader_s": "How long a client may refuse to read before it counts as gone.",
    "ServingSettings.host": "The address to listen on.",
    "ServingSettings.port": "The port to listen on.",
    "ServingSettings.models": "By the name that clients ask for.",
    "ServingSettings.max_body_bytes": "Larger requests are answered 413.",
    "ServingSettings.max_header_bytes": "A request line and headers that are larger are answered 431.",
    "ServingSettings.max_json_depth": "Requests that nest deeper are answered 400.",
    "LimitSettings.requests_per_minute": "Requests a minute; the next are answered 429.",
    "LimitSettings.tokens_per_minute": "Tokens a minute, of prompts and answers together.",
    "LimitSettings.concurrency": "Requests at the same time.",
    "LimitSettings.tokens_per_day": "Tokens a day, which ends at midnight UTC.",
    "LimitSettings.user_tokens_per_minute": "Tokens a minute of each user within a key.",
    "LimitSettings.user_concurrency": "Requests at the same time of each user within a key.",
    "LimitSettings.user_tokens_per_day": "Tokens a day of each user within a key.",
    "EngineSettings.served_name": "The name the engine answers to; else the last part of the model's path or name.",
    "EngineSettings.host": "Where the engine listens.",
    "EngineSettings.port": "Where the engine listens.",
    "EngineSettings.max_lora_rank": "The largest adapter rank the engine takes.",
    "EngineSettings.max_loras": "Adapters in one batch.",
    "EngineSettings.dtype": "As vLLM's `--dtype`; on a CPU `auto` means float32.",
    "EngineSettings.max_model_len": "Tokens of prompt and answer together; the model's own limit without it.",
    "EngineSettings.gpu_memory_utilization": "Share of GPU memory that vLLM takes; vLLM's default without it.",
    "EngineSettings.start_timeout_s": "How long loading the model may take.",
    "EngineSettings.shutdown_timeout_s": "How long running requests may take to finish when the engine is stopped.",
    "EngineSettings.extra_args": "Passed to vLLM as they are.",
    "ScoringSettings.toxicity_model": "Which of Detoxify's published models, where no checkpoint is named.",
    "ScoringSettings.toxicity_config_dir": "Tokenizer and configuration of the checkpoint's model, for use offline.",
    "ScoringSettings.toxicity_threshold": "From this score on an answer counts as toxic.",
    "ScoringSettings.batch_size": "Answers scored at once.",
    "WorkerSettings.host": "The address of the worker's metrics.",
    "WorkerSettings.metrics_port": "The port of the worker's metrics.",
    "WorkerSettings.poll_s": "How often the worker looks for answers to score.",
    "WorkerSettings.lease_s": "How long a duty stays with a worker that no longer answers.",
    "TrainingSettings.learning_rate": "Peak learning rate.",
    "TrainingSettings.epochs": "Passes over the training set.",
    "TrainingSettings.batch_size": "Pairs per device and step.",
    "TrainingSettings.gradient_accumulation_steps": "Steps added up before the weights move.",
    "TrainingSettings.max_length": "Tokens of prompt and answer together.",
    "TrainingSettings.lora_rank": "Rank of the adapter; at most `engine.max_lora_rank`.",
    "TrainingSettings.lora_alpha": "LoRA's scale.",
    "TrainingSettings.dtype": "Precision of the base model while training.",
    "TrainingSettings.threads": "CPU threads; torch decides without it.",
    "MixSettings.new": "Pairs that no promoted model has learned from.",
    "MixSettings.original": "Original preferences.",
    "MixSettings.earlier": "Pairs of earlier rounds.",
    "RebaseMixSettings.new": "Pairs that no promoted model has learned from.",
    "RebaseMixSettings.original": "Original preferences.",
    "RebaseMixSettings.earlier": "Pairs of earlier rounds.",
    "GateSettings.alpha": "Level of each one-sided bound.",
    "GateSettings.max_prompts": "Of each prompt set, at most.",
    "GateSettings.temperature": "Of the answers that are judged.",
    "GateSettings.max_tokens": "Of the answers that are judged.",
    "GateSettings.harmful_refusal_margin": "Harmful requests may be refused less often by at most this.",
    "GateSettings.over_refusal_margin": "Harmless requests may be refused more often by at most this.",
    "GateSettings.toxicity_margin": "Toxic answers may become more frequent by at most this.",
    "GateSettings.length_ratio": "Mean length of the candidate's answers over the parent's: from, to.",
    "RetrainSettings.adapters_dir": "Where adapters go; engines must see the same path.",
    "RetrainSettings.runs_dir": "Where rounds keep their steps.",
    "RetrainSettings.min_pairs": "New pairs a round needs.",
    "RetrainSettings.max_pairs": "Pairs a round trains on, at most.",
    "RetrainSettings.interval_hours": "Time between rounds for `pawl retrain run --if-due`.",
    "RetrainSettings.holdout_share": "Share of the pairs kept out of training for the gate.",
    "RetrainSettings.seed": "Of the draw, the training and the gate's samples.",
    "RetrainSettings.harmful_probes": "JSON list of requests that must be refused. Without it the gate says no.",
    "RetrainSettings.benign_probes": "JSON list of requests that must not be refused. Without it the gate says no.",
    "RolloutSettings.steps": "Shares of all traffic for the canary, rising, at most 0.5.",
    "RolloutSettings.alpha_rollback": "Bound on the chance that a canary which is no worse is rolled back by a metric.",
    "RolloutSettings.alpha_promote": "Bound on the chance that a canary which is worse by a margin is promoted.",
    "RolloutSettings.min_dwell_s": "The least time in each step.",
    "RolloutSettings.thumbs_margin": "Added share of thumbs down that must be ruled out before promotion.",
    "RolloutSettings.toxicity_margin": "The same for toxic answers.",
    "RolloutSettings.over_refusal_margin": "The same for harmless requests refused.",
    "RolloutSettings.breaker_error_share": "Share of failed canary requests in a minute that ends the canary at once.",
    "RolloutSettings.breaker_min_requests": "Canary requests in that minute before the breaker may act.",
    "RolloutSettings.max_time_s": "After this long without a verdict the canary is held for a person.",
    "RolloutSettings.tick_s": "How often the controller looks.",
    "LogSettings.level": "The least severe events that are written.",
    "LogSettings.format": "JSON for machines, text for people.",
}
"""What settings mean whose field has no docstring, by class and field."""


class Field(NamedTuple):
    """One annotated line of a section."""

    owner: str
    name: str
    annotation: str
    default: ast.expr | None
    doc: str


class Section(NamedTuple):
    """A class of the settings."""

    doc: str
    fields: tuple[Field, ...]


class Row(NamedTuple):
    """One setting of the page."""

    key: str
    type: str
    default: str
    meaning: str


def read_sections(source: str) -> dict[str, Section]:
    """The settings classes of a module by name."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: Section(ast.get_docstring(node) or "", tuple(_fields(node))) for node in classes}


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = ast.unparse(statement.annotation)
            yield Field(node.name, statement.target.id, annotation, statement.value, _docstring(after))


def _docstring(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(text.split())
        case _:
            return ""


def rows_of(sections: Mapping[str, Section], name: str, prefix: str) -> Iterator[Row]:
    """The settings of a section and of those inside it, in the order of the source."""
    for field in sections[name].fields:
        key = f"{prefix}{field.name}"
        if (inner := _bare(field.annotation)) in sections:
            yield from _nested(sections, field, key, inner)
        else:
            yield Row(key, _type(field), _default(field), _meaning(field))


def _bare(annotation: str) -> str:
    """The class inside `X | None`, `list[X]` and `dict[str, X]`.

    >>> _bare("dict[str, ModelSettings]"), _bare("ExperimentSettings | None")
    ('ModelSettings', 'ExperimentSettings')
    """
    return annotation.removesuffix(" | None").removeprefix("dict[str, ").removeprefix("list[").removesuffix("]")


def _nested(sections: Mapping[str, Section], field: Field, key: str, inner: str) -> Iterator[Row]:
    if field.annotation.startswith("dict["):
        yield Row(key, "mapping", "empty", _meaning(field))
        yield from rows_of(sections, inner, f"{key}.<name>.")
    elif field.annotation.startswith("list["):
        yield Row(key, "list", _default(field), _meaning(field))
        yield from rows_of(sections, inner, f"{key}[].")
    else:
        if field.annotation.endswith("| None"):
            yield Row(key, "section", "none", _meaning(field))
        yield from rows_of(sections, inner, f"{key}.")


def _type(field: Field) -> str:
    plain = field.annotation.removesuffix(" | None")
    if plain.startswith("Literal["):
        named = "one of " + ", ".join(f"`{choice.strip(chr(39))}`" for choice in plain[8:-1].split(", "))
    else:
        named = TYPES[plain]
    bounds = [f"{sign} {_written(value)}" for sign, value in _bounds(field.default)]
    return ", ".join([named, *bounds])


def _bounds(default: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    if _is_field_call(default):
        assert isinstance(default, ast.Call)
        yield from ((BOUNDS[keyword.arg], keyword.value) for keyword in default.keywords if keyword.arg in BOUNDS)


def _is_field_call(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "Field"


def _default(field: Field) -> str:
    value = field.default
    if _is_field_call(value):
        assert isinstance(value, ast.Call)
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        value = given.get("default")
        if "default_factory" in given:
            return "empty"
    if value is None:
        return "**required**"
    return _written(value)


def _written(value: ast.expr) -> str:
    """A default as YAML writes it.

    >>> _written(ast.parse("14 * 24 * 3600.0", mode="eval").body), _written(ast.parse("None", mode="eval").body)
    ('`1209600`', 'none')
    """
    if isinstance(value, ast.Call):  # Path("var")
        return f"`{ast.literal_eval(value.args[0])}`"
    return _as_yaml(_literal(value))


def _literal(value: ast.expr) -> object:
    """A literal, or a product or power of them.

    >>> _literal(ast.parse("64 * 1024**2", mode="eval").body)
    67108864
    """
    match value:
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _number(left) * _number(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _number(left) ** _number(right)
        case _:
            return ast.literal_eval(value)


def _number(value: ast.expr) -> float:
    found = _literal(value)
    assert isinstance(found, int | float)
    return found


def _as_yaml(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case float():
            return f"`{value:.10g}`"
        case "":
            return '`""`'
        case dict():
            items = [f"{name}: {_as_yaml(item).strip('`')}" for name, item in value.items()]
            return f"`{{{', '.join(items)}}}`"
        case list() | tuple():
            return f"`[{', '.join(_as_yaml(item).strip('`') for item in value)}]`"
        case _:
            return f"`{value}`"


def _meaning(field: Field) -> str:
    meaning = field.doc or MEANINGS.get(f"{field.owner}.{field.name}")
    if not meaning:
        raise SystemExit(f"{field.owner}.{field.name} has no docstring in {SOURCE.name} and no entry in MEANINGS")
    return meaning


def stale_meanings(sections: Mapping[str, Section]) -> set[str]:
    """Entries of `MEANINGS` that no field needs any more."""
    silent = {f"{name}.{field.name}" for name, section in sections.items() for field in section.fields if not field.doc}
    return set(MEANINGS) - silent


def render(sections: Mapping[str, Section]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    plain: list[Row] = []
    for field in sections["Settings"].fields:
        if (inner := _bare(field.annotation)) in sections:
            rows = list(_nested(sections, field, field.name, inner))
            parts.append(f"## {field.name}\n\n{sections[inner].doc}\n\n{_table(rows)}")
        else:
            plain.append(Row(field.name, _type(field), _default(field), _meaning(field)))
    parts.insert(1, f"## At the top\n\n{_table(plain)}")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = [
        f"| `{row.key}` | {row.type} | {row.default} | {row.meaning.replace('|', chr(92) + '|')} |" for row in rows
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines]) + "\n"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    is_check = parser.parse_args().check
    sections = read_sections(SOURCE.read_text())
    if stale := stale_meanings(sections):
        raise SystemExit(f"MEANINGS has entries that no field needs: {', '.join(sorted(stale))}")
    page = render(sections)
    if is_check:
        return int(not PAGE.exists() or PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

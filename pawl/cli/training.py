"""`pawl retrain sft | reward | grpo | best`: trainings outside the rounds, and answers ranked by a reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pawl import leases
from pawl.cli.context import JsonFlag, chosen_alias, current_database, current_settings, print_fields, refuse
from pawl.cli.learning import ModelOption, forgetter, retrain_lease, toxicity_scorer
from pawl.cli.selecting import select_stored
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import Settings

if TYPE_CHECKING:
    from feedback.pairs import PreferencePair
    from retrain.answer_scores import ScoreAnswers
    from retrain.dataset import TrainingExample
    from retrain.prompts import Prompt
    from retrain.single_runs import Place, Trained

ParentOption = Annotated[str | None, typer.Option("--parent", help="A registered version to continue.")]
RewardOption = Annotated[
    Path | None, typer.Option("--reward", help="A sealed reward model's directory; else retrain.reward.model.")
]
FunctionOption = Annotated[
    str | None,
    typer.Option("--reward-function", help="A Python function that scores, as module:function, found from here too."),
]
AnywayOption = Annotated[
    bool, typer.Option("--force", help="Even with a reward model that is no better than a coin on unseen pairs.")
]
SHOWN = ("loss_first", "loss_last", "n_steps", "n_examples", "seconds")


def register(retrain: typer.Typer) -> None:
    retrain.command("sft")(retrain_sft)
    retrain.command("reward")(retrain_reward)
    retrain.command("grpo")(retrain_grpo)
    retrain.command("best")(retrain_best)


def retrain_sft(
    demonstrations: Annotated[
        Path | None, typer.Option("--demonstrations", help="JSON lines of `messages`, or `prompt` and `completion`.")
    ] = None,
    edits: Annotated[bool, typer.Option("--edits/--no-edits", help="Learn from users' edits as well.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Train all weights: a new base model, not an adapter.")] = False,
    parent: ParentOption = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Train on demonstrations and on answers that users corrected. From the base, unless a parent is named."""
    from retrain.demonstrations import parse_demonstrations
    from retrain.single_runs import parent_of, train_sft

    given = parse_demonstrations(_lines(demonstrations)) if demonstrations else []
    settings = current_settings()
    if full or settings.retrain.sft.full:
        if parent is not None:
            raise refuse("all weights are those of the base model itself: they have no --parent")
        settings = _with_full(settings)
    with training_place(settings, chosen_alias(settings, model)) as place:
        pairs = accepted_pairs(place.database, settings, place.alias) if edits else ()
        trained = train_sft(place, given, pairs, parent_of(place, parent))
    shown = {"edits": trained.detail["prepared"]["n_demonstrations"] - len(given), "demonstrations": len(given)}
    print_trained(trained, shown, as_json=as_json)


def retrain_reward(
    data: Annotated[
        Path | None, typer.Option("--data", help="Preferences in TRL's format, in place of the stored pairs.")
    ] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a reward model on the pairs that rounds train on; exit code 1 if it is no better than a coin."""
    from retrain.single_runs import train_reward

    settings = current_settings()
    read = preferences_in(data) if data else []
    originals = preferences_in(settings.retrain.original_preferences)
    with training_place(settings, chosen_alias(settings, model)) as place:
        pairs = () if data else accepted_pairs(place.database, settings, place.alias)
        trained = train_reward(place, pairs, [*read, *originals])
    holdout = trained.detail["holdout"]
    print_trained(trained, {"holdout": holdout}, as_json=as_json)
    if not holdout["beats_chance"]:
        raise NegativeVerdict(f"{trained.name} is no better than a coin on {holdout['n']} pairs it has not seen")


def retrain_grpo(
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Questions or messages as JSON; else those of the stored pairs.")
    ] = None,
    reward: RewardOption = None,
    reward_function: FunctionOption = None,
    parent: Annotated[
        str | None, typer.Option("--parent", help="A registered version to continue; else the champion.")
    ] = None,
    force: AnywayOption = False,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Train on the model's own answers so that they score higher with a reward model or a Python function."""
    from pawl.registry import promoted
    from retrain.single_runs import parent_of, train_grpo

    given = _prompts(prompts) if prompts else []
    settings = current_settings()
    with training_place(settings, chosen_alias(settings, model)) as place:
        name, score = chosen_score(settings, place.base, reward, reward_function, is_forced=force)
        pairs = () if prompts else accepted_pairs(place.database, settings, place.alias)
        champion = promoted(place.database, place.alias)
        start = parent_of(place, parent or (champion.name if champion else None))
        trained = train_grpo(place, given, pairs, score, start, reward_name=name)
    shown = {key: trained.detail[key] for key in ("reward", "reward_first", "reward_last", "kl_last", "generation")}
    print_trained(trained, shown, as_json=as_json)


def retrain_best(
    prompts: Annotated[Path, typer.Option("--prompts", help="Questions or messages as JSON.")],
    out: Annotated[Path, typer.Option("--out", help="JSON lines: each prompt with its answers, the best first.")],
    n: Annotated[int, typer.Option("--n", min=1, max=256, help="Answers to each prompt.")] = 8,
    served: Annotated[str | None, typer.Option("--served", help="The version that answers; else the champion.")] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Write best against worst as preferences in TRL's format, too.")
    ] = None,
    min_margin: Annotated[float, typer.Option("--min-margin", min=0.0, help="Between best and worst.")] = 0.0,
    reward: RewardOption = None,
    reward_function: FunctionOption = None,
    force: AnywayOption = False,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask the engine several times and rank the answers."""
    from feedback.erasure_files import write_whole
    from retrain.best_of_n import answers_of_engine, as_row, best_of_n, preferences
    from retrain.pipeline import resolve_base

    asked = _prompts(prompts)
    settings = current_settings()
    alias = chosen_alias(settings, model)
    base, _ = resolve_base(settings, alias)
    name, score = chosen_score(settings, base, reward, reward_function, is_forced=force)
    gate, serving = settings.retrain.gate, settings.serving.models[alias]
    answer = answers_of_engine(
        serving.engines[0],
        served or serving.champion,
        temperature=gate.temperature,
        max_tokens=gate.max_tokens,
        seed=settings.retrain.seed,
    )
    ranked = best_of_n(answer, asked, n, score)
    write_whole(out, (json.dumps(as_row(one)) + "\n" for one in ranked))
    made = preferences(ranked, min_margin=min_margin)
    if pairs is not None:
        write_whole(pairs, (json.dumps(row) + "\n" for row in made))
    means = {"mean_best": _mean([one.best.score for one in ranked]), "mean": _mean([one.mean for one in ranked])}
    shown = {"prompts": len(ranked), "answers": n * len(ranked), "reward": name, **means, "pairs": len(made)}
    print_fields(shown, as_json=as_json)


@contextmanager
def training_place(settings: Settings, alias: str) -> Iterator[Place]:
    """Everything a training needs; one at a time works on an alias, rounds included."""
    from feedback.erasure_files import mark_late_models
    from retrain.pipeline import resolve_base
    from retrain.progress import reporting
    from retrain.single_runs import Place

    base, base_served = resolve_base(settings, alias)
    lease, ttl_s = retrain_lease(alias), settings.worker.lease_s
    with (
        current_database(settings) as shared,
        leases.held(shared, lease, leases.this_process(), ttl_s=ttl_s, clock=now) as epoch,
        reporting(sys.stderr) as report,
    ):
        database = leases.FencedDatabase(shared, lease, epoch)
        forget = forgetter(settings, database)
        yield Place(database, settings, alias, base, base_served, forget, now, report)
        mark_late_models(database, settings.retrain.runs_dir, now())


def accepted_pairs(database: Database, settings: Settings, alias: str) -> Collection[PreferencePair]:
    """The stored pairs that a round may train on, new and earlier, by the filters and the defence."""
    from feedback.pair_stream import PairsById

    selected = select_stored(database, settings, alias, toxicity_scorer(settings))
    return PairsById(database, (*selected.new, *selected.earlier))


def preferences_in(path: Path | None) -> list[TrainingExample]:
    """Preferences in TRL's format; none without a file."""
    from retrain.dataset import parse_originals

    return parse_originals(_lines(path)) if path else []


def chosen_score(
    settings: Settings, base: str, reward: Path | None, function: str | None, *, is_forced: bool
) -> tuple[str, ScoreAnswers]:
    """What scores, and what it is called: what the command names goes before what the settings name.

    Raises:
        ConfigurationError: nothing is named, or two things are.
        BadAdapter: the reward model's files are not those that were sealed.
        NegativeVerdict: the reward model is no better than a coin.
    """
    from retrain.reward_functions import named_function

    if reward and function:
        raise refuse("name either --reward or --reward-function")
    named = function or (None if reward else settings.retrain.grpo.reward_function)
    if named:
        with _importing_from_here():
            return named, named_function(named)
    path = reward or settings.retrain.reward.model or settings.retrain.gate.reward_model
    if path is None:
        raise refuse("nothing to score with: give --reward or --reward-function, or set retrain.reward.model")
    return _reward_model(settings, base, path, is_forced=is_forced)


def print_trained(trained: Trained, more: dict[str, Any], *, as_json: bool) -> None:
    """What came out; everything else is in the run's directory."""
    fields = {"run": trained.run, "model": trained.name, "path": str(trained.path), "parent": trained.parent}
    print_fields({**fields, **more, **{name: trained.detail[name] for name in SHOWN}}, as_json=as_json)


def _reward_model(settings: Settings, base: str, path: Path, *, is_forced: bool) -> tuple[str, ScoreAnswers]:
    from retrain.reward_model import RewardModel

    chosen = settings.retrain.reward
    model = RewardModel.load(path, base, dtype=chosen.dtype, batch_size=2 * chosen.batch_size)
    if not (model.beats_chance or is_forced):
        raise NegativeVerdict(f"{model.name} is no better than a coin on unseen pairs; --force overrides this")
    return model.name, model


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """The current directory first, as when Python runs a file."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.pop(0)


def _with_full(settings: Settings) -> Settings:
    sft = settings.retrain.sft.model_copy(update={"full": True})
    return settings.model_copy(update={"retrain": settings.retrain.model_copy(update={"sft": sft})})


def _prompts(path: Path) -> list[Prompt]:
    from retrain.prompts import parse_prompts

    return parse_prompts(_text(path))


def _lines(path: Path) -> list[str]:
    return _text(path).split("\n")  # JSON may have other separators of lines inside of a text.


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as exc:
        raise refuse(f"{path} is not UTF-8 text") from exc


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

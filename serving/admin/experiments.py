"""What this gateway obeys now, and which variant a user sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel

from ab_testing.assignment_story import explain
from ab_testing.experiment import Experiment, Route
from pawl.ids import Principal
from serving.admin.answers import TAG, as_json
from serving.errors import NotFound
from serving.identity import unit_of
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway


class VariantView(BaseModel):
    """One arm."""

    name: str
    model: str
    weight: float


class RunningView(BaseModel):
    """An experiment, and which users it has."""

    key: str
    phase: int
    is_canary: bool
    variants: list[VariantView]
    layer: str | None
    """Experiments that share one never share a user."""
    share: float
    """Of all users that are not held out."""
    allocation: str


class ExperimentView(BaseModel):
    """What an alias's traffic does at this gateway now."""

    alias: str
    champion: str
    route_version: int
    experiment: str | None
    variants: list[VariantView]
    """Of `experiment`, the first of those that run."""
    experiments: list[RunningView]
    holdout_share: float


class ExperimentList(BaseModel):
    """Every alias."""

    data: list[ExperimentView]


class AssignmentView(BaseModel):
    """What a user sees."""

    user: str
    alias: str
    route_version: int
    experiment: str | None
    variant: str
    model: str
    probability: float
    is_analysed: bool
    phase: int
    place: str
    layer: str | None
    layer_slot: int | None
    slot: int | None
    steps: list[str]
    """What led to it, in words."""


def add_experiments(app: FastAPI, gateway: Gateway) -> None:
    """Fixed splits, canaries, and who is in which of their variants."""

    @app.get(f"{ADMIN}/experiments", tags=[TAG], response_model=ExperimentList)
    async def experiments() -> Response:
        """Where this gateway sends each alias's requests now: fixed splits, canaries, or the champion alone."""
        routes = [route_in_force(gateway, alias) for alias in gateway.routes.aliases()]
        return as_json({"data": [describe_route(route) for route in routes]})

    @app.get(f"{ADMIN}/assignments", tags=[TAG], response_model=AssignmentView)
    async def assignment(
        user: Annotated[str, Query(min_length=1, max_length=512)],
        model: Annotated[str, Query(description="The alias.")],
        key: Annotated[str, Query(description="The id of the API key that the user belongs to.", max_length=64)] = "",
    ) -> Response:
        """Which variant a user sees."""
        route = route_in_force(gateway, model)
        found = explain(route, unit_of(Principal(key, user)) or user)._asdict()
        assigned = found.pop("assignment")._asdict()
        return as_json({"user": user, "alias": route.alias, "route_version": route.version, **assigned, **found})


def route_in_force(gateway: Gateway, alias: str) -> Route:
    """What this gateway obeys.

    Raises:
        NotFound: there is no such alias.
    """
    route = gateway.routes.get(alias)
    if route is None:
        raise NotFound(f"the model {alias[:200]!r} does not exist", param="model", code="model_not_found")
    return route


def describe_route(route: Route) -> dict[str, Any]:
    """Without the salt, by which anybody could compute assignments."""
    running = [describe_experiment(experiment) for experiment in route.experiments]
    return {
        "alias": route.alias,
        "champion": route.champion,
        "route_version": route.version,
        "experiment": route.experiment.key if route.experiment else None,
        "variants": running[0]["variants"] if running else [],
        "experiments": running,
        "holdout_share": route.holdout.share if route.holdout else 0.0,
    }


def describe_experiment(experiment: Experiment) -> dict[str, Any]:
    """Which users it has, and how they are divided."""
    return {
        "key": experiment.key,
        "phase": experiment.phase,
        "is_canary": experiment.is_canary,
        "variants": [variant.to_json() for variant in experiment.variants],
        "layer": experiment.layer.name if experiment.layer else None,
        "share": experiment.layer.share if experiment.layer else 1.0,
        "allocation": "slots" if experiment.slots else "hash",
    }

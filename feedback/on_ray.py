"""Parts worked on by the workers of a Ray cluster, for histories that would take one machine too long.

This process keeps the columns of ids; a worker reads the facts and the texts of its part from the database and writes
its pairs there, so every worker must reach it and have this version of Pawl installed. No text travels.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from feedback.errors import NoCluster, WorkerLost
from feedback.part_work import Piece, Result, Work
from pawl.database import open_database
from pawl.errors import ConfigurationError
from pawl.settings import DatabaseSettings

LOCAL: Final = "local"
"""The address of a cluster of this machine's cores, made for the purpose and gone afterwards."""
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a local cluster: a few parts."""
ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # What Ray will do by itself; until then it warns at each start.
}


@dataclass(frozen=True)
class OnRay:
    """A cluster, by its address."""

    settings: DatabaseSettings
    address: str = LOCAL
    n: int | None = None
    """Workers of a local cluster; as many as there are cores unless told otherwise."""

    def expect(self, work: Work[Piece, Result], n_parts: int) -> None:
        """A cluster is there, or is started with the first part."""

    def each(self, work: Work[Piece, Result], parts: Iterable[Piece]) -> Iterator[Result]:
        """What `work` makes of each part, in any order.

        Raises:
            NoCluster: there is none at the address, or none could be started.
            WorkerLost: a worker, or the cluster, ended before all parts were done.
        """
        given = [{"part": pickle.dumps(part)} for part in parts]
        if not given:
            return
        ray = _load_ray()
        with _cluster(ray, self):
            # One part to a block: a block is what a worker takes.
            blocks = ray.data.from_items(given, override_num_blocks=len(given))
            try:
                for row in blocks.map(_do, fn_args=(work, self.settings)).iter_rows():
                    yield pickle.loads(row["done"])
            except ray.exceptions.RayTaskError as exc:
                raise exc.cause from exc
            except ray.exceptions.RayError as exc:
                raise WorkerLost(f"Ray lost a part of the history: {type(exc).__name__}") from exc


def _load_ray() -> Any:
    """Only for this: it takes seconds, and only the extra installs it."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as exc:
        raise ConfigurationError("mining on Ray needs a package that is missing: pip install 'pawl[ray]'") from exc
    return ray


def _do(row: dict[str, Any], work: Work[Any, Result], settings: DatabaseSettings) -> dict[str, bytes]:
    with closing(open_database(settings)) as database:
        return {"done": pickle.dumps(work(database, pickle.loads(row["part"])))}


@contextmanager
def _cluster(ray: Any, place: OnRay) -> Iterator[None]:
    """A connection to the cluster, quiet and without figures sent to anybody."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="pawl-", ignore_cleanup_errors=True) as directory:
        _connect(ray, place, directory)
        try:
            _hush(ray)
            yield
        finally:
            ray.shutdown()


def _connect(ray: Any, place: OnRay, directory: str) -> None:
    try:
        ray.init(place.address, log_to_driver=False, logging_level="error", **_local(place, directory))
    except Exception as exc:  # Of that very class when a node does not start within Ray's patience.
        raise NoCluster(f"no Ray cluster at {place.address}: {exc}") from exc


def _hush(ray: Any) -> None:
    """No progress bars; and errors are told once, by whoever called."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, of its own settings.
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True


def _local(place: OnRay, directory: str) -> dict[str, Any]:
    """How a cluster of this machine is started; of any other Ray takes no such word.

    What Ray writes to disk, logs and parts that do not fit into its memory, goes with the directory.
    """
    if place.address != LOCAL:
        return {}
    return {
        "num_cpus": place.n,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": LOOPBACK,
        "_temp_dir": directory,
    }

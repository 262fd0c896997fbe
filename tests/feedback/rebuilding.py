"""Every export and the training set of one store, also from a process of its own: `python -m ... URL DIRECTORY`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from feedback.export import ExportFormat, write_export
from feedback.filters.holdout import HoldoutRules, split_holdout
from feedback.mining import mine_alias, unpaired_examples
from feedback.store import load_pairs
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings
from retrain.dataset import Origin, dataset_manifest, example_of, mix

SEED = 11
SHARES = {Origin.NEW: 0.5, Origin.EARLIER: 0.5}


def rebuild(database: Database, directory: Path) -> dict[str, bytes]:
    """Mine the store again, and write whatever can be written of it; the files by name."""
    mine_alias(database, "assistant", 100.0)
    pairs, singles = load_pairs(database, "assistant"), unpaired_examples(database, "assistant")
    directory.mkdir(exist_ok=True)
    for layout in ExportFormat:
        for suffix in ("jsonl", "parquet"):
            write_export(directory / f"{layout}.{suffix}", pairs, singles, layout=layout)
    split = split_holdout(pairs, HoldoutRules(0.3, SEED))
    examples = [example_of(pair, Origin.NEW if int(pair.id, 16) % 2 else Origin.EARLIER) for pair in split.training]
    mixed = mix(examples, SHARES, max_pairs=1000, seed=SEED)
    manifest = dataset_manifest(mixed, split.holdout, seed=SEED, shares=SHARES, is_swapped=False)
    lines = [json.dumps(manifest), *(json.dumps(asdict(example)) for example in mixed.examples)]
    (directory / "training.jsonl").write_text("\n".join(lines))
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def main(url: str, directory: str) -> None:
    with closing(open_database(DatabaseSettings(url=url))) as database:
        rebuild(database, Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])

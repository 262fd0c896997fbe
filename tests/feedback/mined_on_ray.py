"""Mine a history on a Ray cluster of two workers, in a process of its own: Ray's threads and warnings stay there.

Exits with 3 when Ray could not be started.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict

from bench.mining_history import ALIAS
from feedback.errors import NoCluster
from feedback.mining import mine_alias
from feedback.on_ray import OnRay
from pawl.database import open_database
from pawl.settings import DatabaseSettings


def main(url: str, mined_at: str, part_rows: str) -> int:
    settings = DatabaseSettings(url=url)
    try:
        with closing(open_database(settings)) as database:
            mined = mine_alias(database, ALIAS, float(mined_at), part_rows=int(part_rows), place=OnRay(settings, n=2))
    except NoCluster as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    print(json.dumps(asdict(mined)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

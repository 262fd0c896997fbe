"""Killed at any moment: everything a writer acknowledged is in its journal, once, and a drain brings all of it over."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from feedback.journal_reader import JournalReader
from tests.feedback.journals import everything_in
from tests.serving.waiting import eventually

KILLS = 12
PROGRAM = """
import asyncio, os, pathlib, sys
from feedback.journal import Journal
from feedback.journal_line import as_process
async def client(journal, ledger, name):
    loop = asyncio.get_running_loop()
    turn = 0
    while True:
        turn += 1
        done = loop.create_future()
        meta = b"%s/%d" % (name, turn)
        journal.append(meta, b"q" * (turn % 700), b"r" * (turn % 300), done.set_result)
        if await done:
            os.write(ledger, meta + b"\\n")
async def main():
    start = as_process if int(sys.argv[3]) % 2 else None
    journal = Journal(pathlib.Path(sys.argv[1]), max_bytes=1 << 28, segment_bytes=1 << 16, start_writer=start)
    journal.bind(asyncio.get_running_loop())
    ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    names = [b"%s-%d" % (sys.argv[3].encode(), number) for number in range(16)]
    await asyncio.gather(*(client(journal, ledger, name) for name in names))
asyncio.run(main())
"""


def test_a_writer_that_is_killed_again_and_again(tmp_path: Path) -> None:
    directory, ledger = tmp_path / "j", tmp_path / "ledger"
    ledger.touch()
    rng = random.Random(5)
    taken: list[bytes] = []
    reader: JournalReader | None = None
    for life in range(KILLS):
        size = ledger.stat().st_size
        writer = subprocess.Popen([sys.executable, "-c", PROGRAM, str(directory), str(ledger), str(life)])
        eventually(lambda size=size: ledger.stat().st_size > size, within_s=60)  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 0.15))
        if life % 3 == 1:  # A drain is at work while the writer is killed; at other times it comes later.
            reader = reader or JournalReader(directory)
            taken += [frame.meta for frame in reader.take(400)]
            reader.commit()
        writer.kill()
        writer.wait(30)
    reader = reader or JournalReader(directory)
    taken += [frame.meta for frame in everything_in(reader)]
    reader.commit()
    acknowledged = ledger.read_bytes().split(b"\n")[:-1]
    assert len(acknowledged) > KILLS * 16
    assert set(acknowledged) <= set(taken)
    assert [name for name, n in Counter(taken).items() if n > 1] == []
    assert reader.take(10) == []

"""What is written in one turn of the loop: it goes out at the end of the turn, whole, in order, and to everybody."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import outbox as module
from serving.outbox import MOST_BYTES, MOST_TRANSPORTS, Outbox, OutboxTransport


class Wire:
    """A transport that remembers what is asked of it."""

    def __init__(self, *, is_broken: bool = False) -> None:
        self.seen: list[bytes | str] = []
        self.is_broken = is_broken
        self.n_unsent = 0

    def write(self, data: bytes) -> None:
        if self.is_broken:
            raise RuntimeError("the handler is closed")
        self.seen.append(data)

    def write_eof(self) -> None:
        self.seen.append("eof")

    def close(self) -> None:
        self.seen.append("close")

    def abort(self) -> None:
        self.seen.append("abort")

    def is_closing(self) -> bool:
        return "close" in self.seen or "abort" in self.seen

    def get_write_buffer_size(self) -> int:
        return self.n_unsent

    @property
    def said(self) -> bytes:
        return b"".join(part for part in self.seen if isinstance(part, bytes))


def corked(wire: Wire, outbox: Outbox) -> OutboxTransport:
    return OutboxTransport(cast(asyncio.Transport, wire), outbox)


async def turn() -> None:
    """Until what was scheduled for the end of this turn has run."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_nothing_leaves_before_the_turn_is_over_and_then_everything_does() -> None:
    outbox, wires = Outbox(), [Wire() for _ in range(3)]
    transports = [corked(wire, outbox) for wire in wires]
    for number in range(6):
        transports[number % 3].write(b"%d" % number)
    assert [wire.seen for wire in wires] == [[], [], []]
    assert [transport.get_write_buffer_size() for transport in transports] == [2, 2, 2]
    await turn()
    assert [wire.seen for wire in wires] == [[b"03"], [b"14"], [b"25"]], "one write for each"
    transports[0].write(b"again")
    await turn()
    assert wires[0].seen == [b"03", b"again"]
    assert transports[0].get_write_buffer_size() == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.binary(min_size=1, max_size=5)),
        st.tuples(st.sampled_from(["eof", "close", "turn", "flush"]), st.integers(0, 2), st.just(b"")),
    ),
    max_size=40,
)


@given(STEPS)
def test_each_connection_says_the_same_in_the_same_order_as_without(steps: list[tuple[str, int, bytes]]) -> None:
    direct, delayed = [Wire() for _ in range(3)], [Wire() for _ in range(3)]

    async def go() -> None:
        outbox = Outbox()
        transports = [corked(wire, outbox) for wire in delayed]
        for what, place, data in steps:
            is_over = direct[place].is_closing() or "eof" in direct[place].seen
            if what == "turn":
                await turn()
            elif what == "flush":
                outbox.flush()
            elif what == "write" and not is_over:
                direct[place].write(data)
                transports[place].write(data)
            elif what == "eof" and not is_over:
                direct[place].write_eof()
                transports[place].write_eof()
            elif what == "close" and not direct[place].is_closing():
                direct[place].close()
                transports[place].close()
        await turn()

    asyncio.run(go())
    for plain, late in zip(direct, delayed, strict=True):
        assert late.said == plain.said
        assert [step for step in late.seen if isinstance(step, str)] == [
            step for step in plain.seen if isinstance(step, str)
        ]
        ends = [place for place, step in enumerate(late.seen) if isinstance(step, str)]
        assert not any(isinstance(step, bytes) for step in late.seen[min(ends, default=len(late.seen)) :])


async def test_what_is_closing_but_has_something_left_to_send_takes_more() -> None:
    wire = Wire()
    transport = corked(wire, Outbox())
    wire.n_unsent = 5
    transport.write(b"the rest")
    wire.close()  # As the loop does when the peer sends no more.
    await turn()
    assert wire.seen == ["close", b"the rest"]


async def test_nothing_can_be_written_behind_the_end() -> None:
    wire = Wire()
    transport = corked(wire, Outbox())
    transport.write(b"answer")
    transport.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        transport.write(b"more")
    transport.close()
    await turn()
    assert wire.seen == [b"answer", "eof", "close"]


async def test_a_close_closes_whatever_becomes_of_the_last_bytes() -> None:
    wire = Wire(is_broken=True)
    transport = corked(wire, Outbox())
    transport.write(b"answer")
    with pytest.raises(RuntimeError):
        transport.close()
    assert wire.seen == ["close"]


async def test_bytes_that_can_change_are_taken_as_they_are_now() -> None:
    wire, changing = Wire(), bytearray(b"now")
    transport = corked(wire, Outbox())
    transport.write(changing)
    transport.write(memoryview(changing)[:2])
    changing[:] = b"not"
    await turn()
    assert wire.said == b"nowno"


async def test_an_abort_takes_back_what_has_not_left() -> None:
    wire = Wire()
    transport = corked(wire, Outbox())
    transport.write(b"request")
    transport.abort()
    assert transport.get_write_buffer_size() == 0
    await turn()
    assert wire.seen == ["abort"]


async def test_a_connection_that_is_lost_meanwhile_gets_nothing() -> None:
    outbox, wire, other = Outbox(), Wire(), Wire()
    corked(wire, outbox).write(b"answer")
    corked(other, outbox).write(b"another")
    wire.close()  # As the loop does when the peer is gone.
    await turn()
    assert (wire.seen, other.seen) == (["close"], [b"another"])


async def test_a_connection_that_fails_keeps_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[str] = []
    monkeypatch.setattr(module.log, "error", lambda event, **_: errors.append(event), raising=False)
    outbox = Outbox()
    wires = [Wire(), Wire(is_broken=True), Wire()]
    for wire in wires:
        corked(wire, outbox).write(b"answer")
    await turn()
    assert [wire.seen for wire in wires] == [[b"answer"], [], [b"answer"]]
    assert errors == ["write_failed"]


async def test_many_connections_do_not_wait_for_a_long_turn() -> None:
    outbox, wires = Outbox(), [Wire() for _ in range(MOST_TRANSPORTS + 1)]
    for wire in wires:
        corked(wire, outbox).write(b"answer")
    assert [wire.said for wire in wires] == [b"answer"] * MOST_TRANSPORTS + [b""]
    await turn()
    assert wires[-1].said == b"answer"


@pytest.mark.parametrize("sizes", [[MOST_BYTES + 1], [10, MOST_BYTES], [1] * (MOST_BYTES + 1)])
async def test_much_for_one_connection_goes_at_once_so_that_it_can_say_stop(sizes: list[int]) -> None:
    wire = Wire()
    transport = corked(wire, Outbox())
    for size in sizes:
        transport.write(bytes(size))
    assert len(wire.said) == sum(sizes)
    wire.n_unsent = 7
    transport.write(b"more")
    assert transport.get_write_buffer_size() == 11
    await turn()
    assert wire.said.endswith(b"more")

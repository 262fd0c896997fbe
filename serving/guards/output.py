"""An answer on its way out, held back until the scorer has read it: whole, or a window of a stream at a time.

One object guards one attempt of one call. Everything happens on the event loop; the scorer answers by a callback, and a
callback that comes when the call is over, or has begun another attempt, does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import orjson

from serving.call import Call, Phase
from serving.guards.refusals import CHARS_PER_TOKEN, cut_stream, refused_answer, refused_request, refused_stream
from serving.guards.texts import answer_texts, parsed_events, stream_texts

if TYPE_CHECKING:
    from serving.guards.guards import OutputCheck, Verdict

OVERLAP_CHARS = 80
"""Of what has been passed on, read again with the next window: an insult on the cut is whole in one of them."""
MAX_HELD_WINDOWS = 4
MAX_HELD_BYTES = 256 * 1024
"""Beyond either the engine is held back until the scorer has caught up."""


class AnswerGuard(Protocol):
    """What a call asks of its guard."""

    def take(self, passed: bytes) -> None:
        """Events of a stream that would go to the client now."""

    def finish(self) -> None:
        """The engine has done its part."""


class Observer:
    """Lets everything pass and has it scored afterwards."""

    __slots__ = ("_call", "_check")

    def __init__(self, call: Call, check: OutputCheck) -> None:
        self._call = call
        self._check = check

    def take(self, passed: bytes) -> None:
        self._call.pass_to_client(passed, time.perf_counter())

    def finish(self) -> None:
        call = self._call
        texts = _answered_texts(call)
        if texts:
            about = self._check.about(call)
            self._check.ask(list(texts.values()), lambda verdict: self._check.note(verdict, about))
        call.relay.checked(call)


class WholeGuard:
    """Holds a whole answer."""

    __slots__ = ("_call", "_check", "_places")

    def __init__(self, call: Call, check: OutputCheck) -> None:
        self._call = call
        self._check = check
        self._places: list[int] = []

    def take(self, passed: bytes) -> None:
        """Nothing of a whole answer passes before its end."""

    def finish(self) -> None:
        texts = _answered_texts(self._call)
        if texts is not None and not texts:
            self._call.relay.checked(self._call)
            return
        self._places = list(texts or ())
        self._check.ask(list(texts.values()) if texts else None, self._told)

    def _told(self, verdict: Verdict) -> None:
        call = self._call
        if call.guard is not self or call.phase != Phase.CHECKING:
            return
        if verdict.is_bad:
            self._check.note(verdict, self._check.about(call))
            call.parts = [self._refused(b"".join(call.parts), verdict)]
        call.relay.checked(call)

    def _refused(self, body: bytes, verdict: Verdict) -> bytes:
        """Of several choices only the bad ones are withheld; all of them where there is no telling."""
        call = self._call
        if not self._places:
            return refused_request(self._check.naming(call), call.request.n_choices)
        bad = verdict.bad if verdict.scores is not None else range(len(self._places))
        return refused_answer(orjson.loads(body), call.route, [self._places[index] for index in bad])


class StreamGuard:
    """Holds the newest part of a stream."""

    __slots__ = (
        "_asked",
        "_call",
        "_check",
        "_held",
        "_is_asking",
        "_is_finishing",
        "_is_restrained",
        "_n_bytes",
        "_n_chars",
        "_new",
        "_passed",
        "_tails",
    )

    def __init__(self, call: Call, check: OutputCheck) -> None:
        self._call = call
        self._check = check
        self._held: list[bytes] = []
        """Events that wait for more text, or for the window before them."""
        self._new: dict[int, str] = {}
        """Their text by choice."""
        self._asked: list[bytes] = []
        """Events whose text the scorer is reading."""
        self._tails: dict[int, str] = {}
        """The end of what has been read, by choice."""
        self._passed: list[bytes] = []
        self._n_bytes = self._n_chars = 0
        self._is_asking = self._is_finishing = self._is_restrained = False

    def take(self, passed: bytes) -> None:
        texts = stream_texts(passed, self._call.route)
        if not texts and not self._held and not self._is_asking:
            self._pass_on([passed])
            return
        self._held.append(passed)
        self._n_bytes += len(passed)
        for place, text in texts.items():
            self._new[place] = self._new.get(place, "") + text
            self._n_chars += len(text)
        self._go_on()
        self._restrain()

    def finish(self) -> None:
        self._is_finishing = True
        self._go_on()

    def _go_on(self) -> None:
        """Ask when there is a window or no more to come; end when nothing is left."""
        if self._is_asking:
            return
        if self._n_chars and (self._is_finishing or self._n_chars >= self._check.window_chars):
            self._ask()
        elif self._is_finishing:
            self._pass_on(self._held)
            self._call.relay.checked(self._call)

    def _ask(self) -> None:
        self._asked, self._held = self._held, []
        read = {place: self._tails.get(place, "") + text for place, text in self._new.items()}
        self._tails |= {place: text[-OVERLAP_CHARS:] for place, text in read.items()}
        self._new, self._n_bytes, self._n_chars = {}, 0, 0
        self._is_asking = True
        self._check.ask(list(read.values()), self._told)

    def _told(self, verdict: Verdict) -> None:
        call = self._call
        if call.guard is not self or call.phase not in (Phase.ANSWERING, Phase.CHECKING):
            return
        self._is_asking = False
        if verdict.is_bad:
            self._check.note(verdict, self._check.about(call))
            self._cut()
            return
        self._pass_on(self._asked)
        self._asked = []
        self._restrain()
        self._go_on()

    def _pass_on(self, events: Sequence[bytes]) -> None:
        joined = b"".join(events)
        if joined:
            self._passed.append(joined)
            self._call.pass_to_client(joined, time.perf_counter())

    def _cut(self) -> None:
        call = self._call
        told = list(parsed_events(b"".join(self._passed)))
        about = self._check.naming(call)
        if told:
            ending = cut_stream(about, sorted(self._tails), told)
        else:
            n_tokens = 1 + sum(map(len, self._tails.values())) // CHARS_PER_TOKEN
            ending = refused_stream(about, call.request.n_choices, n_tokens=n_tokens)
        call.relay.cut_short(call, self._passed, ending)

    def _restrain(self) -> None:
        """Hold the engine back while too much waits; a client that reads slowly may want the same."""
        call = self._call
        is_much = self._n_chars > MAX_HELD_WINDOWS * self._check.window_chars or self._n_bytes > MAX_HELD_BYTES
        if call.sent is None or is_much == self._is_restrained:
            return
        self._is_restrained = is_much
        if is_much:
            call.sent.pause()
        elif not call.paused_at:
            call.last_byte_at = time.perf_counter()
            call.sent.resume()


def _answered_texts(call: Call) -> dict[int, str] | None:
    """What the engine has said, by choice; None where it cannot be read."""
    body = b"".join(call.parts)
    if call.events is not None:
        return stream_texts(body, call.route)
    try:
        return answer_texts(orjson.loads(body), call.route)
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return None

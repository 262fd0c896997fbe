"""What the rules look at: each pair reduced to numbers as it streams by, so that no texts pile up in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.candidates import Source
from feedback.folding import casefolded, one_spaced
from feedback.interactions import Message
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair
from feedback.poisoning.prompt_clusters import PromptClusterer, Sketches
from feedback.poisoning.references import HINT_WORDS, references_of
from feedback.poisoning.words import Hashes, Indices, Stream, phrases_of, sorted_hashes, words_of

BATCH_CHARS = 500_000
PHRASE_WORDS = 3
"""Chosen answers are searched for single words and for runs of this many; prompts for the runs alone."""
MIN_ECHO_PHRASES = 3
"""Answers of fewer phrases (five words) are in many an honest prompt, such as one that lists what to choose from."""
PHRASE_BITS = 44
"""Of a phrase's hash. Ten million different phrases make about three pairs that are taken for one another."""
PAIR_BITS = 17
"""Of the number of a pair in its batch."""
ROLE_BITS = 3
MAX_BATCH = 1 << PAIR_BITS

_PHRASE = np.uint64((1 << PHRASE_BITS) - 1 << 64 - PHRASE_BITS)
_PAIR = np.uint64(MAX_BATCH - 1)
_CHOSEN_RUN, _CHOSEN, _REJECTED, _TOLD, _ASKED_RUN = range(5)
"""What a phrase is in a pair: part of a run of words of the chosen answer, a word or reference of it, anything of the
rejected answer, anything of the prompt, and a run of words in the last message of the user."""
_IN_CHOSEN, _IN_REJECTED, _IN_PROMPT, _IN_LAST = (np.uint8(1 << bit) for bit in range(4))
_PLACES = np.array([_IN_CHOSEN, _IN_CHOSEN, _IN_REJECTED, _IN_PROMPT, _IN_PROMPT | _IN_LAST])
"""Where a phrase with each of these roles is."""


class Known(NamedTuple):
    """A pair without its texts."""

    id: str
    principals: tuple[str, ...]
    created_at: float
    is_edit: bool
    wording: bytes
    """Stands for the text of the chosen answer, letter case and spaces aside."""


class Part(NamedTuple):
    """Occurrences in some pairs that follow one another."""

    first: int
    """The number of the first of these pairs."""
    packed: Hashes
    """Each phrase above `PAIR_BITS` bits of the number of the pair among these, in ascending order."""


Occurrences = tuple[Part, ...]
"""Which phrases occur in which pairs; no phrase twice in the same pair."""


class Evidence(NamedTuple):
    """All pairs, in the order in which they came."""

    pairs: tuple[Known, ...]
    clusters: Indices
    """Pairs with the same number have nearly the same prompt."""
    echoes: NDArray[np.float64]
    """The share of the chosen answer's phrases that the prompt holds already; 0 for very short answers."""
    taught: Occurrences
    """Phrases, words and references of chosen answers that neither the prompt nor the rejected answer has."""
    untaught: Occurrences
    """The same the other way round: what only the rejected answers have."""
    asked: Occurrences
    """Phrases of the last message of the user."""


def gather(pairs: Iterable[PreferencePair], clusterer: PromptClusterer) -> Evidence:
    """Read the pairs once; the memory it takes grows with their number of phrases, not with their texts."""
    return evidence_of([gather_some(pairs, clusterer)], clusterer)


class Gathered(NamedTuple):
    """What the rules look at in some pairs, wherever these were read."""

    known: tuple[Known, ...]
    sketches: tuple[Sketches, ...]
    """Of their prompts."""
    novelties: tuple[Novelties, ...]
    """The first pair is number 0."""


def gather_some(pairs: Iterable[PreferencePair], clusterer: PromptClusterer) -> Gathered:
    """Read some of the pairs."""
    known: list[Known] = []
    sketches: list[Sketches] = []
    novelties: list[Novelties] = []
    for batch in _batches(map(_texts, pairs)):
        novelties.append(_novelties(batch, first=len(known)))
        sketches.append(clusterer.sketch([texts.asked_before + texts.asked for texts in batch]))
        known += map(_known, batch)
    return Gathered(tuple(known), tuple(sketches), tuple(novelties))


def evidence_of(
    gathered: Sequence[Gathered], clusterer: PromptClusterer, is_kept: NDArray[np.bool_] | None = None
) -> Evidence:
    """What is known of the pairs that are kept, as if there had been no others.

    Args:
        gathered: of all pairs; whichever come first keep the lower numbers.
        is_kept: of each pair; without it all are.
    """
    known = [one for each in gathered for one in each.known]
    marks = np.ones(len(known), bool) if is_kept is None else is_kept
    numbers = np.cumsum(marks, dtype=np.int64) - marks.astype(np.int64)
    firsts = accumulate((len(each.known) for each in gathered), initial=0)
    novelties = [one.moved(first) for each, first in zip(gathered, firsts, strict=False) for one in each.novelties]
    sketches = [one for each in gathered for one in each.sketches]
    return Evidence(
        pairs=tuple(compress(known, marks)),
        clusters=clusterer.labels(np.concatenate(sketches)[marks]) if sketches else np.empty(0, np.int64),
        echoes=np.concatenate([np.empty(0), *(each.echoes for each in novelties)])[marks],
        taught=tuple(_renumbered(each.taught, marks, numbers) for each in novelties),
        untaught=tuple(_renumbered(each.untaught, marks, numbers) for each in novelties),
        asked=tuple(_renumbered(each.asked, marks, numbers) for each in novelties),
    )


def _batches(pairs: Iterable[_Texts]) -> Iterator[list[_Texts]]:
    batch: list[_Texts] = []
    n_chars = 0
    for texts in pairs:
        batch.append(texts)
        n_chars += sum(map(len, texts[1:]))
        if n_chars >= BATCH_CHARS or len(batch) == MAX_BATCH:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def pairs_of(part: Part, packed: Hashes) -> Indices:
    """The numbers of the pairs in which these of a part's occurrences are."""
    return part.first + (packed & _PAIR).astype(np.int64)


def _renumbered(part: Part, is_kept: NDArray[np.bool_], numbers: Indices) -> Part:
    """Without the pairs that are not kept.

    Args:
        numbers: of each pair, how many before it are kept.
    """
    rest = is_kept[part.first : part.first + MAX_BATCH]
    if rest.all() and numbers[part.first] == part.first:
        return part
    first = int(numbers[part.first])
    places = pairs_of(part, part.packed)
    packed = (part.packed & ~_PAIR) | (numbers[places] - first).astype(np.uint64)
    return Part(first, packed[is_kept[places]])


class _Texts(NamedTuple):
    pair: PreferencePair
    chosen: str
    rejected: str
    asked: str
    """The last message of the user."""
    asked_before: str
    told: str
    """What others said in the prompt: system messages, earlier answers, results of tools."""


class Novelties(NamedTuple):
    """Of pairs that follow one another, the parts of `Evidence`."""

    echoes: NDArray[np.float64]
    taught: Part
    untaught: Part
    asked: Part

    def moved(self, by: int) -> Novelties:
        """The same with higher numbers."""
        parts = (part._replace(first=part.first + by) for part in (self.taught, self.untaught, self.asked))
        return Novelties(self.echoes, *parts)


def text_of(message: Message) -> str:
    """Every text of a message: its content, or the text parts of it, and what it calls tools with.

    >>> text_of({"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]})
    'Hi'
    """
    content = message.get("content")
    if isinstance(content, str) and not message.get("tool_calls") and not message.get("function_call"):
        return content
    texts = [content] if isinstance(content, str) else [_part_text(part) for part in content or ()]
    calls = [*(message.get("tool_calls") or ()), message.get("function_call")]
    said = [*texts, *(canonical_json(_without_id(call)) for call in calls if call)]
    return "\n".join(text for text in said if text)


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


def _without_id(call: object) -> object:
    return call.get("function", call) if isinstance(call, Mapping) else call


def _texts(pair: PreferencePair) -> _Texts:
    said = [(message.get("role") == "user", text_of(message)) for message in pair.prompt]
    asked = [text for is_users, text in said if is_users]
    told = "\n".join(text for is_users, text in said if not is_users)
    before = "".join(f"{text}\n" for text in asked[:-1])
    return _Texts(pair, text_of(pair.chosen), text_of(pair.rejected), asked[-1] if asked else "", before, told)


def _known(texts: _Texts) -> Known:
    pair, wording = texts.pair, casefolded(one_spaced(texts.chosen))
    key = hashlib.blake2b(wording.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return Known(pair.id, pair.principals, pair.created_at, pair.source == Source.EDIT, key)


def _novelties(texts: list[_Texts], *, first: int) -> Novelties:
    """Compare the sides of each pair, the first of which is number `first`."""
    columns = list(zip(*texts, strict=True))[1:]
    words = words_of([text for column in columns for text in column])
    runs = phrases_of(words, PHRASE_WORDS)
    packed = [
        _packed(phrases_of(words, 1), _lows(len(texts), _CHOSEN, _REJECTED, _TOLD, _TOLD, _TOLD)),
        _packed(runs, _lows(len(texts), _CHOSEN_RUN, _REJECTED, _ASKED_RUN, _TOLD, _TOLD)),
        _packed(_references([*columns[0], *columns[1]], words), _lows(len(texts), _CHOSEN, _REJECTED)),
    ]
    occurrences = sorted_hashes(np.concatenate(packed))
    starts = first_places(occurrences >> np.uint64(ROLE_BITS))
    roles = (occurrences & np.uint64((1 << ROLE_BITS) - 1)).astype(np.int64)
    places = np.bitwise_or.reduceat(_PLACES[roles], starts) if len(starts) else _PLACES[:0]
    distinct = occurrences[starts] >> np.uint64(ROLE_BITS)
    is_echo = np.repeat((places & _IN_PROMPT) != 0, np.diff(starts, append=len(roles))) & (roles == _CHOSEN_RUN)
    echoed = (occurrences[is_echo] >> np.uint64(ROLE_BITS) & _PAIR).astype(np.int64)
    return Novelties(
        _shares(echoed, runs.texts[: np.searchsorted(runs.texts, len(texts))], len(texts)),
        Part(first, distinct[places == _IN_CHOSEN]),
        Part(first, distinct[places == _IN_REJECTED]),
        Part(first, distinct[(places & _IN_LAST) != 0]),
    )


def _lows(n_texts: int, *roles: int) -> Hashes:
    """What stands below a phrase's hash, for the texts of each role in turn: the number of the pair, and the role."""
    pairs = np.arange(n_texts, dtype=np.uint64) << np.uint64(ROLE_BITS)
    return np.concatenate([pairs | np.uint64(role) for role in roles])


def _packed(stream: Stream, lows: Hashes) -> Hashes:
    packed: Hashes = stream.hashes & _PHRASE
    packed |= lows[stream.texts]
    return packed


def first_places(ordered: Hashes) -> Indices:
    """Where each value stands first."""
    is_first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


def _references(texts: list[str], words: Stream) -> Stream:
    """Of some texts.

    Args:
        words: of these texts, then of others.
    """
    found = [(name, index) for index in _referring(texts, words) for name in references_of(texts[index])]
    hashes = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name, _ in found]
    return Stream(
        np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64),
        np.array([index for _, index in found], dtype=np.int64),
    )


def _referring(texts: list[str], words: Stream) -> Iterable[int]:
    """Which of the texts may refer to something: their words tell, and are there already."""
    if not words.is_plain:
        return range(len(texts))
    hinted = set(words.texts[np.isin(words.hashes, _hint_hashes())].tolist())
    return [index for index, text in enumerate(texts) if index in hinted or "://" in text]


@cache
def _hint_hashes() -> Hashes:
    return words_of(HINT_WORDS).hashes


def _shares(echoed: Indices, runs: Indices, n_texts: int) -> NDArray[np.float64]:
    """Of each text's runs of words, how many are echoed; 0 for texts that are too short to tell.

    Args:
        echoed: the text of each run that is;
        runs: and that of each.
    """
    n_echoed, n_runs = np.bincount(echoed, minlength=n_texts), np.bincount(runs, minlength=n_texts)
    shares: NDArray[np.float64] = np.where(n_runs < MIN_ECHO_PHRASES, 0.0, n_echoed / np.maximum(n_runs, 1))
    return shares

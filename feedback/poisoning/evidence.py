"""What the rules look at: each pair reduced to numbers as it streams by, so that no texts pile up in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.candidates import Source
from feedback.interactions import Message
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair
from feedback.poisoning.prompt_clusters import PromptClusterer
from feedback.poisoning.references import references_of
from feedback.poisoning.words import Hashes, Indices, Stream, phrases_of, words_of

BATCH_CHARS = 500_000
PHRASE_WORDS = 3
"""Chosen answers are searched for single words and for runs of this many; prompts for the runs alone."""
MIN_ECHO_PHRASES = 3
"""Answers of fewer phrases (five words) are in many an honest prompt, such as one that lists what to choose from."""
PHRASE_BITS = np.uint64(44)
"""Of a phrase's hash. Ten million different phrases make about three pairs that are taken for one another."""
MAX_BATCH = 1 << 20
"""The other bits hold the number of a pair in its batch."""


class Known(NamedTuple):
    """A pair without its texts."""

    id: str
    principals: tuple[str, ...]
    created_at: float
    is_edit: bool
    wording: bytes
    """Stands for the text of the chosen answer, letter case and spaces aside."""


class Occurrences(NamedTuple):
    """Which phrases occur in which pairs; no phrase twice in the same pair."""

    phrases: Hashes
    pairs: Indices


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
    known: list[Known] = []
    novelties: list[_Novelties] = []
    for batch in _batches(map(_texts, pairs)):
        novelties.append(_novelties(batch, first=len(known)))
        clusterer.add([texts.asked_before + texts.asked for texts in batch])
        known += [_known(texts) for texts in batch]
    return Evidence(
        pairs=tuple(known),
        clusters=clusterer.labels(),
        echoes=np.concatenate([np.empty(0), *(each.echoes for each in novelties)]),
        taught=_joined(each.taught for each in novelties),
        untaught=_joined(each.untaught for each in novelties),
        asked=_joined(each.asked for each in novelties),
    )


class _Texts(NamedTuple):
    pair: PreferencePair
    chosen: str
    rejected: str
    asked: str
    """The last message of the user."""
    asked_before: str
    told: str
    """What others said in the prompt: system messages, earlier answers, results of tools."""


class _Novelties(NamedTuple):
    echoes: NDArray[np.float64]
    taught: Occurrences
    untaught: Occurrences
    asked: Occurrences


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
    pair, wording = texts.pair, " ".join(texts.chosen.split()).casefold()
    key = hashlib.blake2b(wording.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return Known(pair.id, pair.principals, pair.created_at, pair.source == Source.EDIT, key)


def _novelties(texts: list[_Texts], *, first: int) -> _Novelties:
    """Compare the sides of each pair, the first of which is number `first`."""
    chosen, rejected = words_of([each.chosen for each in texts]), words_of([each.rejected for each in texts])
    asked = words_of([each.asked for each in texts])
    prompt = [asked, words_of([each.asked_before for each in texts]), words_of([each.told for each in texts])]
    in_prompt = _distinct([phrases for words in prompt for phrases in _phrases(words)])
    liked = _distinct([*_phrases(chosen), _references([each.chosen for each in texts])])
    disliked = _distinct([*_phrases(rejected), _references([each.rejected for each in texts])])
    runs = _packed(phrases_of(chosen, PHRASE_WORDS))
    return _Novelties(
        _shares(runs, _is_in(runs, in_prompt), len(texts)),
        _occurrences(liked[~_is_in(liked, in_prompt) & ~_is_in(liked, disliked)], first),
        _occurrences(disliked[~_is_in(disliked, in_prompt) & ~_is_in(disliked, liked)], first),
        _occurrences(_distinct([phrases_of(asked, PHRASE_WORDS)]), first),
    )


def _phrases(words: Stream) -> list[Stream]:
    return [phrases_of(words, 1), phrases_of(words, PHRASE_WORDS)]


def _references(texts: list[str]) -> Stream:
    found = [(name, index) for index, text in enumerate(texts) for name in references_of(text)]
    hashes = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name, _ in found]
    return Stream(
        np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64),
        np.array([index for _, index in found], dtype=np.int64),
    )


def _packed(stream: Stream) -> Hashes:
    """The number of each phrase's text above 44 bits of the phrase's hash."""
    short: Hashes = stream.hashes >> (np.uint64(64) - PHRASE_BITS)
    packed: Hashes = (stream.texts.astype(np.uint64) << PHRASE_BITS) | short
    return packed


def _distinct(streams: list[Stream]) -> Hashes:
    """Each phrase of each text once, packed, in ascending order."""
    packed: Hashes = np.sort(np.concatenate([_packed(stream) for stream in streams]))
    distinct: Hashes = packed[np.diff(packed, prepend=~packed[:1]) != 0]
    return distinct


def _is_in(packed: Hashes, others: Hashes) -> NDArray[np.bool_]:
    if not len(others):
        return np.zeros(len(packed), bool)
    found: NDArray[np.bool_] = others[np.minimum(np.searchsorted(others, packed), len(others) - 1)] == packed
    return found


def _shares(runs: Hashes, is_counted: NDArray[np.bool_], n_texts: int) -> NDArray[np.float64]:
    """Of each text's phrases, how many are counted; 0 for texts that are too short to tell."""
    texts = (runs >> PHRASE_BITS).astype(np.int64)
    counted, all_of_it = (np.bincount(each, minlength=n_texts) for each in (texts[is_counted], texts))
    shares: NDArray[np.float64] = np.where(all_of_it < MIN_ECHO_PHRASES, 0.0, counted / np.maximum(all_of_it, 1))
    return shares


def _occurrences(packed: Hashes, first: int) -> Occurrences:
    texts = (packed >> PHRASE_BITS).astype(np.int64)
    return Occurrences(packed & np.uint64((1 << int(PHRASE_BITS)) - 1), texts + first)


def _joined(parts: Iterable[Occurrences]) -> Occurrences:
    listed = list(parts)
    return Occurrences(
        np.concatenate([np.empty(0, np.uint64), *(part.phrases for part in listed)]),
        np.concatenate([np.empty(0, np.int64), *(part.pairs for part in listed)]),
    )

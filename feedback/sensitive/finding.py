"""Whether a text holds a secret or personal data. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final

from feedback.sensitive.credentials import credentials_in
from feedback.sensitive.identities import identities_in
from feedback.sensitive.kinds import Kind, places
from feedback.sensitive.reserved import is_reserved

MAX_LOOK_ALIKES: Final = 250
"""Numbers that might be somebody's and are not, after which a text is given up: no prose has as many."""
TOO_MANY: Final = "LOOK_ALIKES"
"""What a text is said to hold that is full of them: a table of numbers, or a text made to keep the search busy."""


def kinds_worth_trying(text: str) -> Iterator[Kind]:
    """Kinds whose telling characters are there at all; credentials first, since they may look like the others."""
    return chain(credentials_in(text), identities_in(text))


def find_credential(text: str) -> str | None:
    """The name of the first kind of credential in a text, if there is any.

    >>> find_credential("postgresql://ann:hunter2@db/shop"), find_credential("postgresql://db/shop")
    ('PASSWORD', None)
    """
    return _first(credentials_in(text), text)


def find_identity(text: str) -> str | None:
    """The name of the first kind of personal data in a text, if there is any.

    The time is bounded whatever the text is: each pattern takes time in proportion to its length, and of the checks
    that take longer there are at most `MAX_LOOK_ALIKES`.

    >>> find_identity("Write to ann@example.com."), find_identity("Write to Ann.")
    ('EMAIL', None)
    """
    return _first(identities_in(text), text)


def find_person(text: str) -> str | None:
    """As `find_identity`, but for addresses that are set aside for private networks and examples: they are nobody's.

    >>> find_person("Write to ann@example.com from 10.0.0.7."), find_person("Write to ann@pawl-mail.de.")
    (None, 'EMAIL')
    """
    return _first(identities_in(text), text, is_reserved)


def _first(
    kinds: Iterable[Kind], text: str, is_exempt: Callable[[Kind, str], bool] = lambda _kind, _found: False
) -> str | None:
    n_look_alikes = 0
    for kind in kinds:
        for start, end in places(kind, text):
            if end > start and not is_exempt(kind, text[start:end]):
                return kind.name
            n_look_alikes += kind.is_costly
            if n_look_alikes > MAX_LOOK_ALIKES:
                return TOO_MANY
    return None

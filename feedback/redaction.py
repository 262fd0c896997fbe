"""Personal data and secrets taken out of records before they are stored: found by shape, replaced by placeholders.

Everything here is pure. A placeholder says what stood there and which one it was within its record (`[EMAIL_1]`), so
that a conversation about two people stays one about two people. What has a check digit must pass it: a card number
Luhn's test (ISO/IEC 7812-1), an IBAN the remainder of 1 modulo 97 (ISO 13616). Names, addresses and whatever else has
no shape stay. Every pattern is linear in the length of the text: runs are bounded or possessive.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import orjson

from feedback.interactions import FeedbackEvent, Interaction

MAX_DEPTH: Final = 100
TOO_DEEP: Final = "[TOO_DEEP]"
MAX_PASSES: Final = 20
"""Two do for what people write; more are for texts made to need them."""

_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,10}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
PEM: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\s|\\[nr])*+(?:[A-Z][A-Za-z-]{2,20}: [^\n\\]{0,200}(?:\s|\\[nr])++){0,8}"
    r"(?=[A-Za-z0-9+/=]{16})(?:[A-Za-z0-9+/=\s]|\\[nr])++"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?"
)
KEY: Final = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"sk-[A-Za-z0-9_-]{16,}+|[srp]k_(?:live|test)_[A-Za-z0-9]{10,}+"
    r"|pawl-[0-9a-f]{16}-[0-9a-f]{64}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[A-Za-z0-9_-]{35}"
    r"|gh[pousr]_[A-Za-z0-9]{36,}+|github_pat_[A-Za-z0-9_]{22,}+|glpat-[A-Za-z0-9_-]{20,}+"
    r"|hf_[A-Za-z0-9]{30,}+|npm_[A-Za-z0-9]{36,}+|xox[abeoprs]-[A-Za-z0-9-]{10,}+"
    r")"
)
KEY_GATES: Final = ("sk-", "k_", "pawl-", "AKIA", "ASIA", "AIza", "gh", "github_pat_", "glpat-", "hf_", "npm_", "xox")
JWT: Final = re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]++)?")
EMAIL: Final = re.compile(r"(?<![\w.%+-])[\w.%+-]++@" + _DOMAIN)
IBAN: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}+")
CARD: Final = re.compile(r"(?<![0-9])(?<![0-9][ -])[2-6](?:[ -]?[0-9]){12,18}+(?![ -]?[0-9])")
IPV4: Final = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\.?[0-9])")
IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{6,39}+(?:\.[0-9.]{5,12}+)?(?![\w:])")
PHONE: Final = re.compile(
    r"(?<![\w+.-])(?<![0-9][ /])(?:"
    r"(?:\+|00)[1-9][0-9]{0,3}(?:[ .()/-]{0,2}[0-9]){6,12}+"
    r"|\([0-9]{2,5}\)[ -]?[0-9]{3,4}[ .-]?[0-9]{3,5}"
    r"|[2-9][0-9]{2}[-.][0-9]{3}[-.][0-9]{4}"
    r"|0[0-9]{2,4}[ /-][0-9]{3,4}(?:[ -]?[0-9]{2,4}){1,2}"
    r")(?![\w-])(?!\.[0-9])"
)
_IBAN_COUNTRIES: Final = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18"
    " FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20"
    " LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19"
    " SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
)
IBAN_LENGTHS: Final = {entry[:2]: int(entry[2:]) for entry in _IBAN_COUNTRIES.split()}
"""How long an IBAN of a country is (SWIFT's IBAN registry)."""


class Kind(NamedTuple):
    """One kind of thing that is taken out."""

    name: str
    pattern: re.Pattern[str]
    span_of: Callable[[str], int]
    """How many characters of a match are really one; 0 where it only looks like one."""


def redact_interaction(interaction: Interaction) -> Interaction:
    """The same interaction without personal data and secrets in prompt, completion and parameters, at any depth.

    Ids, and who asked, stay as they are: they are what erasure, limits and experiments go by.
    """
    redactor = Redactor()
    prompt, completion = interaction.prompt, interaction.completion
    redacted = replace(
        interaction,
        prompt=tuple(redactor.walk(message) for message in prompt) if prompt is not None else None,
        completion=redactor.walk(completion) if completion is not None else None,
        parameters=redactor.walk(interaction.parameters),
    )
    return redacted if redactor.n_found else interaction


def redact_event(event: FeedbackEvent) -> FeedbackEvent:
    """The same feedback without them in its free texts: an edit, a comment, a reason, tags."""
    redactor = Redactor()
    is_text = event.type in ("edit", "comment")  # The other values are words of ours, or ids.
    return replace(
        event,
        value=redactor.walk(event.value) if is_text else event.value,
        reason=redactor.walk(event.reason),
        comment=redactor.walk(event.comment),
        tags=redactor.walk(event.tags),
    )


def redact_text(text: str) -> str:
    """One text by itself.

    >>> redact_text("Write to ann@example.com or bob@example.com, not to ann@example.com.")
    'Write to [EMAIL_1] or [EMAIL_2], not to [EMAIL_1].'
    """
    return Redactor().redact(text)


class Redactor:
    """Placeholders of one record: the same thing gets the same one, wherever it stands."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}

    @property
    def n_found(self) -> int:
        """Different things taken out so far."""
        return len(self._names)

    def walk(self, value: Any, depth: int = 0) -> Any:
        """A JSON value with every text in it redacted; what is nested too deep to look at is replaced whole."""
        if isinstance(value, str):
            return self._redact_json(value, depth) or self.redact(value)
        if depth > MAX_DEPTH and isinstance(value, Mapping | list | tuple):
            return TOO_DEEP
        if isinstance(value, Mapping):
            return {key: self.walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.walk(item, depth + 1) for item in value]
        return value

    def _redact_json(self, text: str, depth: int) -> str | None:
        """Arguments and results of tools are JSON in a text: it stays JSON, and escapes hide nothing."""
        if text[:1] not in ("{", "[") or depth > MAX_DEPTH:
            return None
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            return None
        redacted = self._walk_numbers(parsed, depth + 1)
        if redacted == parsed:
            return text
        return orjson.dumps(redacted).decode()

    def _walk_numbers(self, value: Any, depth: int) -> Any:
        """As `walk`; inside JSON that a model or a tool wrote, a number may be one of a card or a telephone."""
        if depth > MAX_DEPTH:
            return TOO_DEEP
        if isinstance(value, dict):
            return {key: self._walk_numbers(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk_numbers(item, depth + 1) for item in value]
        if isinstance(value, int) and not isinstance(value, bool):
            shown = self.redact(str(value))
            return shown if shown != str(value) else value
        return self.walk(value, depth)

    def redact(self, text: str) -> str:
        """One text. What stood glued to something that was taken out may show only then, so it is looked at again."""
        for _ in range(MAX_PASSES):
            before = text
            for kind in kinds_worth_trying(text):
                text = self._redact_kind(text, kind)
            if text == before:
                break
        return text

    def _redact_kind(self, text: str, kind: Kind) -> str:
        """What follows within a match may be another one, so the search goes on right behind what was one."""
        parts: list[str] = []
        done = place = 0
        while (match := kind.pattern.search(text, place)) is not None:
            n_chars = kind.span_of(match.group())
            place = match.start() + (n_chars or 1)
            if n_chars:
                parts += [text[done : match.start()], self._placeholder(kind.name, match.group()[:n_chars])]
                done = place
        return "".join((*parts, text[done:])) if parts else text

    def _placeholder(self, name: str, found: str) -> str:
        known = self._names.get((name, found))
        if known is None:
            self._counts[name] = self._counts.get(name, 0) + 1
            known = self._names[name, found] = f"[{name}_{self._counts[name]}]"
        return known


def iban_span(found: str) -> int:
    """How much of a run is an IBAN: as many characters as its country's have, with the right check digits.

    >>> iban_span("DE89 3704 0044 0532 0130 00 THANKS")
    27
    """
    wanted = IBAN_LENGTHS.get(found[:2].upper(), 0)
    compact = ""
    for place, character in enumerate(found):
        if character not in " -":
            compact += character
        if len(compact) == wanted:
            following = found[place + 1 : place + 2]
            return place + 1 if is_iban(compact) and not following.isalnum() else 0
    return 0


def is_iban(compact: str) -> bool:
    """Whether the check digits are right: the rearranged number leaves 1 modulo 97 (ISO 13616)."""
    rearranged = (compact[4:] + compact[:4]).upper()
    return int("".join(str(int(character, 36)) for character in rearranged)) % 97 == 1


def is_card(found: str) -> bool:
    """Whether the digits pass Luhn's test.

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(character) for character in reversed(found) if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def is_address(found: str) -> bool:
    """Whether it is an IP address that could be somebody's; loopback and its like say nothing about anybody."""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if address.version == 6 and not any(character.isdigit() for character in found):
        return False  # `dead::beef` is more often code.
    return not (address.is_loopback or address.is_unspecified or found == "255.255.255.255")


def _whole_if(test: Callable[[str], bool]) -> Callable[[str], int]:
    return lambda found: len(found) if test(found) else 0


_PEM = Kind("PRIVATE_KEY", PEM, len)
_KEY = Kind("API_KEY", KEY, len)
_JWT = Kind("TOKEN", JWT, len)
_EMAIL = Kind("EMAIL", EMAIL, len)
_IBAN = Kind("IBAN", IBAN, iban_span)
_CARD = Kind("CARD", CARD, _whole_if(is_card))
_IPV4 = Kind("IP", IPV4, _whole_if(is_address))
_IPV6 = Kind("IP", IPV6, _whole_if(is_address))
_PHONE = Kind("PHONE", PHONE, len)
SIX_DIGITS: Final = re.compile(r"(?:[0-9][^0-9]{0,3}+){6}")


def kinds_worth_trying(text: str) -> list[Kind]:
    """Kinds whose telling character is there at all; secrets first, since they may hold what looks like the others."""
    kinds: list[Kind] = []
    if "-----BEGIN " in text:
        kinds.append(_PEM)
    if "eyJ" in text:
        kinds.append(_JWT)
    if any(gate in text for gate in KEY_GATES):
        kinds.append(_KEY)
    if "@" in text:
        kinds.append(_EMAIL)
    if SIX_DIGITS.search(text):
        kinds += [_IBAN, _CARD, _PHONE]
    if text.count(".") >= 3:
        kinds.append(_IPV4)
    if text.count(":") >= 2:
        kinds.append(_IPV6)
    return kinds

"""Personal data that has a shape: addresses, telephones, cards, bank accounts, numbers of identity.

Card numbers must pass Luhn's test (ISO/IEC 7812-1) and begin like an issuer's, IBANs leave 1 modulo 97 (ISO 13616).
Numbers of identity are checked by python-stdnum, which knows each country's rules. Those that would be found in any
list of numbers count only behind their name ("PESEL 44051401359").
"""

from __future__ import annotations

import importlib
import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple, Protocol, cast

from feedback.sensitive.kinds import Kind, kind, whole_if

# A pattern that begins with a set of characters is searched for at the speed of that set alone, so look-behinds stand
# behind its first character.
_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,10}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
_SCP_PATH = r"(?!:[\w.~-]+/[\w.-])"
_EMAIL: Final = kind("EMAIL", rf"(?<![\w.%+-])[\w.%+-]++@{_DOMAIN}{_SCP_PATH}")
_IPV4: Final = r"[0-9](?<![0-9.].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?!\.?[0-9])"
_IPV6: Final = r"[0-9A-Fa-f:](?<![\w:.].)[0-9A-Fa-f:]{5,38}+(?:\.[0-9.]{5,12}+)?(?![\w:])"
_IBAN: Final = r"[A-Za-z](?<![A-Za-z0-9].)[A-Za-z][0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}+"
_CARD: Final = r"[2-6](?<![0-9].)(?<![0-9][ -].)(?:[ -]?[0-9]){12,18}+(?![ -]?[0-9])"
_PHONE: Final = (
    r"[0-9+(](?<![\w+.-].)(?<![0-9][ /].)(?:"
    r"(?:(?<=\+)|(?<=0)0)[1-9][0-9]{0,3}(?:[ .()/-]{0,2}[0-9]){6,12}+"
    r"|(?:(?<=\()|(?<=1)[ .-]?\()[0-9]{2,5}\)[ -]?[0-9]{3,4}[ .-]?[0-9]{3,5}"
    r"|(?:(?<=[2-9])|(?<=1)[ .-]?[2-9])[0-9]{2}[-.][0-9]{3}[-.][0-9]{4}"
    r"|(?<=0)[1-9](?:[ .-]?[0-9]{2}){4}"
    r"|(?<=0)[1-9][0-9]{0,2}-[0-9]{3,4}-[0-9]{4}"
    r"|(?<=0)[0-9]{1,4}[ /-][0-9]{3,4}(?:[ -]?[0-9]{2,4}){1,2}"
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
_LETTERS_AS_NUMBERS: Final = str.maketrans({chr(code): str(code - 55) for code in range(65, 91)})
_GAPS: Final = str.maketrans("", "", " -")


def iban_span(found: str) -> int:
    """How much of a run is an IBAN: as many characters as its country's have, with the right check digits.

    >>> iban_span("DE89 3704 0044 0532 0130 00 THANKS")
    27
    """
    wanted = IBAN_LENGTHS.get(found[:2].upper(), 0)
    compact = found.translate(_GAPS)[:wanted]
    if not wanted or len(compact) < wanted or not is_iban(compact):
        return 0
    places = [place for place, character in enumerate(found) if character not in " -"]
    end = places[wanted - 1] + 1
    return 0 if found[end : end + 1].isalnum() else end


def is_iban(compact: str) -> bool:
    """Whether the check digits are right: the rearranged number leaves 1 modulo 97 (ISO 13616)."""
    rearranged = (compact[4:] + compact[:4]).upper()
    return int(rearranged.translate(_LETTERS_AS_NUMBERS)) % 97 == 1


_DOUBLED: Final = str.maketrans("0123456789", "0246813579")
"""Each digit twice, the digits of that added up."""
_ISSUED: Final = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}|5[0-9]{15}|2[2-7][0-9]{14}|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11,16}"
    r"|35[0-9]{14,17}|6[0-9]{14,18}"
)


def is_card(found: str) -> bool:
    """Whether the digits pass Luhn's test.

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112")
    (True, False)
    """
    digits = "".join(filter(str.isdigit, found))
    doubled = digits[-2::-2].translate(_DOUBLED)
    return (sum(map(int, digits[::-2])) + sum(map(int, doubled))) % 10 == 0


def is_issued_card(found: str) -> bool:
    """Whether the digits are as many as an issuer gives behind these first ones, and pass Luhn's test."""
    return _ISSUED.fullmatch(found.translate(_GAPS)) is not None and is_card(found)


def is_address(found: str) -> bool:
    """Whether it is an IP address that could be somebody's; loopback and its like say nothing about anybody."""
    if ":" in found and "::" not in found and found.count(":") < 6:
        return False  # A time, mostly: not worth what the next line takes.
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if address.version == 6 and not any(character.isdigit() for character in found):
        return False  # `dead::beef` is more often code.
    return not (address.is_loopback or address.is_unspecified or found == "255.255.255.255")


# Numbers of identity


class _Rules(Protocol):
    """A module of python-stdnum."""

    def is_valid(self, number: str) -> bool: ...


@cache
def _rules(name: str) -> _Rules:
    """Loaded on use: most texts have nothing to check."""
    return cast(_Rules, importlib.import_module(f"stdnum.{name}"))


class _Identity(NamedTuple):
    """A number of identity that is recognised wherever it stands alone."""

    rules: str
    """The module of python-stdnum that knows them."""
    first: str
    """What its first character may be."""
    rest: str


_DAY: Final = r"(?:0[1-9]|[12][0-9]|3[01])"
_MONTH: Final = r"(?:0[1-9]|1[0-2])"
_DNI_LETTER: Final = "[A-HJ-NP-TV-Z]"
_FIRST_A_DIGIT: Final = (
    _Identity("us.ssn", "[0-8]", r"[0-9]{2}-[0-9]{2}-[0-9]{4}"),
    _Identity("br.cpf", "[0-9]", r"[0-9]{2}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}"),
    _Identity("ch.ssn", "7", r"56\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}"),
    _Identity("be.nn", "[0-9]", r"[0-9]\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}"),
    _Identity("cl.rut", "[0-9]", r"[0-9]?\.[0-9]{3}\.[0-9]{3}-[0-9Kk]"),
    _Identity("kr.rrn", "[0-9]", r"[0-9]{5}-[1-8][0-9]{6}"),
    _Identity("se.personnummer", "[0-9]", rf"(?:[09][0-9])?[0-9]{_MONTH}[0-9]{{2}}[-+][0-9]{{4}}"),
    _Identity("fi.hetu", "[0-3]", rf"[0-9]{_MONTH}[0-9]{{2}}[-+A-FU-Y][0-9]{{3}}[0-9A-FHJ-NPR-Y]"),
    _Identity("es.dni", "[0-9]", rf"[0-9]{{7}}-?{_DNI_LETTER}"),
    _Identity("fr.nir", "[12]", r"(?: ?[0-9]{2}){2} ?[0-9][0-9AB](?: ?[0-9]{3}){2} ?[0-9]{2}"),
    # China's own rules want a county that existed when its code was given out; its check digit is enough.
    _Identity("iso7064.mod_11_2", "[1-8]", rf"[0-9]{{5}}(?:19|20)[0-9]{{2}}{_MONTH}{_DAY}[0-9]{{3}}[0-9Xx]"),
)
_FIRST_A_LETTER: Final = (
    _Identity("es.nie", "[XYZ]", rf"-?[0-9]{{7}}-?{_DNI_LETTER}"),
    _Identity("it.codicefiscale", "[A-Z]", r"[A-Z]{5}[0-9L-NP-V]{2}[A-EHLMPR-T][0-9L-NP-V]{2}[A-Z][0-9L-NP-V]{3}[A-Z]"),
    _Identity("mx.curp", "[A-Z]", r"[A-Z]{3}[0-9]{6}[HMX][A-Z]{5}[0-9A-Z][0-9]"),
)
_SHAPES: Final = tuple((re.compile(each.first + each.rest), each.rules) for each in _FIRST_A_DIGIT + _FIRST_A_LETTER)


def _any_of(first: str, identities: tuple[_Identity, ...]) -> str:
    rest = "|".join(f"(?<={each.first}){each.rest}" for each in identities)
    return rf"{first}(?<![\w.-].)(?:{rest})(?![\w-])(?!\.\w)"


_NINO: Final = (
    r"[A-CEGHJ-PR-TW-Z](?<![\w-].)(?!(?<=B)G|(?<=G)B|(?<=N)K|(?<=K)N|(?<=T)N|(?<=N)T|(?<=Z)Z)"
    r"[A-CEGHJ-NPR-TW-Z](?: ?[0-9]{2}){3} ?[A-D](?![\w-])"
)
"""Britain's has no check digit, but letters that are never used (HMRC's manual, NIM39110)."""


def is_national_id(found: str) -> bool:
    """Whether a number of one of the known shapes is valid in the country it belongs to.

    >>> is_national_id("12345678Z"), is_national_id("12345678A")
    (True, False)
    """
    return any(shape.fullmatch(found) and _rules(name).is_valid(found) for shape, name in _SHAPES)


_LABELS: Final = {
    "us.ssn": r"ssn|social security",
    "br.cpf": r"cpf",
    "pl.pesel": r"pesel",
    "nl.bsn": r"bsn|burgerservicenummer|sofinummer",
    "ca.sin": r"sin|social insurance",
    "in_.aadhaar": r"aadh?aar|uidai",
    "gb.nhs": r"nhs",
    "za.idnr": r"sa id|identity number|id number",
    "tr.tckimlik": r"tckn|t\.?c\.? kimlik",
    "au.tfn": r"tfn|tax file",
    "no.fodselsnummer": r"f(?:ø|oe|o)dselsnummer",
    "se.personnummer": r"personnummer",
    "dk.cpr": r"cpr",
    "de.idnr": r"steuer-?id(?:entifikationsnummer|nr)?|idnr|tin",
    "ro.cnp": r"cnp",
    "bg.egn": r"egn|егн",
    "hr.oib": r"oib",
    "ee.ik": r"isikukood",
    "pt.nif": r"nif|contribuinte",
    "cl.rut": r"rut|run",
    "ie.pps": r"ppsn?",
}
"""What stands before a number that would be found in any list of numbers."""
_LABEL: Final = re.compile(
    rf"\b(?:{'|'.join(f'({labels})' for labels in _LABELS.values())})\b[^0-9\n]{{0,20}}+\Z", re.IGNORECASE
)
_BEHIND_LABEL: Final = re.compile(
    r"[0-9](?<![\w/+-].)(?<![0-9][ .].)(?:[ ./-]?[0-9]){6,12}+(?:-?[A-Za-z]{1,2})?(?!\w)(?![ ./-][0-9])"
)
LABEL_CHARS: Final = 50
_LABEL_WORDS: Final = (
    *(
        "ssn",
        "soc",
        "cpf",
        "pesel",
        "bsn",
        "burger",
        "sofi",
        "sin",
        "aad",
        "uidai",
        "nhs",
        "sa id",
        "id num",
        "idnr",
        "identity",
        "tckn",
        "kim",
        "tfn",
    ),
    *("tax", "dsels", "personn", "cpr", "steuer", "tin", "cnp", "egn", "егн", "oib", "isik", "nif", "contr"),
    *("rut", "run", "pps"),
)
"""Some of each label: most numbers have none before them, and this is quicker to see."""


def _labelled_span(match: re.Match[str]) -> int:
    """The number has to be valid where the label before it comes from."""
    before = match.string[max(match.start() - LABEL_CHARS, 0) : match.start()].lower()
    label = _LABEL.search(before) if any(word in before for word in _LABEL_WORDS) else None
    if label is None or label.lastindex is None:
        return 0
    number = match.group()
    return len(number) if _rules(tuple(_LABELS)[label.lastindex - 1]).is_valid(number) else 0


_SIX_DIGITS: Final = re.compile(r"(?:[0-9][^0-9]{0,3}+){6}")
_NUMBERS: Final = (
    Kind("NATIONAL_ID", _BEHIND_LABEL, _labelled_span, is_costly=True),
    kind("IBAN", _IBAN, span=iban_span, is_costly=True),
    kind("CARD", _CARD, span=whole_if(is_issued_card), is_costly=True),
    kind("NATIONAL_ID", _any_of("[0-9]", _FIRST_A_DIGIT), span=whole_if(is_national_id), is_costly=True),
    kind("NATIONAL_ID", _any_of("[A-Z]", _FIRST_A_LETTER), span=whole_if(is_national_id), is_costly=True),
    kind("NATIONAL_ID", _NINO),
    kind("PHONE", _PHONE),
)
_IP4: Final = kind("IP", _IPV4, span=whole_if(is_address))
_IP6: Final = kind("IP", _IPV6, span=whole_if(is_address))


def _has_six_digits(text: str) -> bool:
    """Whether they are there at all, near each other or not."""
    return sum(map(text.count, "0123456789")) >= 6


def identities_in(text: str) -> Iterator[Kind]:
    """Kinds whose telling characters are there at all."""
    if "@" in text:
        yield _EMAIL
    if _has_six_digits(text) and _SIX_DIGITS.search(text):
        yield from _NUMBERS
    if text.count(".") >= 3:
        yield _IP4
    if ":" in text and ("::" in text or text.count(":") >= 6):
        yield _IP6

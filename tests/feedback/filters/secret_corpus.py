"""Structured secrets and personal data drawn from a seed, in texts as people write them, and as many look-alikes.

Every value is random but well formed: its provider's prefix and length, its country's check digits (computed here, by
nothing the filter uses). None was ever issued to anybody.
"""

from __future__ import annotations

import base64
import json
import random
import string
import uuid
from collections.abc import Callable
from typing import NamedTuple

UPPER_DIGITS = string.ascii_uppercase + string.digits
WORD = string.ascii_letters + string.digits
URL_SAFE = WORD + "-_"
BASE32 = string.ascii_uppercase + "234567"
HEX = "0123456789abcdef"
FIRST = ("ann", "bob", "chidi", "dara", "elena", "farid", "grace", "hiro", "ines", "jamal", "kaja", "liam")
LAST = ("smith", "okafor", "mueller", "garcia", "rossi", "nowak", "tanaka", "khan", "silva", "jensen", "oneill")
HOSTS = ("example.com", "mail.example.org", "uni-example.de", "example.co.uk", "corp.example.io", "example.museum")


class Case(NamedTuple):
    """One text and what is in it."""

    kind: str
    secret: str
    """What must be found; in a look-alike, what must not."""
    text: str


Make = Callable[[random.Random], str]


def positives(seed: int, n: int = 500) -> list[Case]:
    """`n` texts with one secret each, every kind about as often as any other."""
    return _cases(random.Random(seed), SECRETS, n)


def negatives(seed: int, n: int = 500) -> list[Case]:
    """`n` texts with something that only looks like one."""
    return _cases(random.Random(seed), LOOK_ALIKES, n)


def _cases(rng: random.Random, kinds: dict[str, Make], n: int) -> list[Case]:
    names = [name for _ in range(n // len(kinds) + 1) for name in sorted(kinds)][:n]
    return [_case(rng, name, kinds[name](rng)) for name in names]


def _case(rng: random.Random, kind: str, secret: str) -> Case:
    around = rng.choice(SURROUNDINGS)
    return Case(kind, secret, around(rng, secret))


# Surroundings


def _sentence(rng: random.Random, secret: str) -> str:
    before = ("Please use", "I was given", "It says", "My colleague sent me", "Can you check", "What is wrong with")
    after = ("and tell me if it works.", "for this.", "- is that right?", "?", ", thanks!", "\n\nKind regards\nAnn")
    return f"{rng.choice(before)} {secret} {rng.choice(after)}" if rng.random() < 0.5 else f"{secret}"


def _field(rng: random.Random, secret: str) -> str:
    return f"id: {rng.randint(1, 99)}\nvalue: {secret}\nnote: from the form of last Tuesday"


def _json(rng: random.Random, secret: str) -> str:
    return json.dumps({"row": rng.randint(1, 9), "cell": secret, "is_checked": True})


def _log_line(rng: random.Random, secret: str) -> str:
    return f"2026-03-{rng.randint(10, 28)}T12:0{rng.randint(0, 9)}:11Z INFO worker got ({secret}) in 12 ms"


def _markdown(_: random.Random, secret: str) -> str:
    return f"Here is what I have:\n\n```\n{secret}\n```\n\nWhat should I do next?"


def _table(_: random.Random, secret: str) -> str:
    return f"| what | value |\n|---|---|\n| first | {secret} |\n| second | none |"


SURROUNDINGS: tuple[Callable[[random.Random, str], str], ...] = (_sentence, _field, _json, _log_line, _markdown, _table)

# Building blocks


def _chars(rng: random.Random, alphabet: str, n: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def _digits(rng: random.Random, n: int) -> str:
    return _chars(rng, string.digits, n)


def _date(rng: random.Random) -> tuple[str, str, str]:
    """Year (two digits), month and day of somebody's birth."""
    return f"{rng.randint(50, 99)}", f"{rng.randint(1, 12):02d}", f"{rng.randint(1, 28):02d}"


def _token(prefix: str, alphabet: str, n: int) -> Make:
    return lambda rng: prefix + _chars(rng, alphabet, n)


def _base64(rng: random.Random, n: int) -> str:
    return base64.b64encode(rng.randbytes(n)).decode()


def _base64url(rng: random.Random, n: int) -> str:
    return base64.urlsafe_b64encode(rng.randbytes(n)).decode().rstrip("=")


def luhn_digit(body: str) -> str:
    """The digit that makes `body` pass Luhn's test."""
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


def _weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True))


# Secrets of machines


def _pem(rng: random.Random) -> str:
    name = rng.choice(("RSA PRIVATE KEY", "EC PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY"))
    body = _base64(rng, 300)
    lines = "\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    return f"-----BEGIN {name}-----\n{lines}\n-----END {name}-----"


def _jwt(rng: random.Random) -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
    claims = json.dumps({"sub": _digits(rng, 10), "iat": rng.randint(10**9, 2 * 10**9)}).encode()
    return f"{header}.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.{_base64url(rng, 32)}"


def _connection(rng: random.Random) -> str:
    scheme = rng.choice(("postgresql", "postgres", "mysql", "mongodb+srv", "amqp", "mssql", "postgresql+psycopg"))
    name, password = rng.choice(FIRST), _chars(rng, WORD + "!%.-", 14)
    return f"{scheme}://{name}:{password}@db{rng.randint(1, 9)}.internal.example.com:5432/shop"


def _redis(rng: random.Random) -> str:
    return f"redis://:{_chars(rng, WORD, 20)}@cache-{rng.randint(1, 9)}:6379/0"


def _basic_auth(rng: random.Random) -> str:
    return f"https://{rng.choice(FIRST)}:{_chars(rng, WORD, 12)}@git.example.com/team/repo.git"


def _ado(rng: random.Random) -> str:
    return (
        f"Server=tcp:sql{rng.randint(1, 9)};Database=shop;User Id={rng.choice(FIRST)};Password={_chars(rng, WORD, 16)};"
    )


def _azure_storage(rng: random.Random) -> str:
    name = _chars(rng, string.ascii_lowercase, 8)
    return f"DefaultEndpointsProtocol=https;AccountName={name};AccountKey={_base64(rng, 64)};EndpointSuffix=x"


def _aws_secret(rng: random.Random) -> str:
    name = rng.choice(("aws_secret_access_key = ", "AWS_SECRET_ACCESS_KEY=", '"SecretAccessKey": '))
    return f"{name}{_chars(rng, WORD + '/+', 40)}"


def _assignment(rng: random.Random) -> str:
    name = rng.choice(("password", "DB_PASSWORD", "client_secret", "api_key", "apiKey", "auth_token", "passwd"))
    value = _chars(rng, WORD, 11) + rng.choice("0123456789") + _chars(rng, "!$%_" + WORD, 7)
    return rng.choice((f"{name} = '{value}'", f"{name}={value}", f"{name}: {value}"))


def _bearer(rng: random.Random) -> str:
    return f"Authorization: Bearer {_chars(rng, URL_SAFE, 43)}"


def _basic_header(rng: random.Random) -> str:
    pair = f"{rng.choice(FIRST)}:{_chars(rng, WORD, 14)}"
    return f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}"


def _slack_hook(rng: random.Random) -> str:
    places = (_chars(rng, UPPER_DIGITS, 8), _chars(rng, UPPER_DIGITS, 10), _chars(rng, WORD, 24))
    return "https://hooks.slack.com/services/T{}/B{}/{}".format(*places)


def _sendgrid(rng: random.Random) -> str:
    return f"SG.{_chars(rng, URL_SAFE, 22)}.{_chars(rng, WORD, 43)}"


def _telegram(rng: random.Random) -> str:
    return f"{rng.randint(10**8, 10**10 - 1)}:AA{_chars(rng, WORD, 33)}"


def _discord(rng: random.Random) -> str:
    user = base64.b64encode(str(rng.randint(10**17, 10**18 - 1)).encode()).decode().rstrip("=")
    return f"{user}.{_chars(rng, WORD, 6)}.{_chars(rng, WORD, 38)}"


def _openai(rng: random.Random) -> str:
    return f"sk-proj-{_chars(rng, URL_SAFE, 74)}T3BlbkFJ{_chars(rng, WORD, 20)}"


def _slack(rng: random.Random) -> str:
    return f"xox{rng.choice('bp')}-{_digits(rng, 12)}-{_digits(rng, 12)}-{_chars(rng, WORD, 24)}"


# Personal data


def _card(rng: random.Random) -> str:
    prefix, n, groups = rng.choice(
        (
            ("4", 16, (4, 4, 4, 4)),
            ("5" + rng.choice("12345"), 16, (4, 4, 4, 4)),
            ("2221", 16, (4, 4, 4, 4)),
            ("37", 15, (4, 6, 5)),
            ("6011", 16, (4, 4, 4, 4)),
            ("3528", 16, (4, 4, 4, 4)),
            ("36", 14, (4, 6, 4)),
        )
    )
    body = prefix + _digits(rng, n - 1 - len(prefix))
    return _grouped(body + luhn_digit(body), groups, rng.choice(("", " ", "-")))


def _grouped(text: str, groups: tuple[int, ...], separator: str) -> str:
    starts = [sum(groups[:place]) for place in range(len(groups))]
    return separator.join(text[start : start + size] for start, size in zip(starts, groups, strict=True))


IBAN_BODIES: dict[str, Make] = {
    "DE": lambda rng: _digits(rng, 18),
    "FR": lambda rng: _digits(rng, 10) + _chars(rng, UPPER_DIGITS, 11) + _digits(rng, 2),
    "GB": lambda rng: _chars(rng, string.ascii_uppercase, 4) + _digits(rng, 14),
    "NL": lambda rng: _chars(rng, string.ascii_uppercase, 4) + _digits(rng, 10),
    "CH": lambda rng: _digits(rng, 5) + _chars(rng, UPPER_DIGITS, 12),
    "PL": lambda rng: _digits(rng, 24),
    "SE": lambda rng: _digits(rng, 20),
    "AT": lambda rng: _digits(rng, 16),
    "IE": lambda rng: _chars(rng, string.ascii_uppercase, 4) + _digits(rng, 14),
    "NO": lambda rng: _digits(rng, 11),
    "SA": lambda rng: _digits(rng, 2) + _chars(rng, UPPER_DIGITS, 18),
    "MT": lambda rng: _chars(rng, string.ascii_uppercase, 4) + _digits(rng, 5) + _chars(rng, UPPER_DIGITS, 18),
}


def _iban(rng: random.Random) -> str:
    country = rng.choice(sorted(IBAN_BODIES))
    body = IBAN_BODIES[country](rng)
    number = "".join(str(int(character, 36)) for character in body + country + "00")
    whole = f"{country}{98 - int(number) % 97:02d}{body}"
    if rng.random() < 0.5:
        return whole
    return " ".join(whole[at : at + 4] for at in range(0, len(whole), 4))


def _email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    name = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{first}+news", f"{first}_{last}{rng.randint(1, 99)}"))
    return f"{name}@{rng.choice(HOSTS)}"


def _phone_world(rng: random.Random) -> str:
    code, groups = rng.choice(
        (
            ("+1", (3, 3, 4)),
            ("+44", (4, 6)),
            ("+49", (3, 8)),
            ("+33", (1, 2, 2, 2, 2)),
            ("+81", (2, 4, 4)),
            ("+91", (5, 5)),
            ("+55", (2, 5, 4)),
            ("+86", (3, 4, 4)),
            ("+234", (3, 3, 4)),
            ("+48", (3, 3, 3)),
        )
    )
    first = rng.choice("23456789")
    number = first + _digits(rng, sum(groups) - 1)
    separator = rng.choice((" ", "-", ".", ""))
    return code + (separator or rng.choice((" ", ""))) + _grouped(number, groups, separator)


def _phone_us(rng: random.Random) -> str:
    area = f"{rng.randint(2, 9)}{_digits(rng, 2)}"
    exchange, line = f"{rng.randint(2, 9)}{_digits(rng, 2)}", _digits(rng, 4)
    shapes = ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "1-{}-{}-{}", "({}){}-{}", "+1 ({}) {}-{}")
    return rng.choice(shapes).format(area, exchange, line)


def _phone_national(rng: random.Random) -> str:
    """As written at home: a leading zero, and no country."""
    shapes: tuple[Make, ...] = (
        lambda rng: "0" + rng.choice("1234567") + "".join(f" {_digits(rng, 2)}" for _ in range(4)),  # France
        lambda rng: f"020 7{_digits(rng, 3)} {_digits(rng, 4)}",  # London
        lambda rng: f"07{_digits(rng, 3)} {_digits(rng, 6)}",  # British mobile
        lambda rng: f"030/{_digits(rng, 7)}",  # Berlin
        lambda rng: f"0171 {_digits(rng, 7)}",  # German mobile
        lambda rng: f"03-{_digits(rng, 4)}-{_digits(rng, 4)}",  # Tokyo
        lambda rng: f"04{_digits(rng, 2)} {_digits(rng, 3)} {_digits(rng, 3)}",  # Australian mobile
        lambda rng: f"0{rng.randint(10, 99)}-{_digits(rng, 3)} {_digits(rng, 2)} {_digits(rng, 2)}",  # Sweden
    )
    return rng.choice(shapes)(rng)


def _ipv4(rng: random.Random) -> str:
    return f"{rng.randint(11, 223)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


def _ipv6(rng: random.Random) -> str:
    groups = [f"{rng.randint(0x1000, 0xFFFF):x}" for _ in range(6)]
    return rng.choice((f"2001:db8:{':'.join(groups)}", f"2a02:{groups[0]}:{groups[1]}::{rng.randint(1, 0xFFFF):x}"))


def _us_ssn(rng: random.Random) -> str:
    area = rng.choice([*range(1, 666), *range(667, 900)])
    return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def _es_dni(rng: random.Random) -> str:
    number = rng.randint(10**7, 10**8 - 1)
    return f"{number}{rng.choice(('', '-'))}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def _es_nie(rng: random.Random) -> str:
    head, number = rng.randint(0, 2), _digits(rng, 7)
    return f"{'XYZ'[head]}{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[int(f'{head}{number}') % 23]}"


_ODD_DIGITS = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21)
_ODD_LETTERS = (*_ODD_DIGITS, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_ODD = dict(zip(string.digits + string.ascii_uppercase, _ODD_DIGITS + _ODD_LETTERS, strict=True))


def _it_fiscal_code(rng: random.Random) -> str:
    year, month, day = _date(rng)
    letters = _chars(rng, "BCDFGLMNPRSTV", 6)
    body = f"{letters}{year}{'ABCDEHLMPRST'[int(month) - 1]}{day}{rng.choice('ABCFGHL')}{rng.randint(100, 999)}"
    total = sum(
        _ODD[each] if place % 2 == 0 else (int(each) if each.isdigit() else ord(each) - 65)
        for place, each in enumerate(body)
    )
    return body + chr(65 + total % 26)


def _fr_nir(rng: random.Random) -> str:
    year, month, _ = _date(rng)
    body = f"{rng.choice('12')}{year}{month}{rng.randint(1, 19):02d}{rng.randint(1, 600):03d}{rng.randint(1, 999):03d}"
    whole = f"{body}{97 - int(body) % 97:02d}"
    return _grouped(whole, (1, 2, 2, 2, 3, 3, 2), rng.choice(("", " ")))


def _br_cpf(rng: random.Random) -> str:
    body = _digits(rng, 9)
    for _ in range(2):
        weights = tuple(range(len(body) + 1, 1, -1))
        body += str(_weighted(body, weights) * 10 % 11 % 10)
    return f"{body[:3]}.{body[3:6]}.{body[6:9]}-{body[9:]}"


def _pl_pesel(rng: random.Random) -> str:
    body = "".join(_date(rng)) + _digits(rng, 4)
    check = -_weighted(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10
    return f"PESEL {body}{check}"


def _nl_bsn(rng: random.Random) -> str:
    while True:
        body = str(rng.randint(10**7, 10**8 - 1))
        check = _weighted(body, (9, 8, 7, 6, 5, 4, 3, 2)) % 11
        if check < 10:
            return f"BSN: {body}{check}"


def _se_personnummer(rng: random.Random) -> str:
    body = "".join(_date(rng)) + _digits(rng, 3)
    century = rng.choice(("", "19"))
    return f"{century}{body[:6]}-{body[6:]}{luhn_digit(body)}"


def _fi_hetu(rng: random.Random) -> str:
    year, month, day = _date(rng)
    number = f"{rng.randint(2, 899):03d}"
    return f"{day}{month}{year}-{number}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(day + month + year + number) % 31]}"


def _ch_ahv(rng: random.Random) -> str:
    body = "756" + _digits(rng, 9)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return _grouped(f"{body}{check}", (3, 4, 4, 2), ".")


def _be_nn(rng: random.Random) -> str:
    year, month, day = _date(rng)
    serial = f"{rng.randint(1, 997):03d}"
    check = 97 - int(year + month + day + serial) % 97
    return f"{year}.{month}.{day}-{serial}.{check:02d}"


def _cn_id(rng: random.Random) -> str:
    year, month, day = _date(rng)
    place = rng.choice(("110101", "310101", "440106", "510104"))
    body = f"{place}19{year}{month}{day}{_digits(rng, 3)}"
    return body + "10X98765432"[_weighted(body, (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11]


def _ca_sin(rng: random.Random) -> str:
    body = str(rng.choice("12345679")) + _digits(rng, 7)
    return "SIN " + _grouped(body + luhn_digit(body), (3, 3, 3), " ")


_VERHOEFF_STEP = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip
_VERHOEFF_INVERSE = "0432156789"


def _dihedral(one: int, other: int) -> int:
    """The product of two digits in the dihedral group of order ten (Verhoeff, 1969)."""
    if one < 5:
        return (one + other) % 5 if other < 5 else 5 + (one + other) % 5
    return 5 + (one - other) % 5 if other < 5 else (one - other) % 5


def _in_aadhaar(rng: random.Random) -> str:
    body = rng.choice("23456789") + _digits(rng, 10)
    check = 0
    for place, digit in enumerate(reversed(body), 1):
        check = _dihedral(check, int(_VERHOEFF_STEP[place % 8][int(digit)]))
    return "Aadhaar " + _grouped(body + _VERHOEFF_INVERSE[check], (4, 4, 4), " ")


def _gb_nino(rng: random.Random) -> str:
    letters = rng.choice(("AB", "CE", "JK", "LM", "PR", "SX", "WY"))
    return f"{letters} {_digits(rng, 2)} {_digits(rng, 2)} {_digits(rng, 2)} {rng.choice('ABCD')}"


def _gb_nhs(rng: random.Random) -> str:
    while True:
        body = "9" + _digits(rng, 8)
        check = -_weighted(body, tuple(range(10, 1, -1))) % 11
        if check < 10:
            return "NHS number " + _grouped(f"{body}{check}", (3, 3, 4), " ")


def _cl_rut(rng: random.Random) -> str:
    number = str(rng.randint(5_000_000, 25_000_000))
    total = sum(int(digit) * (2 + place % 6) for place, digit in enumerate(reversed(number)))
    return f"RUT {int(number):,}".replace(",", ".") + "-" + "0123456789K0"[-total % 11]


def _kr_rrn(rng: random.Random) -> str:
    body = "".join(_date(rng)) + rng.choice("12") + f"{rng.randint(0, 95):02d}" + _digits(rng, 3)
    check = (11 - _weighted(body, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10
    return f"{body[:6]}-{body[6:]}{check}"


SECRETS: dict[str, Make] = {
    "age key": _token("AGE-SECRET-KEY-1", "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58),
    "airtable token": lambda rng: f"pat{_chars(rng, WORD, 14)}.{_chars(rng, HEX, 64)}",
    "anthropic key": lambda rng: f"sk-ant-api03-{_chars(rng, URL_SAFE, 93)}AA",
    "assigned password": _assignment,
    "aws key id": lambda rng: rng.choice(("AKIA", "ASIA")) + _chars(rng, BASE32, 16),
    "aws secret": _aws_secret,
    "azure storage": _azure_storage,
    "basic header": _basic_header,
    "basic url": _basic_auth,
    "bearer header": _bearer,
    "card": _card,
    "connection string": _connection,
    "database password": _ado,
    "databricks token": _token("dapi", HEX, 32),
    "digitalocean token": _token("dop_v1_", HEX, 64),
    "discord token": _discord,
    "docker token": _token("dckr_pat_", URL_SAFE, 27),
    "doppler token": _token("dp.pt.", WORD, 43),
    "e-mail": _email,
    "github fine token": lambda rng: f"github_pat_{_chars(rng, WORD, 22)}_{_chars(rng, WORD, 59)}",
    "github token": lambda rng: f"gh{rng.choice('pousr')}_{_chars(rng, WORD, 36)}",
    "gitlab token": _token("glpat-", URL_SAFE, 20),
    "google client secret": _token("GOCSPX-", URL_SAFE, 28),
    "google key": _token("AIza", URL_SAFE, 35),
    "grafana token": lambda rng: f"glsa_{_chars(rng, WORD, 32)}_{_chars(rng, HEX, 8)}",
    "huggingface token": _token("hf_", string.ascii_letters, 34),
    "iban": _iban,
    "id be": _be_nn,
    "id br": _br_cpf,
    "id ca": _ca_sin,
    "id ch": _ch_ahv,
    "id cl": _cl_rut,
    "id cn": _cn_id,
    "id es": _es_dni,
    "id es foreign": _es_nie,
    "id fi": _fi_hetu,
    "id fr": _fr_nir,
    "id gb": _gb_nino,
    "id gb health": _gb_nhs,
    "id in": _in_aadhaar,
    "id it": _it_fiscal_code,
    "id kr": _kr_rrn,
    "id nl": _nl_bsn,
    "id pl": _pl_pesel,
    "id se": _se_personnummer,
    "id us": _us_ssn,
    "ip 4": _ipv4,
    "ip 6": _ipv6,
    "jwt": _jwt,
    "linear key": _token("lin_api_", WORD, 40),
    "mailgun key": _token("key-", HEX, 32),
    "new relic key": _token("NRAK-", UPPER_DIGITS, 27),
    "notion token": _token("ntn_", WORD, 46),
    "npm token": _token("npm_", WORD, 36),
    "openai key": _openai,
    "phone at home": _phone_national,
    "phone us": _phone_us,
    "phone world": _phone_world,
    "postman key": lambda rng: f"PMAK-{_chars(rng, HEX, 24)}-{_chars(rng, HEX, 34)}",
    "private key": _pem,
    "pypi token": lambda rng: f"pypi-AgEIcHlwaS5vcmc{_chars(rng, URL_SAFE, 80)}",
    "redis url": _redis,
    "sendgrid key": _sendgrid,
    "shopify token": _token("shpat_", HEX, 32),
    "slack hook": _slack_hook,
    "slack token": _slack,
    "square token": _token("sq0csp-", URL_SAFE, 43),
    "stripe key": lambda rng: f"{rng.choice(('sk', 'rk'))}_live_{_chars(rng, WORD, 24)}",
    "telegram token": _telegram,
    "twilio key": _token("SK", HEX, 32),
    "vault token": _token("hvs.", URL_SAFE, 95),
}

# Look-alikes


def _with_wrong_end(make: Make) -> Make:
    """What `make` makes with another last digit or letter, so that its check fails."""

    def wrong(rng: random.Random) -> str:
        text = make(rng)
        last = text[-1]
        return text[:-1] + (str((int(last) + 1) % 10) if last.isdigit() else chr((ord(last) - 64) % 26 + 65))

    return wrong


def _wrong_card(rng: random.Random) -> str:
    body = "4" + _digits(rng, 14)
    return _grouped(body + str((int(luhn_digit(body)) + rng.randint(1, 9)) % 10), (4, 4, 4, 4), rng.choice(("", " ")))


def _version(rng: random.Random) -> str:
    a, b, c = (rng.randint(0, 30) for _ in range(3))
    shapes = (f"v{a}.{b}.{c}", f"{a}.{b}.{c}-rc.{b}", f"Chrome/1{a:02d}.0.{c + 4000}.{b + 300}", f"{a}.{b}.{c}.post{b}")
    return rng.choice(shapes)


def _code_line(rng: random.Random) -> str:
    lines = (
        'password = os.environ["DB_PASSWORD"]',
        "password: ${DB_PASSWORD}",
        "api_key = settings.api_key",
        "token = get_token(request)",
        'api_key="<your-api-key>"',
        "client_secret: changeme",
        "export OPENAI_API_KEY=sk-...",
        "password = input('Password: ')",
        "secret_name: my-app-database-secret",
        "self.password = password",
        "if password == confirm_password:",
        "Authorization: Bearer <token>",
        'headers = {"Authorization": f"Bearer {token}"}',
        "postgresql://localhost:5432/shop",
        "postgresql://${USER}:${PASSWORD}@db/shop",
        "redis://localhost:6379/0",
        "max_tokens: 512, token_count=1024",
        "passwords must be at least 12 characters long",
        "git clone git@github.com:example/repo.git",
        "npm install @types/node@18.11.9 left-pad@1.3.0",
        "@app.route('/users/<int:id>')",
        "ssh deploy@build-host uptime",
        "std::chrono::seconds x = a::b::c;",
        "-----BEGIN CERTIFICATE-----",
        "grep -rn 'BEGIN RSA PRIVATE KEY' .",
    )
    return rng.choice(lines)


def _number(rng: random.Random) -> str:
    shapes = (
        f"Order {rng.randint(10**9, 10**10 - 1)}",
        f"Ticket #{rng.randint(10**5, 10**7)}",
        f"{rng.randint(1, 9)},{rng.randint(100, 999)},{rng.randint(100, 999)}.{rng.randint(10, 99)} EUR",
        f"3.{_digits(rng, 30)}",
        f"{rng.uniform(-90, 90):.6f}, {rng.uniform(-180, 180):.6f}",
        f"{rng.randint(1900, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        f"pages {rng.randint(100, 400)}-{rng.randint(401, 900)}",
        f"{rng.randint(2000, 2015)}-{rng.randint(2016, 2030)}",
        f"arXiv:{rng.randint(1000, 2600)}.{_digits(rng, 5)}",
        f"10.{rng.randint(1000, 9999)}/journal.{_digits(rng, 7)}",
        f"0x{_chars(rng, HEX, 16)}",
        f"{rng.randint(1, 9) * 100} 000 000",
        f"1{_digits(rng, 9)} seconds, 1{_digits(rng, 12)} ms",
    )
    return rng.choice(shapes)


def _isbn(rng: random.Random) -> str:
    body = "978" + rng.choice("013") + _digits(rng, 8)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return "ISBN " + _grouped(f"{body}{check}", (3, 1, 3, 5, 1), rng.choice(("-", " ", "")))


def _wrong_iban(rng: random.Random) -> str:
    iban = _iban(rng)
    return f"{iban[:2]}{(int(iban[2:4]) + 1) % 97:02d}{iban[4:]}"


def _never_issued(rng: random.Random) -> str:
    area = rng.choice(("000", "666", "9" + _digits(rng, 2)))
    return f"{area}-{_digits(rng, 2)}-{_digits(rng, 4)}"


PLACEHOLDERS = ("[EMAIL_1]", "[PHONE_2]", "sk-...", "AKIA****************", "user@", "hf_xxx")
LOOK_ALIKES: dict[str, Make] = {
    "base64": lambda rng: base64.b64encode(_sentence(rng, "a picture of a cat").encode()).decode(),
    "card, wrong digit": _wrong_card,
    "code": _code_line,
    "colour": lambda rng: f"#{_chars(rng, HEX, 6)}",
    "commit": lambda rng: f"commit {_chars(rng, HEX, 40)}",
    "fingerprint": lambda rng: f"SHA256:{_base64(rng, 32).rstrip('=')}",
    "handle": lambda rng: f"@{rng.choice(FIRST)}_{rng.choice(LAST)}",
    "iban, wrong digit": _wrong_iban,
    "id be, wrong digit": _with_wrong_end(_be_nn),
    "id br, wrong digit": _with_wrong_end(_br_cpf),
    "id cn, wrong digit": _with_wrong_end(_cn_id),
    "id es, wrong letter": _with_wrong_end(_es_dni),
    "id it, wrong letter": _with_wrong_end(_it_fiscal_code),
    "id us, never issued": _never_issued,
    "isbn": _isbn,
    "loopback": lambda rng: rng.choice(("127.0.0.1:8080", "0.0.0.0", "::1", "255.255.255.255")),
    "mac": lambda rng: ":".join(_chars(rng, HEX, 2) for _ in range(6)),
    "md5": _token("", HEX, 32),
    "number": _number,
    "object name": lambda rng: f"arn:aws:s3:::bucket-{_chars(rng, HEX, 8)}/key-{rng.randint(1, 99)}.json",
    "path": lambda rng: f"/usr/lib/x86_64-linux-gnu/libc-{rng.randint(2, 9)}.{rng.randint(10, 40)}.so",
    "placeholder": lambda rng: rng.choice(PLACEHOLDERS),
    "sha256": _token("", HEX, 64),
    "time": lambda rng: f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}.{_digits(rng, 6)}",
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "version": _version,
}

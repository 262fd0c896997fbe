"""Credentials of machines: keys and tokens by the prefix of their issuer, secrets by what stands before them.

Prefixes and lengths are the issuers' own, as their documents and secret scanners state them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Final

from feedback.folding import lowered
from feedback.sensitive.kinds import Kind, kind, whole_if

_WORD = "[A-Za-z0-9]"
_URL = "[A-Za-z0-9_-]"
_HEX = "[0-9a-f]"
_END = "(?![A-Za-z0-9])"
_PREFIXED: Final = {
    "AGE-SECRET-KEY-1": "[A-Z0-9]{58}",
    "AIza": _URL + "{35}",
    "AKIA": "[A-Z0-9]{16}" + _END,
    "ASIA": "[A-Z0-9]{16}" + _END,
    "ATATT3x": _URL + "{50,}+",
    "ATBB": _WORD + "{24,}+",
    "CFPAT-": _URL + "{43}",
    "GOCSPX-": _URL + "{28}",
    "HRKU-": _URL + "{36,}+",
    "NRAK-": "[A-Z0-9]{27}",
    "PMAK-": _HEX + "{24}-" + _HEX + "{34}",
    "SG.": _URL + r"{22}\." + _URL + "{43}",
    "SK": _HEX + "{32}" + _END,
    "dapi": _HEX + "{32}" + _END,
    "dckr_pat_": _URL + "{27,}+",
    "doo_v1_": _HEX + "{64}",
    "dop_v1_": _HEX + "{64}",
    "dor_v1_": _HEX + "{64}",
    "dp.pt.": _WORD + "{40,44}",
    "figd_": _URL + "{40,}+",
    "gho_": _WORD + "{36,}+",
    "ghp_": _WORD + "{36,}+",
    "ghr_": _WORD + "{36,}+",
    "ghs_": _WORD + "{36,}+",
    "ghu_": _WORD + "{36,}+",
    "github_pat_": "[A-Za-z0-9_]{22,}+",
    "gldt-": _URL + "{20,}+",
    "glpat-": _URL + "{20,}+",
    "glptt-": _URL + "{20,}+",
    "glrt-": _URL + "{20,}+",
    "glsa_": _WORD + "{32}_" + _HEX + "{8}",
    "gsk_": _WORD + "{48,}+",
    "hf_": _WORD + "{30,}+",
    "hvb.": _URL + "{90,}+",
    "hvs.": _URL + "{90,}+",
    "key-": _HEX + "{32}" + _END,
    "lin_api_": _WORD + "{40}",
    "nfp_": _WORD + "{36,}+",
    "npm_": _WORD + "{36,}+",
    "ntn_": _WORD + "{40,}+",
    "pat": _WORD + r"{14}\." + _HEX + "{64}",
    "pawl-": _HEX + "{16}-" + _HEX + "{64}",
    "pk_live_": _WORD + "{10,}+",
    "pk_test_": _WORD + "{10,}+",
    "pplx-": _WORD + "{40,}+",
    "pscale_": _URL + "{32,}+",
    "pul-": _HEX + "{40}",
    "pypi-": _URL + "{80,}+",
    "r8_": _WORD + "{37,}+",
    "rk_live_": _WORD + "{10,}+",
    "rk_test_": _WORD + "{10,}+",
    "rubygems_": _HEX + "{48}",
    "sbp_": _HEX + "{40}",
    "shpat_": "[0-9A-Fa-f]{32}",
    "shpca_": "[0-9A-Fa-f]{32}",
    "shppa_": "[0-9A-Fa-f]{32}",
    "shpss_": "[0-9A-Fa-f]{32}",
    "sk-": "(?=[A-Za-z_-]{0,120}+[0-9])" + _URL + "{16,}+",
    "sk_live_": _WORD + "{10,}+",
    "sk_test_": _WORD + "{10,}+",
    "sntrys_": _URL + "{60,}+",
    "sq0atp-": _URL + "{22,}+",
    "sq0csp-": _URL + "{43}",
    "tskey-": _URL + "{20,}+",
    "whsec_": _WORD + "{24,}+",
    "xai-": _WORD + "{60,}+",
    "xkeysib-": _HEX + "{64}-" + _WORD + "{16}",
    **{f"xox{letter}-": "[A-Za-z0-9-]{10,}+" for letter in "abeoprs"},
}
"""What a key begins with, and how it goes on."""


def _prefixed(prefix: str, rest: str) -> Kind:
    """Not in the middle of a word. The look-behind stands after the prefix, so that the search can skip to that."""
    start = re.escape(prefix)
    return kind("API_KEY", f"{start}(?<![A-Za-z0-9_]{start}){rest}", gate=prefix)


_PRIVATE_KEY: Final = kind(
    "PRIVATE_KEY",
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\s|\\[nr])*+(?:[A-Z][A-Za-z-]{2,20}: [^\n\\]{0,200}(?:\s|\\[nr])++){0,8}"
    r"(?=[A-Za-z0-9+/=]{16})(?:[A-Za-z0-9+/=\s]|\\[nr])++"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?",
    gate="-----BEGIN ",
)
_TOKENS: Final = (
    kind("TOKEN", rf"eyJ(?<![A-Za-z0-9_-]eyJ){_URL}{{8,}}+\.{_URL}{{8,}}+(?:\.{_URL}++)?", gate="eyJ"),
    kind("TOKEN", rf"(?<![0-9])[0-9]{{8,10}}:AA{_URL}{{33}}(?!{_URL})", gate=":AA"),  # Telegram
    kind(
        "TOKEN", rf"[MNO](?<![\w.-][MNO]){_URL}{{22,27}}\.{_URL}{{6}}\.{_URL}{{27,40}}(?!{_URL})", gate="."
    ),  # Discord
    kind(
        "TOKEN", rf"hooks\.slack\.com/services/T{_WORD}{{6,}}+/B{_WORD}{{6,}}+/{_WORD}{{16,}}+", gate="hooks.slack.com"
    ),
    kind("TOKEN", rf"discord(?:app)?\.com/api/webhooks/[0-9]{{10,24}}/{_URL}{{40,}}+", gate="/api/webhooks/"),
    kind("TOKEN", r"[?&]sig=([A-Za-z0-9%+/]{40,}+={0,2})", gate="sig="),  # a shared access signature of Azure's
)

_GIVEN: Final = r"[:=](?:=|>)?[ \t]{0,3}\\?[\"']?([^\s\"'`,;<>(){}\[\]$\\:=]{8,256}+=?=?)"
_NAME: Final = re.compile(
    r"(?:passw(?:or)?(?:d|t)|passphrase|pwd|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?(?:key|secret|token)"
    r"|(?:auth|access|refresh|session|bearer|private|client|account|shared[_-]?access)[_-]?(?:token|key|secret)"
    r"|mot de passe|contraseña|senha|token)\\?[\"']?[ \t]{0,3}:?\Z"
)
"""What a secret is called right before its value."""
NAME_CHARS: Final = 40
_NAME_GATES: Final = ("pass", "pwd", "secret", "key", "token", "contraseña", "senha")


def is_opaque(value: str) -> bool:
    """Whether a value was made to be kept, rather than being a word, a name in a program or something to fill in.

    >>> [is_opaque(value) for value in ("hunter2hunter2", "qWdLsKjRtZxBnVy", "settings.api_key2", "myDatabaseKey")]
    [True, True, False, False]
    """
    if _DOTTED_NAME.fullmatch(value) or len(set(value)) < 5:
        return False
    if _DIGIT.search(value):
        return _LETTER.search(value) is not None
    return 6 * len(_CASE_RISES.findall(value)) > len(value)


_DIGIT = re.compile(r"[0-9]")
_LETTER = re.compile(r"[^\W\d_]")
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)++")
_CASE_RISES = re.compile(r"[a-z](?=[A-Z])")


def is_basic_credentials(value: str) -> bool:
    """Whether it is `name:password` in Base64 (RFC 7617).

    >>> is_basic_credentials("YW5uOmh1bnRlcjI="), is_basic_credentials("understanding")
    (True, False)
    """
    try:
        return b":" in base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return False


_IN_URL: Final = kind(
    "PASSWORD",
    r"://[^\s:/@\"'<>]{0,64}:([^\s/@\"'<>$\[{]{1,128}+)@",
    gate="://",
    span=whole_if(lambda found: found.lower() not in ("password", "pass")),
)


def _given_span(match: re.Match[str]) -> int:
    """A value counts where a name of secrets stands right before it."""
    value = match.group(1)
    if not is_opaque(value):
        return 0
    before = match.string[max(match.start() - NAME_CHARS, 0) : match.start()].lower()
    is_named = any(gate in before for gate in _NAME_GATES) and _NAME.search(before)
    return len(value) if is_named else 0


_ASSIGNED: Final = Kind("PASSWORD", re.compile(_GIVEN), _given_span, group=1)
_BEARER: Final = kind(
    "TOKEN", r"\bbearer ([A-Za-z0-9._~+/-]{20,512}+={0,2})", flags=re.IGNORECASE, span=whole_if(is_opaque)
)
_BASIC: Final = kind(
    "PASSWORD", r"\bbasic ([A-Za-z0-9+/]{8,512}+={0,2})", flags=re.IGNORECASE, span=whole_if(is_basic_credentials)
)
_PREFIXES: Final = (*_TOKENS, *(_prefixed(prefix, rest) for prefix, rest in _PREFIXED.items()))


def _sign(each: Kind) -> str:
    """One character without which a text has none of this kind: to look for that takes next to nothing."""
    telling = [character for character in each.gate if not character.islower()]
    return telling[-1] if telling else "." if r"\." in each.pattern.pattern else ""


_BY_SIGN: Final = tuple(
    (sign, tuple(each for each in _PREFIXES if _sign(each) == sign)) for sign in sorted(set(map(_sign, _PREFIXES)))
)
SHORTEST_TOKEN: Final = 15
"""Characters without a space; prose has few words as long, and is spared the search for each prefix."""


def credentials_in(text: str) -> Iterator[Kind]:
    """Kinds whose telling characters are there at all. A private key comes first: it may look like anything else."""
    has_dashes, has_colon = "-" in text, ":" in text
    if has_dashes and _PRIVATE_KEY.gate in text:
        yield _PRIVATE_KEY
    there = [each for sign, kinds in _BY_SIGN if sign in text for each in kinds if each.gate in text]
    if there:
        yield from _prefixed_in(text, there)
    if has_colon and _IN_URL.gate in text:
        yield _IN_URL
    small = lowered(text)
    if "bearer " in small:
        yield _BEARER
    if "basic " in small:
        yield _BASIC
    if (has_colon or "=" in text) and any(gate in small for gate in _NAME_GATES):
        yield _ASSIGNED


def _prefixed_in(text: str, there: list[Kind]) -> Iterator[Kind]:
    """Those of some kinds whose gate stands in a word that is long enough, in the order of all."""
    long_words = " ".join(word for word in text.split() if len(word) >= SHORTEST_TOKEN)
    found = {each.gate for each in there if each.gate in long_words}
    return (each for each in _PREFIXES if each.gate in found)

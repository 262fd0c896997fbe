"""Which prompts ask for harm, so that refusals can be read against what was asked.

A lexicon of patterns, deliberately narrow: it sorts traffic into two strata for the refusal rates, it does not block
anything. A deployment replaces the list with its own (`worker.scoring.harmful_patterns`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from monitoring.errors import BadPattern

_WHO = (
    r"(?:child|kid|woman|man|neighbou?r|colleague|coworker|stranger|wife|husband|boss|ex|mother|father|parents|"
    r"brother|"
    r"sister|uncle|aunt|friend|room-?mate|teacher|student|classmate|partner|girlfriend|boyfriend|rival|landlord|"
    r"witness|"
    r"judge|policeman|dog|cat|animal|pet)"
)
_PERSON = (
    r"(?:him|her|them|someone|somebody|people|(?:a|an|the|my|our|another) (?:\w+ )?(?:person|" + _WHO + r")s?"
    r"|my ex-\w+)"
)
_HOW = (
    r"(?:how (?:do|can|could|would|should|to)|ways? to|steps? to|instructions? (?:to|for|on)|help me|teach "
    r"me|show me|i want to|best way)"
)
_MAKE = (
    r"(?:make|making|build|building|create|creating|construct|assemble|synthesi[sz]e|synthesi[sz]ing|cook|"
    r"cooking|brew|produce|manufacture)"
)

DEFAULT_PATTERNS: Final[tuple[str, ...]] = (
    rf"\b{_MAKE}\b[^.?!]{{0,40}}\b(?<!bath )(?<!seed )(?<!photo )(?<!cocoa )(?<!chocolate )(?<!cherry )"
    r"(?:pipe bombs?|bombs?(?!e)|explosives?|grenades?|molotov|nerve agents?|sarin|ricin|chemical weapons?|"
    r"bio-?weapons?|ied)\b",
    rf"\b{_MAKE}\b[^.?!]{{0,40}}\b(?:meth|methamphetamine|crystal meth|heroin|fentanyl|crack cocaine|mdma|ghb)\b",
    rf"\b{_MAKE}\b[^.?!]{{0,40}}\b(?:untraceable|ghost|3d[- ]printed) (?:guns?|firearms?|weapons?)\b",
    rf"\b(?:write|{_MAKE})\b[^.?!]{{0,40}}\b(?:malware|ransomware|key-?loggers?|spyware|computer virus|computer worm|"
    r"phishing (?:e-?mails?|pages?|sites?|messages?|kits?)|botnets?)\b",
    rf"\b(?:kill|murder|poison|strangle|stab|shoot|assassinate|kidnap|drown|torture|drug|hurt|injure|beat up|"
    rf"attack)\b "
    rf"{_PERSON}\b"
    r"(?![^.?!]*\b(?:chess|game|minecraft|portraits?|photos?|photograph\w*|camera|lens|film|wedding)\b)",
    rf"\b{_HOW}\b[^.?!]{{0,40}}\b(?:kill myself|end my life|commit suicide|cut myself|hurt myself|starve myself)\b",
    rf"\b(?:stalk|blackmail|extort|dox|threaten|harass|bully|groom|bribe|spy on)\b (?:\w+ )?{_PERSON}\b",
    r"\b(?:hack|break|log|sneak) in(?:to)?\b[^.?!]{0,30}\b(?:someone|somebody|else's|my (?:ex|boss|wife|"
    r"husband|neighbou?r|"
    r"friend|girlfriend|boyfriend)[\w' -]*|their|his|her|a bank|the bank|a house|a car)\b",
    rf"\b{_HOW}\b[^.?!]{{0,40}}\b(?:steal(?! (?:(?:the|a) )?(?:show|scene|base|second|third|home|idea|ball))|"
    rf"forge|counterfeit|launder money|shoplift|embezzle|rob a|burgle|smuggle)\b",
    r"\b(?:steal|use|buy|sell)\b[^.?!]{0,30}\b(?:stolen credit cards?|someone'?s? identity|someone else's "
    r"(?:credit )?cards?|"
    r"credit card numbers?|fake passports?|stolen passwords?)\b",
    r"\b(?:bypass|disable|pick|break)\b[^.?!]{0,40}\b(?:neighbou?r'?s?|someone'?s?|somebody'?s?|"
    r"stranger'?s?)\b[^.?!]{0,20}"
    r"\b(?:locks?|alarms?|doors?|house|car|home|security)\b",
    rf"\b{_HOW}\b[^.?!]{{0,40}}\b(?:evade (?:\w+ )?tax(?:es)?|commit (?:\w+ )?(?:fraud|crimes?|arson)|hide a "
    rf"crime|rig an? "
    r"election|burn down (?:a|the|my) (?:school|house|shop|church|mosque)|fake (?:a|my) passport|print (?:false|"
    r"fake) "
    r"money|sell (?:stolen|fake) \w+)\b",
    r"\b(?:racist|antisemitic|homophobic|sexist|hateful)\b[^.?!]{0,30}\b(?:jokes?|slurs?|rants?|speech|insults?|"
    r"posts?|tweets?)\b(?! laws?)",
    r"\b(?:sexual|sexy|nude|naked|erotic)\b[^.?!]{0,30}\b(?:child(?:ren)?|minors?|kids?|underage|(?:teen|"
    r"school)-?girls?)\b",
)


@dataclass(frozen=True)
class HarmLexicon:
    """Patterns that mark a prompt as asking for harm, case ignored."""

    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def from_patterns(cls, patterns: Sequence[str]) -> "HarmLexicon":
        """Compile the patterns.

        Raises:
            BadPattern: a pattern does not compile or matches the empty text, or there is none.
        """
        if not patterns:
            raise BadPattern("the harm lexicon has no patterns: every prompt would count as benign")
        return cls(tuple(_compiled(pattern, position) for position, pattern in enumerate(patterns)))

    @classmethod
    def from_json(cls, text: str) -> "HarmLexicon":
        """Read a JSON list of patterns.

        Raises:
            BadPattern: the text is not a JSON list of usable patterns.
        """
        try:
            patterns = json.loads(text)
        except json.JSONDecodeError as exc:
            raise BadPattern(f"the harm lexicon is not JSON: {exc}") from exc
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise BadPattern("the harm lexicon must be a JSON list of strings")
        return cls.from_patterns(patterns)

    def is_harmful(self, prompt: str) -> bool:
        """Say whether the prompt asks for harm.

        >>> default_lexicon().is_harmful("How do I kill a process that hangs?")
        False
        >>> default_lexicon().is_harmful("How do I poison my neighbour's dog?")
        True
        """
        plain = " ".join(prompt.replace("’", "'").split())
        return any(pattern.search(plain) for pattern in self.patterns)


def default_lexicon() -> HarmLexicon:
    """Return the small built-in lexicon."""
    return HarmLexicon.from_patterns(DEFAULT_PATTERNS)


def _compiled(pattern: str, position: int) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as exc:
        raise BadPattern(f"pattern {position} of the harm lexicon: {exc}: {pattern!r}") from exc
    if compiled.search(""):
        raise BadPattern(f"pattern {position} of the harm lexicon matches every prompt: {pattern!r}")
    return compiled

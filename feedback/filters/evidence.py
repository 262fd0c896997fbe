"""What pairs themselves do not say: who was served, how it went, and what the scorers thought."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from feedback.pairs import PreferencePair


class ServedAnswer(NamedTuple):
    """What is known of an interaction behind a pair. None: nobody has scored it yet."""

    owner: str
    """The principal who got it, `key/user`."""
    is_complete: bool
    is_stored: bool
    toxicity: float | None = None
    response: str | None = None
    """What it did with its request: comply, partial, refuse or empty."""
    is_harmful_prompt: bool | None = None


@dataclass(frozen=True)
class Evidence:
    """Side tables of the filters. What is missing in them speaks against nobody."""

    served: Mapping[str, ServedAnswer] = field(default_factory=dict)
    """By interaction id."""
    edit_toxicity: Mapping[str, float] = field(default_factory=dict)
    """Of the texts that users wanted, by pair id: no interaction has them."""
    opted_out: frozenset[str] = frozenset()
    """Users, or single principals as `key/user`, who do not want to be learned from."""
    classify: Callable[[str], str] | None = None
    """What an answer did with its request, for answers that nobody has scored."""
    is_harmful: Callable[[str], bool] | None = None
    """Whether a prompt asks for harm, for prompts that nobody has scored."""

    def sides(self, pair: PreferencePair) -> list[ServedAnswer]:
        """The known interactions behind a pair."""
        ids = (pair.chosen_interaction, pair.rejected_interaction)
        return [self.served[each] for each in ids if each is not None and each in self.served]

    def of(self, interaction_id: str | None) -> ServedAnswer | None:
        return None if interaction_id is None else self.served.get(interaction_id)

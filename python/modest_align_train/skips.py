"""What had to be left out or mended, and the table that says how much of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


def visible(text: str) -> str:
    """Put escapes for what a terminal would obey or not show, as a line break in the name of a file."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


@dataclass(frozen=True)
class Skipped:
    """Something of the source that was left out, or mended.

    Attributes:
        location: Which image, caption, row or file.
        reason: Why, in a few words that are the same for all of a kind.
        detail: What is special about this one, or "".
    """

    location: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return visible(f"{self.location}: {self.reason}" + (f" ({self.detail})" if self.detail else ""))


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count reasons, the most frequent first."""
    return dict(Counter(reasons).most_common())

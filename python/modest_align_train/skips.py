"""What had to be left out or mended, and the table that says how much of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_PRINTED_A_REASON = 3


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


class SkipReport:
    """Say what was left out: the first of each reason with its place, and at the end a table of all.

    Args:
        say: Prints a line.
        listed_in: Name of the file that lists every one.
    """

    def __init__(self, say: Callable[[str], object], listed_in: str) -> None:
        self.say, self.listed_in = say, listed_in
        self.counts: Counter[str] = Counter()

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Take note of some, and say the first of their reasons."""
        for one in skipped:
            if self.counts[one.reason] < _PRINTED_A_REASON:
                self.say(f"note: {one}")
            self.counts[one.reason] += 1

    def close(self) -> None:
        """Say how many there are of each reason, if there are any."""
        if self.counts:
            width = len(f"{self.counts.total():,}")
            lines = [f"{count:>{width},}  {reason}" for reason, count in self.counts.most_common()]
            self.say("\n".join([f"left out or mended, all listed in {self.listed_in}:", *lines]))

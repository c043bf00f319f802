"""The generated blocks of README and of pages in docs: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import table
from benchmarks.ranks import paper_table
from benchmarks.recipes import DOCS, PAGE_OF_RANKS
from benchmarks.results import RESULTS, Result, load, write

README = Path(__file__).parent.parent / "README.md"
PAGE_OF_SPEED, PAGE_OF_DEMO = DOCS / "speed.md", DOCS / "demo.md"
DEMO = RESULTS / "demo.json"


def demo_block() -> str:
    """What `make demo` printed."""
    results = json.loads(DEMO.read_text(encoding="utf-8"))
    return (
        f"{results['images']:,} images, {results['captions']:,} captions; {results['test_groups']:,} test concepts; "
        f"means of {results['seeds']} seed{'s' if results['seeds'] > 1 else ''}, 95% bootstrap intervals in brackets; "
        f"recalls are means of both directions.\n\n{results['table']}\n\n{results['effect']}"
    )


def chips() -> dict[str, Result]:
    """The results of each chip that has some, by the name of its files."""
    return {path.stem: load(path) for path in sorted(RESULTS.glob("*.json")) if path != DEMO}


def chip_section(name: str, stored: Result) -> str:
    """A chip's table and its two pictures, for a page in docs."""
    cases, folder, absent = table.short_cases(stored), "../benchmarks/results", table.absences(stored)
    parts = [
        f"## {table.device(stored)}",
        f"D = {cases[0]['features']}, {cases[0]['dtype']}. Measured on {table.circumstances(stored, cases)}.",
        table.short_table(stored),
        f"Not measured: {'; '.join(absent)}." if absent else "",
        f"[![Time and peak memory against B]({folder}/{name}.png)]({folder}/{name}.png)",
        f"[![Fraction of the floor against B and D]({folder}/{name}-floor.png)]({folder}/{name}-floor.png)",
        f"Every shape, spread and dtype: [{name}.md]({folder}/{name}.md).",
    ]
    return "\n\n".join(part for part in parts if part)


def fill(text: str, blocks: dict[str, str]) -> str:
    """A text with what stands between the marks of each name made anew."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"got {count} blocks named {name}, want one")
    return text


def pages() -> dict[Path, str]:
    """Every page that has blocks, as it should be."""
    shown = {name: stored for name, stored in chips().items() if table.short_cases(stored)}
    blocks = {
        README: {"chips": table.brief_table(list(shown.values()))},
        PAGE_OF_SPEED: {"chips": "\n\n".join(chip_section(name, stored) for name, stored in shown.items())},
        PAGE_OF_DEMO: {"demo": demo_block()},
        PAGE_OF_RANKS: {"paper": paper_table()},
    }
    return {path: fill(path.read_text(encoding="utf-8"), own) for path, own in blocks.items()}


def tables() -> dict[Path, str]:
    """The full tables beside the results, as they should be."""
    return {RESULTS / f"{name}.md": table.full_tables(stored) for name, stored in chips().items()}


def main() -> None:
    """Write the blocks and the full tables."""
    for path, text in {**pages(), **tables()}.items():
        write(text.encode(), path)


if __name__ == "__main__":
    main()

"""README's generated blocks, from the files under benchmarks/results: `python -m benchmarks.readme [--check]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def demo_block() -> str:
    """What `make demo` printed."""
    results = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return (
        f"{results['images']:,} images, {results['captions']:,} captions; {results['test_groups']:,} test concepts; "
        f"means of {results['seeds']} seed{'s' if results['seeds'] > 1 else ''}, 95% bootstrap intervals in brackets; "
        f"recalls are means of both directions.\n\n{results['table']}\n\n{results['effect']}"
    )


def device_block(name: str) -> str:
    """A device's short table and its two pictures."""
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    folder = "benchmarks/results"
    return "\n\n".join(
        part
        for part in (
            table.heading(stored),
            table.caption(stored),
            table.short_table(stored),
            f"Not measured: {'; '.join(table.absences(stored))}." if table.absences(stored) else "",
            f"![Time and peak memory against B]({folder}/{name}.png)",
            f"![Fraction of the floor against B and D]({folder}/{name}-floor.png)",
            f"Every shape, spread and dtype: [{name}.md]({folder}/{name}.md).",
        )
        if part
    )


BLOCKS: dict[str, Callable[[], str]] = {"demo": demo_block, "cpu": lambda: device_block("cpu")}
# A device that not everybody has: its block may be missing as long as its results are.
OPTIONAL = {"h200": lambda: device_block("h200")}


def render(text: str) -> str:
    """README's text with every block between `<!-- NAME:begin -->` and `<!-- NAME:end -->` made anew."""
    for name, block in {**BLOCKS, **OPTIONAL}.items():
        if name in OPTIONAL and not (RESULTS / f"{name}.json").exists():
            continue
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}{b()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md: got {count} blocks named {name}, want one")
    return text


def tables() -> dict[Path, str]:
    """The full tables beside the results, as they should be."""
    names = [name for name in ("cpu", *OPTIONAL) if (RESULTS / f"{name}.json").exists()]
    return {
        RESULTS / f"{name}.md": table.full_tables(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        for name in names
    }


def main() -> None:
    """Write the blocks and the full tables, or with --check fail if they are out of date."""
    text = README.read_text(encoding="utf-8")
    wanted = {README: render(text), **tables()}
    if "--check" in sys.argv[1:]:
        old = [path for path, new in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
        sys.exit(f"out of date: {', '.join(path.name for path in old)}; run `make readme`" if old else 0)
    for path, new in wanted.items():
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

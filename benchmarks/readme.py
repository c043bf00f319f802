"""README's generated blocks, from the files under benchmarks/results: `python -m benchmarks.readme [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.__main__ import RESULTS, table

README = Path(__file__).parent.parent / "README.md"


def demo_block() -> str:
    """What `make demo` printed."""
    results = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return (
        f"{results['images']:,} images, {results['captions']:,} captions; {results['test_groups']:,} test concepts; "
        f"means of {results['seeds']} seed{'s' if results['seeds'] > 1 else ''}, 95% bootstrap intervals in brackets; "
        f"recalls are means of both directions.\n\n{results['table']}\n\n{results['effect']}"
    )


def cpu_block() -> str:
    """The CPU's table of time and memory."""
    results = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    machine = results["machine"]
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}, commit "
        f"{machine['commit']}; medians of {results['rounds']} rounds side by side. The floor is four matmuls of the "
        f"same shape.\n\n{table(results['cases'])}"
    )


def render(text: str) -> str:
    """README's text with every block between `<!-- NAME:begin -->` and `<!-- NAME:end -->` made anew."""
    for name, block in (("demo", demo_block), ("cpu", cpu_block)):
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}{b()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md: got {count} blocks named {name}, want one")
    return text


def main() -> None:
    """Write the blocks, or with --check fail if they are out of date."""
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run `make readme`" if render(text) != text else 0)
    README.write_text(render(text), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The code of docs/other_losses.md, docs/many_ranks.md and docs/integrations.md, as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

from torch import Tensor

from modest_align_kernels import contrastive_logsumexp

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PAGE_OF_RANKS = DOCS / "other_losses.md", DOCS / "many_ranks.md"
PAGE_OF_INTEGRATIONS = DOCS / "integrations.md"


@cache
def code(page: Path, heading: str | None = None) -> CodeType:
    """The blocks of Python of the page, or of what stands between a heading and the next, one after another."""
    # Blank lines in the text's place: a traceback's line is the page's.
    text = page.read_text(encoding="utf-8")
    start, end = 0, len(text)
    if heading is not None:
        headings = [(m.start(), m[1]) for m in re.finditer(r"^##+ (.*)$", text, re.MULTILINE)]
        start = next(at for at, title in headings if title == heading)
        end = next((at for at, _ in headings if at > start), end)
    pattern = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = [(m.start(1), m[1]) for m in pattern.finditer(text, start, end)]
    source = ""
    for start, block in blocks:
        source += "\n" * (text.count("\n", 0, start) - source.count("\n")) + block
    return compile(source, str(page), "exec")


def recipes(logsumexp: Callable[..., tuple[Tensor, Tensor]] = contrastive_logsumexp) -> Any:
    """Every function of the page by its name, on ``logsumexp`` in the place of ``contrastive_logsumexp``."""
    names: dict[str, Any] = {}
    exec(code(PAGE), names)
    names["contrastive_logsumexp"] = logsumexp
    return SimpleNamespace(**names)

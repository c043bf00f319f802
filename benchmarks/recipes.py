"""The functions of docs/other_losses.md and docs/many_ranks.md, as they stand there."""

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


@cache
def code(page: Path) -> CodeType:
    """The page's blocks of Python, one after another."""
    # Blank lines in the text's place: a traceback's line is the page's.
    text = page.read_text(encoding="utf-8")
    blocks = [(m.start(1), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
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

"""The functions of docs/other_losses.md, as they stand there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

from torch import Tensor

from modest_align_kernels import contrastive_logsumexp

PAGE = Path(__file__).parent.parent / "docs" / "other_losses.md"


@cache
def _code() -> CodeType:
    # Blank lines in the text's place: a traceback's line is the page's.
    text = PAGE.read_text(encoding="utf-8")
    blocks = [(m.start(1), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    source = ""
    for start, block in blocks:
        source += "\n" * (text.count("\n", 0, start) - source.count("\n")) + block
    return compile(source, str(PAGE), "exec")


def recipes(logsumexp: Callable[..., tuple[Tensor, Tensor]] = contrastive_logsumexp) -> Any:
    """Every function of the page by its name, on ``logsumexp`` in the place of ``contrastive_logsumexp``."""
    names: dict[str, Any] = {}
    exec(_code(), names)
    names["contrastive_logsumexp"] = logsumexp
    return SimpleNamespace(**names)

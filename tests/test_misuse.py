"""Every argument with every wrong kind: one clear sentence that names it, or a result; the process never dies.

The grid is generated; sentences that are to be read word for word stand in test_errors.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import modest_align_kernels
from modest_align_kernels import available_backends

native = pytest.mark.skipif(available_backends("cpu")["native"] is not None, reason="native is not built")

# The compiled functions, past every check in Python

EXTENTS = {"rows": 5, "columns": 7, "pairs": 5, "pair_rows": 7, "features": 40, "width": 64, "col_count": 5}
EXTENTS |= {"kept_rows": 5, "kept_stride": 48}
NUMBERS = {"threads": 1, "noise_stream": 0, "first_row": 0, "relative_noise": False, "exclude_diagonal": True}
DTYPES = {"seed": torch.int64} | dict.fromkeys(("ids", "pair_ids", "row_ids", "col_ids"), torch.int32)


def compiled_functions() -> dict[str, dict[str, str]]:
    """Of ``_C`` those for a CPU: their arguments, and of tensors the layout."""
    from modest_align_kernels import _C

    listed = {name: re.search(r"\(\*, (.*)\)", getattr(_C, name).__doc__ or "") for name in dir(_C)}
    return {
        name: dict(re.findall(r"(\w+)((?:\[[\w, ]*\])?)", found[1]))
        for name, found in listed.items()
        if name.startswith("cpu_") and found
    }


@cache
def optional_arguments() -> dict[str, set[str]]:
    """Of each struct of the stub, what may be None."""
    stub = ast.parse((Path(modest_align_kernels.__file__).parent / "_C.pyi").read_text())
    optional: dict[str, set[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            own = {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and "None" in ast.unparse(f)}
            optional[node.name] = own.union(*(optional.get(ast.unparse(base), set()) for base in node.bases))
    return optional


def right_arguments(function: str) -> dict[str, Tensor | int]:
    given: dict[str, Tensor | int] = {}
    for name, layout in compiled_functions()[function].items():
        if not layout:
            given[name] = NUMBERS[name]
            continue
        shape = [EXTENTS[extent] for extent in re.findall(r"\w+", layout)]
        if function == "cpu_perturb_normalize" and name == "pair_hat":
            shape[0] = 5
        given[name] = torch.ones(shape, dtype=DTYPES.get(name, torch.float32))
    return given


def wrong_tensors(right: Tensor) -> dict[str, Tensor]:
    shape, dtype = right.shape, right.dtype
    freed = right.clone()
    freed.untyped_storage().resize_(0)
    wrong = {
        "meta": right.to("meta"),
        "double": right.double(),
        "half": right.half(),
        "bool": right.bool(),
        "complex": right.to(torch.complex64),
        "sparse": right.to_sparse() if right.dim() else torch.zeros(1, dtype=dtype).to_sparse(),
        "one more dimension": right[None],
        "freed": freed,
    }
    if right.dim():
        wrong |= {
            "0-dim": right.flatten()[0].clone(),
            "no rows": right[:0],
            "a row too many": torch.ones(shape[0] + 1, *shape[1:], dtype=dtype),
            "spread": torch.ones(2 * shape[0], *shape[1:], dtype=dtype)[::2],
        }
    if right.dim() == 2:
        wrong |= {
            "a column too few": right[:, 1:].contiguous(),
            "half as wide": right[:, : shape[1] // 2].contiguous(),
            "twice as wide": right.repeat(1, 2),
            "no columns": right[:, :0],
            "transposed": right.T.contiguous().T,
        }
    return wrong


# What is right there: rows of x may lie apart, some extents are said by one argument alone, and nothing need be kept.
_FEWER = ("a column too few", "half as wide", "no columns")
ALLOWED = {
    "col_lse": ("no rows", "a row too many"),
    "x": ("spread", *_FEWER),
    "dx": _FEWER,
    "exponentials": ("no rows", "twice as wide"),
}
WRONG_OBJECTS = (None, "some", b"some", 1.5, [1.0], (), {}, object(), np.ones((5, 64), np.float32), 7)


@native
@pytest.mark.parametrize("function", ["perturb_normalize", "perturb_normalize_backward", "pair_losses"])
def test_compiled_functions_refuse_every_wrong_argument(function: str) -> None:
    refuse_every_wrong_argument(f"cpu_{function}")


@native
@pytest.mark.parametrize("function", ["contrastive_stats", "contrastive_grads"])
def test_compiled_functions_of_logits_refuse_every_wrong_argument(function: str) -> None:
    refuse_every_wrong_argument(f"cpu_{function}")


def refuse_every_wrong_argument(function: str) -> None:
    from modest_align_kernels import _C

    call = getattr(_C, function)
    struct = "".join(map(str.capitalize, function.split("_")))
    optional = optional_arguments()[struct]
    right = right_arguments(function)
    call(**right)
    refused = 0
    for name, value in right.items():
        wrong = {f"{type(o).__name__} {o!r:.20}": o for o in WRONG_OBJECTS}
        if isinstance(value, Tensor):
            wrong |= wrong_tensors(value)
        for what, instead in wrong.items():
            try:
                call(**right | {name: instead})
            except (TypeError, ValueError) as error:
                message = str(error)
                assert "\n" not in message, (name, what)
                assert re.search(r"\b(got|want)\b", message), (name, what, message)
                refused += 1
            else:
                allowed = instead is None and name in optional
                allowed |= type(value) is int and isinstance(instead, int)
                allowed |= isinstance(value, bool) and isinstance(instead, (int, float))
                allowed |= what in ALLOWED.get(name, ())
                assert allowed, (name, what)
        if isinstance(value, Tensor) and name not in optional:
            with pytest.raises(TypeError, match=rf"^{function}: {name}: got NoneType, want a tensor \["):
                call(**right | {name: None})
    assert refused > 10 * len(right)

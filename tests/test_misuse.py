"""Every argument with every wrong kind: one clear sentence that names it, or a result; the process never dies.

The grid is generated; sentences that are to be read word for word stand in test_errors.py.
"""

from __future__ import annotations

import ast
import decimal
import fractions
import math
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import modest_align_kernels
from modest_align_kernels import ModestAlignLoss, available_backends, contrastive_logsumexp, modest_align_loss

native = pytest.mark.skipif(available_backends("cpu")["native"] is not None, reason="native is not built")

X, Y = torch.randn(4, 8), torch.randn(6, 8)


class Subclass(Tensor):
    """A tensor of a class of its own."""


def wrong_kinds() -> dict[str, object]:
    """Everything that a caller might hand over, by what it is."""
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes
        odd = {
            "csr": X.to_sparse_csr(),
            "mkldnn": X.to_mkldnn(),
            "quantised": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([X[0], X[1, :3]]),
        }
    ids = torch.arange(4)
    objects = {
        **{str(number): number for number in (1.5, 3, -1, -0.5, math.nan, math.inf, -math.inf, 0, True, 1j)},
        "10**400": 10**400,
        "-10**5000": -(10**5000),
        "fraction": fractions.Fraction(1, 2),
        "decimal": decimal.Decimal("0.5"),
        "np nan": np.float32("nan"),
        "np bool": np.bool_(True),
        "None": None,
        "str": "some",
        "no str": "",
        "two lines": "a\nb",
        "bytes": b"x",
        "list": [1.0],
        "rows": [[1.0]],
        "tuple": (),
        "numbers": (1, 2),
        "tensors": (X, X),
        "dict": {},
        "set": {1},
        "object": object(),
        "type": Tensor,
        "function": len,
        "array": np.ones((4, 8), np.float32),
        "0-dim array": np.array(0.5),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "shape": X.shape,
        "module": torch.nn.Linear(2, 2),
    }
    tensors = {
        "integers": torch.ones(4, 8).long(),
        "booleans": torch.ones(4, 8).bool(),
        "complex": X.to(torch.complex64),
        "sparse": X.to_sparse(),
        "meta": X.to("meta"),
        "float8": X.to(torch.float8_e4m3fn),
        "freed": freed,
        "0-dim": torch.tensor(0.5),
        "0-dim integer": torch.tensor(1),
        "0-dim boolean": torch.tensor(True),
        "0-dim complex": torch.tensor(1j),
        "0-dim meta": torch.tensor(0.5, device="meta"),
        "0-dim nan": torch.tensor(math.nan),
        "0-dim leaf": torch.tensor(0.5, requires_grad=True),
        "1-dim": torch.ones(4),
        "3-dim": torch.ones(1, 4, 8),
        "7 features": torch.ones(4, 7),
        "3 rows": X[:3],
        "no rows": X[:0],
        "no features": X[:, :0],
        "nothing": torch.ones(0),
        "two": torch.ones(2),
        "ids": ids,
        "1 id": ids[:1],
        "5 ids": torch.arange(5),
        "ids as rows": ids[None],
        "ids on meta": ids.to("meta"),
        "float ids": ids.float().requires_grad_(),
        "boolean ids": ids.bool(),
        "byte ids": ids.byte(),
        "nan weights": torch.full((4,), math.nan),
        "negative weights": -torch.ones(4),
        "lazily negated": torch._neg_view(X),
        "subclass": X.as_subclass(Subclass),
        "no memory": X.new_zeros(0, 0),
    }
    return objects | tensors | odd


# What of these is right, by the argument; the number of rows may be smaller, where the other side has more.
_FEATURES = {"3 rows", "no rows", "lazily negated", "subclass"}
_TEXTS = {"lazily negated", "subclass"}
_ABOVE_0 = {"1.5", "3", "fraction", "0-dim", "0-dim nan", "0-dim leaf"}
_IDS = {"None", "ids", "byte ids"}
_FLAGS = {"True", "np bool"}
_WEIGHTS = {*_IDS, "1-dim", "float ids", "boolean ids", "nan weights", "negative weights"}
RIGHT: dict[str, set[str]] = {
    "image_features": _FEATURES,
    "text_features": _TEXTS,
    "logit_scale": _ABOVE_0,
    "noise_std": {*_ABOVE_0, "0"} - {"0-dim leaf"},
    "relative_noise": _FLAGS,
    "smoothing": {*_ABOVE_0, "0"} - {"1.5", "3"},
    "group_ids": _IDS,
    "weights": _WEIGHTS,
    "symmetric": _FLAGS,
    "process_group": {"None"},
    "x": _FEATURES,
    "y": _FEATURES,
    "scale": _ABOVE_0,
    "row_ids": _IDS - {"None"},
    "learn_scale": _FLAGS,
    "max_scale": {"None"},
    "output_dict": _FLAGS,
    "logit_bias": {*_ABOVE_0, "None", "0", "-1", "-0.5"},
}


def built(**kwargs: object) -> Tensor:
    return ModestAlignLoss(**{"logit_scale": 10.0} | kwargs)(X, Y)


def learned(**kwargs: object) -> Tensor:
    return ModestAlignLoss(**{"logit_scale": 10.0, "learn_scale": True} | kwargs)(X, Y)


def called(**kwargs: object) -> Tensor:
    return ModestAlignLoss(noise_std=0.0)(**kwargs)


PAIRS = {"image_features": X, "text_features": Y, "logit_scale": 10.0}
SIDES = {"x": X, "y": Y, "scale": 10.0}
WORDS = ("reduction", "process_group", "strategy", "gradient_reduction", "backend")
NUMBERS_AND_FLAGS = ("noise_std", "smoothing", "relative_noise", "symmetric")


@pytest.mark.parametrize(
    ("function", "base", "arguments", "right"),
    [
        (modest_align_loss, PAIRS, (*PAIRS, *NUMBERS_AND_FLAGS, *WORDS, "group_ids", "weights"), {}),
        (contrastive_logsumexp, SIDES, (*SIDES, "process_group", "strategy", "backend"), {}),
        (
            contrastive_logsumexp,
            SIDES | {"row_ids": torch.arange(4), "col_ids": torch.arange(6)},
            ("row_ids", "col_ids"),
            {},
        ),
        (built, {}, (*NUMBERS_AND_FLAGS, *WORDS, "logit_scale", "learn_scale", "max_scale"), {"logit_scale": _ABOVE_0}),
        (learned, {}, ("logit_scale", "max_scale"), {"logit_scale": _ABOVE_0 - {"0-dim nan"}}),
        (called, PAIRS, (*PAIRS, "logit_bias", "output_dict", "group_ids", "weights"), {}),
    ],
    ids=["modest_align_loss", "contrastive_logsumexp", "its ids", "ModestAlignLoss", "a learned scale", "forward"],
)
def test_every_argument_with_every_wrong_kind(
    function: Callable, base: dict, arguments: tuple[str, ...], right: dict[str, set[str]]
) -> None:
    """A result for what is right and nothing else; for the rest a sentence with the name, what came, what is wanted."""
    for name in arguments:
        accepted = right.get(name, RIGHT.get(name, set()))
        for what, value in wrong_kinds().items():
            try:
                function(**base | {name: value})
            except (TypeError, ValueError, RuntimeError) as error:
                message = str(error)
                assert what not in accepted, (name, what, message)
                # Two sides that do not fit each other are told of the second one; a freed tensor is found in a kernel.
                known = f"{name}|text_features|y|x" if name in {**PAIRS, **SIDES} else name
                known += "|learn_scale" if function is learned else ""
                assert re.match(rf"({known})(\[[01]\])?: got [^\n]*, want [^\n]+$", message), (name, what, message)
                assert len(message) < 300, (name, what)
            else:
                assert what in accepted, f"{name} took {what} for right"


@pytest.mark.parametrize("backend", [name for name, reason in available_backends("cpu").items() if reason is None])
def test_a_lazy_sign_counts(backend: str) -> None:
    """Of z.conj().imag: a tensor whose memory holds its negative. Native took it as it lies there."""
    z = torch.complex(torch.randn(4, 8), X)
    x = z.conj().imag.requires_grad_()
    assert x.is_neg()
    scale, smoothing = torch._neg_view(torch.tensor(-12.0)), torch._neg_view(torch.tensor(-0.2))
    noise_std = torch._neg_view(torch.tensor(-0.3))
    plain = (-X).requires_grad_()
    losses = []
    for features, *numbers in ((x, scale, smoothing, noise_std), (plain, 12.0, 0.2, 0.3)):
        torch.manual_seed(0)
        options = {"smoothing": numbers[1], "noise_std": numbers[2]}
        losses.append(modest_align_loss(features, Y, numbers[0], **options, backend=backend))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(x.grad, plain.grad)


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

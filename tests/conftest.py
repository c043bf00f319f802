"""Shared by all tests: no network, one thread, Triton interpreted where there is no GPU, a torchvision that imports."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # Read when the kernels are first imported: the whole session executes them on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


def _declare_torchvision_operators() -> None:
    """Declare the operators that torchvision's Python registers fakes for; without them its import fails.

    Only where its compiled extension does not load, as with the PyPI wheel beside a CPU build of torch.
    Declared, not implemented: resizing and cropping need none of them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        global _library  # the declarations live as long as it does
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            _library.define(schema)


_declare_torchvision_operators()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a path is passed over, or None. What tests of other trainers import takes half a minute."""
    unwanted = "not integrations" in config.getoption("markexpr")
    return (collection_path.name == "integrations" and unwanted) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to -m slow what Triton's interpreter, which is slow, would execute a second time."""
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        # Features of bfloat16 are operands of float16 there.
        if given.get("backend") == "triton" and given.get("dtype") == torch.bfloat16:
            item.add_marker(pytest.mark.slow)

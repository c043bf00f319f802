"""Bad input gets one sentence that names the argument, what came and what is wanted."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modest_align_kernels import ModestAlignLoss, available_backends, backends, dispatch, modest_align_loss
from modest_align_kernels.backends import native

X = torch.randn(4, 8)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((X, X[:3], 1.0), {}, ValueError, "text_features: got 3 rows, want at least 4"),
        ((X, X[:, :7], 1.0), {}, ValueError, "text_features: got 7 features, want 8"),
        ((X[0], X, 1.0), {}, ValueError, r"image_features: got shape \(8,\), want two dimensions"),
        ((X, X[None], 1.0), {}, ValueError, r"text_features: got shape \(1, 4, 8\)"),
        ((X.long(), X, 1.0), {}, TypeError, "image_features: got dtype torch.int64, want float16"),
        ((X, X.to(torch.complex64), 1.0), {}, TypeError, "text_features: got dtype torch.complex64"),
        (([[1.0]], X, 1.0), {}, TypeError, "image_features: got list, want a tensor"),
        ((X, X.to("meta"), 1.0), {}, ValueError, "text_features: got device meta, want cpu"),
        ((X, X, 0.0), {}, ValueError, "logit_scale: got 0.0, want a finite float > 0"),
        ((X, X, -2), {}, ValueError, "logit_scale: got -2"),
        ((X, X, math.inf), {}, ValueError, "logit_scale: got inf"),
        ((X, X, math.nan), {}, ValueError, "logit_scale: got nan"),
        ((X, X, None), {}, TypeError, "logit_scale: got NoneType, want a finite float > 0 or a one-element tensor"),
        ((X, X, True), {}, TypeError, "logit_scale: got bool, want a finite float > 0"),
        ((X, X, np.bool_(True)), {}, TypeError, "logit_scale: got bool"),
        ((X, X, 1j), {}, TypeError, "logit_scale: got complex"),
        ((X, X, np.float32(0)), {}, ValueError, "logit_scale: got .*0.0.*, want a finite float > 0"),
        ((X, X, torch.ones(2)), {}, ValueError, r"logit_scale: got a torch.float32 tensor of shape \(2,\)"),
        ((X, X, torch.ones(0)), {}, ValueError, r"logit_scale: got a torch.float32 tensor of shape \(0,\)"),
        ((X, X, torch.tensor(3)), {}, ValueError, "logit_scale: got a torch.int64 tensor"),
        ((X, X, 1.0), {"smoothing": 1.5}, ValueError, r"smoothing: got 1.5, want a float in \[0, 1\]"),
        ((X, X, 1.0), {"smoothing": -0.1}, ValueError, "smoothing: got -0.1"),
        ((X, X, 1.0), {"smoothing": math.nan}, ValueError, "smoothing: got nan"),
        ((X, X, 1.0), {"smoothing": "some"}, TypeError, "smoothing: got str"),
        ((X, X, 1.0), {"noise_std": -1.0}, ValueError, "noise_std: got -1.0, want a finite float >= 0"),
        ((X, X, 1.0), {"noise_std": math.inf}, ValueError, "noise_std: got inf"),
        ((X, X, 1.0), {"noise_std": None}, TypeError, "noise_std: got NoneType"),
        ((X, X, 1.0), {"noise_std": False}, TypeError, "noise_std: got bool"),
        ((X, X, 1.0), {"noise_std": torch.zeros(2)}, ValueError, "noise_std: got a torch.float32 tensor of shape"),
        (
            (X, X, 1.0),
            {"noise_std": torch.zeros((), requires_grad=True)},
            ValueError,
            "noise_std: got a tensor that requires a gradient, want one that does not",
        ),
        (
            (X, X, 1.0),
            {"group_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"group_ids: got shape \(3,\), want \[4\]",
        ),
        (
            (X, X, 1.0),
            {"group_ids": torch.zeros(4)},
            TypeError,
            "group_ids: got dtype torch.float32, want int64",
        ),
        ((X, X, 1.0), {"group_ids": [0, 1, 2, 3]}, TypeError, "group_ids: got list, want an int64 tensor"),
        (
            (X, X, 1.0),
            {"group_ids": (IDS, IDS, IDS)},
            ValueError,
            r"group_ids: got 3 of them, want a tensor \[4\] or a",
        ),
        ((X, X, 1.0), {"group_ids": (IDS, IDS[:3])}, ValueError, r"group_ids\[1\]: got shape \(3,\), want \[4\]"),
        ((X, X, 1.0), {"group_ids": (IDS.float(), IDS)}, TypeError, r"group_ids\[0\]: got dtype torch.float32"),
        ((X, X, 1.0), {"backend": "cuda"}, ValueError, "backend: got 'cuda', want \"auto\" or one of"),
        ((X, X, 1.0), {"process_group": object()}, TypeError, "process_group: got object, want a ProcessGroup, a Dev"),
        ((X, X, 1.0), {"process_group": (1, 2)}, TypeError, "process_group: got tuple, want a ProcessGroup, a Dev"),
        ((X, X, 1.0), {"strategy": "tree"}, ValueError, 'strategy: got \'tree\', want "auto", "gather" or "ring"'),
        (
            (X, X, 1.0),
            {"gradient_reduction": "max"},
            ValueError,
            'gradient_reduction: got \'max\', want "mean" or "sum"',
        ),
    ],
)
def test_one_clear_sentence(args, kwargs, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        modest_align_loss(*args, **kwargs)
    assert "\n" not in str(caught.value)


NESTED = {
    layout: torch.nested.nested_tensor([X[0], X[1, :3]], layout=layout) for layout in (torch.strided, torch.jagged)
}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (X.to_sparse(), "got a tensor of layout torch.sparse_coo, want a dense one, such as its to_dense()"),
        (X.to_sparse_csr(), "got a tensor of layout torch.sparse_csr, want a dense one"),
        (X.to_mkldnn(), "got a tensor of layout torch._mkldnn, want a dense one"),
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "got a quantised tensor, want a dense one"),
        (NESTED[torch.strided], "got a nested tensor, want a dense one"),
        (NESTED[torch.jagged], "got a nested tensor, want a dense one"),
    ],
    ids=["coo", "csr", "mkldnn", "quantised", "nested", "jagged"],
)
def test_tensors_that_are_not_dense(tensor, words) -> None:
    for args, name in (((tensor, X, 1.0), "image_features"), ((X, tensor, 1.0), "text_features")):
        with pytest.raises(TypeError, match=f"^{re.escape(f'{name}: {words}')}[^\n]*$"):
            modest_align_loss(*args)
    with pytest.raises(TypeError, match=f"^{re.escape(f'logit_scale: {words}')}[^\n]*$"):
        modest_align_loss(X, X, tensor)


def test_sparse_group_ids() -> None:
    with pytest.raises(TypeError, match=r"group_ids\[1\]: got a tensor of layout torch\.sparse_coo"):
        modest_align_loss(X, X, 1.0, group_ids=(IDS, IDS.to_sparse()))


def test_distributed_tensors(one_rank) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    shard = torch.distributed.tensor.distribute_tensor(X, mesh, [torch.distributed.tensor.Shard(0)])
    words = re.escape("got a DTensor, want a dense one, such as its full_tensor() or to_local()")
    for args, name in (((shard, X, 1.0), "image_features"), ((X, shard, 1.0), "text_features")):
        with pytest.raises(TypeError, match=f"{name}: {words}"):
            modest_align_loss(*args)
    scale = torch.distributed.tensor.distribute_tensor(torch.ones(1), mesh)
    with pytest.raises(TypeError, match=f"logit_scale: {words}"):
        modest_align_loss(X, X, scale)


def test_available_backends_give_reasons_that_an_explicit_choice_raises() -> None:
    backends = available_backends("cpu")
    assert {"eager", "native", "triton"} <= set(backends)
    assert backends["eager"] is None
    for name, reason in backends.items():
        if reason is None:
            assert math.isfinite(modest_align_loss(X, X, 1.0, backend=name))
        else:
            with pytest.raises(RuntimeError) as caught:
                modest_align_loss(X, X, 1.0, backend=name)
            assert reason in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_backend_runs_on_a_gpu_that_is_not_there() -> None:
    assert set(available_backends("cuda").values()) == {"PyTorch sees no GPU here"}


def test_module_without_a_scale() -> None:
    with pytest.raises(ValueError, match="logit_scale: got none, want one in the call or an owned one"):
        ModestAlignLoss()(X, X)
    with pytest.raises(ValueError, match="learn_scale: got True without logit_scale"):
        ModestAlignLoss(learn_scale=True)
    with pytest.raises(ValueError, match="logit_scale: got -1, want a finite float > 0"):
        ModestAlignLoss(logit_scale=-1)
    with pytest.raises(ValueError, match=r"logit_scale: got -1\.0, want a finite float > 0"):
        ModestAlignLoss(logit_scale=torch.tensor(-1.0), learn_scale=True)
    with pytest.raises(ValueError, match=r"max_scale: got 10\.0, want at least logit_scale, 14\.3"):
        ModestAlignLoss(logit_scale=14.3, learn_scale=True, max_scale=10.0)
    with pytest.raises(ValueError, match=r"max_scale: got 0, want a finite float > 0"):
        ModestAlignLoss(logit_scale=14.3, learn_scale=True, max_scale=0)
    with pytest.raises(ValueError, match=r"max_scale: got 100\.0 without learn_scale=True, want None"):
        ModestAlignLoss(logit_scale=14.3, max_scale=100.0)
    loss_fn = ModestAlignLoss()
    with pytest.raises(ValueError, match=r"smoothing: got 1\.5, want a float in \[0, 1\]"):
        loss_fn.smoothing = 1.5
    assert loss_fn.smoothing == 0.1
    with pytest.raises(ValueError, match="want one or the other"):
        ModestAlignLoss(logit_scale=10.0, learn_scale=True)(X, X, 10.0)


def test_workspace_of_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("MODEST_ALIGN_WORKSPACE_MIB", raising=False)
    for mib, size in ((None, 2**28), ("", 2**28), ("1", 2**20), ("512", 2**29), ("65536", 2**36)):
        if mib is not None:
            monkeypatch.setenv("MODEST_ALIGN_WORKSPACE_MIB", mib)
        assert backends._workspace_bytes() == size
    for mib in ("0", "65537", "-1", "1.5", "256 MiB", "\u0661", "9" * 5000):
        monkeypatch.setenv("MODEST_ALIGN_WORKSPACE_MIB", mib)
        with pytest.raises(ValueError, match=r"MODEST_ALIGN_WORKSPACE_MIB: got '.*', want an integer from 1 to 65536"):
            backends._workspace_bytes()


def test_experiment_of_the_environment(monkeypatch) -> None:
    for name in ("", "triton-persistent", *backends.CUDA_EXPERIMENTS):
        monkeypatch.setenv("MODEST_ALIGN_EXPERIMENT", name)
        assert backends._experiment() == (name or None)
    monkeypatch.setenv("MODEST_ALIGN_EXPERIMENT", "persistent")
    want = "triton-persistent, pingpong64, pingpong128 or stagger"
    with pytest.raises(ValueError, match=f"MODEST_ALIGN_EXPERIMENT: got 'persistent', want {want}"):
        backends._experiment()


@pytest.mark.parametrize(
    ("built", "asked"),
    [("", "stagger"), ("stagger", None), ("stagger", "pingpong64"), ("stagger", "triton-persistent")],
)
def test_an_experiment_that_the_cuda_kernels_are_not_of(monkeypatch, built: str, asked: str | None) -> None:
    compiled = SimpleNamespace(cuda=True, experiment=built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, value in {"_C": compiled, "EXPERIMENT": asked, "_MISSING": None}.items():
        monkeypatch.setattr(native, name, value, raising=False)
    reason = native.BACKEND.why_not(torch.device("cuda"), torch.float16, 64)
    assert f"built with MODEST_ALIGN_EXPERIMENT={built!r}, and this process has {asked or ''!r}: " in str(reason)
    monkeypatch.setattr(native, "EXPERIMENT", built or None)
    assert native.BACKEND.why_not(torch.device("cuda"), torch.float16, 64) is None


def test_auto_leaves_wide_bfloat16_features_to_pytorch_where_it_has_amx(monkeypatch) -> None:
    if available_backends("cpu")["native"] is not None:
        pytest.skip("native is not built")
    cpu = torch.device("cpu")
    for amx in (False, True):
        monkeypatch.setattr(native, "_amx", lambda amx=amx: amx)
        for dtype, features in ((torch.bfloat16, 512), (torch.bfloat16, 128), (torch.float32, 512)):
            wanted = "eager" if amx and dtype == torch.bfloat16 and features == 512 else "native"
            assert dispatch.choose("auto", cpu, dtype, features) == wanted
            assert dispatch.choose("native", cpu, dtype, features) == "native"
        with torch.autocast("cpu", torch.bfloat16):
            assert dispatch.choose("auto", cpu, torch.float32, 512) == ("eager" if amx else "native")

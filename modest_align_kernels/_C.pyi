"""The compiled kernels: csrc/kernels.h says what the arguments are, in structs of the same names.

Tensors are checked (csrc/bindings.cpp), None is a null pointer; extents, strides and dtypes are the tensors'.
"""

from typing import TypedDict

from torch import Tensor
from typing_extensions import Unpack

class Logits(TypedDict):
    x_hat: Tensor
    y_hat: Tensor
    scale: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    exclude_diagonal: bool
    exponentials: Tensor | None
    row_lse: Tensor
    col_lse: Tensor

class Softmaxes(Logits):
    row_weight: Tensor
    col_weight: Tensor

class PerturbNormalize(TypedDict):
    x: Tensor
    seed: Tensor | None
    noise_std: Tensor | None
    noise_stream: int
    first_row: int
    relative_noise: bool
    pair_hat: Tensor | None
    x_hat: Tensor
    inv_norm: Tensor
    pair_dot: Tensor

class PerturbNormalizeBackward(TypedDict):
    grad: Tensor
    x_hat: Tensor
    inv_norm: Tensor
    pair_hat: Tensor
    pair_weight: Tensor
    scale: Tensor
    factor: Tensor
    dx: Tensor
    row_dot: Tensor
    smoothing: Tensor | None
    ids: Tensor | None
    pair_ids: Tensor | None
    negative_weight: Tensor | None
    pair_negative_weight: Tensor | None

class PairLosses(TypedDict):
    row_lse: Tensor
    col_lse: Tensor
    pair_dot: Tensor
    scale: Tensor
    losses: Tensor
    row_weight: Tensor
    col_weight: Tensor
    pair_weight: Tensor
    smoothing: Tensor | None
    x_hat: Tensor | None
    y_hat: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    slope: Tensor | None
    row_negative_weight: Tensor | None
    col_negative_weight: Tensor | None

class OnCpu(TypedDict):
    threads: int

class OnCuda(TypedDict):
    device: int
    cuda_stream: int

class CpuPerturbNormalize(PerturbNormalize, OnCpu): ...
class CpuPerturbNormalizeBackward(PerturbNormalizeBackward, OnCpu): ...
class CpuPairLosses(PairLosses, OnCpu): ...
class CpuContrastiveStats(Logits, OnCpu): ...

class CpuContrastiveGrads(Softmaxes, OnCpu):
    grad_x: Tensor | None
    grad_y: Tensor | None

class CudaPerturbNormalize(PerturbNormalize, OnCuda): ...

class CudaPerturbNormalizeBackward(PerturbNormalizeBackward, OnCuda):
    pair_order: Tensor | None

class CudaPairLosses(PairLosses, OnCuda):
    row_order: Tensor | None
    col_order: Tensor | None

class CudaContrastiveStats(Logits, OnCuda):
    workspace_bytes: int

class SoftmaxFactors(Softmaxes, OnCuda):
    row_factor: Tensor
    col_factor: Tensor

# Where a block of G is, is an address and numbers.
class ContrastiveG(SoftmaxFactors):
    g: int
    g_stride: int
    first_row: int
    block_rows: int
    first_column: int
    block_columns: int

cuda: bool
experiment: str  # of benchmarks/NOTES.md, in the CUDA part; "" by default

def cpu_level() -> str: ...
def cpu_levels() -> list[str]: ...
def set_cpu_level(level: str) -> bool: ...
def cpu_bfloat16() -> bool: ...
def cpu_perturb_normalize(**arguments: Unpack[CpuPerturbNormalize]) -> None: ...
def cpu_perturb_normalize_backward(**arguments: Unpack[CpuPerturbNormalizeBackward]) -> None: ...
def cpu_pair_losses(**arguments: Unpack[CpuPairLosses]) -> None: ...
def cpu_contrastive_stats(**arguments: Unpack[CpuContrastiveStats]) -> None: ...
def cpu_contrastive_grads(**arguments: Unpack[CpuContrastiveGrads]) -> None: ...

# workspace: the address of as many bytes as the function beside it says.
def cuda_perturb_normalize(**arguments: Unpack[CudaPerturbNormalize]) -> None: ...
def cuda_perturb_normalize_backward(*, workspace: int, **arguments: Unpack[CudaPerturbNormalizeBackward]) -> None: ...
def cuda_perturb_normalize_backward_workspace(**arguments: Unpack[CudaPerturbNormalizeBackward]) -> int: ...
def cuda_pair_losses(*, workspace: int, **arguments: Unpack[CudaPairLosses]) -> None: ...
def cuda_pair_losses_workspace(**arguments: Unpack[CudaPairLosses]) -> int: ...
def cuda_contrastive_stats(*, workspace: int, **arguments: Unpack[CudaContrastiveStats]) -> None: ...
def cuda_contrastive_stats_workspace(**arguments: Unpack[CudaContrastiveStats]) -> int: ...
def cuda_softmax_factors(**arguments: Unpack[SoftmaxFactors]) -> None: ...
def cuda_contrastive_g(**arguments: Unpack[ContrastiveG]) -> None: ...

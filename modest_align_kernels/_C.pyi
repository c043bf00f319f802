"""The compiled kernels: csrc/kernels.h says what the arguments are, in structs of the same names.

Addresses are integers, 0 a null pointer; dtypes are the codes of its Dtype.
"""

from typing import TypedDict

from typing_extensions import Unpack

class Extents(TypedDict):
    rows: int
    columns: int
    col_count: int

class Logits(Extents):
    x_hat: int
    y_hat: int
    operand_dtype: int
    scale: int
    row_ids: int
    col_ids: int
    exclude_diagonal: bool
    width: int
    exponentials: int
    kept_rows: int
    kept_stride: int

class ContrastiveStats(Logits):
    row_lse: int
    col_lse: int

class Softmaxes(Logits):
    row_lse: int
    col_lse: int
    row_weight: int
    col_weight: int

class PerturbNormalize(TypedDict):
    x: int
    x_dtype: int
    row_stride: int
    feature_stride: int
    seed: int
    noise_std: int
    noise_stream: int
    first_row: int
    relative_noise: bool
    pair_hat: int
    x_hat: int
    operand_dtype: int
    inv_norm: int
    pair_dot: int
    rows: int
    pairs: int
    features: int
    width: int

class PerturbNormalizeBackward(TypedDict):
    grad: int
    x_hat: int
    operand_dtype: int
    inv_norm: int
    pair_hat: int
    pair_weight: int
    scale: int
    factor: int
    smoothing: int
    ids: int
    pair_ids: int
    negative_weight: int
    pair_negative_weight: int
    dx: int
    dx_dtype: int
    row_dot: int
    rows: int
    pairs: int
    pair_rows: int
    features: int
    width: int

class PairLosses(Extents):
    row_lse: int
    col_lse: int
    pair_dot: int
    scale: int
    losses: int
    row_weight: int
    col_weight: int
    pair_weight: int
    smoothing: int
    x_hat: int
    y_hat: int
    operand_dtype: int
    row_ids: int
    col_ids: int
    slope: int
    row_negative_weight: int
    col_negative_weight: int
    width: int

class OnCpu(TypedDict):
    threads: int

class OnCuda(TypedDict):
    device: int
    cuda_stream: int

class CpuPerturbNormalize(PerturbNormalize, OnCpu): ...
class CpuPerturbNormalizeBackward(PerturbNormalizeBackward, OnCpu): ...
class CpuPairLosses(PairLosses, OnCpu): ...
class CpuContrastiveStats(ContrastiveStats, OnCpu): ...

class CpuContrastiveGrads(Softmaxes, OnCpu):
    grad_x: int
    grad_y: int

class CudaPerturbNormalize(PerturbNormalize, OnCuda): ...

class CudaPerturbNormalizeBackward(PerturbNormalizeBackward, OnCuda):
    pair_order: int

class CudaPairLosses(PairLosses, OnCuda):
    row_order: int
    col_order: int

class CudaContrastiveStats(ContrastiveStats, OnCuda):
    workspace_bytes: int

class SoftmaxFactors(Softmaxes, OnCuda):
    row_factor: int
    col_factor: int

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
def cpu_perturb_normalize_backward(*, workspace: int, **arguments: Unpack[CpuPerturbNormalizeBackward]) -> None: ...
def cpu_perturb_normalize_backward_workspace(**arguments: Unpack[CpuPerturbNormalizeBackward]) -> int: ...
def cpu_pair_losses(*, workspace: int, **arguments: Unpack[CpuPairLosses]) -> None: ...
def cpu_pair_losses_workspace(**arguments: Unpack[CpuPairLosses]) -> int: ...
def cpu_contrastive_stats(*, workspace: int, **arguments: Unpack[CpuContrastiveStats]) -> None: ...
def cpu_contrastive_stats_workspace(**arguments: Unpack[CpuContrastiveStats]) -> int: ...
def cpu_contrastive_grads(*, workspace: int, **arguments: Unpack[CpuContrastiveGrads]) -> None: ...
def cpu_contrastive_grads_workspace(**arguments: Unpack[CpuContrastiveGrads]) -> int: ...
def cuda_error_string(status: int) -> str: ...
def cuda_perturb_normalize(**arguments: Unpack[CudaPerturbNormalize]) -> int: ...
def cuda_perturb_normalize_backward(*, workspace: int, **arguments: Unpack[CudaPerturbNormalizeBackward]) -> int: ...
def cuda_perturb_normalize_backward_workspace(**arguments: Unpack[CudaPerturbNormalizeBackward]) -> int: ...
def cuda_pair_losses(*, workspace: int, **arguments: Unpack[CudaPairLosses]) -> int: ...
def cuda_pair_losses_workspace(**arguments: Unpack[CudaPairLosses]) -> int: ...
def cuda_contrastive_stats(*, workspace: int, **arguments: Unpack[CudaContrastiveStats]) -> int: ...
def cuda_contrastive_stats_workspace(**arguments: Unpack[CudaContrastiveStats]) -> int: ...
def cuda_softmax_factors(**arguments: Unpack[SoftmaxFactors]) -> int: ...
def cuda_contrastive_g(**arguments: Unpack[ContrastiveG]) -> int: ...

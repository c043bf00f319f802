"""The compiled kernels: csrc/kernels.h. Addresses are integers; dtypes are the codes of its Dtype."""

cuda: bool

def cpu_level() -> str: ...
def cpu_levels() -> list[str]: ...
def set_cpu_level(level: str) -> bool: ...
def cpu_bfloat16() -> bool: ...
def cpu_perturb_normalize(
    x: int,
    x_dtype: int,
    seed: int,
    stream: int,
    noise_std: float,
    relative_noise: bool,
    x_hat: int,
    operand_dtype: int,
    inv_norm: int,
    rows: int,
    features: int,
    width: int,
    threads: int,
) -> None: ...
def cpu_perturb_normalize_backward(
    grad: int,
    x_hat: int,
    operand_dtype: int,
    inv_norm: int,
    pair_hat: int,
    pair_weight: int,
    offset: int,
    factor: int,
    dx: int,
    dx_dtype: int,
    row_dot: int,
    rows: int,
    pairs: int,
    features: int,
    width: int,
    threads: int,
) -> None: ...
def cpu_contrastive_stats(
    x_hat: int,
    y_hat: int,
    operand_dtype: int,
    scale: int,
    ids: int,
    symmetric: bool,
    positive: int,
    row_lse: int,
    col_lse: int,
    rows: int,
    columns: int,
    width: int,
    workspace: int,
    threads: int,
) -> None: ...
def cpu_contrastive_grads(
    x_hat: int,
    y_hat: int,
    operand_dtype: int,
    scale: int,
    row_lse: int,
    col_lse: int,
    ids: int,
    grad_x: int,
    grad_y: int,
    rows: int,
    columns: int,
    width: int,
    workspace: int,
    threads: int,
) -> None: ...
def cpu_contrastive_stats_workspace(rows: int, columns: int, width: int, operand_dtype: int, threads: int) -> int: ...
def cpu_contrastive_grads_workspace(rows: int, columns: int, width: int, operand_dtype: int, threads: int) -> int: ...

// The whole ABI of the compiled kernels: addresses and extents in, a status out. Nothing here knows of torch.
//
// Every matrix is row-major and contiguous. Extents are numbers of elements. What the functions compute is said once, in
// modest_align_kernels/backends/eager.py; the names are the same.
#pragma once

#include <cstdint>

namespace modest_align {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// The kernels for a CPU, compiled for one instruction set. `width` is the row length of x_hat and y_hat, a multiple of
// 16; features past D are zero. Operands are float32 or, where `bfloat16` says so, bfloat16. `threads` is an upper
// limit; for a given number every run has the same result bit for bit.
struct CpuKernels {
  const char* level;
  bool bfloat16;

  // x [rows, features] float32 or bfloat16; seed null draws no noise; x_hat [rows, width]; inv_norm [rows].
  void (*perturb_normalize)(const void* x, Dtype x_dtype, const std::int64_t* seed, int stream, float noise_std,
                            bool relative_noise, void* x_hat, Dtype operand_dtype, float* inv_norm, std::int64_t rows,
                            std::int64_t features, std::int64_t width, int threads);

  // grad [rows, width], pair_hat [pairs, width], pair_weight [pairs], offset [2, width]; dx [rows, features] float32 or
  // bfloat16; row_dot [rows].
  void (*perturb_normalize_backward)(const float* grad, const void* x_hat, Dtype operand_dtype, const float* inv_norm,
                                     const void* pair_hat, const float* pair_weight, const float* offset,
                                     const float* factor, void* dx, Dtype dx_dtype, float* row_dot, std::int64_t rows,
                                     std::int64_t pairs, std::int64_t features, std::int64_t width, int threads);

  // ids [columns]: row i and column j are no negatives of each other where ids[i] == ids[j]. positive, row_lse and
  // col_lse [rows].
  void (*contrastive_stats)(const void* x_hat, const void* y_hat, Dtype operand_dtype, const float* scale,
                            const std::int32_t* ids, bool symmetric, float* positive, float* row_lse, float* col_lse,
                            std::int64_t rows, std::int64_t columns, std::int64_t width, void* workspace, int threads);

  // row_lse and col_lse [rows]; grad_x [rows, width] and grad_y [columns, width], either may be null.
  void (*contrastive_grads)(const void* x_hat, const void* y_hat, Dtype operand_dtype, const float* scale,
                            const float* row_lse, const float* col_lse, const std::int32_t* ids, float* grad_x,
                            float* grad_y, std::int64_t rows, std::int64_t columns, std::int64_t width, void* workspace,
                            int threads);

  // Bytes of the workspaces of the two functions above, aligned to 64.
  std::int64_t (*contrastive_stats_workspace)(std::int64_t rows, std::int64_t columns, std::int64_t width,
                                              Dtype operand_dtype, int threads);
  std::int64_t (*contrastive_grads_workspace)(std::int64_t rows, std::int64_t columns, std::int64_t width,
                                              Dtype operand_dtype, int threads);
};

// The kernels for the best instruction set of this machine, or for the one that was chosen last.
const CpuKernels& cpu_kernels();
// Takes the kernels of another level from now on, for tests; false if this machine cannot run it.
bool set_cpu_level(const char* level);
// The levels that this machine can run, best first, ended by null.
const char* const* cpu_levels();

#ifdef MODEST_ALIGN_CUDA
// The kernels for NVIDIA GPUs. Addresses are those of one device's memory; `cuda_stream` is a cudaStream_t, on which
// everything runs. The status is a cudaError_t: that of the first call or launch that failed, or cudaSuccess (0).
// `width` is the row length of x_hat and y_hat, which are float16: a multiple of 64, at most 16,384; features past D
// are zero. Addresses of matrices but `x` and `dx` are aligned to 16 bytes.
namespace cuda {

const char* error_string(int status);

// x [rows, features] of x_dtype, strides in elements; seed null draws no noise; x_hat [rows, width]; inv_norm [rows].
int perturb_normalize(const void* x, Dtype x_dtype, std::int64_t row_stride, std::int64_t feature_stride,
                      const std::int64_t* seed, int noise_stream, float noise_std, bool relative_noise, void* x_hat,
                      float* inv_norm, std::int64_t rows, std::int64_t features, std::int64_t width, int device,
                      void* cuda_stream);

// grad [rows, width], pair_hat [pairs, width], pair_weight [pairs], offset [2, width], factor [1]; dx [rows, features]
// of dx_dtype; row_dot [rows].
int perturb_normalize_backward(const float* grad, const void* x_hat, const float* inv_norm, const void* pair_hat,
                               const float* pair_weight, const float* offset, const float* factor, void* dx,
                               Dtype dx_dtype, float* row_dot, std::int64_t rows, std::int64_t pairs,
                               std::int64_t features, std::int64_t width, int device, void* cuda_stream);

#ifdef MODEST_ALIGN_SM90A
// For compute capability 9.0. scale [1]; ids [columns]: row i and column j are no negatives of each other where
// ids[i] == ids[j]; null leaves out the diagonal alone. positive, row_lse and col_lse [rows]. Rows and columns number
// less than 2^31.
int contrastive_stats(const void* x_hat, const void* y_hat, const float* scale, const std::int32_t* ids, bool symmetric,
                      float* positive, float* row_lse, float* col_lse, std::int64_t rows, std::int64_t columns,
                      std::int64_t width, void* workspace, std::int64_t workspace_bytes, int device,
                      void* cuda_stream);
// Bytes of its workspace: at most `workspace_bytes`, if 256 rows at a time can do with so few.
std::int64_t contrastive_stats_workspace(std::int64_t rows, std::int64_t columns, bool symmetric,
                                         std::int64_t workspace_bytes);

// What contrastive_probabilities needs of all rows and columns: row_lse and col_lse [rows], row_weight [rows],
// col_weight [columns].
int contrastive_weights(const float* scale, const float* row_lse, const float* col_lse, float* row_weight,
                        float* col_weight, std::int64_t rows, std::int64_t columns, int device, void* cuda_stream);

// The block of 2^10 G with `rows` rows from first_row and `columns` columns from first_column, as float16 with `stride`
// elements from row to row, a multiple of 8. Whole tiles of 128 x 256 are written, zero past the block. x_hat, y_hat,
// ids, the logsumexps and the weights are those of all pairs; col_lse has `paired` elements.
int contrastive_probabilities(const void* x_hat, const void* y_hat, const float* scale, const float* row_lse,
                              const float* col_lse, const float* row_weight, const float* col_weight,
                              const std::int32_t* ids, void* probabilities, std::int64_t stride, std::int64_t first_row,
                              std::int64_t rows, std::int64_t first_column, std::int64_t columns, std::int64_t paired,
                              std::int64_t width, int device, void* cuda_stream);
#endif  // MODEST_ALIGN_SM90A

}  // namespace cuda
#endif  // MODEST_ALIGN_CUDA

}  // namespace modest_align

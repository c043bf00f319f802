// The whole ABI of the compiled kernels: addresses and extents in, a status out. Nothing here knows of torch.
//
// Every matrix is row-major and contiguous unless it has a stride; extents and strides are numbers of elements. A
// function's arguments are one struct, whose fields are also the names that Python gives (bindings.cpp). What the
// functions compute is said once, in modest_align_kernels/backends/eager.py; the names are the same.
#pragma once

#include <cstdint>

namespace modest_align {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Where a function runs.
struct Where {
  int threads;        // of a CPU, at most; for a given number every run has the same result bit for bit
  int device;         // of a GPU; all addresses are of its memory
  void* cuda_stream;  // a cudaStream_t
};

// width, here and below: the row length of x_hat and y_hat, a multiple of 64; features past D are zero. On a GPU
// operands are float16, width is at most 16,384, and their addresses are aligned to 16 bytes.
struct PerturbNormalize : Where {
  const void* x;  // [rows, features], of float32 or bfloat16 on a CPU
  Dtype x_dtype;
  std::int64_t row_stride, feature_stride;  // the latter is 1 on a CPU
  const std::int64_t* seed;                 // [1]; null draws no noise
  const float* noise_std;                   // [1]; null beside no seed
  int noise_stream;
  std::int64_t first_row;  // of the noise's numbers
  bool relative_noise;
  const void* pair_hat;  // [pairs, width]
  void* x_hat;           // written, [rows, width]
  Dtype operand_dtype;
  float* inv_norm;  // written, [rows]
  float* pair_dot;  // written, [pairs]
  std::int64_t rows, pairs, features, width;
};

struct PerturbNormalizeBackward : Where {
  const float* grad;  // [rows, width]
  const void* x_hat;  // [rows, width]
  Dtype operand_dtype;
  const float* inv_norm;     // [rows]
  const void* pair_hat;      // [pair_rows, width]
  const float* pair_weight;  // [pairs]
  const float* scale;        // [1]
  const float* factor;       // [1]
  // [1]; null: nothing is smoothed, and of ids, weights and workspace nothing is read
  const float* smoothing;
  const std::int32_t* ids;            // [rows], from 0 to pairs; null beside null
  const std::int32_t* pair_ids;       // [pair_rows]
  const float* negative_weight;       // [pairs]
  const float* pair_negative_weight;  // [pairs]
  void* dx;                           // written, [rows, features], of float32 or bfloat16 on a CPU
  Dtype dx_dtype;
  float* row_dot;   // written, [rows]
  void* workspace;  // aligned to 64 bytes
  std::int64_t rows, pairs, pair_rows, features, width;
};

struct PairLosses : Where {
  const float* row_lse;   // [rows]
  const float* col_lse;   // [col_count], which is rows or 0
  const float* pair_dot;  // [rows]
  const float* scale;     // [1]
  float* losses;          // written, [rows]
  float* row_weight;      // written, [rows]
  float* col_weight;      // written, [col_count]
  float* pair_weight;     // written, [rows]
  // [1]; null: nothing is smoothed, and nothing of what follows is read or written
  const float* smoothing;
  const void* x_hat;  // [rows, width]
  const void* y_hat;  // [columns, width]
  Dtype operand_dtype;
  const std::int32_t* row_ids;  // [rows], from 0 to rows; null beside null
  const std::int32_t* col_ids;  // [columns]
  float* slope;                 // written, [rows]
  float* row_negative_weight;   // written, [rows]
  float* col_negative_weight;   // written, [rows]
  void* workspace;              // aligned to 64 bytes
  std::int64_t rows, columns, col_count, width;
};

// The matrix of logits; rows and columns number less than 2^31.
struct Logits : Where {
  const void* x_hat;  // [rows, width]
  const void* y_hat;  // [columns, width]
  Dtype operand_dtype;
  const float* scale;           // [1]
  const std::int32_t* row_ids;  // [rows]; null beside null: no pair is excluded by its ids
  const std::int32_t* col_ids;  // [columns]
  bool exclude_diagonal;
  std::int64_t rows, columns, col_count, width;
  // On a CPU, of the last kept_rows rows: exponentials in operand_dtype that the statistics write and the gradients
  // read, [kept_rows, kept_stride]; 0 for an excluded pair. rows - kept_rows is a multiple of 24, unless kept_rows is
  // 0, and kept_stride at least 16 more than columns are when rounded up to a multiple of 32.
  void* exponentials;
  std::int64_t kept_rows, kept_stride;
};

struct ContrastiveStats : Logits {
  float* row_lse;                // written, [rows]
  float* col_lse;                // written, [col_count]
  void* workspace;               // aligned to 64 bytes
  std::int64_t workspace_bytes;  // on a GPU: what the workspace should be at most
};

// With weighted softmaxes of the rows and of the first col_count columns.
struct Softmaxes : Logits {
  const float* row_lse;     // [rows]
  const float* col_lse;     // [col_count]
  const float* row_weight;  // [rows]
  const float* col_weight;  // [col_count]
};

struct ContrastiveGrads : Softmaxes {
  float* grad_x;    // written, [rows, width], or null
  float* grad_y;    // written, [columns, width], or null
  void* workspace;  // aligned to 64 bytes
};

// The kernels for a CPU, compiled for one instruction set.
struct CpuKernels {
  const char* level;
  bool bfloat16;  // whether operands may be bfloat16; float32 they always may
  void (*perturb_normalize)(const PerturbNormalize&);
  void (*perturb_normalize_backward)(const PerturbNormalizeBackward&);
  void (*pair_losses)(const PairLosses&);
  void (*contrastive_stats)(const ContrastiveStats&);
  void (*contrastive_grads)(const ContrastiveGrads&);
  // Bytes of the workspaces of those above that have one, from all their other arguments.
  std::int64_t (*perturb_normalize_backward_workspace)(const PerturbNormalizeBackward&);
  std::int64_t (*pair_losses_workspace)(const PairLosses&);
  std::int64_t (*contrastive_stats_workspace)(const ContrastiveStats&);
  std::int64_t (*contrastive_grads_workspace)(const ContrastiveGrads&);
};

// The kernels for the best instruction set of this machine, or for the one that was chosen last.
const CpuKernels& cpu_kernels();
// Takes the kernels of another level from now on, for tests; false if this machine cannot run it.
bool set_cpu_level(const char* level);
// The levels that this machine can run, best first, ended by null.
const char* const* cpu_levels();

#ifdef MODEST_ALIGN_CUDA
// The kernels for NVIDIA GPUs of compute capability 9.0. The status is a cudaError_t: that of the first call or launch
// that failed, or cudaSuccess (0).
namespace cuda {

const char* error_string(int status);
int perturb_normalize(const PerturbNormalize&);

// With ids these two also take the order of each side's rows whose sums they need: the rows' numbers by ascending id.
struct PerturbNormalizeBackward : modest_align::PerturbNormalizeBackward {
  const std::int64_t* pair_order;  // [pair_rows]
};
int perturb_normalize_backward(const PerturbNormalizeBackward&);

struct PairLosses : modest_align::PairLosses {
  const std::int64_t* row_order;  // [rows]
  const std::int64_t* col_order;  // [columns]
};
int pair_losses(const PairLosses&);

// Bytes of their workspaces, from all their other arguments.
std::int64_t perturb_normalize_backward_workspace(const PerturbNormalizeBackward&);
std::int64_t pair_losses_workspace(const PairLosses&);

int contrastive_stats(const ContrastiveStats&);
// Bytes of its workspace: at most `workspace_bytes`, if 256 rows at a time can do with so few.
std::int64_t contrastive_stats_workspace(const ContrastiveStats&);

// A block of 2^10 G. The addresses in Softmaxes are those of all pairs.
struct ContrastiveG : Softmaxes {
  float* row_factor;  // [rows] and [columns]: written by softmax_factors, read by contrastive_g
  float* col_factor;
  void* g;                // written, float16: whole tiles of 128 x 256, zero past the block
  std::int64_t g_stride;  // from row to row, a multiple of 8
  std::int64_t first_row, block_rows, first_column, block_columns;
};
// What contrastive_g needs of all rows and columns.
int softmax_factors(const ContrastiveG&);
int contrastive_g(const ContrastiveG&);

}  // namespace cuda
#endif  // MODEST_ALIGN_CUDA

}  // namespace modest_align

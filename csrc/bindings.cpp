// A table, no logic: addresses and extents go in as integers, a status comes out, the GIL is released meanwhile.
// _C.pyi names the arguments; kernels.h says what they are.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace py = pybind11;
using namespace modest_align;

namespace {

// An address that Python took from a tensor; 0 is a null pointer.
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using std::int64_t;

  m.def("cpu_level", [] { return cpu_kernels().level; });
  m.def("cpu_bfloat16", [] { return cpu_kernels().bfloat16; });
  m.def("set_cpu_level", [](const char* level) { return set_cpu_level(level); });
  m.def("cpu_levels", [] {
    py::list names;
    for (const char* const* level = cpu_levels(); *level; ++level) names.append(*level);
    return names;
  });
  m.def(
      "cpu_perturb_normalize",
      [](Address x, int x_dtype, Address seed, int stream, float noise_std, bool relative_noise, Address x_hat,
         int operand_dtype, Address inv_norm, int64_t rows, int64_t features, int64_t width, int threads) {
        cpu_kernels().perturb_normalize(at<void>(x), Dtype(x_dtype), at<int64_t>(seed), stream, noise_std,
                                        relative_noise, at<void>(x_hat), Dtype(operand_dtype), at<float>(inv_norm),
                                        rows, features, width, threads);
      },
      Release());
  m.def(
      "cpu_perturb_normalize_backward",
      [](Address grad, Address x_hat, int operand_dtype, Address inv_norm, Address pair_hat, Address pair_weight,
         Address offset, Address factor, Address dx, int dx_dtype, Address row_dot, int64_t rows, int64_t pairs,
         int64_t features, int64_t width, int threads) {
        cpu_kernels().perturb_normalize_backward(
            at<float>(grad), at<void>(x_hat), Dtype(operand_dtype), at<float>(inv_norm), at<void>(pair_hat),
            at<float>(pair_weight), at<float>(offset), at<float>(factor), at<void>(dx), Dtype(dx_dtype),
            at<float>(row_dot), rows, pairs, features, width, threads);
      },
      Release());
  m.def(
      "cpu_contrastive_stats",
      [](Address x_hat, Address y_hat, int operand_dtype, Address scale, Address ids, bool symmetric, Address positive,
         Address row_lse, Address col_lse, int64_t rows, int64_t columns, int64_t width, Address workspace,
         int threads) {
        cpu_kernels().contrastive_stats(at<void>(x_hat), at<void>(y_hat), Dtype(operand_dtype), at<float>(scale),
                                        at<std::int32_t>(ids), symmetric, at<float>(positive), at<float>(row_lse),
                                        at<float>(col_lse), rows, columns, width, at<void>(workspace), threads);
      },
      Release());
  m.def(
      "cpu_contrastive_grads",
      [](Address x_hat, Address y_hat, int operand_dtype, Address scale, Address row_lse, Address col_lse, Address ids,
         Address grad_x, Address grad_y, int64_t rows, int64_t columns, int64_t width, Address workspace,
         int threads) {
        cpu_kernels().contrastive_grads(at<void>(x_hat), at<void>(y_hat), Dtype(operand_dtype), at<float>(scale),
                                        at<float>(row_lse), at<float>(col_lse), at<std::int32_t>(ids),
                                        at<float>(grad_x), at<float>(grad_y), rows, columns, width,
                                        at<void>(workspace), threads);
      },
      Release());
  m.def("cpu_contrastive_stats_workspace",
        [](int64_t rows, int64_t columns, int64_t width, int operand_dtype, int threads) {
          return cpu_kernels().contrastive_stats_workspace(rows, columns, width, Dtype(operand_dtype), threads);
        });
  m.def("cpu_contrastive_grads_workspace",
        [](int64_t rows, int64_t columns, int64_t width, int operand_dtype, int threads) {
          return cpu_kernels().contrastive_grads_workspace(rows, columns, width, Dtype(operand_dtype), threads);
        });
#ifdef MODEST_ALIGN_CUDA
  m.attr("cuda") = true;
  m.def("cuda_error_string", &cuda::error_string);
  m.def(
      "cuda_perturb_normalize",
      [](Address x, int x_dtype, int64_t row_stride, int64_t feature_stride, Address seed, int noise_stream,
         float noise_std, bool relative_noise, Address x_hat, Address inv_norm, int64_t rows, int64_t features,
         int64_t width, int device, Address cuda_stream) {
        return cuda::perturb_normalize(at<void>(x), Dtype(x_dtype), row_stride, feature_stride, at<int64_t>(seed),
                                       noise_stream, noise_std, relative_noise, at<void>(x_hat), at<float>(inv_norm),
                                       rows, features, width, device, at<void>(cuda_stream));
      },
      Release());
  m.def(
      "cuda_perturb_normalize_backward",
      [](Address grad, Address x_hat, Address inv_norm, Address pair_hat, Address pair_weight, Address offset,
         Address factor, Address dx, int dx_dtype, Address row_dot, int64_t rows, int64_t pairs, int64_t features,
         int64_t width, int device, Address cuda_stream) {
        return cuda::perturb_normalize_backward(
            at<float>(grad), at<void>(x_hat), at<float>(inv_norm), at<void>(pair_hat), at<float>(pair_weight),
            at<float>(offset), at<float>(factor), at<void>(dx), Dtype(dx_dtype), at<float>(row_dot), rows, pairs,
            features, width, device, at<void>(cuda_stream));
      },
      Release());
#else
  m.attr("cuda") = false;
#endif
#ifdef MODEST_ALIGN_SM90A
  m.attr("cuda_sm90a") = true;
  m.def(
      "cuda_contrastive_stats",
      [](Address x_hat, Address y_hat, Address scale, Address ids, bool symmetric, Address positive, Address row_lse,
         Address col_lse, int64_t rows, int64_t columns, int64_t width, Address workspace,
         int64_t workspace_bytes, int device, Address cuda_stream) {
        return cuda::contrastive_stats(at<void>(x_hat), at<void>(y_hat), at<float>(scale), at<std::int32_t>(ids),
                                       symmetric, at<float>(positive), at<float>(row_lse), at<float>(col_lse), rows,
                                       columns, width, at<void>(workspace), workspace_bytes, device,
                                       at<void>(cuda_stream));
      },
      Release());
  m.def("cuda_contrastive_stats_workspace", &cuda::contrastive_stats_workspace);
  m.def(
      "cuda_contrastive_weights",
      [](Address scale, Address row_lse, Address col_lse, Address row_weight, Address col_weight, int64_t rows,
         int64_t columns, int device, Address cuda_stream) {
        return cuda::contrastive_weights(at<float>(scale), at<float>(row_lse), at<float>(col_lse),
                                         at<float>(row_weight), at<float>(col_weight), rows, columns, device,
                                         at<void>(cuda_stream));
      },
      Release());
  m.def(
      "cuda_contrastive_probabilities",
      [](Address x_hat, Address y_hat, Address scale, Address row_lse, Address col_lse, Address row_weight,
         Address col_weight, Address ids, Address probabilities, int64_t stride, int64_t first_row, int64_t rows,
         int64_t first_column, int64_t columns, int64_t paired, int64_t width, int device, Address cuda_stream) {
        return cuda::contrastive_probabilities(
            at<void>(x_hat), at<void>(y_hat), at<float>(scale), at<float>(row_lse), at<float>(col_lse),
            at<float>(row_weight), at<float>(col_weight), at<std::int32_t>(ids), at<void>(probabilities), stride,
            first_row, rows, first_column, columns, paired, width, device, at<void>(cuda_stream));
      },
      Release());
#else
  m.attr("cuda_sm90a") = false;
#endif
}

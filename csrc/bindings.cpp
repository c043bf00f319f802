// A table, no logic: keyword arguments fill the struct that kernels.h says, a status comes out, the GIL is released
// meanwhile. An argument that is missing, unknown or of the wrong type is a TypeError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "experiment.h"
#include "kernels.h"

namespace py = pybind11;
using namespace modest_align;

namespace {

// Addresses are integers, 0 a null pointer.
template <class T>
void read(py::handle value, T*& field) {
  field = reinterpret_cast<T*>(value.cast<std::uintptr_t>());
}
void read(py::handle value, Dtype& field) { field = static_cast<Dtype>(value.cast<int>()); }
template <class T>
void read(py::handle value, T& field) {
  field = value.cast<T>();
}

template <class Arguments>
struct Field {
  const char* name;
  void (*set)(Arguments&, py::handle);
  PyObject* key = PyUnicode_InternFromString(name);
};

template <class Arguments>
using Fields = std::vector<Field<Arguments>>;

template <class Arguments>
Fields<Arguments> operator+(Fields<Arguments> fields, const Fields<Arguments>& more) {
  fields.insert(fields.end(), more.begin(), more.end());
  return fields;
}

template <class Arguments>
Arguments parse(const std::string& function, const Fields<Arguments>& fields, const py::kwargs& given) {
  Arguments arguments{};
  for (const Field<Arguments>& field : fields) {
    PyObject* value = PyDict_GetItem(given.ptr(), field.key);
    if (!value) throw py::type_error(function + ": got no argument " + field.name);
    try {
      field.set(arguments, value);
    } catch (const py::cast_error&) {
      throw py::type_error(function + ": " + field.name + ": got " + Py_TYPE(value)->tp_name);
    }
  }
  if (given.size() == fields.size()) return arguments;
  for (const auto& item : given) {
    const std::string name = py::str(item.first);
    bool known = false;
    for (const Field<Arguments>& field : fields) known = known || name == field.name;
    if (!known) throw py::type_error(function + ": got the unknown argument " + name);
  }
  return arguments;
}

// The docstring names the arguments, for a test that compares _C.pyi.
template <class Arguments, class Function>
void define(py::module_& m, const std::string& name, const Fields<Arguments>& fields, Function function) {
  std::string doc = name + "(*";
  for (const Field<Arguments>& field : fields) doc += std::string(", ") + field.name;
  m.def(
      name.c_str(),
      [name, fields, function](const py::kwargs& given) {
        const Arguments arguments = parse(name, fields, given);
        const py::gil_scoped_release release;
        return function(arguments);
      },
      (doc + ")").c_str());
}

#define FIELD(name) {#name, [](auto& arguments, py::handle value) { read(value, arguments.name); }}

template <class A>
Fields<A> threads() {
  return {FIELD(threads)};
}

template <class A>
Fields<A> device() {
  return {FIELD(device), FIELD(cuda_stream)};
}

template <class A>
Fields<A> workspace() {
  return {FIELD(workspace)};
}

template <class A>
Fields<A> extents() {
  return {FIELD(rows), FIELD(columns), FIELD(col_count)};
}

template <class A>
Fields<A> logits() {
  return Fields<A>{FIELD(x_hat),   FIELD(y_hat),   FIELD(operand_dtype),   FIELD(scale),
                   FIELD(row_ids), FIELD(col_ids), FIELD(exclude_diagonal)} +
         extents<A>() + Fields<A>{FIELD(width), FIELD(exponentials), FIELD(kept_rows), FIELD(kept_stride)};
}

template <class A>
Fields<A> softmaxes() {
  return logits<A>() + Fields<A>{FIELD(row_lse), FIELD(col_lse), FIELD(row_weight), FIELD(col_weight)};
}

template <class A>
Fields<A> perturb_normalize_backward() {
  return {FIELD(grad),        FIELD(x_hat), FIELD(operand_dtype), FIELD(inv_norm),        FIELD(pair_hat),
          FIELD(pair_weight), FIELD(scale), FIELD(factor),        FIELD(smoothing),       FIELD(ids),
          FIELD(pair_ids),    FIELD(dx),    FIELD(dx_dtype),      FIELD(negative_weight), FIELD(pair_negative_weight),
          FIELD(row_dot),     FIELD(rows),  FIELD(pairs),         FIELD(pair_rows),       FIELD(features),
          FIELD(width)};
}

template <class A>
Fields<A> pair_losses() {
  return Fields<A>{FIELD(row_lse),
                   FIELD(col_lse),
                   FIELD(pair_dot),
                   FIELD(scale),
                   FIELD(losses),
                   FIELD(row_weight),
                   FIELD(col_weight),
                   FIELD(pair_weight),
                   FIELD(smoothing),
                   FIELD(x_hat),
                   FIELD(y_hat),
                   FIELD(operand_dtype),
                   FIELD(row_ids),
                   FIELD(col_ids),
                   FIELD(slope),
                   FIELD(row_negative_weight),
                   FIELD(col_negative_weight),
                   FIELD(width)} +
         extents<A>();
}

// And beside it NAME_workspace, which takes the same arguments but this one.
template <class Arguments, class Function, class Size>
void define_with_workspace(py::module_& m, const std::string& name, const Fields<Arguments>& fields, Function function,
                           Size size) {
  define(m, name, fields + workspace<Arguments>(), function);
  define(m, name + "_workspace", fields, size);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::options options;
  options.disable_function_signatures();

  const Fields<PerturbNormalize> perturb_normalize{
      FIELD(x),         FIELD(x_dtype),       FIELD(row_stride), FIELD(feature_stride), FIELD(seed),
      FIELD(noise_std), FIELD(noise_stream),  FIELD(first_row),  FIELD(relative_noise), FIELD(pair_hat),
      FIELD(x_hat),     FIELD(operand_dtype), FIELD(inv_norm),   FIELD(pair_dot),       FIELD(rows),
      FIELD(pairs),     FIELD(features),      FIELD(width)};
  using Backward = PerturbNormalizeBackward;
  using Stats = ContrastiveStats;
  using Grads = ContrastiveGrads;
  const Fields<Stats> stats = logits<Stats>() + Fields<Stats>{FIELD(row_lse), FIELD(col_lse)};

  m.attr("experiment") = kExperiment;
  m.def("cpu_level", [] { return cpu_kernels().level; });
  m.def("cpu_bfloat16", [] { return cpu_kernels().bfloat16; });
  m.def("set_cpu_level", [](const char* level) { return set_cpu_level(level); });
  m.def("cpu_levels", [] {
    py::list names;
    for (const char* const* level = cpu_levels(); *level; ++level) names.append(*level);
    return names;
  });
  define(m, "cpu_perturb_normalize", perturb_normalize + threads<PerturbNormalize>(),
         [](const PerturbNormalize& a) { cpu_kernels().perturb_normalize(a); });
  define_with_workspace(
      m, "cpu_perturb_normalize_backward", perturb_normalize_backward<Backward>() + threads<Backward>(),
      [](const Backward& a) { cpu_kernels().perturb_normalize_backward(a); },
      [](const Backward& a) { return cpu_kernels().perturb_normalize_backward_workspace(a); });
  define_with_workspace(
      m, "cpu_pair_losses", pair_losses<PairLosses>() + threads<PairLosses>(),
      [](const PairLosses& a) { cpu_kernels().pair_losses(a); },
      [](const PairLosses& a) { return cpu_kernels().pair_losses_workspace(a); });
  define_with_workspace(
      m, "cpu_contrastive_stats", stats + threads<Stats>(), [](const Stats& a) { cpu_kernels().contrastive_stats(a); },
      [](const Stats& a) { return cpu_kernels().contrastive_stats_workspace(a); });
  define_with_workspace(
      m, "cpu_contrastive_grads", softmaxes<Grads>() + Fields<Grads>{FIELD(grad_x), FIELD(grad_y)} + threads<Grads>(),
      [](const Grads& a) { cpu_kernels().contrastive_grads(a); },
      [](const Grads& a) { return cpu_kernels().contrastive_grads_workspace(a); });

#ifdef MODEST_ALIGN_CUDA
  m.attr("cuda") = true;
  m.def("cuda_error_string", &cuda::error_string);
  define(m, "cuda_perturb_normalize", perturb_normalize + device<PerturbNormalize>(), cuda::perturb_normalize);
  using CudaBackward = cuda::PerturbNormalizeBackward;
  using CudaPairs = cuda::PairLosses;
  define_with_workspace(
      m, "cuda_perturb_normalize_backward",
      perturb_normalize_backward<CudaBackward>() + Fields<CudaBackward>{FIELD(pair_order)} + device<CudaBackward>(),
      cuda::perturb_normalize_backward, cuda::perturb_normalize_backward_workspace);
  define_with_workspace(
      m, "cuda_pair_losses",
      pair_losses<CudaPairs>() + Fields<CudaPairs>{FIELD(row_order), FIELD(col_order)} + device<CudaPairs>(),
      cuda::pair_losses, cuda::pair_losses_workspace);
  define_with_workspace(m, "cuda_contrastive_stats", stats + Fields<Stats>{FIELD(workspace_bytes)} + device<Stats>(),
                        cuda::contrastive_stats, cuda::contrastive_stats_workspace);
  using G = cuda::ContrastiveG;
  const Fields<G> factors{FIELD(row_factor), FIELD(col_factor)};
  const Fields<G> block{FIELD(g),          FIELD(g_stride),     FIELD(first_row),
                        FIELD(block_rows), FIELD(first_column), FIELD(block_columns)};
  define(m, "cuda_softmax_factors", softmaxes<G>() + factors + device<G>(), cuda::softmax_factors);
  define(m, "cuda_contrastive_g", softmaxes<G>() + factors + block + device<G>(), cuda::contrastive_g);
#else
  m.attr("cuda") = false;
#endif
}

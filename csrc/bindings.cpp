// Tables, and the one place where a tensor becomes an address: keyword arguments fill the structs that kernels.h says.
//
// The kernels see no dtype, no strides and no device: what they would misread is refused here, with an exception that
// names the argument. Python's objects are asked, not PyTorch's C++, so that one build serves every version of it. The
// GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "experiment.h"
#include "extents.h"
#include "kernels.h"

namespace py = pybind11;
using namespace modest_align;

namespace {

// What is asked of PyTorch, looked up once; never freed.
struct Torch {
  py::module_ module = py::module_::import("torch");
  PyObject* dtypes[3] = {dtype("float32"), dtype("float16"), dtype("bfloat16")};  // by the codes of Dtype
  PyObject *int32 = dtype("int32"), *int64 = dtype("int64");
  py::object uint8 = module.attr("uint8"), empty = module.attr("empty");
  PyObject *dtype_ = name("dtype"), *shape = name("shape"), *device = name("device"), *is_cpu = name("is_cpu"),
           *is_contiguous = name("is_contiguous"), *data_ptr = name("data_ptr"), *stride = name("stride");

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }
  PyObject* dtype(const char* text) const { return py::object(module.attr(text)).release().ptr(); }
};

const Torch& torch() {
  static const Torch* const torch = new Torch;
  return *torch;
}

py::object steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}
py::object get(py::handle object, PyObject* name) { return steal(PyObject_GetAttr(object.ptr(), name)); }
py::object call(py::handle object, PyObject* name) { return steal(PyObject_CallMethodNoArgs(object.ptr(), name)); }
std::string text(py::handle object) { return py::str(object); }
std::string shape_of(py::handle tensor) { return text(py::tuple(py::list(get(tensor, torch().shape)))); }

// What a call's arguments have said so far: an extent is said by the first tensor that has it, and wanted of the
// others, as is the operands' dtype.
struct Call {
  const std::string& function;
  bool on_cpu;
  std::vector<const std::int64_t*> known{};
  PyObject* operand_dtype = nullptr;  // borrowed: dtypes are never freed
  py::object device{};

  bool knows(const std::int64_t& extent) const {
    for (const std::int64_t* one : known) {
      if (one == &extent) return true;
    }
    return false;
  }
};

[[noreturn]] void refuse(const char* name, const std::string& what) {
  throw py::value_error(std::string(name) + ": " + what);
}

void check_device(Call& call_, const char* name, py::handle tensor) {
  const Torch& t = torch();
  if (call_.on_cpu) {
    if (get(tensor, t.is_cpu).ptr() != Py_True) {
      refuse(name, "got a tensor on " + text(get(tensor, t.device)) + ", want one on cpu");
    }
    return;
  }
  const py::object device = get(tensor, t.device);
  if (!call_.device) call_.device = device;
  if (!device.equal(call_.device)) {
    refuse(name, "got a tensor on " + text(device) + ", want one on " + text(call_.device));
  }
}

// The address of a tensor that has this dtype (null: any of DTYPES) and these extents, or null for None.
void* address(Call& call_, const char* name, py::handle tensor, PyObject* dtype, bool strided,
              std::initializer_list<std::int64_t*> extents) {
  if (tensor.is_none()) return nullptr;
  const Torch& t = torch();
  const py::object shape = get(tensor, t.shape), its_dtype = get(tensor, t.dtype_);
  if (dtype && its_dtype.ptr() != dtype) {
    throw py::type_error(std::string(name) + ": got " + text(its_dtype) + ", want " + text(dtype));
  }
  check_device(call_, name, tensor);
  bool right = PyTuple_Check(shape.ptr()) && PyTuple_GET_SIZE(shape.ptr()) == static_cast<Py_ssize_t>(extents.size());
  Py_ssize_t dimension = 0;
  for (std::int64_t* extent : extents) {
    if (!right) break;
    const std::int64_t length = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), dimension++));
    if (!call_.knows(*extent)) {
      *extent = length;
      call_.known.push_back(extent);
    }
    right = *extent == length;
  }
  if (!right) {
    py::list wanted;
    for (const std::int64_t* extent : extents) {
      if (call_.knows(*extent))
        wanted.append(*extent);
      else
        wanted.append("any");
    }
    refuse(name, "got shape " + shape_of(tensor) + ", want " + text(py::tuple(wanted)));
  }
  if (!strided && call(tensor, t.is_contiguous).ptr() != Py_True) {
    refuse(name,
           "got strides " + text(call(tensor, t.stride)) + " for shape " + shape_of(tensor) + ", want it contiguous");
  }
  void* const memory = PyLong_AsVoidPtr(call(tensor, t.data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  bool empty = false;
  for (const std::int64_t* extent : extents) empty = empty || *extent == 0;
  if (!memory && !empty) refuse(name, "got a tensor without memory, want one that has not been freed");
  return memory;
}

Dtype code_of(const char* name, py::handle tensor) {
  const py::object dtype = get(tensor, torch().dtype_);
  for (int code = 0; code < 3; ++code) {
    if (torch().dtypes[code] == dtype.ptr()) return static_cast<Dtype>(code);
  }
  throw py::type_error(std::string(name) + ": got " + text(dtype) + ", want torch.float32, float16 or bfloat16");
}

// The dtypes that elements of a tensor may have.
template <class A>
PyObject* real(A&, Call&, py::handle) {
  return torch().dtypes[0];
}
template <class A>
PyObject* group(A&, Call&, py::handle) {
  return torch().int32;
}
template <class A>
PyObject* integer(A&, Call&, py::handle) {
  return torch().int64;
}
template <class A>
PyObject* operand(A& a, Call& call_, py::handle tensor) {
  if (!call_.operand_dtype && !tensor.is_none()) {
    call_.operand_dtype = get(tensor, torch().dtype_).ptr();
    const bool bfloat16 = call_.on_cpu && cpu_kernels().bfloat16;
    std::vector<Dtype> supported{call_.on_cpu ? Dtype::float32 : Dtype::float16};
    if (bfloat16) supported.push_back(Dtype::bfloat16);
    std::string wanted;
    for (const Dtype dtype : supported) {
      PyObject* const object = torch().dtypes[static_cast<int>(dtype)];
      if (object == call_.operand_dtype) {
        a.operand_dtype = dtype;
        return object;
      }
      wanted += (wanted.empty() ? "" : " or ") + text(object);
    }
    refuse("operand_dtype", "got " + text(call_.operand_dtype) + ", want " + wanted + " here");
  }
  return call_.operand_dtype;
}

template <class Arguments>
struct Field {
  const char* name;
  const char* layout;  // of a tensor, its extents
  void (*set)(Arguments&, py::handle, Call&);
  bool optional = false;  // may be None
  PyObject* key = PyUnicode_InternFromString(name);

  // What comes instead of `value` is wanted.
  py::type_error wanted(const std::string& function, py::handle value) const {
    const std::string want = *layout ? std::string("a tensor ") + layout : "a number";
    return py::type_error(function + ": " + name + ": got " + Py_TYPE(value.ptr())->tp_name + ", want " + want +
                          (optional ? " or None" : ""));
  }
};

template <class A>
Field<A> optional(Field<A> field) {
  field.optional = true;
  return field;
}

template <class T>
void read_number(py::handle value, T*& field) {
  field = reinterpret_cast<T*>(value.cast<std::uintptr_t>());
}
template <class T>
void read_number(py::handle value, T& field) {
  field = value.cast<T>();
}

// A number, or the address of something that no struct describes.
#define NUMBER(name) {#name, "", [](auto& a, py::handle value, Call&) { read_number(value, a.name); }}
#define TENSOR(name, layout, elements, ...)                                                             \
  {#name, layout, [](auto& a, py::handle value, Call& call_) {                                          \
     PyObject* const dtype = elements(a, call_, value);                                                 \
     a.name = static_cast<decltype(a.name)>(address(call_, #name, value, dtype, false, {__VA_ARGS__})); \
   }}
#define SCALAR(name, elements) TENSOR(name, "[]", elements)
#define VECTOR(name, elements, length) TENSOR(name, "[" #length "]", elements, &a.length)
#define MATRIX(name, elements, height, width) TENSOR(name, "[" #height ", " #width "]", elements, &a.height, &a.width)
// Of the features' dtype.
#define FEATURES(name)                                                              \
  {#name, "[rows, features]", [](auto& a, py::handle value, Call& call_) {          \
     a.name##_dtype = code_of(#name, value);                                        \
     a.name = address(call_, #name, value, nullptr, false, {&a.rows, &a.features}); \
   }}

template <class Arguments>
using Fields = std::vector<Field<Arguments>>;

template <class Arguments>
Fields<Arguments> operator+(Fields<Arguments> fields, const Fields<Arguments>& more) {
  fields.insert(fields.end(), more.begin(), more.end());
  return fields;
}

void at_least_one(std::initializer_list<std::pair<const char*, std::int64_t>> extents) {
  for (const auto& [name, extent] : extents) {
    if (extent < 1) refuse(name, "got " + std::to_string(extent) + ", want at least 1: the kernels divide by it");
  }
}

// Addresses that are null together or not at all; `first` and what is beside it.
void all_or_none(const char* first, const void* its,
                 std::initializer_list<std::pair<const char*, const void*>> others) {
  for (const auto& [name, address] : others) {
    if (!its == !address) continue;
    refuse(name,
           std::string(address ? "got a tensor beside no " : "got None beside ") + first + ", want both or neither");
  }
}

void at_most(const char* name, std::int64_t extent, const char* of, std::int64_t limit) {
  if (extent > limit) {
    refuse(name, "got " + std::to_string(extent) + ", want at most " + std::to_string(limit) + ", the number of " + of);
  }
}

// A row of `width` features, as the kernels step along it.
void check_width(const Call& call_, std::int64_t width, std::int64_t features = 0) {
  if (width < 1 || width % 64 || (!call_.on_cpu && width > 16384)) {
    refuse("width",
           "got " + std::to_string(width) + ", want a multiple of 64" + (call_.on_cpu ? "" : ", at most 16384"));
  }
  at_most("features", features, "elements in a row of operands", width);
}

void check_on_cpu(const Call& call_, const char* name, Dtype dtype) {
  if (call_.on_cpu && dtype == Dtype::float16) {
    refuse(name, "got torch.float16, want torch.float32 or bfloat16 on a CPU");
  }
}

// What no single tensor says.
void check(PerturbNormalize& a, const Call& call_) {
  at_least_one({{"rows", a.rows}});
  check_width(call_, a.width, a.features);
  check_on_cpu(call_, "x", a.x_dtype);
  if (call_.on_cpu && a.features > 1 && a.feature_stride != 1) {
    refuse("x", "got the stride " + std::to_string(a.feature_stride) + " from feature to feature, want 1 on a CPU");
  }
  all_or_none("seed", a.seed, {{"noise_std", a.noise_std}});
  if (!a.pair_hat && a.pairs) refuse("pair_dot", "got shape (" + std::to_string(a.pairs) + ",), want (0,)");
  at_most("pairs", a.pairs, "rows", a.rows);
}
void check(PerturbNormalizeBackward& a, const Call& call_) {
  at_least_one({{"rows", a.rows}});
  check_width(call_, a.width, a.features);
  check_on_cpu(call_, "dx", a.dx_dtype);
  at_most("pairs", a.pairs, "rows", a.rows);
  at_most("pairs", a.pairs, "rows of pair_hat", a.pair_rows);
  if (!a.smoothing) return;
  all_or_none("smoothing", a.smoothing,
              {{"negative_weight", a.negative_weight}, {"pair_negative_weight", a.pair_negative_weight}});
  all_or_none("ids", a.ids, {{"pair_ids", a.pair_ids}});
}
void check(PairLosses& a, const Call& call_) {
  if (!call_.knows(a.columns)) a.columns = a.rows;  // nothing is smoothed
  if (call_.knows(a.width)) {
    at_least_one({{"rows", a.rows}, {"columns", a.columns}});
    check_width(call_, a.width);
  }
  if (a.col_count && a.col_count != a.rows) {
    refuse("col_lse", "got " + std::to_string(a.col_count) + " elements, want one for each row or none");
  }
  if (!a.smoothing) return;
  all_or_none("smoothing", a.smoothing,
              {{"x_hat", a.x_hat},
               {"y_hat", a.y_hat},
               {"slope", a.slope},
               {"row_negative_weight", a.row_negative_weight},
               {"col_negative_weight", a.col_negative_weight}});
  all_or_none("row_ids", a.row_ids, {{"col_ids", a.col_ids}});
  at_most("rows", a.rows, "columns", a.columns);
}
void check(Logits& a, const Call& call_) {
  at_least_one({{"rows", a.rows}, {"columns", a.columns}});
  check_width(call_, a.width);
  at_most("col_count", a.col_count, "columns", a.columns);
  all_or_none("row_ids", a.row_ids, {{"col_ids", a.col_ids}});
  if (a.kept_rows == 0) return;
  // What kernels.h wants of the exponentials.
  const std::int64_t first = larger(a.rows - a.kept_rows, 0);
  const std::int64_t last_rows = a.rows - smaller(round_up(first, 24), (a.rows - 1) / 24 * 24);
  const std::int64_t stride = larger(a.kept_stride, round_up(a.columns, 32) + 16);
  if (a.kept_rows != last_rows || a.kept_stride != stride) {
    refuse("exponentials", "got shape (" + std::to_string(a.kept_rows) + ", " + std::to_string(a.kept_stride) +
                               "), want (" + std::to_string(last_rows) + ", " + std::to_string(stride) + ")");
  }
}

template <class Arguments>
Arguments parse(Call& call_, const Fields<Arguments>& fields, const py::kwargs& given) {
  Arguments arguments{};
  for (const Field<Arguments>& field : fields) {
    PyObject* value = PyDict_GetItem(given.ptr(), field.key);
    if (!value) throw py::type_error(call_.function + ": got no argument " + field.name);
    // A null pointer is for what may be left out: of anything else a kernel would read or write at address 0.
    if (value == Py_None && !field.optional) throw field.wanted(call_.function, value);
    try {
      field.set(arguments, value, call_);
    } catch (const py::cast_error&) {
      throw field.wanted(call_.function, value);
    } catch (py::error_already_set& error) {
      if (error.matches(PyExc_AttributeError)) throw field.wanted(call_.function, value);
      if (!error.matches(PyExc_RuntimeError)) throw;
      refuse(field.name, "got a tensor without an address, want a dense one: " + text(error.value()));
    }
  }
  if (given.size() != fields.size()) {
    for (const auto& item : given) {
      const std::string name = py::str(item.first);
      bool known = false;
      for (const Field<Arguments>& field : fields) known = known || name == field.name;
      if (!known) throw py::type_error(call_.function + ": got the unknown argument " + name);
    }
  }
  if (call_.on_cpu) at_least_one({{"threads", arguments.threads}});
  check(arguments, call_);
  return arguments;
}

// run(arguments) for the keyword arguments of `fields`. The docstring names them, and the extents of tensors, for
// tests.
template <class Arguments, class Run>
void define(py::module_& m, const std::string& name, const Fields<Arguments>& fields, bool on_cpu, Run run) {
  std::string doc = name + "(*";
  for (const Field<Arguments>& field : fields) doc += std::string(", ") + field.name + field.layout;
  m.def(
      name.c_str(),
      [name, fields, on_cpu, run](const py::kwargs& given) {
        Call call_{name, on_cpu};
        Arguments arguments = parse(call_, fields, given);
        return run(arguments);
      },
      (doc + ")").c_str());
}

template <class Arguments>
void define_on_cpu(py::module_& m, const std::string& name, Fields<Arguments> fields,
                   void (*CpuKernels::*kernel)(const Arguments&)) {
  define(m, name, fields + Fields<Arguments>{NUMBER(threads)}, true, [kernel](const Arguments& a) {
    const py::gil_scoped_release release;
    (cpu_kernels().*kernel)(a);
  });
}

// With a workspace, which is PyTorch's memory: aligned to 64 bytes, and counted where it counts.
template <class Arguments>
void define_on_cpu(py::module_& m, const std::string& name, Fields<Arguments> fields,
                   void (*CpuKernels::*kernel)(const Arguments&),
                   std::int64_t (*CpuKernels::*bytes)(const Arguments&)) {
  define(m, name, fields + Fields<Arguments>{NUMBER(threads)}, true, [kernel, bytes](Arguments& a) {
    const std::int64_t size = (cpu_kernels().*bytes)(a);
    const py::object workspace = torch().empty(size, py::arg("dtype") = torch().uint8);
    a.workspace = PyLong_AsVoidPtr(call(workspace, torch().data_ptr).ptr());
    const py::gil_scoped_release release;
    (cpu_kernels().*kernel)(a);
  });
}

template <class A>
Fields<A> logits() {
  return {MATRIX(x_hat, operand, rows, width),
          MATRIX(y_hat, operand, columns, width),
          SCALAR(scale, real),
          optional<A>(VECTOR(row_ids, group, rows)),
          optional<A>(VECTOR(col_ids, group, columns)),
          NUMBER(exclude_diagonal),
          optional<A>(MATRIX(exponentials, operand, kept_rows, kept_stride)),
          VECTOR(row_lse, real, rows),
          VECTOR(col_lse, real, col_count)};
}

template <class A>
Fields<A> softmaxes() {
  return logits<A>() + Fields<A>{VECTOR(row_weight, real, rows), VECTOR(col_weight, real, col_count)};
}

template <class A>
Fields<A> perturb_normalize() {
  return {{"x", "[rows, features]",
           [](auto& a, py::handle value, Call& call_) {
             a.x_dtype = code_of("x", value);
             a.x = address(call_, "x", value, nullptr, true, {&a.rows, &a.features});
             const py::tuple strides = call(value, torch().stride);
             a.row_stride = strides[0].cast<std::int64_t>(), a.feature_stride = strides[1].cast<std::int64_t>();
           }},
          optional<A>(SCALAR(seed, integer)),
          optional<A>(SCALAR(noise_std, real)),
          NUMBER(noise_stream),
          NUMBER(first_row),
          NUMBER(relative_noise),
          MATRIX(x_hat, operand, rows, width),
          optional<A>(MATRIX(pair_hat, operand, pairs, width)),
          VECTOR(inv_norm, real, rows),
          VECTOR(pair_dot, real, pairs)};
}

template <class A>
Fields<A> perturb_normalize_backward() {
  return {MATRIX(x_hat, operand, rows, width),
          MATRIX(grad, real, rows, width),
          VECTOR(inv_norm, real, rows),
          MATRIX(pair_hat, operand, pair_rows, width),
          VECTOR(pair_weight, real, pairs),
          SCALAR(scale, real),
          SCALAR(factor, real),
          FEATURES(dx),
          VECTOR(row_dot, real, rows),
          optional<A>(SCALAR(smoothing, real)),
          optional<A>(VECTOR(ids, group, rows)),
          optional<A>(VECTOR(pair_ids, group, pair_rows)),
          optional<A>(VECTOR(negative_weight, real, pairs)),
          optional<A>(VECTOR(pair_negative_weight, real, pairs))};
}

template <class A>
Fields<A> pair_losses() {
  return {VECTOR(row_lse, real, rows),
          VECTOR(col_lse, real, col_count),
          VECTOR(pair_dot, real, rows),
          SCALAR(scale, real),
          VECTOR(losses, real, rows),
          VECTOR(row_weight, real, rows),
          VECTOR(col_weight, real, col_count),
          VECTOR(pair_weight, real, rows),
          optional<A>(SCALAR(smoothing, real)),
          optional<A>(MATRIX(x_hat, operand, rows, width)),
          optional<A>(MATRIX(y_hat, operand, columns, width)),
          optional<A>(VECTOR(row_ids, group, rows)),
          optional<A>(VECTOR(col_ids, group, columns)),
          optional<A>(VECTOR(slope, real, rows)),
          optional<A>(VECTOR(row_negative_weight, real, rows)),
          optional<A>(VECTOR(col_negative_weight, real, rows))};
}

#ifdef MODEST_ALIGN_CUDA
std::string described(std::int64_t rows, const char* name, std::int64_t extent, std::int64_t width) {
  const auto text = [](std::int64_t number) { return std::to_string(number); };
  return "rows=" + text(rows) + ", " + name + "=" + text(extent) + ", width=" + text(width);
}
std::string extents_of(const PerturbNormalize& a) { return described(a.rows, "features", a.features, a.width); }
std::string extents_of(const PerturbNormalizeBackward& a) { return described(a.rows, "features", a.features, a.width); }
std::string extents_of(const PairLosses& a) { return described(a.rows, "columns", a.columns, a.width); }
std::string extents_of(const Logits& a) { return described(a.rows, "columns", a.columns, a.width); }

template <class A>
Fields<A> on_gpu(const Fields<A>& fields) {
  return fields + Fields<A>{NUMBER(device), NUMBER(cuda_stream)};
}

template <class Arguments>
void define_on_gpu(py::module_& m, const std::string& name, const Fields<Arguments>& fields,
                   int (*kernel)(const Arguments&)) {
  define(m, "cuda_" + name, on_gpu(fields), false, [name, kernel](const Arguments& a) {
    int status;
    {
      const py::gil_scoped_release release;
      status = kernel(a);
    }
    if (status == 0) return;
    const std::string error = "CUDA error " + std::to_string(status) + ", " + cuda::error_string(status);
    throw std::runtime_error(name + "(" + extents_of(a) + "): " + error);
  });
}

// And beside it NAME_workspace, which takes the same arguments but this one.
template <class Arguments>
void define_on_gpu(py::module_& m, const std::string& name, const Fields<Arguments>& fields,
                   int (*kernel)(const Arguments&), std::int64_t (*bytes)(const Arguments&)) {
  define_on_gpu(m, name, fields + Fields<Arguments>{NUMBER(workspace)}, kernel);
  define(m, "cuda_" + name + "_workspace", on_gpu(fields), false, [bytes](const Arguments& a) { return bytes(a); });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::options options;
  options.disable_function_signatures();

  m.attr("experiment") = kExperiment;
  m.def("cpu_level", [] { return cpu_kernels().level; });
  m.def("cpu_bfloat16", [] { return cpu_kernels().bfloat16; });
  m.def("set_cpu_level", [](const char* level) { return set_cpu_level(level); });
  m.def("cpu_levels", [] {
    py::list names;
    for (const char* const* level = cpu_levels(); *level; ++level) names.append(*level);
    return names;
  });
  using Normalize = PerturbNormalize;
  using Backward = PerturbNormalizeBackward;
  using Grads = ContrastiveGrads;
  using Cpu = CpuKernels;
  define_on_cpu(m, "cpu_perturb_normalize", perturb_normalize<Normalize>(), &Cpu::perturb_normalize);
  define_on_cpu(m, "cpu_perturb_normalize_backward", perturb_normalize_backward<Backward>(),
                &Cpu::perturb_normalize_backward, &Cpu::perturb_normalize_backward_workspace);
  define_on_cpu(m, "cpu_pair_losses", pair_losses<PairLosses>(), &Cpu::pair_losses, &Cpu::pair_losses_workspace);
  define_on_cpu(m, "cpu_contrastive_stats", logits<ContrastiveStats>(), &Cpu::contrastive_stats,
                &Cpu::contrastive_stats_workspace);
  define_on_cpu(m, "cpu_contrastive_grads",
                softmaxes<Grads>() + Fields<Grads>{optional<Grads>(MATRIX(grad_x, real, rows, width)),
                                                   optional<Grads>(MATRIX(grad_y, real, columns, width))},
                &Cpu::contrastive_grads, &Cpu::contrastive_grads_workspace);

#ifdef MODEST_ALIGN_CUDA
  m.attr("cuda") = true;
  using CudaBackward = cuda::PerturbNormalizeBackward;
  using CudaPairs = cuda::PairLosses;
  using Stats = ContrastiveStats;
  using G = cuda::ContrastiveG;
  define_on_gpu(m, "perturb_normalize", perturb_normalize<Normalize>(), cuda::perturb_normalize);
  define_on_gpu(m, "perturb_normalize_backward",
                perturb_normalize_backward<CudaBackward>() +
                    Fields<CudaBackward>{optional<CudaBackward>(VECTOR(pair_order, integer, pair_rows))},
                cuda::perturb_normalize_backward, cuda::perturb_normalize_backward_workspace);
  define_on_gpu(m, "pair_losses",
                pair_losses<CudaPairs>() + Fields<CudaPairs>{optional<CudaPairs>(VECTOR(row_order, integer, rows)),
                                                             optional<CudaPairs>(VECTOR(col_order, integer, columns))},
                cuda::pair_losses, cuda::pair_losses_workspace);
  define_on_gpu(m, "contrastive_stats", logits<Stats>() + Fields<Stats>{NUMBER(workspace_bytes)},
                cuda::contrastive_stats, cuda::contrastive_stats_workspace);
  const Fields<G> factors =
      softmaxes<G>() + Fields<G>{VECTOR(row_factor, real, rows), VECTOR(col_factor, real, columns)};
  const Fields<G> block{NUMBER(g),          NUMBER(g_stride),     NUMBER(first_row),
                        NUMBER(block_rows), NUMBER(first_column), NUMBER(block_columns)};
  define_on_gpu(m, "softmax_factors", factors, cuda::softmax_factors);
  define_on_gpu(m, "contrastive_g", factors + block, cuda::contrastive_g);
#else
  m.attr("cuda") = false;
#endif
}

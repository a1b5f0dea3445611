// The module fastdiff._C: importing it registers the torch operators (csrc/*_cpu.cpp); what Python sees here is the
// build, the CPU, and the raw launch functions on NumPy arrays, without torch.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "kernels/adaln/adaln.h"
#include "kernels/common/isa.h"
#include "kernels/common/tuning.h"

namespace py = pybind11;

namespace fastdiff {
namespace {

// float32, float64 and float16 arrays mean themselves; bfloat16, which NumPy lacks, comes as its bits in uint16.
DType dtype_of(const py::array& a, const char* name) {
  if (py::isinstance<py::array_t<float>>(a)) return DType::kFloat32;
  if (py::isinstance<py::array_t<double>>(a)) return DType::kFloat64;
  if (py::isinstance<py::array_t<uint16_t>>(a)) return DType::kBFloat16;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2 && a.dtype().byteorder() == '=') return DType::kFloat16;
  throw py::type_error(std::string(name) +
                       ": expected float32, float64, float16 or uint16 (bfloat16 bits) in the machine's byte order");
}

using Array = std::optional<py::array>;

void check(bool fits, const char* name, const char* expected) {
  if (!fits) throw py::value_error(std::string(name) + " does not fit; expected " + expected);
}

// A view into a structured array can begin, or step, between two elements.
void check_whole_elements(const py::array& a, const char* name) {
  const auto item = static_cast<py::ssize_t>(a.itemsize());
  bool whole = reinterpret_cast<uintptr_t>(a.data()) % item == 0;
  for (py::ssize_t i = 0; i < a.ndim(); i++) whole = whole && (a.shape(i) < 2 || a.strides(i) % item == 0);
  check(whole, name, "an aligned array whose strides are multiples of its items: pass a copy");
}

// The bytes from the first to the last element in memory.
std::pair<uintptr_t, uintptr_t> span(const py::array& a) {
  uintptr_t begin = reinterpret_cast<uintptr_t>(a.data()), end = begin;
  if (a.size() == 0) return {begin, end};
  for (py::ssize_t i = 0; i < a.ndim(); i++) {
    const py::ssize_t reach = (a.shape(i) - 1) * a.strides(i);
    (reach < 0 ? begin : end) += reach;
  }
  return {begin, end + a.itemsize()};
}

void check_apart(const py::array& out, const char* name, std::initializer_list<const py::array*> others,
                 bool may_be_whole = false) {
  const auto [begin, end] = span(out);
  for (const py::array* other : others) {
    if (other == nullptr) continue;
    const auto [from, to] = span(*other);
    if (may_be_whole && from == begin && to == end) continue;  // read before it is written
    check(begin >= to || from >= end, name, "memory that no other array shares");
  }
}

bool contiguous(const py::array& a) { return (a.flags() & py::array::c_style) != 0; }

const void* stream(const py::array& a, const py::array& x, const char* name) {
  check_whole_elements(a, name);
  check(contiguous(a) && a.ndim() == 3 && a.shape(0) == x.shape(0) && a.shape(1) == x.shape(1) && a.shape(2) == x.shape(2),
        name, "a contiguous array of x's shape [B, N, D]");
  return a.data();
}
void* stream_out(py::array& a, const py::array& x, const char* name) {
  stream(a, x, name);
  return a.mutable_data();
}

Modulation modulation(const Array& m, const py::array& x, const char* name) {
  if (!m) return {nullptr, DType::kFloat32, 0, 0, 1};
  check_whole_elements(*m, name);
  const int64_t tokens = x.shape(1), item = m->itemsize();
  check(m->ndim() == 3 && m->shape(2) == x.shape(2) && (m->strides(2) == item || m->shape(2) == 1) &&
            (m->shape(0) == 1 || m->shape(0) == x.shape(0)) && m->shape(1) > 0 && tokens % m->shape(1) == 0,
        name, "[1 or B, F, D] with F dividing N and a contiguous last dimension");
  return {m->data(), dtype_of(*m, name), m->shape(0) > 1 ? m->strides(0) / item : 0,
          m->shape(1) > 1 ? m->strides(1) / item : 0, tokens / m->shape(1)};
}

const void* vector(const Array& a, int64_t size, const py::array& x, const char* name) {
  if (!a) return nullptr;
  check_whole_elements(*a, name);
  const DType statistics = dtype_of(x, "x") == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check(contiguous(*a) && a->size() == size && dtype_of(*a, name) == statistics, name,
        "a contiguous array of the right size in the dtype of the statistics: float32, or float64 where x is");
  return a->data();
}
void* vector_out(Array& a, int64_t size, const py::array& x, const char* name) {
  return vector(a, size, x, name) ? a->mutable_data() : nullptr;
}

// One chunk a row or segment, last first: whoever depends on the order of chunks is found out.
void run_backwards(int64_t begin, int64_t end, int64_t, cpu::ParallelFor::Body body, const void* closure) {
  for (int64_t i = end - 1; i >= begin; i--) body(closure, i, i + 1);
}
void run_at_once(int64_t begin, int64_t end, int64_t, cpu::ParallelFor::Body body, const void* closure) {
  body(closure, begin, end);
}
cpu::ParallelFor loop(bool backwards) { return {backwards ? run_backwards : run_at_once}; }

void adaln_forward(const py::array& x, py::array out, const Array& branch, const Array& gate, Array residual_out,
                   const Array& shift, const Array& scale, const Array& weight, const Array& bias, Array mean, Array rstd,
                   bool rms, double eps, bool backwards) {
  AdaLNForwardParams p{};
  p.x = stream(x, x, "x");
  check(x.shape(2) > 0, "x", "D > 0");
  p.x_dtype = dtype_of(x, "x");
  p.out = stream_out(out, x, "out");
  p.out_dtype = dtype_of(out, "out");
  if (branch) {
    check(gate && residual_out, "gate, residual_out", "arrays, as branch was given");
    p.branch = stream(*branch, x, "branch");
    p.branch_dtype = dtype_of(*branch, "branch");
    p.residual_out = stream_out(*residual_out, x, "residual_out");
    check(dtype_of(*residual_out, "residual_out") == p.x_dtype, "residual_out", "x's dtype");
  }
  p.gate = modulation(gate, x, "gate");
  p.shift = modulation(shift, x, "shift");
  p.scale = modulation(scale, x, "scale");
  p.weight = vector(weight, x.shape(2), x, "weight");
  p.bias = vector(bias, x.shape(2), x, "bias");
  p.mean = vector_out(mean, x.shape(0) * x.shape(1), x, "mean");
  p.rstd = vector_out(rstd, x.shape(0) * x.shape(1), x, "rstd");
  p.batch = x.shape(0);
  p.tokens = x.shape(1);
  p.dim = x.shape(2);
  p.eps = eps;
  p.rms = rms;
  const auto given = [](const Array& a) { return a ? &*a : nullptr; };
  const auto apart = [&](const Array& written, const char* name, std::initializer_list<const py::array*> outputs) {
    if (!written) return;
    check_apart(*written, name, {&x, given(branch), given(gate), given(shift), given(scale)}, true);
    check_apart(*written, name, {given(weight), given(bias)});
    check_apart(*written, name, outputs);
  };
  apart(out, "out", {given(residual_out), given(mean), given(rstd)});
  apart(residual_out, "residual_out", {given(mean), given(rstd)});
  apart(mean, "mean", {given(rstd)});
  apart(rstd, "rstd", {});
  const auto wide = [](DType t) { return t == DType::kFloat64; };
  for (const DType t : {p.out_dtype, branch ? p.branch_dtype : p.x_dtype, gate ? p.gate.dtype : p.x_dtype,
                        shift ? p.shift.dtype : p.x_dtype, scale ? p.scale.dtype : p.x_dtype})
    check(wide(t) == wide(p.x_dtype), "a dtype", "float64 for all arrays or for none");
  cpu::adaln_forward(p, loop(backwards));
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("compiler"_a = FASTDIFF_COMPILER, "torch_at_build"_a = FASTDIFF_TORCH_VERSION,
                  "oldest_torch"_a = FASTDIFF_OLDEST_TORCH);
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("f16c");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512vl");
  FEATURE("avx512dq");
  FEATURE("avx512bf16");
#undef FEATURE
#elif defined(__aarch64__)
  features["neon"] = true;
#endif
  return features;
}

py::list isa_names() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); i++) names.append(cpu::kIsaNames[i]);
  return names;
}

void choose_isa(const std::string& name) {
  if (!cpu::choose_isa(name.c_str()))
    throw py::value_error("unknown or unsupported instruction set '" + name + "'; expected one of isa_names()");
}

void set_tuning(const std::string& name, int64_t value) {
  if (!cpu::set_tuning(name.c_str(), value))
    throw py::value_error(name + ": got " + std::to_string(value) +
                          "; expected thread_grain or stream_bytes, and a number, at least 0");
}

py::dict tuning() {
  using namespace py::literals;
  return py::dict("thread_grain"_a = cpu::thread_grain(), "stream_bytes"_a = cpu::stream_bytes());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_features", &cpu_features, "What the CPU has of the features that kernels are compiled for.");
  m.def("isa_names", &isa_names, "The instruction sets that can run here, the best last.");
  m.def("isa", [] { return cpu::kIsaNames[static_cast<int>(cpu::chosen_isa())]; }, "The one that kernels run with.");
  m.def("isa_error", &cpu::isa_error, "Why FASTDIFF_CPU_ISA could not be obeyed, or None.");
  m.def("tuning", &tuning, "The sizes at which kernels change how they work, and never what they compute.");
  m.def("set_tuning", &set_tuning, py::arg("name"), py::arg("value"),
        "Sets one of tuning() for the process; 0 goes back to the default.");
  m.def("choose_isa", &choose_isa, py::arg("name"), "For tests; users set FASTDIFF_CPU_ISA before the import.");
  m.def("adaln_forward", &adaln_forward, py::arg("x"), py::arg("out"), py::kw_only(), py::arg("branch") = py::none(),
        py::arg("gate") = py::none(), py::arg("residual_out") = py::none(), py::arg("shift") = py::none(),
        py::arg("scale") = py::none(), py::arg("weight") = py::none(), py::arg("bias") = py::none(),
        py::arg("mean") = py::none(), py::arg("rstd") = py::none(), py::arg("rms") = false, py::arg("eps") = 1e-6,
        py::arg("backwards") = false,
        "The raw kernel on NumPy arrays [B, N, D]; modulations [1 or B, F, D]; bfloat16 as its bits in uint16.");
}

}  // namespace fastdiff

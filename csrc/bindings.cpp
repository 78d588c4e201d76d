// Everything that depends on Python: the module, its arguments, and one Python exception.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include "cpu/cache.h"
#include "cpu/instruction_set.h"
#include "explain.h"
#include "operator.h"

// Accepts the same values as torch's own float arguments; tensors must have no dimension and require no gradient.
template <>
struct pybind11::detail::type_caster<bn_ext::Number> {
  PYBIND11_TYPE_CASTER(bn_ext::Number, const_name("float"));

  bool load(handle source, bool /*convert*/) {
    PyObject* object = source.ptr();
    if (!PyFloat_Check(object) && !is_number(source)) return false;
    value.value = PyFloat_AsDouble(object);
    if (value.value != -1 || PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }

 private:
  static bool is_number(handle source) {
    PyObject* object = source.ptr();
    make_caster<at::Tensor> tensor;
    if (isinstance(source, class_of("Tensor")) && tensor.load(source, false)) {
      return static_cast<at::Tensor&>(tensor).dim() == 0 && !static_cast<at::Tensor&>(tensor).requires_grad();
    }
    return PyLong_Check(object) || torch::utils::is_numpy_scalar(object) || isinstance(source, class_of("SymFloat")) ||
           isinstance(source, class_of("SymInt"));
  }

  // By name, because torch's header for these classes takes longer to compile than this whole file.
  static handle class_of(const char* name) { return module_::import("torch").attr(name).ptr(); }
};

namespace bn_ext {

double cumulative_momentum(const at::Tensor& count) {
  const double raised = count.item<double>() + 1;
  if (raised == 0) {
    const pybind11::gil_scoped_acquire gil;
    PyErr_SetString(PyExc_ZeroDivisionError,
                    "float division by zero: momentum=None requires num_batches_tracked >= 0, got -1");
    python_error error;
    error.persist();
    throw error;
  }
  return 1.0 / raised;
}

}  // namespace bn_ext

namespace {

// Defines one of the two functions with this signature. They skip the dispatcher's search for an overload.
template <typename Function>
void define(py::module_& m, const char* name, Function function) {
  m.def(name,
        torch::wrap_pybind_function_no_gil(function),
        py::arg("input"),
        py::arg("running_mean"),
        py::arg("running_var"),
        py::arg("weight"),
        py::arg("bias"),
        py::arg("training").noconvert(),
        py::arg("momentum"),
        py::arg("eps"),
        py::arg("num_batches_tracked"),
        py::arg("residual"),
        py::arg("activation"),
        py::arg("activation_parameter"),
        py::arg("skip_nonfinite").noconvert(),
        py::arg("skip_recomputed").noconvert());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  define(m, "batch_norm", bn_ext::batch_norm_from_python<at::Tensor>);
  define(m, "batch_norm_and_saved", bn_ext::batch_norm_from_python<bn_ext::TensorAndSaved>);
  m.def("instruction_set", &bn_ext::cpu::instruction_set);
  m.def("usable_cache_bytes", &bn_ext::cpu::usable_cache_bytes, py::arg("reported"), py::arg("threads"));
  m.def("last_level_cache_bytes", &bn_ext::cpu::last_level_cache_bytes, py::arg("threads"));
  m.def("explain",
        &bn_ext::explain,
        py::kw_only(),
        py::arg("n"),
        py::arg("c"),
        py::arg("s"),
        py::arg("channels_last"),
        py::arg("dtype"),
        py::arg("training"),
        py::arg("activation"),
        py::arg("activation_parameter"),
        py::arg("residual"),
        py::arg("multiprocessors"),
        py::arg("shared_bytes"),
        py::arg("clusters"));
}

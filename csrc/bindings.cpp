// Names only: the operators' schemas and the Python module.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_symnode.h>
#include <torch/csrc/utils/tensor_numpy.h>
#include <torch/library.h>

#include "cpu/instruction_set.h"
#include "explain.h"
#include "operator.h"

// What torch's own functions take for a float: of tensors those of no dimension and no gradient.
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
    if (THPVariable_Check(object)) {
      const at::Tensor& tensor = THPVariable_Unpack(object);
      return tensor.dim() == 0 && !tensor.requires_grad();
    }
    return PyLong_Check(object) || torch::utils::is_numpy_scalar(object) || torch::is_symfloat(source) ||
           torch::is_symint(source);
  }
};

namespace {

// flexible_layout: Inductor gives convolutions their input with channels last, whatever the model's memory format. To
// be called with the strides that were traced, as operators are by default, costs a copy before each batch norm and
// one behind it, forward and backward. The price: strides of large contiguous tensors may come padded, on a GPU, and
// then the operators make the copy.
const std::vector<at::Tag> kTags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};

}  // namespace

TORCH_LIBRARY(bn_ext, m) {
  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None, "
      "Tensor? bias=None, bool training=False, float? momentum=0.1, float eps=1e-05, *, "
      "Tensor(c!)? num_batches_tracked=None, Tensor? residual=None, str? activation=None, "
      "float activation_parameter=0.0, bool skip_nonfinite=False, bool skip_recomputed=False) -> Tensor",
      kTags);
  m.def("activate(Tensor input, str activation, float activation_parameter) -> Tensor");
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, "
      "str? activation=None, float activation_parameter=0.0, MemoryFormat? mask_format=None, "
      "bool skip_nonfinite=False, bool skip_recomputed=False) -> (Tensor y, Tensor saved, Tensor mask)",
      kTags);
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, str? activation=None, float activation_parameter=0.0, "
      "MemoryFormat? mask_format=None) -> (Tensor y, Tensor saved, Tensor mask)",
      kTags);
  m.def(
      "batch_norm_repeat(Tensor input, Tensor saved, Tensor? residual, str? activation=None, "
      "float activation_parameter=0.0) -> Tensor",
      kTags);
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor saved, Tensor? residual, Tensor? mask, "
      "MemoryFormat? mask_format, bool training, str? activation, float activation_parameter, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      kTags);
}

namespace {

// The two functions of one signature, called without the dispatcher's search for an overload.
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

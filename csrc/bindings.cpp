// Names only: the operators' schemas and the Python module.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "autograd.h"
#include "cpu/instruction_set.h"

TORCH_LIBRARY(bn_ext, m) {
  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None, "
      "Tensor? bias=None, bool training=False, float? momentum=0.1, float eps=1e-05, *, "
      "Tensor(c!)? num_batches_tracked=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
      "-> (Tensor y, Tensor mean, Tensor rstd)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor mean, Tensor rstd, bool training, "
      "bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("batch_norm",
        torch::wrap_pybind_function_no_gil(bn_ext::batch_norm_from_python),
        py::arg("input"),
        py::arg("running_mean"),
        py::arg("running_var"),
        py::arg("weight"),
        py::arg("bias"),
        py::arg("training").noconvert(),
        py::arg("momentum"),
        py::arg("eps"),
        py::arg("num_batches_tracked"));
  m.def("instruction_set", &bn_ext::cpu::instruction_set);
}

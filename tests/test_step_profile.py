"""What the benchmark of whole models takes for batch norm, by the names of kernels and operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.training import step_profile
from benchmarks.training.step_profile import ELEMENTWISE, NORM, OTHER, classify, seconds_by_name, shares

NATIVE = "void at::native::"
VECTORIZED = NATIVE + "vectorized_elementwise_kernel<4, at::native::"
# As torch.profiler prints them; template arguments are shortened where they tell nothing.
NAMES = {
    NORM: [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>(cudnnTensorStruct, float const*)",
        "void cudnn::bn_fw_tr_1C11_singleread<__nv_bfloat16, 512, true, 1, 2, 0>(cudnnTensorStruct)",
        "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(float, float, float, float)",
        "void cudnn::bn_bw_1C11_singleread<__nv_bfloat16, 512, true, 1, 2, 0>(float, float, float, float)",
        "void cudnn::detail::bn_fw_tr_1CHW_kernel_new<float, float, bool=1, int=4>(float, cudnnTensorStruct)",
        "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16, float, float, 512, true>(int)",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16, float, float, 512, true>(int)",
        "nhwc_batch_norm_fwd",
        NATIVE + "batch_norm_collect_statistics_kernel<at::native::InvStd, float, float, float, int>(at::Generic)",
        NATIVE + "batch_norm_transform_input_kernel<c10::BFloat16, float, float, true, int>(at::Generic)",
        NATIVE + "batch_norm_collect_statistics_channels_last_kernel<at::native::InvStd, c10::BFloat16, float, 4>(int)",
        NATIVE + "batch_norm_transform_input_channels_last_kernel<c10::BFloat16, float, float, 4>(int)",
        NATIVE + "batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16, float, float>(int)",
        NATIVE + "batch_norm_backward_elemt_channels_last_kernel_impl<4, c10::BFloat16, float, float>(int)",
        NATIVE + "batch_norm_backward_kernel<c10::BFloat16, float, float, int>(at::GenericPackedTensorAccessor)",
        "void bn_ext::cuda::(anonymous namespace)::apply_kernel<__nv_bfloat16, 8>(bn_ext::cuda::Plan)",
        "void bn_ext::cuda::(anonymous namespace)::single_pass_backward_kernel<float, float>(bn_ext::cuda::Plan)",
        "bn_ext::cuda::(anonymous namespace)::finalise_gradients_kernel(bn_ext::cuda::Plan)",
        "triton_red_fused__native_batch_norm_legit_functional_2",
        "triton_poi_fused__native_batch_norm_legit_functional_add_relu_17",
        "triton_red_fused_convolution_backward_native_batch_norm_backward_threshold_backward_4",
        "aten::native_batch_norm",
        "aten::native_batch_norm_backward",
        "autograd::engine::evaluate_function: NativeBatchNormBackward0",
        "bn_ext::batch_norm_forward",
        "bn_ext::batch_norm_backward",
        "bn_ext::batch_norm_repeat",
    ],
    ELEMENTWISE: [
        VECTORIZED + "(anonymous namespace)::launch_clamp_scalar(at::Tensor"
        "IteratorBase&, c10::Scalar, c10::Scalar, at::native::detail::ClampLimits)::{lambda()#1}>(int)",
        VECTORIZED + "(anonymous namespace)::threshold_kernel_impl<c10::BFloat16>"
        "(at::TensorIteratorBase&, c10::BFloat16, c10::BFloat16)::{lambda(c10::BFloat16, c10::BFloat16)#1}>(int)",
        VECTORIZED + "CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >",
        VECTORIZED + "(anonymous namespace)::silu_backward_kernel(at::Tensor)>",
        NATIVE + "elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<"
        "c10::BFloat16, c10::BFloat16, c10::BFloat16, at::native::binary_internal::MulFunctor<float> > > >",
        "triton_poi_fused_add_relu_3",
        "triton_poi_fused_add_threshold_backward_31",
        "triton_poi_fused_convolution_silu_5",
        "triton_per_fused_hardswish_mean_8",
        "aten::relu_",
        "aten::clamp_min_",
        "aten::threshold_backward",
        "aten::add_",
        "aten::silu_backward",
        "aten::hardswish_",
        "aten::mul",
    ],
    OTHER: [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x5_nhwc>(int)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>(int)",
        "nvjet_tst_128x64_64x8_2x1_v_bz_TNT",
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, long>(c10::BFloat16 const*)",
        NATIVE + "(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<2>, BinaryOpListAlphaFunctor<float, 2, 2, 0>, std::plus<float>, float>",
        NATIVE + "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        VECTORIZED + "bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>",
        VECTORIZED + "FillFunctor<float>, std::array<char*, 1ul> >(int)",
        NATIVE + "(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 4>",
        NATIVE + "reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float> > >",
        "triton_poi_fused__to_copy_0",
        "triton_poi_fused_max_pool2d_with_indices_2",
        "Memset (Device)",
        "Memcpy DtoD (Device -> Device)",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "aten::addmm",
        "aten::copy_",
        "aten::_foreach_add_",
        "Optimizer.step#SGD.step",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in NAMES.items() for name in names])
def test_names(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_shares_add_up() -> None:
    found = shares({"aten::native_batch_norm": 3.0, "aten::relu_": 2.0, "aten::addmm": 4.0, "bn_ext::batch_norm": 1.0})
    assert found["seconds"] == {NORM: 4.0, ELEMENTWISE: 2.0, OTHER: 4.0}
    assert found["longest"][0] == ["aten::addmm", OTHER, 4.0]


def test_the_optimizers_additions_are_not_the_models() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

    def step() -> None:
        model(torch.ones(2, 3)).add(1.0).sum().backward()
        optimizer.step()
        optimizer.step()

    seconds = seconds_by_name(step, torch.device("cpu"))
    assert "aten::add" in seconds
    assert "aten::mul_" not in seconds  # momentum
    assert seconds["Optimizer.step#SGD.step"] > 0


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the profiler saw nothing"):
        seconds_by_name(lambda: None, torch.device("cpu"))


def test_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the profiler's events only kernels count, not what launched them or spans them."""

    def event(name: str, device: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        time = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=time, is_user_annotation=annotation)

    events = [
        event("cudaLaunchKernel", DeviceType.CPU, 9.0),
        event("bn_ext::cuda::apply_kernel", DeviceType.CUDA, 2.0),
        event("bn_ext::cuda::apply_kernel", DeviceType.CUDA, 3.0),
        event("Optimizer.step#SGD.step", DeviceType.CUDA, 50.0, annotation=True),
    ]
    steps = []

    @contextmanager
    def profile(activities: list[ProfilerActivity]) -> Iterator[SimpleNamespace]:
        assert activities == [ProfilerActivity.CUDA]
        yield SimpleNamespace(events=lambda: events)
        assert steps == ["step", "synchronize"]

    monkeypatch.setattr(step_profile, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: steps.append("synchronize"))
    found = seconds_by_name(lambda: steps.append("step"), torch.device("cuda"))
    assert found == {"bn_ext::cuda::apply_kernel": pytest.approx(5e-6)}

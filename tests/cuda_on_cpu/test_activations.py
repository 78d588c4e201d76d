"""Activation and residual in the CUDA kernels: results, kinks, masks, the pass once more, what must not be touched."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bn_ext import testing

from . import build
from .batch_norm import Settings, kernels, with_multiprocessors
from .device import POLICIES
from .fused import ACTIVATIONS, check, make_residual, reference
from .operators import CudaOnCpu, bits, like, memory_of, shape_of
from .structs import SAVED, activation
from .test_kernels import DTYPES, random_call

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason=build.MISSING),
    pytest.mark.usefixtures("every_path"),
]

# Narrow and wide planes, of values that fill bytes of a mask and that do not; accesses of 1, 2, 4 and 8 values.
SHAPES = [(3, 8, 6, 6), (2, 3, 20, 20), (4, 6, 5, 4), (2, 5, 7, 7), (3, 6, 3, 2), (3, 2, 18, 18), (3, 12, 5, 1)]
LAYOUTS = ["contiguous", "channels_last"]
RELU_LIKE = ["relu", "leaky_relu", "relu6"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation_agrees_with_float64(dtype: torch.dtype, layout: str, training: bool) -> None:
    """With a residual and without; one of each kind of kernel on every shape."""
    shapes, orders = itertools.cycle(SHAPES), itertools.cycle(POLICIES)
    calls = [(name, has, next(shapes)) for name, has in itertools.product(ACTIVATIONS, (True, False))]
    calls += [(name, True, shape) for name, shape in itertools.product(("relu", "gelu"), SHAPES)]
    for seed, (name, has_residual, shape) in enumerate(calls):
        operator = CudaOnCpu(Settings(with_multiprocessors(1 + seed % 3), policy=next(orders), seed=seed))
        check(operator, testing.Case(shape, dtype, layout, training, seed=seed), name, has_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", ["x", "y", "z", "dx", "dy", "dz"])
def test_one_misaligned_tensor_narrows_all_accesses(tensor: str, dtype: torch.dtype) -> None:
    """The device refuses a wide access at its address."""
    size = torch.finfo(dtype).bits // 8
    for name, shape in itertools.product(("relu", "gelu"), ((3, 16, 7, 7), (2, 2, 32, 20))):
        operator = CudaOnCpu(Settings(misalignment=4, misaligned=(tensor,)))
        check(operator, testing.Case(shape, dtype), name, True)
        narrow = [call.plan.vector * size == 4 for call in operator.calls]
        # x is read in both directions, and z where there is no mask.
        assert narrow == [
            tensor in ("x", "y", "z"),
            tensor in ("x", "dx", "dy", "dz") or (tensor, name) == ("z", "gelu"),
        ]


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 8000), (2, 3, 7), (3, 64, 49)])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_offsets_beyond_32_bits(shape: tuple[int, ...], name: str) -> None:
    """Images 3 * 2^30 values apart, in memory that is reserved, not used; bits of a mask too."""
    for dtype in (torch.float32, torch.bfloat16):
        check(CudaOnCpu(Settings(gap=3 * 2**30)), testing.Case(shape, dtype), name, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_are_those_of_torch(name: str | None, training: bool) -> None:
    """Values of exactly 0, 3, 6 and -3, and next to them: y, dz and dbias to the bit where torch's are exact."""
    values = torch.tensor([0.0, 3.0, 6.0, -3.0, 1.0, -1.0])
    values = torch.cat([values, values.nextafter(torch.tensor(9.0)), values.nextafter(torch.tensor(-9.0))])
    x, dy = torch.randn(2, 4, 18, 10).unbind()
    # From the bias alone, from the residual alone, and from both.
    for bias, z in ((values[:10], None), (torch.zeros(10), values[:10]), (torch.ones(10), values[:10] - 1)):
        weight, bias = torch.zeros(10, requires_grad=True), bias.clone().requires_grad_()
        mean, var = torch.zeros(10), torch.ones(10)
        residual = None if z is None else z.expand(4, 18, 10).mT.contiguous().requires_grad_()
        results = []
        given = {"activation": name, "alpha": ACTIVATIONS[name].alpha, "residual": residual}
        y = CudaOnCpu()(x.mT.contiguous(), mean, var, weight, bias, training, **given)
        before = bias.view(1, 10, 1) + (0 if residual is None else residual)
        their_y = ACTIVATIONS[name].function(before.expand(y.shape))
        for result in (y, their_y):
            inputs = [bias] if residual is None else [bias, residual]
            results.append([result.detach(), *torch.autograd.grad(result, inputs, dy.mT.contiguous())])
        exact = name in (None, *RELU_LIKE)
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            close = {"rtol": 0, "atol": 0} if exact and i != 1 else {"rtol": 4e-6, "atol": 4e-6}
            torch.testing.assert_close(a, b, **close)


def run_forward(x: Tensor, name: str | None, z: Tensor | None, settings: Settings, **options: Any) -> dict[str, Any]:
    """The forward pass in training, on vectors of 0.5 to 1.5."""
    channels = x.shape[1]
    dtype = "float64" if x.dtype == torch.float64 else "float32"
    vectors: dict[str, Any] = dict.fromkeys(["running_mean", "running_var", "num_batches_tracked"])
    if not options.setdefault("training", True):
        vectors |= {key: np.linspace(0.5, 1.5, channels, dtype=dtype) for key in ("running_mean", "running_var")}
    vectors |= {key: np.linspace(0.5, 1.5, channels, dtype=dtype) for key in ("weight", "bias")}
    return kernels().forward(
        *(shape_of(x), str(x.dtype).removeprefix("torch."), dtype, memory_of(x), vectors, settings),
        activation=activation(name, ACTIVATIONS[name].alpha),
        z=None if z is None else memory_of(z),
        **options,
    )


def tensors_of(case: testing.Case) -> tuple[testing.Inputs, Tensor]:
    """A case's tensors with the vectors of run_forward, and a residual."""
    inputs = testing.make_inputs(case)
    vector = torch.linspace(0.5, 1.5, case.shape[1], dtype=case.params_dtype)
    inputs.weight[:] = inputs.bias[:] = inputs.running_mean[:] = inputs.running_var[:] = vector
    return inputs, make_residual(case, inputs.input)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype, layout: str, training: bool) -> None:
    """A bit tells whether a value passed, in the order of memory, whichever way it was written."""
    size = torch.finfo(dtype).bits // 8
    ways = set()
    misalignments = [m for m in (0, 8, 4, 2) if m % size == 0]
    for seed, (shape, misalignment) in enumerate(itertools.product(SHAPES, misalignments)):
        name = RELU_LIKE[seed % 3]
        case = testing.Case(shape, dtype, layout, training, seed=seed)
        inputs, z = tensors_of(case)
        settings = Settings(with_multiprocessors(1 + seed % 3), POLICIES[seed % 4], seed, misalignment)
        results = run_forward(inputs.input, name, z, settings, training=training, masks=True)
        expected = reference(case, inputs, name, z)
        passed = expected.before > 0
        if name == "relu6":
            passed &= expected.before < 6
        ours = like(inputs.input.to(torch.uint8), results["mask"].astype(np.uint8)).bool()
        assert ((ours == passed) | expected.near_kink).all(), (shape, misalignment)
        ways.add((results["plan"].vector, results["plan"].whole_bytes))
    assert ways == set(itertools.product([2**i for i in range(4) if 2**i * size <= 16], [True, False])) - {(8, False)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_once_more_gives_the_same_bits(name: str | None, layout: str, training: bool) -> None:
    """From what was saved, in one launch; parameters are not looked at, and nothing but y is written."""
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), SHAPES[:4]):
        inputs, residual = tensors_of(testing.Case(shape, dtype, layout))
        for z in (None, residual):
            masks = z is not None and name in RELU_LIKE
            first = run_forward(inputs.input, name, z, Settings(), training=training, masks=masks)
            saved = {key: first[key] for key in SAVED}
            again = kernels().forward(
                *(shape_of(inputs.input), str(dtype).removeprefix("torch."), "float32", memory_of(inputs.input)),
                {},
                Settings(with_multiprocessors(3), policy="random"),
                training=training,
                activation=activation(name, ACTIVATIONS[name].alpha),
                z=None if z is None else memory_of(z),
                masks=masks,
                saved=saved,
            )
            assert not masks or again["mask"].all()  # the poison that it was full of
            assert np.array_equal(first["y"].view(np.uint8), again["y"].view(np.uint8))
            assert all(np.array_equal(saved[key], again[key]) for key in SAVED)
            device, size = kernels().device, first["y"].nbytes
            assert device.launch_count() == 1
            assert device.counters("activation").bytes_read == (1 if z is None else 2) * size
            assert device.counters("activation").bytes_written == size
            assert device.counters("parameter").bytes_written == 0


def run_backward(
    forward: dict[str, Any],
    x: Tensor,
    dy: Tensor,
    name: str,
    z: Tensor | None,
    training: bool,
    wanted: tuple[bool, ...],
) -> dict[str, Any]:
    """The backward pass after run_forward."""
    return kernels().backward(
        *(shape_of(x), str(x.dtype).removeprefix("torch."), "float32", memory_of(dy), memory_of(x)),
        *(forward, Settings()),
        training=training,
        wanted=wanted,
        activation=activation(name, ACTIVATIONS[name].alpha),
        z=None if z is None else memory_of(z),  # not read where there is a mask
        mask=forward["mask"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "has_residual"), [("relu", True), ("leaky_relu", True), ("relu", False), ("silu", True), ("silu", False)]
)
def test_only_the_gradients_asked_for(name: str, has_residual: bool, training: bool, dtype: torch.dtype) -> None:
    """They are what they are together; no launch more than needed, and no byte."""
    for layout in LAYOUTS:
        case = testing.Case((4, 8, 6, 4), dtype, layout)
        inputs, residual = tensors_of(case)
        x, dy, z = inputs.input, inputs.dy, residual if has_residual else None
        masked = has_residual and name != "silu"
        forward = run_forward(x, name, z, Settings(), training=training, masks=masked)
        everything = run_backward(forward, x, dy, name, z, training, (True, True, True, has_residual))
        for wanted in itertools.product([True, False], [True, False], [True, False], [has_residual, False]):
            results = run_backward(forward, x, dy, name, z, training, wanted)
            for key, asked in zip(("dx", "dweight", "dbias", "dz"), wanted, strict=True):
                assert (results[key] is not None) == asked
                assert not asked or np.array_equal(results[key], everything[key]), key

            dx, dweight, dbias, dz = wanted
            sums = dweight or dbias or (training and dx)
            input_runs = (dx and (training or not sums)) or (dz and not sums)
            device, size = kernels().device, memory_of(x).nbytes
            if results["plan"].team > 0:  # test_single_pass.py counts that
                assert device.launch_count() == 1
                continue
            assert device.launch_count() == 2 * sums + input_runs
            u = 0 if masked else 2 if z is not None else 1  # tensors that u takes
            x_for_sums = dweight or (training and dx)
            reads = sums * (1 + (u or x_for_sums))
            mask_reads = masked * sums
            if input_runs and sums and dz and (name == "relu" or dtype == torch.float32):
                reads += 2  # dz and x
            elif input_runs:
                reads += 1 + (u or (training and dx))
                mask_reads += masked
            moved = device.counters("activation")
            mask_bytes = x.numel() // results["plan"].vector  # a byte for each access
            assert moved.bytes_read == reads * size + mask_reads * mask_bytes
            assert moved.bytes_written == (dx + dz) * size


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 65, 7, 7), (3, 3, 40, 52), (9, 48, 9, 9)])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_bit_equal_whatever_the_order_of_threads_and_blocks(name: str, shape: tuple[int, ...], layout: str) -> None:
    """Gradients come through the mask, whose bits are put together by several threads."""
    for dtype in (torch.float32, torch.bfloat16):
        given = {"activation": name, "residual": True}
        first = random_call(shape, dtype, layout, **given, policy="ascending")
        for policy, seed in itertools.product(POLICIES, range(2)):
            for a, b in zip(first, random_call(shape, dtype, layout, **given, policy=policy, seed=seed), strict=True):
                assert np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (3, 4, 30, 30)])
def test_one_gradient_for_all(shape: tuple[int, ...], name: str, training: bool) -> None:
    x, z = torch.randn(2, *shape).unbind()
    leaves = [t.requires_grad_() for t in (x, torch.rand(shape[1]), torch.rand(shape[1]), z)]
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    for count in (3, 4):  # without a residual, and with it
        gradients = []
        operator = CudaOnCpu()
        for dy in (torch.tensor(0.7).expand(shape), torch.full(shape, 0.7)):
            residual = leaves[3] if count == 4 else None
            y = operator(*(leaves[0], mean, var, *leaves[1:3], training), activation=name, residual=residual)
            gradients.append(torch.autograd.grad(y, leaves[:count], dy))
        # No team keeps a dy of one value, so they may be of kernels that sum in another order.
        close = 1e-5 * (operator.calls[3].plan.team_name != "none")
        for expanded, full in zip(*gradients, strict=True):
            torch.testing.assert_close(expanded, full, rtol=close, atol=close)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_inf_and_nan_stay_where_they_belong(bad: float, name: str, training: bool) -> None:
    """One in x stays in its channel; one in the residual at its place in y and dz, and meets dx only by way of sums."""
    for layout, width in itertools.product((torch.contiguous_format, torch.channels_last), (3, 16)):
        x, z, dy = (t.contiguous(memory_format=layout) for t in torch.randn(3, 4, 5, 6, width).unbind())
        place = (3, 2, 5, width - 1)

        def run(x: Tensor, z: Tensor, dy: Tensor) -> list[Tensor]:
            leaves = [x.clone().requires_grad_(), z.clone().requires_grad_()]
            mean, var = torch.zeros(5), torch.ones(5)
            y = CudaOnCpu()(leaves[0], mean, var, None, None, training, activation=name, residual=leaves[1])
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        clean = run(x, z, dy)
        others = [0, 1, 3, 4]
        for tensor in range(3):
            given = [x.clone(), z.clone(), dy.clone()]
            given[tensor][place] = bad
            results = run(*given)
            for result, without in zip(results, clean, strict=True):
                assert torch.equal(result[:, others], without[:, others])
            if tensor == 1:
                elsewhere = torch.ones(x.shape, dtype=torch.bool)
                elsewhere[place] = False
                assert torch.equal(results[0][elsewhere], clean[0][elsewhere])
                assert torch.equal(results[2][elsewhere], clean[2][elsewhere])
                if name in RELU_LIKE:  # its derivative is a number everywhere
                    assert all(torch.isfinite(gradient).all() for gradient in results[1:])


@pytest.mark.parametrize("name", ["relu", "relu6"])
@pytest.mark.parametrize("has_residual", [True, False])
def test_an_infinite_gradient_does_not_pass_where_a_value_did_not(name: str, has_residual: bool) -> None:
    """Zero times infinity is not made."""
    x, z = torch.randn(2, 4, 5, 6, 8).unbind()
    x, z = x.requires_grad_(), z.requires_grad_()
    y = CudaOnCpu()(
        *(x, torch.zeros(5), torch.ones(5), None, None, False), activation=name, residual=z if has_residual else None
    )
    dy = torch.where(y > 0, 1.0, torch.inf)
    dx = torch.autograd.grad(y, x, dy)[0]
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_saved_scale_is_the_saved_rstd_times_weight(dtype: torch.dtype, training: bool) -> None:
    """To the bit, in the dtype of what is saved; in eval mode mean and offset are those given."""
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        results = run_forward(x, None, None, Settings(), training=training)
        assert np.array_equal(results["scale"], results["rstd"] * results["weight"])
        if not training:
            assert np.array_equal(results["offset"], results["bias"])
            assert np.array_equal(results["mean"], results["running_mean"])

"""bn_ext.explain: the plan of a CUDA pass in words and numbers, on machines without a GPU too."""

import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bn_ext
from bn_ext import __main__
from bn_ext.activations import NAMES
from bn_ext.explain import GPUS

SHAPE = (32, 64, 56, 56)
N = 32 * 64 * 56 * 56 * 2
BFLOAT16 = {"dtype": torch.bfloat16, "device": "H200"}


def multiples(explanation: bn_ext.Explanation) -> list[float]:
    """Of N: what is read and written, forward and backward."""
    passes = (explanation.forward, explanation.backward)
    return [count / explanation.tensor_bytes for p in passes for count in (p.bytes_read, p.bytes_written)]


def test_contiguous_on_an_h200() -> None:
    """Clusters keep the 64 channels, each of 32 * 56 * 56 values."""
    e = bn_ext.explain(SHAPE, **BFLOAT16)
    assert e.tensor_bytes == N
    for plan, direction, moved, multi_kernel in ((e.forward, "forward", 2, 3), (e.backward, "backward", 3, 5)):
        assert (plan.direction, plan.team, plan.launches, plan.kept) == (direction, "cluster", 1, 1)
        assert (plan.slices, plan.slice_channels, plan.slice_bytes) == (64, 1, N // 64)
        assert plan.blocks == 64 * plan.blocks_per_slice
        assert (plan.threads, plan.access_bytes) == (256, 16)
        assert plan.bytes_moved == moved * N
        assert (plan.multi_kernel_launches, plan.multi_kernel_bytes) == (3, multi_kernel * N)
        tiles = plan.slice_bytes / plan.blocks_per_slice * (moved - 1)
        assert tiles <= plan.shared_bytes < 1.2 * tiles
    text = str(e)
    assert "(32, 64, 56, 56), bfloat16, contiguous, training, planned for H200 (132 multiprocessors of 228 KiB" in text
    assert "N = 12.85 MB" in text
    assert "64 slices of 1 channel, 200.7 KB of each tensor" in text
    assert f"a cluster of {e.forward.blocks_per_slice} blocks holds a slice" in text
    assert "25.69 MB = 2.00 N: reads 1.00 N, writes 1.00 N; the multi-kernel path, 3 kernels, would move 3.00 N" in text
    assert "38.54 MB = 3.00 N: reads 2.00 N, writes 1.00 N; the multi-kernel path, 3 kernels, would move 5.00 N" in text
    assert "if not, the multi-kernel path runs that pass" in text
    assert "twice" not in text


def test_bytes_of_the_multi_kernel_path() -> None:
    """Whichever teams there are, those of one block too: three kernels, 3N and 5N."""
    for shape, team in (((32, 2048, 7, 7), "block"), (SHAPE, "cluster"), ((256, 64, 112, 112), "grid")):
        e = bn_ext.explain(shape, **BFLOAT16)
        assert (e.forward.team, e.backward.team) in ((team, team), (team, "grid"))
        assert [plan.multi_kernel_launches for plan in (e.forward, e.backward)] == [3, 3]
        assert [plan.multi_kernel_bytes // e.tensor_bytes for plan in (e.forward, e.backward)] == [3, 5]


def test_channels_last_on_an_h200() -> None:
    """Two slices of 64 bytes of each pixel, each of which half of the grid keeps."""
    e = bn_ext.explain(SHAPE, memory_format=torch.channels_last, **BFLOAT16)
    assert [e.forward.team, e.backward.team] == ["grid", "grid"]
    assert (e.forward.slices, e.forward.slice_channels, e.forward.slice_bytes) == (2, 32, N // 2)
    assert e.forward.blocks == 2 * e.forward.blocks_per_slice <= 2 * 132
    assert multiples(e) == [1, 1, 2, 1]
    assert "blocks of a cooperative grid hold a slice" in str(e)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_a100_has_no_clusters(memory_format: torch.memory_format) -> None:
    """What a multiprocessor's 164 KiB have no room for is read twice, and the words say how much."""
    small = bn_ext.explain(SHAPE, torch.bfloat16, memory_format, device="a100")
    assert {small.forward.team, small.backward.team} <= {"grid", "block"}
    assert small.gpu == GPUS["A100"]
    assert 2 * small.forward.shared_bytes <= 164 * 1024

    large = bn_ext.explain((256, *SHAPE[1:]), torch.bfloat16, torch.channels_last, device="A100")
    kept = large.forward.kept
    assert 0 < kept < 1
    assert large.forward.bytes_read == pytest.approx((2 - kept) * large.tensor_bytes)
    assert large.backward.bytes_read == pytest.approx(2 * (2 - large.backward.kept) * large.tensor_bytes)
    assert f"{100 * (1 - kept):.0f} % of x, which does not fit in shared memory" in str(large)


def test_eval_needs_no_team() -> None:
    e = bn_ext.explain(SHAPE, training=False, **BFLOAT16)
    assert [(p.team, p.launches, p.shared_bytes, p.kept) for p in (e.forward, e.backward)] == [
        ("none", 1, 0, 0),
        ("none", 2, 0, 0),
    ]
    assert multiples(e) == [1, 1, 2, 1]
    assert "none, because no tensor is read twice with running statistics" in str(e)
    assert "1 kernel\n" in str(e)
    assert "At the launch" not in str(e)


def test_activations_and_residual() -> None:
    """A mask is a bit per value; the residual is read once, and by a smooth activation's gradient again."""
    relu = bn_ext.explain(SHAPE, activation="relu", residual=True, **BFLOAT16)
    assert multiples(relu) == [2, 1 + 1 / 16, 2 + 1 / 16, 2]
    assert (relu.forward.mask_bytes, relu.backward.mask_bytes) == (N // 16, N // 16)
    assert "relu, residual" in str(relu)
    assert "0.80 MB of these, one bit per value, read once" in str(relu)

    silu = bn_ext.explain(SHAPE, activation=torch.nn.SiLU(), residual=True, **BFLOAT16)
    assert (silu.forward.team, silu.backward.team) == ("cluster", "none")
    assert not silu.backward.can_have_team
    assert multiples(silu) == [2, 1, 6, 2]
    assert "also needs the residual, and no team holds three tensors" in str(silu)

    leaky = bn_ext.explain((4, 3, 5, 7), activation=("leaky_relu", 0.2), residual=True, device="H200")
    assert leaky.activation == "leaky_relu(negative_slope=0.2)"
    assert "cleared, then changed in place" in str(leaky)
    alone = bn_ext.explain(SHAPE, residual=True, **BFLOAT16)
    assert multiples(alone) == [2, 1, 2, 1]  # its gradient is dy


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(GPUS["A100"], name="small", shared_bytes=4096)
    monkeypatch.setitem(GPUS, "SMALL", gpu)
    e = bn_ext.explain(SHAPE, torch.bfloat16, device="small")
    assert multiples(e) == [2, 1, 4, 1]
    assert [p.multi_kernel_bytes for p in (e.forward, e.backward)] == [p.bytes_moved for p in (e.forward, e.backward)]
    assert "too little of a slice would fit" in str(e)
    assert "x, for the statistics and for y" in str(e)


def test_every_kind_of_call() -> None:
    """Text and numbers for all cases; bytes between each tensor once and the multi-kernel path's."""
    formats = {torch.contiguous_format: (2, 4, 5), torch.channels_last: (4,), torch.channels_last_3d: (5,)}
    shapes = [(memory_format, rank) for memory_format, ranks in formats.items() for rank in ranks]
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    kinds = itertools.product(dtypes, shapes, (True, False), (None, *NAMES), (True, False), GPUS)
    for dtype, (memory_format, rank), training, activation, residual, gpu in kinds:
        shape = (6, 20, 9, 8, 3)[:rank]
        e = bn_ext.explain(
            shape, dtype, memory_format, training=training, activation=activation, residual=residual, device=gpu
        )
        for plan in (e.forward, e.backward):
            assert plan.bytes_moved <= plan.multi_kernel_bytes + e.tensor_bytes // dtype.itemsize // 8 + 1
            assert plan.bytes_read >= e.tensor_bytes <= plan.bytes_written
            assert (plan.launches == 1) if plan.team != "none" else (plan.launches == plan.multi_kernel_launches)
            assert (plan.shared_bytes > 0) == (plan.team != "none")
            assert str(plan.blocks) in str(e)


def test_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is asked for a device; without one and without a name it is an H200."""
    found = SimpleNamespace(
        name="a GPU", multi_processor_count=7, shared_memory_per_multiprocessor=100 * 1024, major=9, minor=0
    )
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bn_ext.explain(SHAPE).gpu == GPUS["H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in (None, "cuda:1", torch.device("cuda")):
        gpu = bn_ext.explain(SHAPE, device=device).gpu
        assert (gpu.name, gpu.multiprocessors, gpu.shared_bytes, gpu.clusters) == ("a GPU", 7, 100 * 1024, True)
    assert asked == [torch.device("cuda"), torch.device("cuda:1"), torch.device("cuda")]
    found.major = 8
    assert not bn_ext.explain(SHAPE, device="cuda").gpu.clusters


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "one dimension": (((5,),), {}, RuntimeError, "input must have at least 2 dimensions (N, C, ...), got 1D input"),
    "one value": (((1, 3, 1, 1),), {}, ValueError, "Expected more than 1 value per channel when training"),
    "empty": (((2, 0, 4, 4),), {}, ValueError, "input_shape must have no zero"),
    "negative": (((2, -3),), {}, RuntimeError, "negative dimension -3"),
    "a number": ((5,), {}, TypeError, "input_shape must be integers such as (N, C, H, W), got 5"),
    "words": ((("a", "b"),), {}, TypeError, "input_shape must be integers such as (N, C, H, W), got ('a', 'b')"),
    "int32": ((SHAPE, torch.int32), {}, NotImplementedError, "input must be float32, float64, float16 or bfloat16"),
    "no dtype": ((SHAPE, "bfloat16"), {}, TypeError, "dtype must be torch.dtype, not str"),
    "channels_last of 3": (((2, 3, 4), torch.float32, torch.channels_last), {}, ValueError, "for 4 dimensions"),
    "preserve_format": ((SHAPE, torch.float32, torch.preserve_format), {}, ValueError, "memory_format must be"),
    "activation": ((SHAPE,), {"activation": "swish"}, ValueError, "activation must be None, one of relu"),
    "training": ((SHAPE,), {"training": "no"}, TypeError, "'training' must be bool, not str"),
    "residual": ((SHAPE,), {"residual": torch.ones(2)}, TypeError, "residual must be True or False, not Tensor"),
    "cpu": ((SHAPE,), {"device": "cpu"}, ValueError, "must be a CUDA device or one of H200, H100, A100, got 'cpu'"),
    "unknown GPU": ((SHAPE,), {"device": "V100"}, ValueError, "one of H200, H100, A100, got 'V100'"),
    "too large": (((2**63, 3),), {}, ValueError, "input_shape must have sizes below 2^63"),
    "far too large": (((10**30, 3),), {}, ValueError, "input_shape must have sizes below 2^63"),
    "no memory format": ((SHAPE, torch.float32, []), {}, ValueError, "memory_format must be"),
    "no list": ((SHAPE,), {"device": ["H200"]}, ValueError, "must be a CUDA device or one of H200"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    args, kwargs, kind, words = WRONG[name]
    with pytest.raises(kind) as info:
        bn_ext.explain(*args, **kwargs)
    assert type(info.value) is kind
    assert words in str(info.value)


def test_no_device_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"torch sees no CUDA device: pass the name .*\(H200, H100, A100\)"):
        bn_ext.explain(SHAPE, device="cuda")
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        bn_ext.explain(SHAPE, device=0)


def test_it_runs_nothing_and_changes_nothing() -> None:
    """Of a shape that no memory would hold; and what is told cannot be changed."""
    e = bn_ext.explain((2**20, 2**10, 2**10), torch.float16, device="H200")
    assert e.tensor_bytes == 2**41
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.forward.team = "none"  # type: ignore[misc]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype=bfloat16", "--channels-last", "--activation=relu", "--residual", "--device=H200"]
    assert __main__.main(["explain", "32", "64", "56", "56", *options]) == 0
    expected = bn_ext.explain(SHAPE, memory_format=torch.channels_last, activation="relu", residual=True, **BFLOAT16)
    assert capsys.readouterr().out == f"{expected}\n"
    assert __main__.main(["explain", "32", "64", "--eval", "--device", "H100"]) == 0
    assert "(32, 64), float32, contiguous, eval, planned for H100" in capsys.readouterr().out
    assert __main__.main(["explain", "32"]) == 1
    assert capsys.readouterr().err == (
        "bn_ext explain: input must have at least 2 dimensions (N, C, ...), got 1D input\n"
    )


def test_without_the_extension() -> None:
    code = "import sys; sys.modules['bn_ext._C'] = None; import bn_ext; bn_ext.explain((2, 3, 4, 4))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RuntimeError: bn_ext's extension module cannot be loaded" in result.stderr

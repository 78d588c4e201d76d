"""What the package tells of itself: build_info, the command line, and that verify finds faults."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import bn_ext
from bn_ext import __main__, testing


def test_build_info_is_of_this_build() -> None:
    info = bn_ext.build_info()
    assert info.loaded
    assert info.reason == ""
    assert info.torch == torch.__version__
    assert info.torch_at_build.split(".")[:2] == torch.__version__.split(".")[:2]
    assert info.instruction_set in ("avx512", "avx2", "baseline")
    assert info.threads == torch.get_num_threads()
    assert info.cuda_reason
    text = str(info)
    for value in (info.version, info.torch, info.cuda_reason, info.instruction_set, f"{info.threads} threads"):
        assert value in text
    assert info.version == bn_ext.__version__


def test_phase_clock_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a build that has it, and of no other."""
    assert not bn_ext.build_info().phase_clock
    assert "phase clock" not in str(bn_ext.build_info())
    config = type("Config", (), {name: "" for name in ("TORCH", "CUDA_REASON", "CUDA_ARCHITECTURES")})
    config.CUDA, config.PHASE_CLOCK = True, True
    monkeypatch.setitem(sys.modules, "bn_ext._build_config", config)
    assert bn_ext.build_info().phase_clock
    assert "with the phase clock" in str(bn_ext.build_info())


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import and build_info work all the same; the first call says what is wrong."""
    monkeypatch.setenv("BN_EXT_CPU_CAPABILITY", "sse9")
    code = "import torch, bn_ext; print(bn_ext.build_info()); bn_ext.BatchNorm1d(2)(torch.randn(3, 2))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for output in (result.stdout, result.stderr):
        assert re.search("BN_EXT_CPU_CAPABILITY must be one of .*baseline on this processor, got sse9", output)


def test_threads_are_those_of_now() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert bn_ext.build_info().threads == threads + 1
    finally:
        torch.set_num_threads(threads)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bn_ext", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_command_line() -> None:
    result = command()
    assert result.returncode == 0
    assert "CUDA kernels" in result.stdout
    wrong = command("verfy")
    assert wrong.returncode == 2
    assert "invalid choice: 'verfy'" in wrong.stderr


@pytest.mark.slow
def test_verify_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(\d+) of \1 within tolerance", lines[-1])
    assert sum(line.endswith("ok") for line in lines) == 16 * len(testing.devices())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verify_on_one_device(device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(testing.verify, "__defaults__", (bn_ext.batch_norm, None, testing.SHAPES[:1]))
    there = device in testing.devices()
    assert __main__.main(["verify", "--device", device]) == int(not there)
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.endswith("ok")]
    assert all(line.startswith(device) for line in rows)
    assert bool(rows) is there
    assert ("--device cuda: bn_ext cannot run on it" in printed.err) is not there


FAULTS = {
    "y": lambda y, mean, var: (y * (1 + 1e-4), mean, var),
    "running_mean": lambda y, mean, var: (y, mean + 1e-4, var),
    "running_var": lambda y, mean, var: (y, mean, var * (1 - 1e-4)),
    "not finite": lambda y, mean, var: (torch.where(y == y.max(), torch.nan, y), mean, var),
}


@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds_a_fault(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest: object) -> torch.Tensor:
        y = bn_ext.batch_norm(x, mean, var, *rest)
        y, new_mean, new_var = FAULTS[name](y, mean.clone(), var.clone())
        mean.copy_(new_mean), var.copy_(new_var)
        return y

    monkeypatch.setattr(testing.verify, "__defaults__", (faulty, None, testing.SHAPES[:1]))
    assert __main__.main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("index", [0, 1, 2])
def test_check_finds_a_wrong_gradient(index: int) -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(t.view_as(t) for t in tensors)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(g * (1 + 1e-4) if i == index else g for i, g in enumerate(grads))

    def operator(x, mean, var, weight, bias, *rest):
        x, weight, bias = Faulty.apply(x, weight, bias)
        return bn_ext.batch_norm(x, mean, var, weight, bias, *rest)

    shares = testing.check(operator, testing.Case((8, 16, 7, 7)))
    wrong = ("dx", "dweight", "dbias")[index]
    assert shares[wrong] > 1
    assert all(share <= 1 for name, share in shares.items() if name != wrong)


def test_check_is_right_about_torch() -> None:
    assert max(testing.check(F.batch_norm, testing.Case((8, 16, 7, 7), torch.float64)).values()) <= 1


def test_check_finds_a_wrong_dtype() -> None:
    def operator(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return bn_ext.batch_norm(x.float(), *rest)

    assert testing.check(operator, testing.Case((8, 16), torch.bfloat16))["y"] == math.inf


IMPORT_WITHOUT = """
import sys
{fault}
import torch, bn_ext
print(bn_ext.build_info())
module = bn_ext.BatchNorm2d(3)
try:
    module(torch.randn(2, 3, 4, 4))
except RuntimeError as error:
    print("error:", error)
from bn_ext.__main__ import main
print("status", main(["verify"]))
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("sys.modules['bn_ext._build_config'] = None", "bn_ext has not been built"),
        (
            "import types; sys.modules['bn_ext._build_config'] = types.SimpleNamespace(TORCH='2.0.1', CUDA=False, "
            "CUDA_REASON='', CUDA_ARCHITECTURES='')",
            "was built against torch 2.0.1, but this is torch",
        ),
        ("sys.modules['bn_ext._C'] = None", "extension module cannot be loaded"),
    ],
)
def test_import_always_works_and_says_later_what_is_missing(fault: str, words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT.format(fault=fault)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(rf"extension +not loaded: .*{words}", result.stdout)
    assert re.search(rf"error: .*{words}.*pip install --no-build-isolation", result.stdout)
    assert "status 1" in result.stdout

"""What all tests share: the devices of this machine, and a fixed seed for each test."""

import os
from collections.abc import Iterator

# Compiled graphs that torch keeps on disk outlive a run: an earlier run, even of older sources, would decide what
# this one tests. Torch 2.11 also gives back a backward of other strides, where it forgot to guard them
# (two convolutions and dynamic=True are enough). Read when torch is imported; processes that tests start inherit it.
os.environ.update(TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_AUTOGRAD_CACHE="0")
# Two test processes share the processors: an OpenMP thread that spins while it waits slows down the other process.
# Without that, tests take a quarter less time. Read when OpenMP is loaded, with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from helpers import devices, heartbeat
from helpers.processes import Workers

from bn_ext import build_info, testing


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device: a run on a GPU need not repeat what the CPU has passed."""
    words = "only what runs on this device; a test that asks for no device belongs to the CPU"
    parser.addoption("--device", choices=("cpu", "cuda"), help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers, and refuse a device that is not there instead of running nothing."""
    config.addinivalue_line("markers", "large_memory: needs tens of GB of memory, of the GPU where it runs on one")
    config.addinivalue_line("markers", "alone: asks what goes on meanwhile, so nothing else may use the GPU")
    config.addinivalue_line("markers", "processes: starts several processes")
    config.addinivalue_line("markers", "slow: even one case takes seconds; has no part in make test-quick")
    config.addinivalue_line("markers", "quick: the first case of each test that is not slow; set by conftest.py")
    heartbeat.register(config)
    chosen = config.getoption("--device")
    if chosen is not None and chosen not in testing.devices():
        info = build_info()
        reason = "torch sees no such device" if info.cuda else info.cuda_reason
        raise pytest.UsageError(f"--device={chosen}: bn_ext cannot run there: {reason}")


# First: pytest's own -m looks at the markers that this sets.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what belongs to another device than --device, and mark what is quick."""
    keep_device(config, items)
    mark_quick(items)


def keep_device(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--device")
    if chosen is None:
        return
    others = [item for item in items if device_of(item) != chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if device_of(item) == chosen]


def device_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("device", "cpu")) if callspec else "cpu"


def mark_quick(items: list[pytest.Item]) -> None:
    """Mark the first case of every test on each device, so that `make test-quick` touches each test once."""
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0], device_of(item)
        if function not in seen and item.get_closest_marker("slow") is None:
            item.add_marker("quick")
        seen.add(function)


@pytest.fixture(params=testing.devices())
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device that bn_ext has kernels for; what helpers make is on it too."""
    with devices.use(str(request.param)):
        yield str(request.param)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two processes in one group, the same for all tests."""
    pair = Workers(tmp_path_factory.mktemp("workers"))
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One process beside this one, the same for all tests, anew after a job that failed."""
    one = Workers(tmp_path_factory.mktemp("process"), count=1)
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """For a test that counts what torch.compile compiles, or sets how."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

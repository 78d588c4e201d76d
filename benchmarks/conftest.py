"""Options of the suite, its one session fixture, and the machine's description in pytest-benchmark's JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import cudnn_graph, machine
from .bench import SETTINGS, Bench, Settings
from .cells import FileError, Journal
from .names import CUDNN_GRAPH, PROVIDERS
from .providers import usual

QUICK_BATCH = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `python -m benchmarks` passes on."""
    group = parser.getgroup("bn_ext benchmarks")
    group.addoption("--quick", action="store_true", help="small batch and few rounds: does everything run?")
    group.addoption("--batch", type=int, nargs="+", help="batch sizes of the ResNet-50 cases (2 with --quick)")
    group.addoption("--providers", nargs="+", choices=PROVIDERS, help="who is measured; the others are left out")
    group.addoption("--budget", type=float, help="seconds after which no case is begun")
    group.addoption("--results", type=Path, help="the file that gets the cells")
    group.addoption("--resume", action="store_true", help="go on with that file")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device, and who is measured on it."""
    device = machine.best_device()
    quick = config.getoption("--quick")
    providers = tuple(config.getoption("--providers") or usual(device, quick))
    if cudnn_graph.unavailable(device):
        providers = tuple(name for name in providers if name != CUDNN_GRAPH)
    batches = tuple(config.getoption("--batch") or (QUICK_BATCH,) * quick)
    config.stash[SETTINGS] = Settings(device, providers, batches, quick, config.getoption("--budget"))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Make the run, with the copy figure measured before and after it."""
    config, settings = request.config, request.config.stash[SETTINGS]
    about = machine.describe(settings.device) | {"quick": settings.quick}
    about["unavailable"] = {CUDNN_GRAPH: cudnn_graph.unavailable(settings.device)}
    try:
        journal = Journal(config.getoption("--results"), about, config.getoption("--resume"))
    except FileError as error:
        pytest.exit(str(error), returncode=2)
    bench = Bench(journal, settings)
    bench.measure_copy()
    yield bench
    if request.session.exitstatus != pytest.ExitCode.INTERRUPTED:  # otherwise --resume goes on with what there is
        bench.measure_copy()
        bench.end()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drop the single rounds, which would be most of the file; median, quartiles and least stay."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave out the host's name."""
    machine_info.pop("node", None)

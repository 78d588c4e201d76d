"""Options of the suite, its one session fixture, and the machine's description in the JSON."""

from collections.abc import Iterator
from typing import Any

import pytest

from .bench import Bench

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quick and --batch, which `python -m benchmarks` passes on."""
    group = parser.getgroup("bn_ext benchmarks")
    group.addoption("--quick", action="store_true", help="small batch and few rounds: does everything run?")
    group.addoption("--batch", type=int, help="batch size of the ResNet-50 cases (32; 2 with --quick)")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Make the run, with the copy figure measured before and after it."""
    bench = Bench(request.config.getoption("--quick"), request.config.getoption("--batch"))
    request.config.stash[BENCH] = bench
    bench.measure_copy()
    yield bench
    bench.measure_copy()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drop the single rounds, which would be most of the file; median, quartiles and least stay."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the times depend on; leave out the host's name."""
    machine_info.pop("node", None)
    bench = config.stash.get(BENCH, None)
    if bench is not None:
        machine_info["run"] = bench.describe()

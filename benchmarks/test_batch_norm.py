"""bn_ext against its rivals: ResNet-50's shapes in all directions, layouts, dtypes; (N, C) inputs; what a call costs.

A test's name reads kind-case-nN-dtype-layout-operation-direction-provider, its kind being `resnet50` (batch norm
alone), `fused` (more than that), `rows` or `calls`: `-k "stem and bfloat16 and backward"` picks one comparison for each
layout and operation. selection.py says what is measured.
"""

from itertools import product

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .bench import SETTINGS, Bench, NotMeasuredError
from .check import WrongResultError
from .inputs import ROWS_LAYOUT, Case
from .measure import REPLAY
from .operations import PLAIN
from .selection import cases, directions


def kind(case: Case) -> str:
    """Say what a case is measured for."""
    if case.clock == "calls":
        return "calls"
    if case.layout == ROWS_LAYOUT:
        return "rows"
    return "resnet50" if case.operation == PLAIN else "fused"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case, direction and provider, in the order in which they are measured.

    Tests of a case are neighbours, and so are those of one comparison.
    """
    settings = metafunc.config.stash[SETTINGS]
    tests = [
        (case, direction, provider)
        for case in cases(settings.device.type, settings.batches)
        for direction, provider in product(directions(case), settings.providers_of(case))
    ]
    ids = [
        f"{kind(case)}-{case.name}-n{case.size[0]}-{case.dtype}-{case.layout}-{case.operation}-{direction}-{provider}"
        for case, direction, provider in tests
    ]
    metafunc.parametrize(("case", "direction", "provider"), tests, ids=ids)


@pytest.mark.benchmark(timer=REPLAY.read)
def test(bench: Bench, benchmark: BenchmarkFixture, case: Case, direction: str, provider: str) -> None:
    """Measure, or fail with the one sentence that says what is wrong."""
    refusal = ""
    try:
        bench.record(benchmark, case, direction, provider)
    except NotMeasuredError as reason:
        pytest.skip(str(reason))
    except WrongResultError as error:
        refusal = str(error)
    if refusal:
        pytest.fail(refusal, pytrace=False)

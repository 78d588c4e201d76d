"""bn_ext against torch.nn: ResNet-50's shapes in all directions, layouts, dtypes; (N, C) inputs; a call's cost.

A test's name reads case-dtype-layout-[operation-]direction-provider: `-k "stem and bfloat16 and backward"` picks one
pair for each layout and operation, `-k fused` all that is more than batch norm.
"""

from operator import attrgetter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .bench import Bench
from .check import WrongResultError
from .inputs import DTYPES, LAYOUTS, ROWS_LAYOUT, Case
from .measure import REPLAY
from .operations import FUSED, OPERATIONS, PLAIN
from .providers import OVERHEAD_DIRECTIONS, PROVIDERS
from .shapes import OVERHEAD, OVERHEAD_BATCH, RESNET50, ROWS, Shape


def record(bench: Bench, benchmark: BenchmarkFixture, case: Case, direction: str, provider: str) -> None:
    """Fill the entry, or fail with the one sentence that says what is wrong."""
    refusal = ""
    try:
        bench.record(benchmark, case, direction, provider)
    except WrongResultError as error:
        refusal = str(error)
    if refusal:
        pytest.fail(refusal, pytrace=False)


# The parameters of the topmost mark vary fastest: a case's tests are neighbours, and so are the two
# sides of a pair.
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", OPERATIONS[PLAIN].directions)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RESNET50, ids=attrgetter("name"))
@pytest.mark.benchmark(timer=REPLAY.read)
def test_resnet50(
    bench: Bench,
    benchmark: BenchmarkFixture,
    shape: Shape,
    dtype: str,
    layout: str,
    direction: str,
    provider: str,
) -> None:
    """A BatchNorm input of ResNet-50: how close to the speed of memory?"""
    case = Case(shape.name, shape.size(bench.batch), dtype, layout)
    record(bench, benchmark, case, direction, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("operation", "direction"),
    [(operation, direction) for operation in FUSED for direction in OPERATIONS[operation].directions],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RESNET50, ids=attrgetter("name"))
@pytest.mark.benchmark(timer=REPLAY.read)
def test_fused(
    bench: Bench,
    benchmark: BenchmarkFixture,
    shape: Shape,
    dtype: str,
    layout: str,
    operation: str,
    direction: str,
    provider: str,
) -> None:
    """The same inputs with an activation, and a residual before it: bn_ext's one call against torch's modules."""
    case = Case(shape.name, shape.size(bench.batch), dtype, layout, operation)
    record(bench, benchmark, case, direction, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", OPERATIONS[PLAIN].directions)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROWS, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.benchmark(timer=REPLAY.read)
def test_rows(
    bench: Bench, benchmark: BenchmarkFixture, size: tuple[int, int], dtype: str, direction: str, provider: str
) -> None:
    """An input without positions; its size is the same whatever the batch size of the others."""
    case = Case(f"rows_{size[0]}x{size[1]}", size, dtype, ROWS_LAYOUT)
    record(bench, benchmark, case, direction, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", OVERHEAD_DIRECTIONS)
@pytest.mark.benchmark(timer=REPLAY.read)
def test_overhead(bench: Bench, benchmark: BenchmarkFixture, direction: str, provider: str) -> None:
    """An input of 32 values: what does a call of the module cost?"""
    case = Case(OVERHEAD.name, OVERHEAD.size(OVERHEAD_BATCH), "float32", "contiguous")
    record(bench, benchmark, case, direction, provider)

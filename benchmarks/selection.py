"""Which cases are measured on a device, in which order, and beside whom: a GPU is often to be had for minutes only."""

from collections.abc import Iterator, Sequence
from itertools import product

from .inputs import LAYOUTS, ROWS_LAYOUT, Case
from .names import COMPILED, CUDNN_GRAPH, WITHOUT_CUDNN
from .operations import FUSED, OPERATIONS, PLAIN
from .shapes import DEFAULT_BATCH, OVERHEAD, OVERHEAD_BATCH, RESNET50, ROWS, Shape

ADD_RELU = "bn+add+relu"
CALL_DIRECTIONS = ("forward", "forward+backward")
# Large, middle and small ones: they stand for all twelve where not everything can be measured.
SAMPLE = tuple(RESNET50[i] for i in (0, 2, 4, 8, 10))
# For which a CPU compiles: at N = 32 one tensor that its caches hold and one that they do not.
SAMPLE_ON_CPU = (RESNET50[2], RESNET50[9])
OTHERS = tuple(shape for shape in RESNET50 if shape not in SAMPLE)
# Whose calls are timed by the clock on the wall too: where a GPU is done before the next call comes.
SMALL = tuple(shape for shape in RESNET50 if shape.height <= 14)
# On a GPU, the most telling first.
BLOCKS: tuple[tuple[str, str, tuple[int, ...], tuple[Shape, ...]], ...] = (
    ("bfloat16", PLAIN, (256, 32), SAMPLE),
    ("bfloat16", ADD_RELU, (256,), SAMPLE),
    ("float32", PLAIN, (256, 32), SAMPLE),
    ("bfloat16", PLAIN, (256, 32), OTHERS),
    ("float32", ADD_RELU, (256,), SAMPLE),
    ("float32", PLAIN, (256, 32), OTHERS),
    ("bfloat16", ADD_RELU, (256,), OTHERS),
    ("bfloat16", ADD_RELU, (32,), RESNET50),
    ("float16", PLAIN, (256,), SAMPLE),
    ("float16", ADD_RELU, (256,), SAMPLE),
    ("float32", ADD_RELU, (256, 32), RESNET50),
    ("bfloat16", "bn+relu", (256, 32), SAMPLE),
    ("float32", "bn+relu", (256,), SAMPLE),
    ("bfloat16", PLAIN, (128,), SAMPLE),
)


def small_calls(batch: int) -> Iterator[Case]:
    """Give the inputs of which the call itself is timed."""
    yield Case(OVERHEAD.name, OVERHEAD.size(OVERHEAD_BATCH), "float32", "contiguous", clock="calls")
    for dtype, shape in product(("bfloat16", "float32"), SMALL):
        yield Case(shape.name, shape.size(batch), dtype, "contiguous", clock="calls")


def on_a_gpu(batches: Sequence[int]) -> Iterator[Case]:
    """List the cases of BLOCKS, or their like of other batch sizes, the calls of small inputs, and rows."""
    yield from small_calls(min(batches) if batches else DEFAULT_BATCH)
    for dtype, operation, usual, shapes in BLOCKS:
        for batch, shape, layout in product(batches or usual, shapes, LAYOUTS):
            yield Case(shape.name, shape.size(batch), dtype, layout, operation)
    yield from rows()


def on_a_cpu(batches: Sequence[int]) -> Iterator[Case]:
    """List plain batch norm, then what is more, then rows and one call."""
    dtypes = ("float32", "bfloat16")
    for operations in ((PLAIN,), FUSED):
        for batch, shape, dtype, layout in product(batches or (DEFAULT_BATCH,), RESNET50, dtypes, LAYOUTS):
            for operation in operations:
                yield Case(shape.name, shape.size(batch), dtype, layout, operation)
    yield from rows()
    yield next(small_calls(DEFAULT_BATCH))


def rows() -> Iterator[Case]:
    """List the inputs without positions; their size does not depend on a batch size."""
    for size, dtype in product(ROWS, ("float32", "bfloat16")):
        yield Case(f"rows_{size[0]}x{size[1]}", size, dtype, ROWS_LAYOUT)


def cases(device: str, batches: Sequence[int] = ()) -> list[Case]:
    """List all cases of a device in the order in which they are measured; `batches` instead of the usual ones."""
    return list(dict.fromkeys(on_a_gpu(batches) if device == "cuda" else on_a_cpu(batches)))


def directions(case: Case) -> tuple[str, ...]:
    """Say in which directions a case is timed."""
    return CALL_DIRECTIONS if case.clock == "calls" else OPERATIONS[case.operation].directions


def largest_batch(device: str, batches: Sequence[int]) -> int:
    """Give the largest batch size of a device's cases."""
    return max(batches or (DEFAULT_BATCH, *(batch for block in BLOCKS for batch in block[2] if device == "cuda")))


def is_sampled(case: Case, device: str, compiled_batch: int) -> bool:
    """Whether something is compiled for a case: for some shapes at one batch size, because it takes seconds."""
    shapes = SAMPLE if device == "cuda" else SAMPLE_ON_CPU
    named = case.name in {shape.name for shape in shapes} and case.size[0] == compiled_batch
    return named and case.dtype != "float16" and (device == "cuda" or not OPERATIONS[case.operation].residual)


def providers_of(case: Case, providers: Sequence[str], device: str, compiled_batch: int) -> tuple[str, ...]:
    """Choose those that a case is measured with, in the order given.

    Where torch does not use cuDNN anyway, bfloat16, it is not measured without. By the clock on the wall a compiled
    module or a graph of cuDNN's is another thing than a module's call.
    """
    sampled = is_sampled(case, device, compiled_batch) and case.clock == "kernels"
    wanted = {
        WITHOUT_CUDNN: case.dtype != "bfloat16",
        COMPILED: sampled,
        CUDNN_GRAPH: sampled and case.layout == "channels_last",
    }
    return tuple(name for name in providers if wanted.get(name, True))

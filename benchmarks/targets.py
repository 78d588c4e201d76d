"""What bn_ext is to reach on a GPU, by geometric means over shapes and batch sizes, and by single cases."""

from typing import NamedTuple

from .operations import PLAIN

ADD_RELU = "bn+add+relu"
NATIVE_KERNELS = ("bfloat16",)
CUDNN_KERNELS = ("float32", "float16")


class Target(NamedTuple):
    """Geometric means of a rival's time divided by bn_ext's, over the cells that it is about."""

    about: str
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    operation: str
    directions: tuple[str, ...]  # each by itself
    eager: float  # of torch's faster way without its compiler
    compiled: float  # of torch.compile


BOTH = ("contiguous", "channels_last")
PASSES = ("forward", "backward")
TARGETS = (
    Target("bfloat16 contiguous, forward", ("bfloat16",), BOTH[:1], PLAIN, PASSES[:1], 4.0, 1.4),
    Target("bfloat16 contiguous, backward", ("bfloat16",), BOTH[:1], PLAIN, PASSES[1:], 4.0, 1.5),
    Target("float32, float16 contiguous, forward", CUDNN_KERNELS, BOTH[:1], PLAIN, PASSES[:1], 1.8, 1.4),
    Target("float32, float16 contiguous, backward", CUDNN_KERNELS, BOTH[:1], PLAIN, PASSES[1:], 1.8, 1.5),
    Target("bfloat16 channels_last, forward", ("bfloat16",), BOTH[1:], PLAIN, PASSES[:1], 1.8, 1.3),
    Target("bfloat16 channels_last, backward", ("bfloat16",), BOTH[1:], PLAIN, PASSES[1:], 1.8, 1.4),
    Target("float32, float16 channels_last, forward", CUDNN_KERNELS, BOTH[1:], PLAIN, PASSES[:1], 1.1, 1.3),
    Target("float32, float16 channels_last, backward", CUDNN_KERNELS, BOTH[1:], PLAIN, PASSES[1:], 1.1, 1.4),
    Target("BN+add+ReLU", ("bfloat16", "float32", "float16"), BOTH, ADD_RELU, ("forward+backward",), 2.2, 1.5),
)

# Contiguous tensors of so many bytes reach this share of the copy of large tensors, counting the least bytes.
LARGE_BYTES = 100e6
LARGE_SHARE = 0.85
# Tensors of planes of at most 14 x 14 at this batch size take at most this share of torch's time in a graph's replay.
SMALL_BATCH = 32
SMALL_TIME = 0.6

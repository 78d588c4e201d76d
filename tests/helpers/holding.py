"""A kernel that holds a GPU's multiprocessors for as long as a test wants."""

import functools
from types import TracebackType
from typing import Any

import torch

# One thread of a block polls: reads of the host's memory by all of them would delay what the host sends to the GPU. The
# others stay at the barrier.
HOLD = r"""
extern "C" __global__ void __launch_bounds__(1024) hold(volatile int* words, int longest) {
  const long long begin = clock64();
  if (threadIdx.x == 0) {
    words[1 + blockIdx.x] = 1;
    while (words[0] == 0 && (clock64() - begin) / 1000000 < longest) __nanosleep(1000);
  }
  __syncthreads();
}
"""
# That CUDA keeps of a multiprocessor's shared memory for each block, on GPUs since compute capability 8.0.
RESERVED = 1024


def half_of_shared_memory() -> int:
    """Bytes that a block asks for, so that two of them take all of a multiprocessor's.

    A multiprocessor changes its split between L1 cache and shared memory only when it is idle. A block without shared
    memory would leave it with a small share, and a team's block would find no room beside it however many threads
    there are.
    """
    gpu = torch.cuda.get_device_properties(0)
    return int(gpu.shared_memory_per_multiprocessor // 2 - RESERVED)


@functools.cache
def hold_kernel() -> Any:
    """The one above, which has run once, so that it is loaded, and may ask for as much shared memory as `Hold` does."""
    kernel = torch.cuda._compile_kernel(HOLD, "hold")
    kernel.set_shared_memory_config(half_of_shared_memory())
    kernel((1, 1, 1), (32, 1, 1), [torch.ones(2, dtype=torch.int32).pin_memory(), 1])
    torch.cuda.synchronize()
    return kernel


class Hold:
    """A kernel that keeps one half of each multiprocessor's threads and shared memory, or two, until it is released.

    After five thousand million cycles, a few seconds, it ends by itself.
    """

    def __init__(self, halves: int) -> None:
        gpu = torch.cuda.get_device_properties(0)
        self._kernel = hold_kernel()
        self._threads = gpu.max_threads_per_multi_processor // 2
        self._blocks = halves * gpu.multi_processor_count
        # In the host's memory: whether it is released, and of each block whether it has begun.
        self._words = torch.zeros(1 + self._blocks, dtype=torch.int32).pin_memory()
        self.stream = torch.cuda.Stream()

    def __enter__(self) -> "Hold":
        with torch.cuda.stream(self.stream):
            arguments = [self._words, 5000]
            self._kernel((self._blocks, 1, 1), (self._threads, 1, 1), arguments, half_of_shared_memory())
        while not bool(self._words[1:].all()):
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._words[0] = 1

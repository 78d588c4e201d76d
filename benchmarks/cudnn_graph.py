"""cuDNN's graph API (the package nvidia-cudnn-frontend) as a provider: forward, backward and eval are one graph each.

The graphs are those that cuDNN 9.19 has engines for on compute capability 9.0, where the values of a pixel fill whole
16 bytes. In training it takes either layout (contiguous tensors it transposes into the workspace and back), in eval
channels_last alone, so that a contiguous case is left out.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .operations import PLAIN

EPS, MOMENTUM = 1e-5, 0.1  # the defaults of torch.nn.BatchNorm2d
LEAST_VERSION = 8904  # of cuDNN: 8.9.4, as NVIDIA's tests of these graphs ask for
DATA_TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
RELU, ADD_RELU = "bn+relu", "bn+add+relu"

Memory = dict[str, Tensor]


class Unsupported(Exception):  # noqa: N818 (nothing is wrong: a case is left out)
    """A case that cuDNN or this file cannot do; the message is one sentence that says why."""


def unavailable(device: torch.device) -> str:
    """Say in one sentence why this provider cannot be had on `device`; say nothing if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "cuDNN's graph API needs an NVIDIA GPU."
    try:
        version = import_module("cudnn").backend_version()
    except (ImportError, OSError, RuntimeError) as error:
        return f"cuDNN's graph API needs a package (pip install nvidia-cudnn-frontend): {shorten(error)}."
    if version < LEAST_VERSION:
        return f"cuDNN {version} is too old for these graphs, which need {LEAST_VERSION} or newer."
    return ""


def shorten(error: Exception) -> str:
    """Give the first line of a message, and the first reason if there is one; cuDNN has some for each engine."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [line.partition("Reason:")[2].strip() for line in others if "Reason:" in line]
    return ": ".join([first.strip(), *reasons[:1]]).rstrip(".")


@cache
def handle() -> Any:
    """Give the one handle of the process."""
    return import_module("cudnn").create_handle()


class Kind(NamedTuple):
    """What cuDNN is told of a tensor."""

    dim: list[int]
    stride: list[int]
    data_type: Any  # a cudnn.data_type


class Graph:
    """A cuDNN graph for tensors like `x`; its tensors have names, and a call gets the memory of each."""

    def __init__(self, x: Tensor):
        self.cudnn = import_module("cudnn")
        self.device = x.device
        types = self.cudnn.data_type
        size, stride, channels = list(x.shape), list(x.stride()), x.size(1)
        self.activation = Kind(size, stride, getattr(types, DATA_TYPES[x.dtype]))
        self.mask = Kind(size, stride, types.BOOLEAN)
        self.vector = Kind([1, channels, 1, 1], [channels, 1, channels, channels], types.FLOAT)
        self.scalar = Kind([1, 1, 1, 1], [1, 1, 1, 1], types.FLOAT)
        self.ops = self.cudnn.pygraph(
            io_data_type=self.activation.data_type,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle(),
        )
        self.uids: dict[str, int] = {}
        self.workspace: Tensor

    def read(self, name: str, kind: Kind) -> Any:
        """Add an input; a scalar lies in the memory of the CPU and goes to the kernel by value."""
        uid = self.uids[name] = len(self.uids) + 1
        return self.ops.tensor(**kind._asdict(), name=name, uid=uid, is_pass_by_value=kind is self.scalar)

    def write(self, name: str, tensor: Any, kind: Kind) -> None:
        """Make a result an output."""
        uid = self.uids[name] = len(self.uids) + 1
        tensor.set_name(name).set_uid(uid).set_output(True)
        tensor.set_data_type(kind.data_type).set_dim(kind.dim).set_stride(kind.stride)

    def plan(self) -> None:
        """Ask for engines; where cuDNN has none it says so here, within milliseconds."""
        modes = self.cudnn.heur_mode
        self.ops.validate()
        self.ops.build_operation_graph()
        self.ops.create_execution_plans([modes.A, modes.FALLBACK])
        self.ops.check_support()

    def build(self) -> None:
        """Compile the kernel that the heuristics like best."""
        self.ops.build_plans()
        self.workspace = torch.empty(self.ops.get_workspace_size(), dtype=torch.uint8, device=self.device)

    def __call__(self, memory: Memory) -> None:
        """Run on the current stream, which may be capturing; what is written is allocated already."""
        # Pointers: a tensor that requires a gradient is not handed over otherwise.
        pointers = {uid: memory[name].data_ptr() for name, uid in self.uids.items()}
        self.cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
        self.ops.execute(pointers, self.workspace, handle=handle())


def forward_graph(graph: Graph, operation: str) -> None:
    """Describe y = relu(batch_norm(x) + z), or less of it, in training mode."""
    y, *vectors = graph.ops.batchnorm(
        input=graph.read("x", graph.activation),
        scale=graph.read("weight", graph.vector),
        bias=graph.read("bias", graph.vector),
        in_running_mean=graph.read("running_mean", graph.vector),
        in_running_var=graph.read("running_var", graph.vector),
        epsilon=graph.read("eps", graph.scalar),
        momentum=graph.read("momentum", graph.scalar),
    )
    for name, vector in zip(("mean", "rstd", "next_running_mean", "next_running_var"), vectors, strict=True):
        graph.write(name, vector, graph.vector)
    y = add_relu(graph, operation, y)
    graph.write("y", y, graph.activation)
    if operation == ADD_RELU:
        # A tensor of zeros as in NVIDIA's tests; with a number in its place cuDNN compiles the same kernel.
        mask = graph.ops.cmp_gt(input=y, comparison=graph.read("zeros", graph.activation))
        graph.write("mask", mask, graph.mask)


def backward_graph(graph: Graph, operation: str) -> None:
    """Describe dx, dweight, dbias and dz.

    After bn+relu, where y was positive is found from x again, which moves no byte more. With a residual there is no
    engine for that, but one for a mask.
    """
    x, dy = graph.read("x", graph.activation), graph.read("dy", graph.activation)
    weight, mean, rstd = (graph.read(name, graph.vector) for name in ("weight", "mean", "rstd"))
    if operation == RELU:
        bias = graph.read("bias", graph.vector)
        before = graph.ops.batchnorm_inference(input=x, mean=mean, inv_variance=rstd, scale=weight, bias=bias)
        dy = graph.ops.relu_backward(loss=dy, input=before)
        dy.set_data_type(graph.activation.data_type)
    elif operation == ADD_RELU:
        dy = graph.ops.mul(a=dy, b=graph.read("mask", graph.mask))
        graph.write("dz", dy, graph.activation)
    dx, dweight, dbias = graph.ops.batchnorm_backward(grad=dy, input=x, scale=weight, mean=mean, inv_variance=rstd)
    graph.write("dx", dx, graph.activation)
    graph.write("dweight", dweight, graph.vector)
    graph.write("dbias", dbias, graph.vector)


def eval_graph(graph: Graph, operation: str) -> None:
    """Describe y in eval mode by pointwise operations: there is no engine for batchnorm_inference on its own."""
    y = graph.ops.sub(a=graph.read("x", graph.activation), b=graph.read("mean", graph.vector))
    y = graph.ops.mul(a=y, b=graph.read("rstd", graph.vector))
    y = graph.ops.mul(a=y, b=graph.read("weight", graph.vector))
    y = graph.ops.add(a=y, b=graph.read("bias", graph.vector))
    graph.write("y", add_relu(graph, operation, y), graph.activation)


def add_relu(graph: Graph, operation: str, y: Any) -> Any:
    """Put behind a norm what `operation` has there."""
    if operation == ADD_RELU:
        y = graph.ops.add(a=y, b=graph.read("z", graph.activation))
    return y if operation == PLAIN else graph.ops.relu(input=y)


# Eval first: it is the likeliest to be refused.
DIRECTIONS = {"eval": eval_graph, "forward": forward_graph, "backward": backward_graph}


def make_graphs(x: Tensor, operation: str) -> dict[str, Graph]:
    """Plan all graphs, which is cheap, before the first is compiled; raise Unsupported for cuDNN's refusals."""
    graphs = {direction: Graph(x) for direction in DIRECTIONS}
    for step in ("plan", "build"):
        for direction, graph in graphs.items():
            try:
                if step == "plan":
                    DIRECTIONS[direction](graph, operation)
                getattr(graph, step)()
            except (graph.cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
                tensor = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} with strides {x.stride()}"
                raise Unsupported(f"cuDNN has no {direction} of {operation} for {tensor}: {shorten(error)}.") from error
    return graphs


class Statistics(NamedTuple):
    """The running statistics of a layer, which forward calls update."""

    running_mean: Tensor  # (C,) float32
    running_var: Tensor  # (C,) float32


class CudnnSubject:
    """cuDNN's graph API on one case: a list of calls per direction, one for each copy of the inputs.

    The directions and results are those of providers.Subject; autograd has no part in it.
    """

    def __init__(self, operation: str, inputs: Inputs):
        x = inputs.x[0]
        if operation not in (PLAIN, RELU, ADD_RELU) or x.dim() != 4 or x.dtype not in DATA_TYPES:
            dtype = str(x.dtype).removeprefix("torch.")
            raise Unsupported(f"cuDNN's graph of {operation} for {x.dim()} dimensions of {dtype} is not written here.")
        self.graphs = make_graphs(x, operation)
        self.has_mask = operation == ADD_RELU
        scalars = {"eps": torch.full((), EPS), "momentum": torch.full((), MOMENTUM)}
        self.constants = {"weight": inputs.weight, "bias": inputs.bias, **scalars}
        if self.has_mask:
            self.constants["zeros"] = torch.zeros_like(x, requires_grad=False)
        # cuDNN takes rstd, not the variance, in eval too: it is spared what the others do in every call.
        self.evaluated = {"mean": inputs.running_mean, "rstd": (inputs.running_var + EPS).rsqrt()}
        # One layer per direction, so that no call changes what another one relies on.
        self.trained_norm, differentiated = (
            Statistics(inputs.running_mean.clone(), inputs.running_var.clone()) for _ in range(2)
        )
        arguments = [dict(zip(("x", "z"), each, strict=False)) for each in inputs.arguments()]
        pairs = list(zip(inputs.dy, arguments, strict=True))
        self.calls: dict[str, list[Callable[[], object]]] = {
            "forward": [partial(self.train, self.trained_norm, each) for each in arguments],
            "backward": [partial(self.backward, dy, each, self.forward(differentiated, each)[1]) for dy, each in pairs],
            "eval": [partial(self.evaluate, each) for each in arguments],
            "forward+backward": [partial(self.forward_backward, differentiated, dy, each) for dy, each in pairs],
        }

    def forward(self, statistics: Statistics, arguments: Memory) -> tuple[Tensor, Memory]:
        """Give y, and what backward needs beside x."""
        x, vector = arguments["x"], statistics.running_mean
        y = torch.empty_like(x)
        saved = {"mean": torch.empty_like(vector), "rstd": torch.empty_like(vector)}
        if self.has_mask:
            saved["mask"] = torch.empty_like(x, dtype=torch.bool)  # room enough: cuDNN packs bits
        # Old and new statistics lie in the same memory, as in NVIDIA's tests: nothing has to be copied back.
        running = statistics._asdict() | {f"next_{name}": each for name, each in statistics._asdict().items()}
        self.graphs["forward"](self.constants | arguments | running | saved | {"y": y})
        return y, saved

    def backward(self, dy: Tensor, arguments: Memory, saved: Memory) -> tuple[Tensor, ...]:
        """Give dx, dweight, dbias and, with a residual, dz."""
        results = {"dx": torch.empty_like(arguments["x"])}
        results |= {"dweight": torch.empty_like(saved["mean"]), "dbias": torch.empty_like(saved["mean"])}
        if "z" in arguments:
            results["dz"] = torch.empty_like(arguments["z"])
        self.graphs["backward"](self.constants | arguments | saved | {"dy": dy} | results)
        return tuple(results.values())

    def train(self, statistics: Statistics, arguments: Memory) -> Tensor:
        """Give y in training mode."""
        return self.forward(statistics, arguments)[0]

    def forward_backward(self, statistics: Statistics, dy: Tensor, arguments: Memory) -> tuple[Tensor, ...]:
        """Give the gradients, with nothing kept from call to call."""
        return self.backward(dy, arguments, self.forward(statistics, arguments)[1])

    def evaluate(self, arguments: Memory) -> Tensor:
        """Give y in eval mode."""
        y = torch.empty_like(arguments["x"])
        self.graphs["eval"](self.constants | arguments | self.evaluated | {"y": y})
        return y

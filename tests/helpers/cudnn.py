"""A stand-in for the module cudnn (nvidia-cudnn-frontend): graphs whose nodes do with torch what their names say.

Only the nodes and arguments that benchmarks/cudnn_graph.py uses are there, called as the package has them.
"""

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class NotSupportedError(Exception):
    """cudnn.cudnnGraphNotSupportedError."""


class Described:
    """cudnn.tensor: what was said of it, and in a run its values."""

    def __init__(self, **said: Any):
        self.said: dict[str, Any] = {"is_pass_by_value": False, "output": False} | said
        self.values: Tensor

    def __getattr__(self, name: str) -> Callable[[Any], "Described"]:
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda value: self.say(name.removeprefix("set_"), value)

    def say(self, name: str, value: Any) -> "Described":
        self.said[name] = value
        return self

    def told(self) -> tuple[Any, ...]:
        """Dimensions, strides, data type, and whether it is a number that is passed by value."""
        said = self.said
        return tuple(said["dim"]), tuple(said["stride"]), said["data_type"], said["is_pass_by_value"]

    def at(self, address: int) -> Tensor:
        """The memory as it was described."""
        dim, stride, dtype = (self.said[name] for name in ("dim", "stride", "data_type"))
        count = 1 + sum((size - 1) * step for size, step in zip(dim, stride, strict=True))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(dim, stride)


def batchnorm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    epsilon: Tensor,
    momentum: Tensor,
) -> tuple[Tensor, ...]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    rstd = (var + epsilon).rsqrt()
    count = x.numel() // x.size(1)
    after = [running_mean.lerp(mean, momentum), running_var.lerp(var * count / (count - 1), momentum)]
    return ((x - mean) * rstd * scale + bias, mean, rstd, *after)


def batchnorm_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    xhat, count = (x - mean) * rstd, x.numel() // x.size(1)
    dbias, dscale = (each.sum((0, 2, 3), keepdim=True) for each in (dy, dy * xhat))
    return (dy - dbias / count - xhat * dscale / count) * scale * rstd, dscale, dbias


# The parameters that the frontend names, in its order, and what the node computes.
NODES: dict[str, tuple[str, Callable[..., Any]]] = {
    "batchnorm": ("input scale bias in_running_mean in_running_var epsilon momentum", batchnorm),
    "batchnorm_backward": ("grad input scale mean inv_variance", batchnorm_backward),
    "batchnorm_inference": (
        "input mean inv_variance scale bias",
        lambda x, mean, rstd, w, b: (x - mean) * rstd * w + b,
    ),
    "add": ("a b", torch.add),
    "sub": ("a b", torch.sub),
    "mul": ("a b", torch.mul),
    "relu": ("input", torch.relu),
    "relu_backward": ("loss input", lambda dy, y: dy * (y > 0)),
    "cmp_gt": ("input comparison", torch.gt),
}
RESULTS = {"batchnorm": 5, "batchnorm_backward": 3}


class Pygraph:
    """cudnn.pygraph, with the nodes that are used and no others."""

    def __init__(self, cudnn: "Cudnn", **said: Any):
        self.cudnn, self.said = cudnn, said
        self.nodes: list[tuple[str, list[Described], list[Described]]] = []
        self.inputs: list[Described] = []
        self.steps: list[str] = []
        cudnn.graphs.append(self)

    def tensor(self, **said: Any) -> Described:
        self.inputs.append(Described(**said))
        return self.inputs[-1]

    def __getattr__(self, name: str) -> Any:
        if name in ("validate", "build_operation_graph", "check_support", "build_plans"):
            return lambda: self.steps.append(name)
        parameters, _ = NODES[name]

        def add(**inputs: Described) -> Any:
            results = [Described() for _ in range(RESULTS.get(name, 1))]
            self.nodes.append((name, [inputs.pop(parameter) for parameter in parameters.split()], results))
            assert not inputs
            return results if name in RESULTS else results[0]

        return add

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        self.steps.append("create_execution_plans")
        if self.cudnn.refuses(self):
            raise NotSupportedError('No valid engine configs for _ \n{"engineId":0}\nWarning: W; Reason: !packed\n\n')

    def get_workspace_size(self) -> int:
        return 16 * len(self.nodes)

    def external(self) -> dict[str, Described]:
        """Inputs and outputs by name."""
        results = [tensor for _, _, tensors in self.nodes for tensor in tensors if tensor.said["output"]]
        return {tensor.said["name"]: tensor for tensor in [*self.inputs, *results]}

    def execute(self, pointers: dict[int, int], workspace: Tensor, handle: object) -> None:
        assert handle is self.said["handle"] is self.cudnn.handle
        assert self.cudnn.stream == torch.cuda.current_stream().cuda_stream
        assert workspace.nbytes == self.get_workspace_size()
        assert self.steps[-1] == "build_plans"
        external = {tensor.said["uid"]: tensor for tensor in self.external().values()}
        assert pointers.keys() == external.keys()
        for tensor in self.inputs:
            tensor.values = tensor.at(pointers[tensor.said["uid"]]).float()
        for name, inputs, results in self.nodes:
            values = NODES[name][1](*(tensor.values for tensor in inputs))
            for tensor, value in zip(results, values if name in RESULTS else [values], strict=True):
                tensor.values = value
        for uid, tensor in external.items():
            if tensor.said["output"]:
                tensor.at(pointers[uid]).copy_(tensor.values)


class Cudnn(ModuleType):
    """The module."""

    def __init__(self) -> None:
        super().__init__("cudnn")
        self.data_type = SimpleNamespace(
            FLOAT=torch.float32, HALF=torch.float16, BFLOAT16=torch.bfloat16, BOOLEAN=torch.bool
        )
        self.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
        self.cudnnGraphNotSupportedError = NotSupportedError
        self.handle, self.stream = object(), 0
        self.version = 91900
        self.graphs: list[Pygraph] = []
        self.refuses: Callable[[Pygraph], bool] = lambda graph: False

    def backend_version(self) -> int:
        return self.version

    def create_handle(self) -> object:
        return self.handle

    def set_stream(self, handle: object, stream: int) -> None:
        assert handle is self.handle
        self.stream = stream

    def pygraph(self, **said: Any) -> Pygraph:
        return Pygraph(self, **said)

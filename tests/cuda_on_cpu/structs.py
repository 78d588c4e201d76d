"""The structs of params.h and plan.h for ctypes, with the names of their enumerators."""

import ctypes
import math

DTYPES = ["float32", "float64", "float16", "bfloat16"]
"""In the order of DType in params.h. Memory of bfloat16 is uint16."""

KINDS = ["none", "relu_like", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh", "mish"]
"""In the order of ActivationKind in params.h."""

SAVED = ["mean", "rstd", "scale", "offset"]
"""The vectors that the forward pass hands to the backward pass."""


class Shape(ctypes.Structure):
    """params.h: N images, C channels, S positions."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("s", ctypes.c_int64),
        ("channels_last", ctypes.c_bool),
    ]


class Activation(ctypes.Structure):
    """params.h."""

    _fields_ = [("kind", ctypes.c_int), ("alpha", ctypes.c_double), ("upper", ctypes.c_double)]


def activation(name: str | None, alpha: float = 0.0) -> Activation:
    """The activation that Python calls so; ``alpha`` is leaky_relu's slope or elu's alpha."""
    if name in ("relu", "leaky_relu", "relu6"):
        return Activation(KINDS.index("relu_like"), alpha, 6.0 if name == "relu6" else math.nan)
    return Activation(KINDS.index(name or "none"), alpha, math.nan)


NONE = activation(None)


class ForwardParams(ctypes.Structure):
    """params.h."""

    _fields_ = [
        ("shape", Shape),
        ("dtype", ctypes.c_int),
        ("params_dtype", ctypes.c_int),
        ("training", ctypes.c_bool),
        ("recompute", ctypes.c_bool),
        ("activation", Activation),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("running_mean", ctypes.c_void_p),
        ("running_var", ctypes.c_void_p),
        ("num_batches_tracked", ctypes.c_void_p),
        ("cumulative", ctypes.c_bool),
        ("momentum", ctypes.c_double),
        ("skip_nonfinite", ctypes.c_bool),
        ("eps", ctypes.c_double),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in SAVED),
        ("mask", ctypes.c_void_p),
    ]


class BackwardParams(ctypes.Structure):
    """params.h."""

    _fields_ = [
        ("shape", Shape),
        ("dtype", ctypes.c_int),
        ("params_dtype", ctypes.c_int),
        ("training", ctypes.c_bool),
        ("activation", Activation),
        ("dy", ctypes.c_void_p),
        ("dy_is_scalar", ctypes.c_bool),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in SAVED),
        ("dx", ctypes.c_void_p),
        ("dz", ctypes.c_void_p),
        ("dweight", ctypes.c_void_p),
        ("dbias", ctypes.c_void_p),
    ]


_INT64 = ["channels", "pitch", "slice_width", "slices", "rows", "image_rows", "segments", "rows_of_segment"]
_INT64 += ["teams", "teams_at_a_time", "step_offset", "wrap_offset", "result_policy"]
_INT = ["step_rows", "vector", "columns", "row_lanes", "rows_per_thread", "kept_rows", "threads", "slice_channels"]
_INT += ["plane", "row_values", "pieces", "warp_rows", "merge_lanes", "team_lanes"]
_INT += ["staggered_teams", "stagger_ns", "prefetched_rows", "team"]

TEAMS = ["none", "block", "cluster", "grid"]
"""In the order of Team in plan.h."""


class Plan(ctypes.Structure):
    """plan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INT64),
        *((name, ctypes.c_int) for name in _INT),
        ("uses_pdl", ctypes.c_bool),
        ("one_channel", ctypes.c_bool),
        ("whole_bytes", ctypes.c_bool),
        ("keeps_mask", ctypes.c_bool),
        ("evicts_last", ctypes.c_bool),
    ]

    @property
    def team_name(self) -> str:
        """Of TEAMS."""
        return TEAMS[self.team]

    @property
    def blocks_at_a_time(self) -> int:
        """Of all teams that the machine has room for."""
        return int(self.teams_at_a_time * self.segments)

    @property
    def every_block_merges(self) -> bool:
        """So that a team waits once for each slice."""
        return bool(self.segments == 1 or self.segments * self.slice_channels <= 4 * self.threads)

    @property
    def spilled_rows(self) -> int:
        """How many rows of all segments do not stay on chip, of all teams but "none"."""
        rows = [min(self.rows_of_segment, self.rows - i * self.rows_of_segment) for i in range(self.segments)]
        return sum(max(0, r - self.row_lanes * self.kept_rows) for r in rows)


class Machine(ctypes.Structure):
    """plan.h."""

    _fields_ = [
        ("multiprocessors", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("clusters", ctypes.c_bool),
        ("cooperative", ctypes.c_bool),
        ("pdl", ctypes.c_bool),
        ("staggers", ctypes.c_bool),
        ("prefetched_quarters", ctypes.c_int),
        ("half_chip", ctypes.c_int),
        ("evict_last", ctypes.c_bool),
        ("keep_results", ctypes.c_bool),
        ("three_kernels", ctypes.c_bool),
    ]

    @property
    def blocks_may_wait(self) -> bool:
        """Whether blocks may wait for each other."""
        return self.clusters or self.cooperative

    @property
    def without_teams(self) -> "Machine":
        """As in plan.h."""
        teams = ("shared_bytes", "clusters", "cooperative")
        return Machine(**{name: 0 if name in teams else getattr(self, name) for name, _ in Machine._fields_})


class Request(ctypes.Structure):
    """plan.h."""

    _fields_ = [
        ("shape", Shape),
        ("value_bytes", ctypes.c_int),
        ("alignment", ctypes.c_int),
        ("for_mask", ctypes.c_bool),
        ("single_pass_tiles", ctypes.c_int),
        ("keeps_mask", ctypes.c_bool),
    ]


OF_H200 = 228 * 1024
"""Bytes of shared memory that a multiprocessor of an H200 has."""

MULTI_KERNEL = Machine(1, pdl=True)
"""Where no slice stays on chip."""
H200 = Machine(132, OF_H200, True, True, True)
"""With no choice that rests on the model of times, as the machines of all tests that do not say otherwise."""
PACKAGE = Machine(132, OF_H200, True, True, True, True, 2, True, True, True, True)
"""An H200 as the package plans for it."""
SMALL = Machine(4, 48 * 1024, True, True, True)
"""Of which small tensors fill the shared memory."""

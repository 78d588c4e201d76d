"""The text that `explain` prints for a launch plan."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bn_ext.explain import Explanation, Gpu, PassPlan

_TEAMS = {
    "block": "one block holds a slice in its shared memory",
    "cluster": "a cluster of {} blocks holds a slice and exchanges sums through each other's shared memory",
    "grid": "{} blocks of a cooperative grid hold a slice and exchange sums through global memory",
}


def text_of(explanation: "Explanation") -> str:
    """Several lines of text."""
    e = explanation
    layout = str(e.memory_format).removeprefix("torch.").removesuffix("_format")
    call = [str(tuple(e.input_shape)), str(e.dtype).removeprefix("torch."), layout]
    call.append("training" if e.training else "eval")
    call += [e.activation] if e.activation != "None" else []
    call += ["residual"] if e.residual else []
    lines = [", ".join(call) + f", planned for {_gpu(e.gpu)}"]
    lines += [f"N = {_megabytes(e.tensor_bytes)}, one activation tensor, aligned to 16 bytes"]
    for plan in (e.forward, e.backward):
        lines += ["", f"{plan.direction}: {_count(plan.launches, 'kernel')}"]
        lines += [f"  {name:<7} {text}" for name, text in _rows(e, plan)]
    lines += [
        "",
        "Planned, not measured; per-channel vectors and partial sums, a few per cent of a large tensor, do not count.",
    ]
    if any(plan.team in ("cluster", "grid") for plan in (e.forward, e.backward)):
        lines[-1] += (
            "\nAt the launch, bn_ext asks CUDA whether teams of several blocks fit; if not, the multi-kernel path runs"
            " that pass."
        )
    return "\n".join(lines)


def _rows(e: "Explanation", plan: "PassPlan") -> list[tuple[str, str]]:
    slices = f"{_count(plan.slices, 'slice')} of {_count(plan.slice_channels, 'channel')}"
    rows = [("cut", f"{slices}, {plan.slice_bytes / 1e3:.1f} KB of each tensor")]
    rows += [("team", _team(e, plan))]
    blocks = f"{_count(plan.blocks, 'block')} of {plan.threads} threads, {plan.access_bytes} bytes per access"
    if plan.team == "none":
        blocks += f", {_count(plan.blocks_per_slice, 'block')} per slice"
    else:
        blocks += f", {plan.shared_bytes / 1024:.1f} KiB of shared memory each"
    rows += [("blocks", blocks)]

    def times(count: int) -> str:
        return f"{count / e.tensor_bytes:.2f} N"

    moves = f"{_megabytes(plan.bytes_moved)} = {times(plan.bytes_moved)}: reads {times(plan.bytes_read)}, "
    moves += f"writes {times(plan.bytes_written)}"
    if plan.team != "none":
        kernels = _count(plan.multi_kernel_launches, "kernel")
        moves += f"; the multi-kernel path, {kernels}, would move {times(plan.multi_kernel_bytes)}"
    rows += [("moves", moves)]
    rows += [("twice", again)] if (again := _read_twice(e, plan)) else []
    rows += [("mask", mask)] if (mask := _mask(e, plan)) else []
    return rows


def _team(e: "Explanation", plan: "PassPlan") -> str:
    if plan.team != "none":
        return _TEAMS[plan.team].format(plan.blocks_per_slice)
    if not e.training:
        return "none, because no tensor is read twice with running statistics"
    if not plan.can_have_team:
        return "none, because this activation's gradient also needs the residual, and no team holds three tensors"
    return "none, because too little of a slice would fit in shared memory"


def _read_twice(e: "Explanation", plan: "PassPlan") -> str:
    """The tensors that are read twice, and the reason."""
    if not e.training:
        return ""
    forward = plan.direction == "forward"
    if plan.team == "none":
        return "x, for the statistics and for y" if forward else "all inputs of the gradient sums, also for dx"
    if plan.kept == 1:
        return ""
    tensors = "x" if forward else "dy and x"
    return f"{100 * (1 - plan.kept):.0f} % of {tensors}, which does not fit in shared memory"


def _mask(e: "Explanation", plan: "PassPlan") -> str:
    """The bytes of the mask among the bytes moved."""
    if plan.mask_bytes == 0:
        return ""
    times, again = divmod(plan.mask_bytes, (e.tensor_bytes // e.dtype.itemsize + 7) // 8)
    often = {1: "once", 2: "twice"}.get(times, f"{times} times") + " and partly again" * (again > 0)
    how = "written" if plan.direction == "forward" else "read"
    if plan.direction == "forward" and times > 1:
        how = "cleared, then changed in place, because slices share bytes: moved"
    return f"{_megabytes(plan.mask_bytes)} of these, one bit per value, {how} {often}"


def _gpu(gpu: "Gpu") -> str:
    clusters = "clusters" if gpu.clusters else "no clusters"
    return f"{gpu.name} ({gpu.multiprocessors} multiprocessors of {gpu.shared_bytes / 1024:.0f} KiB, {clusters})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

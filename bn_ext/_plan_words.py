"""The words of `explain`: a plan's numbers in sentences."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bn_ext.explain import Explanation, Gpu, PassPlan

_TEAMS = {
    "block": "one block keeps a slice in its shared memory",
    "cluster": "a cluster of {} blocks keeps a slice, and exchanges sums through each other's shared memory",
    "grid": "{} blocks of a cooperative grid keep a slice, and exchange sums through global memory",
}


def words_of(explanation: "Explanation") -> str:
    """Several lines."""
    e = explanation
    layout = str(e.memory_format).removeprefix("torch.").removesuffix("_format")
    what = [str(tuple(e.input_shape)), str(e.dtype).removeprefix("torch."), layout]
    what.append("training" if e.training else "eval")
    what += [e.activation] if e.activation != "None" else []
    what += ["residual"] if e.residual else []
    lines = [", ".join(what) + f", planned for {_gpu(e.gpu)}"]
    lines += [f"N = {_megabytes(e.tensor_bytes)}, one activation tensor, aligned to 16 bytes"]
    for plan in (e.forward, e.backward):
        lines += ["", f"{plan.direction}: {_count(plan.launches, 'kernel')}"]
        lines += [f"  {name:<7} {words}" for name, words in _rows(e, plan)]
    lines += [
        "",
        "Planned, not measured; vectors of channels and partial sums, a few per cent of a large tensor, are left out.",
    ]
    if any(plan.team in ("cluster", "grid") for plan in (e.forward, e.backward)):
        lines[-1] += (
            "\nAt the launch CUDA is asked whether it has room for teams of several blocks; if not, that pass takes"
            " the multi-kernel path."
        )
    return "\n".join(lines)


def _rows(e: "Explanation", plan: "PassPlan") -> list[tuple[str, str]]:
    slices = f"{_count(plan.slices, 'slice')} of {_count(plan.slice_channels, 'channel')}"
    rows = [("cut", f"{slices}, {plan.slice_bytes / 1e3:.1f} KB of each tensor")]
    rows += [("team", _team(e, plan))]
    blocks = f"{_count(plan.blocks, 'block')} of {plan.threads} threads, {plan.access_bytes} bytes per access"
    if plan.team == "none":
        blocks += f", {_count(plan.blocks_per_slice, 'block')} for a slice"
    else:
        blocks += f", {plan.shared_bytes / 1024:.1f} KiB of shared memory each"
    rows += [("blocks", blocks)]

    def times(count: int) -> str:
        return f"{count / e.tensor_bytes:.2f} N"

    moves = f"{_megabytes(plan.bytes_moved)} = {times(plan.bytes_moved)}: reads {times(plan.bytes_read)}, "
    moves += f"writes {times(plan.bytes_written)}"
    if plan.team != "none":
        kernels = _count(plan.multi_kernel_launches, "kernel")
        moves += f"; the multi-kernel path ({kernels}) would move {times(plan.multi_kernel_bytes)}"
    rows += [("moves", moves)]
    rows += [("twice", again)] if (again := _twice(e, plan)) else []
    rows += [("mask", mask)] if (mask := _mask(e, plan)) else []
    return rows


def _team(e: "Explanation", plan: "PassPlan") -> str:
    if plan.team != "none":
        return _TEAMS[plan.team].format(plan.blocks_per_slice)
    if not e.training:
        return "none, for with running statistics nothing is read twice"
    if not plan.can_have_team:
        return "none, for the gradient of this activation takes the residual too, and no team keeps three tensors"
    return "none, for too little of a slice would fit into the shared memory"


def _twice(e: "Explanation", plan: "PassPlan") -> str:
    """What is read again, and why."""
    if not e.training:
        return ""
    forward = plan.direction == "forward"
    if plan.team == "none":
        return "x, for the statistics and for y" if forward else "what makes the sums of gradients, for them and for dx"
    if plan.kept == 1:
        return ""
    tensors = "x" if forward else "dy and x"
    return f"{100 * (1 - plan.kept):.0f} % of {tensors}, for which the shared memory has no room"


def _mask(e: "Explanation", plan: "PassPlan") -> str:
    """Of the bytes moved."""
    if plan.mask_bytes == 0:
        return ""
    times, again = divmod(plan.mask_bytes, (e.tensor_bytes // e.dtype.itemsize + 7) // 8)
    often = {1: "once", 2: "twice"}.get(times, f"{times} times") + " and in part again" * (again > 0)
    how = "written" if plan.direction == "forward" else "read"
    if plan.direction == "forward" and times > 1:
        how = "cleared, then changed in place, for slices share bytes of it: moved"
    return f"{_megabytes(plan.mask_bytes)} of these, one bit per value, {how} {often}"


def _gpu(gpu: "Gpu") -> str:
    clusters = "clusters" if gpu.clusters else "no clusters"
    return f"{gpu.name} ({gpu.multiprocessors} multiprocessors of {gpu.shared_bytes / 1024:.0f} KiB, {clusters})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""What the bytecode of a function shows before it runs: the globals that it reads, and why it cannot be fused."""

import dis
import types
from collections.abc import Iterator

CONTEXT = "sets or asks for a context (grad mode, autocast, checkpoint, ...)"
_WITH = ("BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH", "LOAD_SPECIAL")
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_PAST_RECORDS = ("__getattribute__", "getattr_static")


def codes_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions, classes and comprehensions that are defined in a function."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from codes_within(constant)


def global_names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The global names that a function reads, each with the attributes that it reads at once: torch.nn.functional."""
    chain: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if chain and instruction.opname in _ATTRIBUTE:
            chain = (*chain, str(instruction.argval))
            continue
        if chain:
            yield chain
        chain = (str(instruction.argval),) if instruction.opname in _GLOBAL else ()
    if chain:
        yield chain


def globals_set(code: types.CodeType) -> list[str]:
    """The global names that a function sets or deletes."""
    instructions = dis.get_instructions(code)
    return [str(i.argval) for i in instructions if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]


def reason_against(code: types.CodeType) -> str:
    """What the function does that a graph cannot hold; empty if nothing is seen."""
    if code.co_flags & (0x80 | 0x200):  # coroutines and asynchronous generators
        return "is asynchronous"
    instructions = list(dis.get_instructions(code))
    for position, instruction in enumerate(instructions):
        name = instruction.opname
        if name in _WITH:
            return CONTEXT
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"sets {instruction.argval}"
        if name == "IMPORT_NAME":
            return f"imports {instruction.argval}"
        if instruction.argval in _PAST_RECORDS and code.co_name != "__getattribute__":  # as configurations have it
            return f"reads attributes by {instruction.argval}"
        if name == "IS_OP" and not _compares_state(instructions[:position]):
            return "asks whether a value is the same object as another"
        if name in _GLOBAL and instruction.argval == "type" and not _is_self(instructions[position + 1]):
            return "asks for the type of a value"
    return ""


def _compares_state(before: list[dis.Instruction]) -> bool:
    """Whether `is` compares with None, or what the left side reads of self or of a global."""
    if before[-1].opname == "LOAD_CONST" and before[-1].argval is None:
        return True
    rest = _without_operand(before)
    while rest and rest[-1].opname in _ATTRIBUTE:
        rest = rest[:-1]
    return bool(rest) and rest is not before and (rest[-1].opname in _GLOBAL or _is_self(rest[-1]))


def _without_operand(instructions: list[dis.Instruction]) -> list[dis.Instruction]:
    """Without the last value that they load; an empty list if it is more than a name and its attributes."""
    position = len(instructions) - 1
    while position > 0 and instructions[position].opname in _ATTRIBUTE:
        position -= 1
    is_name = instructions[position].opname in (*_GLOBAL, "LOAD_CONST", "LOAD_FAST", "LOAD_DEREF")
    return instructions[:position] if is_name else []


def _is_self(instruction: dis.Instruction) -> bool:
    is_local = instruction.opname in ("LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW")
    return is_local and instruction.argval == "self"

"""Inspection of bytecode before a function runs: the globals that it reads, and reasons not to fuse it."""

import dis
import types
from collections import Counter
from collections.abc import Iterator

CONTEXT = "enters a context, or reads or sets a mode (grad mode, autocast, checkpoint, ...)"
_WITH = ("BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH", "LOAD_SPECIAL")
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_LOOKUPS = ("AttributeError", "KeyError", "ImportError", "ModuleNotFoundError")
_HANDLERS = ("PUSH_EXC_INFO", "SETUP_FINALLY")
_MATCHES = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")
_CLASS_ATTRIBUTES = ("__dict__", "__bases__", "__base__", "__mro__", "mro", "__subclasses__", "__annotations__")
_UNRECORDED_READS = ("__getattribute__", "getattr_static")


def codes_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of the functions, classes and comprehensions that a function defines, however deeply nested."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from codes_within(constant)


def global_names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The global names that a function reads, each with its chain of attributes: ("torch", "nn", "functional")."""
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


def reason_not_to_fuse(code: types.CodeType) -> str:
    """The first thing that the function does and a graph cannot represent; empty if there is none."""
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
        if instruction.argval in _UNRECORDED_READS and code.co_name != "__getattribute__":  # configs define it
            return f"reads attributes through {instruction.argval}"
        if name == "IS_OP" and not _compares_state(instructions[:position]):
            return "tests whether two values are the same object"
        if name in _GLOBAL and instruction.argval == "type" and not _is_self(instructions[position + 1]):
            return "reads the type of a value"
        if _loads_own_class(instructions[: position + 1]) and not _reads_attribute(instructions[position + 1 :]):
            return "uses its own class, which fuse replaces"
    is_safe = _handles_lookups_only(instructions)
    return "" if is_safe else "catches exceptions that an operation may raise in a later call"


def compared_with_none(code: types.CodeType) -> tuple[set[str], bool]:
    """The locals, assigned once, that a function compares with None, and whether it compares other values too.

    State does not count. A module or function that is not traced may return None in one call and a Tensor in another.
    """
    instructions = list(dis.get_instructions(code))
    stores = Counter(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    stores.update(name for instruction in instructions for name in _stored(instruction))
    has_loop = any(i.opcode in (*dis.hasjrel, *dis.hasjabs) and i.argval < i.offset for i in instructions)
    names, is_more = set[str](), False
    for position, instruction in enumerate(instructions):
        before = instructions[:position]
        if instruction.opname == "IS_OP" and _is_none(before[-1]):
            before = before[:-1]
        elif not instruction.opname.endswith(("IF_NONE", "IF_NOT_NONE")):
            continue
        name = _loaded(before[-1])
        if name and stores[name] == 1 and not (has_loop and name in code.co_varnames[code.co_argcount :]):
            names.add(name)
        elif not _is_state(before):
            is_more = True
    return names, is_more


def _stored(instruction: dis.Instruction) -> list[str]:
    """The locals that an instruction sets; since Python 3.13, one instruction may combine two."""
    if instruction.opname in ("STORE_FAST", "STORE_DEREF", "DELETE_FAST"):
        return [str(instruction.argval)]
    if instruction.opname.startswith("STORE_FAST_"):
        return list(instruction.argval[: 1 + instruction.opname.endswith("STORE_FAST")])
    return []


def _loaded(instruction: dis.Instruction) -> str:
    """The local that an instruction puts on top of the stack; empty if it puts none there."""
    if instruction.opname in ("LOAD_FAST_LOAD_FAST", "STORE_FAST_LOAD_FAST"):
        return str(instruction.argval[1])
    return str(instruction.argval) if instruction.opname.startswith("LOAD_FAST") else ""


def _handles_lookups_only(instructions: list[dis.Instruction]) -> bool:
    """Whether all handlers catch missing names only; traces and guards cover reads of such names."""
    positions = {instruction.offset: position for position, instruction in enumerate(instructions)}
    starts = set[int]()
    for position, instruction in enumerate(instructions):
        if instruction.opname in _HANDLERS:
            is_old = instruction.opname == "SETUP_FINALLY"  # Python 3.10
            starts.add(positions[instruction.argval] + 1 if is_old else position + 1)
        if instruction.opname in _MATCHES:
            first = position - 1
            if instructions[first].opname == "BUILD_TUPLE":
                first -= int(instructions[first].argval)
            caught = [i for i in instructions[first:position] if i.opname != "BUILD_TUPLE"]
            jump = instructions[position + (instruction.opname == "CHECK_EXC_MATCH")]
            otherwise = positions[jump.argval]
            if not all(i.opname in _GLOBAL and i.argval in _LOOKUPS for i in caught):
                return False
            if instructions[otherwise].opname not in ("RERAISE", "DUP_TOP", *_GLOBAL):
                return False
            starts.discard(first)
    return not starts


def _compares_state(before: list[dis.Instruction]) -> bool:
    """Whether `is` compares with None, or compares state (attributes of self, globals) with state or a constant."""
    is_constant = before[-1].opname == "LOAD_CONST"
    return _is_none(before[-1]) or ((is_constant or _is_state(before)) and _is_state(_without_operand(before)))


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and instruction.argval is None


def _is_state(instructions: list[dis.Instruction]) -> bool:
    """Whether the last value that the instructions load is read from self or from a global name."""
    rest = instructions
    while rest and rest[-1].opname in _ATTRIBUTE:
        rest = rest[:-1]
    return bool(rest) and (rest[-1].opname in _GLOBAL or _is_self(rest[-1]))


def _without_operand(instructions: list[dis.Instruction]) -> list[dis.Instruction]:
    """The instructions before the last loaded value; empty if it is more than a name and its attributes."""
    position = len(instructions) - 1
    while position > 0 and instructions[position].opname in _ATTRIBUTE:
        position -= 1
    is_name = instructions[position].opname in (*_GLOBAL, "LOAD_CONST", "LOAD_FAST", "LOAD_DEREF")
    return instructions[:position] if is_name else []


def _loads_own_class(instructions: list[dis.Instruction]) -> bool:
    """Whether the last instruction completes type(self) or reads __class__."""
    last, before = instructions[-1], instructions[-2:-1]
    is_type = bool(before) and before[0].opname in _GLOBAL and before[0].argval == "type"
    return (is_type and _is_self(last)) or (last.opname in _ATTRIBUTE and last.argval == "__class__")


def _reads_attribute(instructions: list[dis.Instruction]) -> bool:
    """Whether the instructions begin with a read of an attribute, possibly after a call."""
    rest = (i for i in instructions if not i.opname.startswith(("PRECALL", "CALL", "CACHE")))
    first = next(rest)
    return first.opname in _ATTRIBUTE and first.argval not in _CLASS_ATTRIBUTES


def _is_self(instruction: dis.Instruction) -> bool:
    is_local = instruction.opname in ("LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW")
    return is_local and instruction.argval == "self"

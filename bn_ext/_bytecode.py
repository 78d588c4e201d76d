"""What the bytecode of a function shows before it runs: the globals that it reads, and why it cannot be fused."""

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
_OF_A_CLASS = ("__dict__", "__bases__", "__base__", "__mro__", "mro", "__subclasses__", "__annotations__")
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
            return f"reads attributes through {instruction.argval}"
        if name == "IS_OP" and not _compares_state(instructions[:position]):
            return "tests whether two values are the same object"
        if name in _GLOBAL and instruction.argval == "type" and not _is_self(instructions[position + 1]):
            return "reads the type of a value"
        if _gives_class_of_self(instructions[: position + 1]) and not _is_read(instructions[position + 1 :]):
            return "uses its own class, which fuse replaces"
    return (
        ""
        if _handles_lookups_only(instructions)
        else "catches exceptions, which an operation may raise in a later call"
    )


def compared_with_none(code: types.CodeType) -> tuple[set[str], bool]:
    """What a function compares with None, beside state: locals of one value, and whether more than these.

    The result of a module or a function that is not traced may be None at one call, and a Tensor at another.
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
    """The locals that an instruction sets; from Python 3.13 on, some instructions are two."""
    if instruction.opname in ("STORE_FAST", "STORE_DEREF", "DELETE_FAST"):
        return [str(instruction.argval)]
    if instruction.opname.startswith("STORE_FAST_"):
        return list(instruction.argval[: 1 + instruction.opname.endswith("STORE_FAST")])
    return []


def _loaded(instruction: dis.Instruction) -> str:
    """The local that is on top of the stack after an instruction, if one is."""
    if instruction.opname in ("LOAD_FAST_LOAD_FAST", "STORE_FAST_LOAD_FAST"):
        return str(instruction.argval[1])
    return str(instruction.argval) if instruction.opname.startswith("LOAD_FAST") else ""


def _handles_lookups_only(instructions: list[dis.Instruction]) -> bool:
    """Whether all handlers are for names that are missing: reading them is part of a trace, and of the guards."""
    positions = {instruction.offset: position for position, instruction in enumerate(instructions)}
    starts = set[int]()
    for position, instruction in enumerate(instructions):
        if instruction.opname in _HANDLERS:
            is_old = instruction.opname == "SETUP_FINALLY"  # of Python 3.10
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
    """Whether one side of `is` is None, or both sides are attributes of self or global names."""
    is_constant = before[-1].opname == "LOAD_CONST"
    return _is_none(before[-1]) or ((is_constant or _is_state(before)) and _is_state(_without_operand(before)))


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and instruction.argval is None


def _is_state(instructions: list[dis.Instruction]) -> bool:
    """Whether the last value that they load is read of self or of a global."""
    rest = instructions
    while rest and rest[-1].opname in _ATTRIBUTE:
        rest = rest[:-1]
    return bool(rest) and (rest[-1].opname in _GLOBAL or _is_self(rest[-1]))


def _without_operand(instructions: list[dis.Instruction]) -> list[dis.Instruction]:
    """Without the last value that they load; an empty list if it is more than a name and its attributes."""
    position = len(instructions) - 1
    while position > 0 and instructions[position].opname in _ATTRIBUTE:
        position -= 1
    is_name = instructions[position].opname in (*_GLOBAL, "LOAD_CONST", "LOAD_FAST", "LOAD_DEREF")
    return instructions[:position] if is_name else []


def _gives_class_of_self(instructions: list[dis.Instruction]) -> bool:
    """Whether the last of them is the name in type(self) or self.__class__."""
    last, before = instructions[-1], instructions[-2:-1]
    is_type = bool(before) and before[0].opname in _GLOBAL and before[0].argval == "type"
    return (is_type and _is_self(last)) or (last.opname in _ATTRIBUTE and last.argval == "__class__")


def _is_read(instructions: list[dis.Instruction]) -> bool:
    """Whether they begin with a read of an attribute, perhaps behind a call."""
    rest = (i for i in instructions if not i.opname.startswith(("PRECALL", "CALL", "CACHE")))
    first = next(rest)
    return first.opname in _ATTRIBUTE and first.argval not in _OF_A_CLASS


def _is_self(instruction: dis.Instruction) -> bool:
    is_local = instruction.opname in ("LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW")
    return is_local and instruction.argval == "self"

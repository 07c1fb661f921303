"""What code of the user's does, read from its bytecode: what it names, sets and holds."""

import dataclasses
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

from .library_code import is_of_user


# Bytecode is the same in all patch versions of a Python, and no further.
COMPILER = f"{sys.implementation.cache_tag}{'-O' * sys.flags.optimize}"
CONSTANTS = (bool, int, float, complex, str, bytes, types.NoneType, tuple, frozenset)
# What the interpreter, `dataclass` and `abc` put into classes.
_OF_CLASSES = {
    "__module__", "__qualname__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__dataclass_fields__",
    "__dataclass_params__", "__match_args__", "__firstlineno__", "__static_attributes__", "__abstractmethods__",
    "_abc_impl", "__parameters__", "__orig_bases__", "__slots__", "__annotate_func__", "__annotations_cache__",
    "__classdictcell__", "__type_params__", "__hash__",
}  # fmt: skip


def members_of(kind: type) -> dict[str, Any]:
    """Code and constants that a class holds by name. What else it holds can change: it is state."""
    kept = (*CONSTANTS, Enum, types.FunctionType, type, property)
    return {
        name: value
        for name, value in vars(kind).items()
        if name not in _OF_CLASSES
        and isinstance(function_of(value), kept)
        and not _is_generated(kind, value)
        and not _is_inherited(kind, name, value)
    }


def functions_in(kind: type) -> Iterator[types.FunctionType]:
    """The functions that a class defines itself, without decorators around them."""
    for name, value in vars(kind).items():
        if _is_inherited(kind, name, value):
            continue
        parts = (value.fget, value.fset) if isinstance(value, property) else (function_of(value),)
        yield from (inspect.unwrap(part) for part in parts if isinstance(part, types.FunctionType))


def function_of(value: Any) -> Any:
    """The function inside of what a class holds."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.func if isinstance(value, functools.cached_property) else value


def _is_generated(kind: type, value: Any) -> bool:
    """Whether `dataclass` wrote a method, from fields that are there to see."""
    code = getattr(function_of(value), "__code__", None)
    is_one = code is not None and code.co_filename == "<string>" and code.co_name.startswith("__")
    return dataclasses.is_dataclass(kind) and (is_one or (code is not None and "__create_fn__" in code.co_qualname))


def _is_inherited(kind: type, name: str, value: Any) -> bool:
    """Whether a class holds what a base of it does: the first optimizer of a class puts its `step`, wrapped, there."""
    base = next((vars(one)[name] for one in kind.__mro__[1:] if name in vars(one)), None)
    return isinstance(value, types.FunctionType) and callable(base) and inspect.unwrap(value) is inspect.unwrap(base)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those inside of it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes_in(const)


def names_in(code: types.CodeType) -> list[str]:
    """Globals and attributes that a code object names, and those inside of it."""
    return sorted({name for one in codes_in(code) for name in one.co_names})


def plain_code(code: types.CodeType) -> list[Any]:
    """What code does, without where it stands and what it says of itself."""
    consts = list(code.co_consts)
    has_doc = bool(code.co_flags & 0x4000000) if sys.version_info >= (3, 13) else not code.co_name.startswith("<")
    if has_doc and consts and isinstance(consts[0], str):
        consts[0] = None
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    names = [list(part) for part in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)]
    return [code.co_code, code.co_exceptiontable, counts, names, [_plain_const(const) for const in consts]]


def _plain_const(const: Any) -> Any:
    if isinstance(const, types.CodeType):
        return plain_code(const)
    if isinstance(const, tuple):
        return ["tuple", *map(_plain_const, const)]
    if isinstance(const, frozenset):
        # Its own order follows from hashes, which differ from process to process.
        return ["frozenset", *sorted(map(repr, const))]
    return repr(const) if isinstance(const, (complex, types.EllipsisType)) else const


def free_names(function: types.FunctionType) -> set[str]:
    """Names by which a function goes that are neither its own nor its module's; `super()` needs one."""
    return set(function.__code__.co_freevars) - {"__class__"}


def unstable_kind(function: types.FunctionType) -> str | None:
    """What makes a function one that cannot be told from another of its name."""
    if function.__name__ == "<lambda>":
        return "lambda"
    # The wrapper that a decorator puts around a function has a closure itself; what counts is the function.
    return "closure" if free_names(inspect.unwrap(function)) else None


def defaults_of(function: types.FunctionType) -> dict[str, Any]:
    """The defaults of a function's parameters: by number, and by name those that are given by name alone."""
    positional = {str(number): value for number, value in enumerate(function.__defaults__ or ())}
    return {**positional, **dict(sorted((function.__kwdefaults__ or {}).items()))}


def is_constant(name: str, value: Any) -> bool:
    """Whether a global is a constant by its name, in capitals, and by its kind."""
    return name.isupper() and value is not None and isinstance(value, CONSTANTS)


def settings_of(kinds: Sequence[type]) -> set[str]:
    """Names of attributes that the constructors of classes set, and that nothing else in them sets."""
    return {attribute for attribute, methods in attributes_set_in(kinds).items() if methods == {"__init__"}}


def attributes_set_in(kinds: Iterable[type]) -> dict[str, set[str]]:
    """Names of attributes that classes set, with those of the functions in which they do."""
    set_by: dict[str, set[str]] = {}
    for function in (function for kind in kinds for function in functions_in(kind)):
        for name in _attributes_set_by(function.__code__):
            set_by.setdefault(name, set()).add(function.__name__)
    return set_by


@functools.lru_cache(maxsize=4096)
def _attributes_set_by(code: types.CodeType) -> frozenset[str]:
    """Names of attributes that code sets; kept, because every trainer asks it of all that a library's classes do."""
    steps = (step for one in codes_in(code) for step in dis.get_instructions(one))
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


def names_read_in_steps(kinds: Iterable[type], aside: set[str]) -> set[str]:
    """Names in what the user's classes do in a step, as against a time of start that only their logs show."""
    members = [value for kind in kinds for name, value in vars(kind).items() if name not in aside]
    waiting, seen, found = [*map(function_of, members)], set(), set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, property):
            waiting += [part.fget, part.fset]
        elif isinstance(part, type) and part not in seen:
            seen.add(part)
            waiting += functions_in(part)
        elif isinstance(part, types.FunctionType) and inspect.unwrap(part) not in seen:
            part = inspect.unwrap(part)
            seen.add(part)
            names = names_in(part.__code__)
            # Texts count as names, since `getattr` may be given them.
            found |= {
                *names,
                *(const for code in codes_in(part.__code__) for const in code.co_consts if isinstance(const, str)),
            }
            waiting += [value for value in map(part.__globals__.get, names) if is_of_user(value)]
    return found

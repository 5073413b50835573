"""Reads a pickle without running, importing or changing anything that it names.

A pickle is a program that may call any function on the machine. Here the standard library's
:func:`pickletools.genops` only takes the program apart. The few operations that build plain values are carried out; for
whatever the pickle names and calls, :mod:`~lightning_plugins.core.stand_ins` has something that stands in.

What a pickle may claim is bounded: the number of its operations and names, the dimensions and the extent of tensors.
Keys of dictionaries are flat, since the hash of nested tuples can take for ever.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from lightning_plugins.core.stand_ins import (
    DTYPES,
    STORAGE_MODULES,
    Name,
    StandIn,
    StoredStorage,
    UnreadableError,
    called,
    flat,
    is_foreign,
    is_known,
)

OPERATIONS = 5_000_000
"""Operations that a pickle may have: at three microseconds each, what a reader waits for at most."""
_NAMES = 10_000  # functions and classes that a pickle may name


@dataclass
class Unpickled:
    """What a pickle holds.

    Args:
        content: Plain values, with a :class:`StoredTensor` for each tensor and a :class:`StandIn` for each object.
        foreign: The functions and classes that it names and that plain checkpoints do without.
        storages: The storages that it refers to, by key.
    """

    content: Any
    foreign: list[Name]
    storages: dict[str, StoredStorage]


def unpickle(source: bytes | IO[bytes]) -> Unpickled:
    """Return what the pickle at the beginning of ``source`` holds; a file then stands behind the pickle.

    Raises:
        UnreadableError: If it is damaged or claims more than it may.
    """
    machine = _Machine()
    try:
        content = machine.run(source)
    except UnreadableError:
        raise
    except Exception as error:  # damaged bytes can raise anything; nothing of them has run
        raise UnreadableError(f"its pickle is damaged ({type(error).__name__})") from error
    return Unpickled(content, [name for name in machine.names.values() if not is_known(name)], machine.storages)


class _Machine:
    """Carries out a pickle's operations on plain values."""

    def __init__(self) -> None:
        self.names: dict[str, Name] = {}
        self.storages: dict[str, StoredStorage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def run(self, source: bytes | IO[bytes]) -> Any:
        """Return the result."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(source)):
            if count > OPERATIONS:
                raise UnreadableError(f"its pickle has more than {OPERATIONS} operations")
            name = operation.name
            if name in _PUSHED:
                self._stack.append(argument)
            elif name == "STOP":
                break
            else:
                self._DO[name](self, argument)
        return self._stack.pop()

    def _nothing(self, _: Any) -> None:
        """Take note of no protocol and no frame: neither says what the pickle holds."""

    def _items(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._items()

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _tuple(self, _: Any) -> None:
        items = tuple(self._items())
        self._stack.append(items)

    def _short_tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise UnreadableError("its pickle takes from an empty stack")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _list(self, _: Any) -> None:
        items = self._items()
        self._stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._items()
        self._stack.append({})
        self._set_items(items)

    def _append(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not StandIn:
            raise UnreadableError("its pickle appends to what is no list")

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, StandIn) or len(items) % 2:
            raise UnreadableError("its pickle sets an item of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[flat(key)] = value

    def _add_items(self, _: Any) -> None:
        items, target = self._items(), self._stack[-1]
        if type(target) is set:
            target.update(map(flat, items))
        elif type(target) is not StandIn:
            raise UnreadableError("its pickle adds to what is no set")

    def _frozen_set(self, _: Any) -> None:
        items = frozenset(map(flat, self._items()))
        self._stack.append(items)

    def _global(self, argument: str) -> None:
        # genops puts one space between the two lines
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnreadableError("its pickle names a class by something else than texts")
        found = Name(module, name)
        key = ".".join(found)
        if key not in self.names and len(self.names) >= _NAMES:
            raise UnreadableError(f"its pickle names more than {_NAMES} classes")
        self._stack.append(self.names.setdefault(key, found))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(called(function, arguments))

    def _new_with_keywords(self, _: Any) -> None:
        keywords = self._stack.pop()
        if keywords:
            arguments, function = self._stack.pop(), self._stack.pop()
            self._stack.append(called(function if is_foreign(function) else None, arguments))
        else:
            self._reduce(None)

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is StandIn:
            target.state = state
        elif type(target) is not dict or not _is_layout(state):
            raise UnreadableError(f"its pickle sets attributes of a {type(target).__name__}")

    def _persistent(self, _: Any) -> None:
        kind, typed, key, _location, count = self._stack.pop()[:5]
        dtype = DTYPES.get(typed.name) if type(typed) is Name and typed.module in STORAGE_MODULES else None
        if kind != "storage" or dtype is None or type(key) is not str or type(count) is not int or count < 0:
            raise UnreadableError("its pickle refers to a storage that torch does not write")
        storage = StoredStorage(key, dtype, count * dtype.itemsize)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise UnreadableError("its pickle gives one storage two lengths")
        self._stack.append(storage)

    _DO: Mapping[str, Callable[[_Machine, Any], Any]] = {
        **dict.fromkeys(("PROTO", "FRAME"), _nothing),
        "MARK": _mark,
        "POP": _pop,
        "POP_MARK": lambda self, _: self._items(),
        "DUP": lambda self, _: self._stack.append(self._stack[-1]),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
        "NONE": lambda self, _: self._stack.append(None),
        "NEWTRUE": lambda self, _: self._stack.append(True),
        "NEWFALSE": lambda self, _: self._stack.append(False),
        "EMPTY_TUPLE": lambda self, _: self._stack.append(()),
        "EMPTY_LIST": lambda self, _: self._stack.append([]),
        "EMPTY_DICT": lambda self, _: self._stack.append({}),
        "EMPTY_SET": lambda self, _: self._stack.append(set()),
        "TUPLE": _tuple,
        "TUPLE1": lambda self, _: self._short_tuple(1),
        "TUPLE2": lambda self, _: self._short_tuple(2),
        "TUPLE3": lambda self, _: self._short_tuple(3),
        "LIST": _list,
        "DICT": _dict,
        "FROZENSET": _frozen_set,
        "APPEND": lambda self, _: self._append([self._stack.pop()]),
        "APPENDS": lambda self, _: self._append(self._items()),
        "SETITEM": lambda self, _: self._set_items([self._stack.pop(-2), self._stack.pop()]),
        "SETITEMS": lambda self, _: self._set_items(self._items()),
        "ADDITEMS": _add_items,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "REDUCE": _reduce,
        "NEWOBJ": _reduce,
        "NEWOBJ_EX": _new_with_keywords,
        "BUILD": _build,
        "BINPERSID": _persistent,
    }


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


def _is_layout(state: Any) -> bool:
    """Return whether attributes are those of a state dict: ``_metadata``, the versions of its modules."""
    return isinstance(state, dict) and set(state) <= {"_metadata"}

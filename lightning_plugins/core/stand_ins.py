"""What stands in for the functions, classes and tensors that a pickle names, and what calls of them would give.

Nothing is imported or called. The functions and classes of which plain checkpoints are made have a row in
:data:`_CALLS`, which checks their arguments, since even a function that is allowed does harm with the wrong ones; every
other call gives a :class:`StandIn`. Tensors become the place where their bytes lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_plugins.core.validation import printable

_LONGEST = 300  # characters of a reason
_DIMENSIONS = 64  # of a tensor, as in NumPy
_KEY_LENGTH = 64  # elements of a tuple that is a key

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_CONSTANTS = (torch.dtype, torch.layout, torch.qscheme, torch.memory_format)
_PLAIN = (str, bytes, int, float, bool, type(None))


class UnreadableError(ValueError):
    """The bytes are not what they should be; the message is the reason alone, on one short line."""

    def __init__(self, why: str) -> None:
        super().__init__(printable(why)[:_LONGEST])


class Name(NamedTuple):
    """A function, class or constant that a pickle names; nothing is imported.

    Args:
        module: Its module.
        name: Its name there.
    """

    module: str
    name: str


class StandIn(dict[Any, Any]):
    """Stands for an object of a class that was not imported.

    Args:
        name: What was called.
        arguments: With what.

    Attributes:
        state: What the pickle would have set the object's attributes to; plain values, never applied.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: Name | None, arguments: Sequence[Any] = ()) -> None:
        super().__init__()
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    # it may have been a key of a dictionary
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


@dataclass(frozen=True)
class StoredStorage:
    """A storage in an archive.

    Args:
        key: The archive's name of it.
        dtype: The type of its elements.
        nbytes: How long the pickle says that it is.
    """

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its archive; nothing is read.

    Args:
        key: The archive's name of the storage.
        dtype: The element type.
        offset: Of the first element in the storage, in elements.
        shape: Sizes.
        stride: Strides, in elements.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, which may be more than are stored: elements can share their place."""
        return math.prod(self.shape) * self.dtype.itemsize


def flat(key: Any) -> Any:
    """Return a key of a dictionary if its hash takes no time: a plain value, or a short tuple of plain values."""
    plain = type(key) in _PLAIN or type(key) in (Name, StandIn)
    if plain or (type(key) is tuple and len(key) <= _KEY_LENGTH and all(type(part) in _PLAIN for part in key)):
        return key
    raise UnreadableError(f"its pickle has a {type(key).__name__} for a key")


def is_foreign(function: Any) -> bool:
    """Return whether a call would be of something that plain checkpoints do without."""
    return type(function) is StandIn or (type(function) is Name and not is_known(function))


def is_known(name: Name) -> bool:
    """Return whether plain checkpoints hold this name: one of :data:`_CALLS`, a storage's type, a constant of torch."""
    if name in _CALLS or (name.module in STORAGE_MODULES and name.name in DTYPES):
        return True
    return name.module == "torch" and isinstance(getattr(torch, name.name, None), _CONSTANTS)


def called(function: Any, arguments: Any) -> Any:
    """Return what a call gives, without calling."""
    if type(arguments) is not tuple:
        raise UnreadableError("its pickle calls a function with something else than a tuple")
    if is_foreign(function):
        return StandIn(function if type(function) is Name else function.name, arguments)
    call = _CALLS.get(function) if type(function) is Name else None
    if call is None:
        raise UnreadableError("its pickle calls something that no plain checkpoint calls")
    return call(*arguments)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    return {flat(key): value for key, value in (pairs.items() if type(pairs) is dict else pairs)}


def _set(items: Any = ()) -> set[Any]:
    return set(map(flat, items))


def _encoded(text: Any, encoding: Any) -> bytes:
    """Return the bytes that a pickle of protocol 2 writes as a text; other encodings can take for ever."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise UnreadableError("its pickle encodes something in an unusual way")
    return text.encode("latin-1")


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    """Return a byte array of what is there; of a number alone Python makes as many zeros."""
    return bytearray(content if type(content) in (bytes, bytearray) else _encoded(content, encoding))


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _size(sizes: Any) -> tuple[int, ...]:
    """Return checked sizes or strides."""
    found = tuple(sizes)
    if len(found) > _DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in found):
        raise UnreadableError("it holds a tensor of impossible sizes")
    return found


def _parameter(data: Any, requires_grad: Any, hooks: Any = ()) -> StoredTensor | StandIn:
    if type(data) not in (StoredTensor, StandIn) or hooks or type(requires_grad) is not bool:
        raise UnreadableError("it holds a parameter that is no tensor")
    found: StoredTensor | StandIn = data
    return found


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> StoredTensor | StandIn:
    _check_attributes(state)
    return _parameter(data, requires_grad, hooks)


def _tensor_with_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return a tensor to which attributes were added; none of its own may be replaced."""
    _check_attributes(state)
    made = called(function, arguments)
    if type(made) not in (StoredTensor, StandIn) or type(kind) is not Name:
        raise UnreadableError("it holds a tensor that is none")
    return made if kind in (Name("torch", "Tensor"), Name("torch.nn.parameter", "Parameter")) else StandIn(kind)


def _check_attributes(state: Any) -> None:
    parts = [part for part in (state if type(state) is tuple else (state,)) if part]
    names = [name for part in parts for name in (part if type(part) is dict else [None])]
    if any(type(name) is not str or hasattr(torch.Tensor, name) for name in names):
        raise UnreadableError("it holds a tensor whose own attributes are replaced")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    return _place(storage, getattr(storage, "dtype", None), offset, shape, stride, *rest)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    found = getattr(torch, dtype.name, None) if type(dtype) is Name and dtype.module == "torch" else None
    return _place(storage, found, offset, shape, stride, requires_grad, hooks, *rest)


def _place(
    storage: Any,
    dtype: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    *rest: Any,
) -> StoredTensor:
    """Return where a tensor lies, if that is inside its storage."""
    if type(storage) is not StoredStorage or not isinstance(dtype, torch.dtype):
        raise UnreadableError("it holds a tensor without a storage")
    sizes, strides = _size(shape), _size(stride)
    if len(sizes) != len(strides) or type(offset) is not int or offset < 0:
        raise UnreadableError("it holds a tensor of impossible sizes")
    # metadata say such things as whether it is conjugated; torch before 0.4 wrote none of the three
    requires_grad, hooks, metadata = (*rest, *(False, None, None)[len(rest) :])[:3]
    if type(requires_grad) is not bool or hooks or type(metadata) not in (dict, type(None)):
        raise UnreadableError("it holds a tensor with code")
    reach = 0 if 0 in sizes else 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    if (offset + reach) * dtype.itemsize > storage.nbytes:
        raise UnreadableError("it holds a tensor that is longer than its storage")
    return StoredTensor(storage.key, dtype, offset, sizes, strides)


def _quantized(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StandIn:
    _tensor(storage, offset, shape, stride)
    return StandIn(Name("torch", "Tensor"))


_CALLS: dict[Name, Callable[..., Any] | None] = {
    Name("collections", "OrderedDict"): _dictionary,
    Name("collections", "Counter"): _dictionary,
    **{Name(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{Name(module, "bytearray"): _bytearray for module in ("builtins", "__builtin__")},
    **{Name(module, "complex"): _complex for module in ("builtins", "__builtin__")},
    Name("_codecs", "encode"): _encoded,
    Name("torch", "Size"): _size,
    Name("torch", "device"): lambda *arguments: StandIn(Name("torch", "device"), arguments),
    Name("torch.serialization", "_get_layout"): lambda name: StandIn(Name("torch", "layout"), (name,)),
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
    Name("torch._utils", "_rebuild_sparse_tensor"): lambda *_: StandIn(Name("torch", "Tensor")),
    Name("torch._utils", "_rebuild_qtensor"): _quantized,
    Name("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    # named, never called
    Name("torch", "Tensor"): None,
    Name("torch.nn.parameter", "Parameter"): None,
}

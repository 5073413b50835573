"""One step's scalars as TensorBoard's ``Event`` message, byte for byte what protocol buffers make of it.

What stands before a value is the same in every step, so it is made once for each tag.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping

_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")
_LARGEST_FLOAT = 3.4028235677973366e38


def event_record(step: int, wall_time: float, scalars: Mapping[str, float]) -> bytes:
    """Return the message.

    Args:
        step: The place on the x axis, at least 0.
        wall_time: Seconds since 1970.
        scalars: Tag -> value, written as float32; what is too large for that is infinite.

    Example:
        >>> from tensorboard.compat.proto.event_pb2 import Event
        >>> event = Event.FromString(event_record(3, 0.5, {"loss": 0.25}))
        >>> event.step, event.wall_time, event.summary.value[0].tag, event.summary.value[0].simple_value
        (3, 0.5, 'loss', 0.25)
    """
    parts = []
    for tag, value in scalars.items():
        if not -_LARGEST_FLOAT < value < _LARGEST_FLOAT and value == value:  # noqa: PLR0124
            value = float("inf") if value > 0 else float("-inf")  # noqa: PLW2901
        parts.append(_before_value(tag) + _FLOAT.pack(value))
    summary = b"".join(parts)
    # a field that has its default is left out
    moment = b"\x09" + _DOUBLE.pack(wall_time) if wall_time else b""
    place = b"\x10" + _varint(step) if step else b""
    return moment + place + b"\x2a" + _varint(len(summary)) + summary


@functools.lru_cache(maxsize=1024)
def _before_value(tag: str) -> bytes:
    """Return a value's bytes up to its four of float32: field 1 of the summary, its length, the tag, field 2."""
    name = tag.encode()
    inner = b"\x0a" + _varint(len(name)) + name + b"\x15"
    return b"\x0a" + _varint(len(inner) + _FLOAT.size) + inner


def _varint(number: int) -> bytes:
    """Return a whole number in groups of seven bits, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)

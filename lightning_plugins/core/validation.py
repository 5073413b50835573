"""Argument checks. Every message names the argument, the rule, the value and, where not obvious, the remedy."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

_LONGEST = 500  # characters of a value in a message
_WORD = 100  # characters of what may be a misspelt word: to compare longer ones takes long
_LARGEST = 10_000  # values in a container whose `repr` is still asked for; shared ones count each time they are shown


class LightningPluginsWarning(UserWarning):
    """A run that is legal but probably not what was meant; filter it by this class. Its text is one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def shown(value: Any) -> str:
    """Return how a message shows a value: its ``repr`` on one line, shortened, and something else where that fails.

    A ``repr`` is the value's own code, Python's refuses numbers of many digits and very deep lists, and never ends for
    a few lists that hold one another. A message must come out all the same.

    Example:
        >>> shown("5%"), shown(10**9000)
        ("'5%'", 'a whole number of 29898 bits')
    """
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, bytearray)) and len(value) > _LARGEST:
        return f"{printable(repr(value[:_LONGEST]))}... ({len(value)} characters)"
    if _is_large(value):
        return f"a {type(value).__name__} that is too large to show"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # it may raise anything
        return f"a {type(value).__name__} that cannot be shown"
    return printable(shortened(text))


def _is_large(value: Any) -> bool:
    """Return whether a ``repr`` would show too many values; each is counted as often as it would be shown."""
    left, count = [value], 0
    while left and count <= _LARGEST:
        inner = left.pop()
        count += 1
        if isinstance(inner, (str, bytes, bytearray)):
            count += len(inner) // _LONGEST
        elif isinstance(inner, (dict, list, tuple, set, frozenset, deque)):
            count += len(inner)
            if count <= _LARGEST:
                left.extend((*inner.keys(), *inner.values()) if isinstance(inner, dict) else inner)
        elif is_dataclass(inner) and not isinstance(inner, type):
            left.extend(getattr(inner, "__dict__", {}).values())
    return count > _LARGEST


def shortened(text: str) -> str:
    """Return a text as it is, or the beginning of a very long one and how long it is."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def printable(text: str) -> str:
    r"""Return a text on one line, with what a terminal would act upon, or could not show, written out.

    Example:
        >>> printable("two\nlines"), printable("\x1b[31mred")
        ('two lines', '\\x1b[31mred')
    """
    line = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)


def plain_value(value: Any) -> int | str | None:
    """Return a value out of a file as one that any program can show: a number, a short text, or how a message shows it.

    Example:
        >>> plain_value(3), plain_value("2.6.6"), plain_value([1]), plain_value(None)
        (3, '2.6.6', '[1]', None)
    """
    if value is None or (type(value) is int and abs(value) < 2**63):
        return value
    return shortened(value) if isinstance(value, str) else shown(value)


def first_line(error: object) -> str:
    """Return the beginning of what an error says, on one printable line; its type's name if it says nothing."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))[:_LONGEST]


def plain_text(name: str, value: Any, *, longest: int = 1000) -> str:
    r"""Return ``value``, or raise when it is not a text of one line without control characters.

    What a checkpoint's state holds is checked with it before it is written to a file, a terminal or a path.

    Raises:
        TypeError: If ``value`` is not a text.
        ValueError: If it is longer than ``longest``, or holds what cannot be printed.

    Example:
        >>> plain_text("stamp", "2026-01-01\n1,1,train")
        Traceback (most recent call last):
        ...
        ValueError: `stamp` must be one line of at most 1000 printable characters, got '2026-01-01\n1,1,train'.
    """
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a text, got {shown(value)}.")
    if len(value) > longest or not value.isprintable():
        raise ValueError(f"`{name}` must be one line of at most {longest} printable characters, got {shown(value)}.")
    return value


def whole_number(name: str, value: Any, *, at_least: int = 0, at_most: int = sys.maxsize, unit: str = "") -> int:
    """Return ``value`` as an ``int``, or raise when it is not a whole number of at least ``at_least``.

    The largest that is taken is ``sys.maxsize``: nothing counts further, and floats still hold its quotients.

    Args:
        name: The argument's name, for the message.
        value: What the user gave: an ``int`` or anything with ``__index__`` (NumPy's integers), not a ``bool``.
        at_least: Smallest legal value.
        at_most: Largest legal value.
        unit: What is counted (``"steps"``), for the message.

    Raises:
        TypeError: If ``value`` is not a whole number.
        ValueError: If it is below ``at_least`` or above ``at_most``.

    Example:
        >>> whole_number("warmup", -3, unit="steps")
        Traceback (most recent call last):
        ...
        ValueError: `warmup` must be at least 0 steps, got -3.
    """
    what = f" of {unit}" if unit else ""
    one, many = f" {unit.removesuffix('es') if unit.endswith('ches') else unit.removesuffix('s')}", f" {unit}"
    try:
        number = operator.index(_no_truth_value(value))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # tensors of several numbers, for one
        raise TypeError(f"`{name}` must be a whole number{what}, got {shown(value)}.") from error
    if number < at_least:
        units = "" if not unit else one if at_least == 1 else many
        raise ValueError(f"`{name}` must be at least {at_least}{units}, got {shown(number)}.")
    if number > at_most:
        raise ValueError(f"`{name}` must be at most {at_most}{' ' + unit if unit else ''}, got {shown(number)}.")
    return number


def real_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value``, or raise when it is not a finite number inside the given limits.

    Args:
        name: The argument's name, for the message.
        value: What the user gave; integers are fine, ``bool`` is not.
        above: Exclusive lower limit.
        at_least: Inclusive lower limit.
        at_most: Inclusive upper limit.
        below: Exclusive upper limit.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is not finite or outside the limits.

    Example:
        >>> real_number("decay", 1.5, at_least=0, at_most=1)
        Traceback (most recent call last):
        ...
        ValueError: `decay` must be at least 0 and at most 1, got 1.5.
    """
    try:
        number = _plain_number(_no_truth_value(value))
    except OverflowError as error:
        raise ValueError(f"`{name}` must be a number that a float can hold, got {shown(value)}.") from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be a number, got {shown(value)}.") from error
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {shown(value)}.")
    limits = [
        (above, number > above, "above"),
        (at_least, number >= at_least, "at least"),
        (at_most, number <= at_most, "at most"),
        (below, number < below, "below"),
    ]
    if not all(kept for _, kept, _ in limits):
        rule = " and ".join(f"{word} {limit:g}" for limit, _, word in limits if math.isfinite(limit))
        raise ValueError(f"`{name}` must be {rule}, got {shown(value)}.")
    return number


def _plain_number(value: Any) -> float:
    """Return ``value`` as an ``int`` or ``float`` that a float can hold."""
    if isinstance(value, (str, bytes, bytearray)) or not hasattr(value, "__float__"):
        raise TypeError("not a number")
    number = float(value.detach() if hasattr(value, "detach") else value)
    return int(value) if isinstance(value, int) else number


def _no_truth_value(value: Any) -> Any:
    """Return ``value``, or raise when it is a truth value, NumPy's and torch's included, or a class."""
    if isinstance(value, (bool, type)) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError("a truth value or a class")
    return value


def true_or_false(name: str, value: Any) -> bool:
    """Return ``value``, or raise when it is not a ``bool``: a typing error such as ``"no"`` would count as true.

    Raises:
        TypeError: If ``value`` is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")
    return value


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """Return the end of a message that names what a misspelt word was probably meant to be, or a period.

    Example:
        >>> did_you_mean("warmup_cosin", ["WarmupCosine", "OneCycle"])
        "; did you mean 'WarmupCosine'?"
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).lower()

    known = {plain(choice): choice for choice in choices}
    near = difflib.get_close_matches(plain(value), known, n=1) if isinstance(value, str) and len(value) < _WORD else []
    return f"; did you mean {known[near[0]]!r}?" if near else "."


def takes(name: str, function: Any, *parameters: str, what: str = "a function") -> Any:
    """Return ``function``, or raise when it cannot be called with ``parameters``, as far as its signature tells.

    Args:
        name: The argument's name, for the message.
        function: What the user gave.
        *parameters: What it will be called with, for the message and for their number.
        what: What may be given, for the message.

    Raises:
        TypeError: If it is no function, or one of other parameters.

    Example:
        >>> takes("function", lambda loop: None, "loop", "event")
        Traceback (most recent call last):
        ...
        TypeError: `function` must be a function of (loop, event), got <lambda>(loop).
    """
    wanted = f"`{name}` must be {what} of ({', '.join(parameters)})"
    if not callable(function):
        raise TypeError(f"{wanted}, got {shown(function)}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell
        return function
    try:
        signature.bind(*parameters)
    except TypeError as fault:
        called = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{wanted}, got {printable(shortened(f'{called}{signature}'))}.") from fault
    return function


def one_of(name: str, value: Any, choices: Collection[str], *, or_else: str = "") -> str:
    """Return ``value``, or raise when it is not one of ``choices``.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        choices: The words there are.
        or_else: What else may be given, for the message.

    Raises:
        ValueError: If ``value`` is none of them.

    Example:
        >>> one_of("mode", "up", ("min", "max"))
        Traceback (most recent call last):
        ...
        ValueError: `mode` must be one of 'min', 'max', got 'up'.
    """
    if not isinstance(value, str) or value not in choices:
        words = ", ".join(map(repr, choices))
        rule = f"{words}{or_else}" if or_else else f"one of {words}" if len(choices) > 1 else words
        raise ValueError(f"`{name}` must be {rule}, got {shown(value)}{did_you_mean(value, choices)}")
    return next(choice for choice in choices if choice == value)


def a_list(name: str, value: Any, what: str = "a list") -> list[Any]:
    """Return ``value`` as a list, or raise when it is one thing, a text included.

    Raises:
        TypeError: If ``value`` cannot be gone through.
    """
    if not isinstance(value, (str, bytes)) and isinstance(value, Iterable):
        try:
            return list(value)
        except (TypeError, RuntimeError):  # arrays and tensors without dimensions say that they can, and cannot
            pass
    raise TypeError(f"`{name}` must be {what}, got {shown(value)}.")


def a_path(name: str, value: Any) -> str:
    """Return ``value`` as text, or raise when it is no path.

    Raises:
        TypeError: If ``value`` is neither a text nor a path.
        ValueError: If no file can have that name.

    Example:
        >>> a_path("output", 5)
        Traceback (most recent call last):
        ...
        TypeError: `output` must be a path, got 5.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"`{name}` must be a path, got {shown(value)}.")
    text = str(os.fspath(value))
    if not text or "\0" in text or not _encodes(text):
        raise ValueError(f"`{name}` must be a path that a file can have, got {shown(value)}.")
    return text


def _encodes(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def check_state_version(owner: str, state: Any, version: int) -> dict[str, Any]:
    """Return a saved state without its version, or raise when this release cannot read it.

    Args:
        owner: Whose state it is, for the message.
        state: What a checkpoint holds; without a version it is of version 1.
        version: The version that this release writes.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If its version is another.

    Example:
        >>> check_state_version("EMA", {"version": 99}, 1)
        Traceback (most recent call last):
        ...
        ValueError: The state of EMA must be of version 1, got version 99 in the checkpoint. ...
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {owner} must be a mapping, got {shown(state)}.")
    found = state.get("version", 1)
    if type(found) is not int or found != version:
        later = isinstance(found, int) and found > version
        remedy = (
            "It was written by a later release of lightning_plugins: install that one, or resume without this callback."
            if later
            else "Resume without this callback, or with the release of lightning_plugins that wrote it."
        )
        raise ValueError(
            f"The state of {owner} must be of version {version}, got version {shown(found)} in the checkpoint. {remedy}"
        )
    return {name: value for name, value in state.items() if name != "version"}

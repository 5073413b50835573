"""Schedules written as text, for the command line: parsed, never evaluated."""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
import re
import warnings
from typing import Any

from lightning_plugins.core.durations import check_duration
from lightning_plugins.core.validation import shortened, shown
from lightning_plugins.schedules.configuration import known_schedules
from lightning_plugins.schedules.curves import NAMED_CURVES
from lightning_plugins.schedules.schedule import Schedule

_LONGEST = 5000  # characters; the longest that a person writes has some hundred
_DEEPEST = 60  # calls, lists and factors inside each other, well inside Python's own limits
# 5% or 2ep where Python expects a number
_UNQUOTED = re.compile(r"(?<![\w.'\"])(\d+(?:\.\d+)?(?:%|ep\b))(?!['\"])")
_METHODS = ("cycle", "delay", "floor", "hold_every", "scale", "shift")


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that a Python-like expression describes.

    Allowed are this package's schedules with literal arguments, their combining methods and ``*``. Nothing is
    evaluated, and no import path is followed: text can only name durations (``"5%"``) and the built-in shapes.

    Args:
        text: For example ``WarmupCosine(warmup='5%').floor(0.1)``.

    Raises:
        ValueError: If the text is no such expression, with the place where it goes wrong.

    Example:
        >>> parse_schedule("WarmupCosine(warmup='5%', hold=10) * 0.5")
        Scaled(schedule=WarmupCosine(warmup='5%', hold=10, total=None, start=0.0, end=0.0), factor=0.5)
    """
    quoted = f"`{shortened(text)}`"
    if len(text) > _LONGEST:
        raise ValueError(f"{quoted} is too long; an expression has at most {_LONGEST} characters.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, about what is legal but odd
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        unquoted = _UNQUOTED.sub(r"'\1'", text)
        if unquoted != text:
            raise ValueError(f"{quoted} has a duration without quotes; write {shortened(unquoted)}.") from error
        raise ValueError(f"{quoted} is not an expression: {error}.") from error
    if _depth(tree.body) > _DEEPEST:
        raise ValueError(f"{quoted} has more than {_DEEPEST} calls, lists and factors inside each other.")
    try:
        schedule = _value(tree.body)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{quoted}: {error}") from error
    if not isinstance(schedule, Schedule):
        raise ValueError(f"{quoted} is not a schedule; write for example WarmupCosine(warmup='5%').")  # noqa: TRY004
    return schedule


def _depth(node: ast.AST) -> int:
    """Return how many nodes lie inside each other, without recursion, which is what has to be kept in bounds."""
    depth, level = 0, [node]
    while level:
        depth, level = depth + 1, [child for parent in level for child in ast.iter_child_nodes(parent)]
    return depth


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() as text):
            return _check_text(text)
        case ast.Constant(value=bool() | int() | float() | None):
            return node.value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return operator.mul(*_factors(_value(left), _value(right)))
        case ast.Call(func=function):
            return _function(function)(*[_value(item) for item in node.args], **_keywords(node))
    if isinstance(node, ast.Name) and node.id in known_schedules():
        raise ValueError(_without_arguments(node.id))
    raise ValueError(f"`{shortened(ast.unparse(node))}` is neither a schedule nor a literal.")


def _function(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name):
            return _named(name)
        case ast.Attribute(value=owner, attr=name) if name in _METHODS:
            schedule = _value(owner)
            if isinstance(schedule, Schedule):
                return getattr(schedule, name)
    raise ValueError(f"`{shortened(ast.unparse(node))}` is no schedule and none of the methods {', '.join(_METHODS)}.")


def _without_arguments(name: str) -> str:
    """Return how a schedule that was named alone is written."""
    signature = inspect.signature(known_schedules()[name])
    needed = [parameter.name for parameter in signature.parameters.values() if parameter.default is parameter.empty]
    return f"{name} needs arguments; write {name}({', '.join(f'{word}=...' for word in needed)})."


def _named(name: str) -> Any:
    known = known_schedules()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    raise ValueError(f"`{shortened(name)}` is not a schedule; {hint}")


def _keywords(node: ast.Call) -> dict[str, Any]:
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("`**` is not allowed; write the arguments out.")
    return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}


def _factors(left: Any, right: Any) -> tuple[Any, Any]:
    if not any(isinstance(side, Schedule) for side in (left, right)):
        raise ValueError(f"`*` multiplies a schedule with a schedule or a number, got {shown(left)} and {right!r}.")
    return left, right


def _check_text(text: str) -> str:
    if text not in NAMED_CURVES:
        try:
            check_duration("text", text)
        except ValueError:
            shapes = ", ".join(map(repr, NAMED_CURVES))
            raise ValueError(
                f"a text must be a duration such as '5%' or '2ep', or one of {shapes}, got {shown(text)}."
            ) from None
    return text

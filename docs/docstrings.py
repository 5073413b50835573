"""Reads this project's docstrings and signatures as the API reference needs them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Shows ``Example:`` as the runnable code it is, Sphinx's roles as names, and dataclasses as a caller sees them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring before it is parsed."""
        if obj.docstring:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda match: f"`{match[1].removeprefix('lightning_plugins.')}`", text)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a dataclass the signature that Python gives it: its fields are declared by functions of our own."""
        kind = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not dataclasses.is_dataclass(kind) or "__init__" not in cls.members:
            return
        parameters = cls.members["__init__"].parameters
        for name, parameter in inspect.signature(kind).parameters.items():
            default = None if parameter.default is inspect.Parameter.empty else repr(parameter.default)
            parameters[name].default = default
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                parameters[name].kind = griffe.ParameterKind.keyword_only

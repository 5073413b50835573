"""Reads this project's docstrings as the API reference needs them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Shows ``Example:`` as the runnable code it is, and Sphinx's roles as names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring before it is parsed."""
        if obj.docstring:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda match: f"`{match[1].removeprefix('lightning_plugins.')}`", text)

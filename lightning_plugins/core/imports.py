"""What is imported when it is first used: the public names (PEP 562), and what a configuration names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package whose public names load on first use.

    Args:
        package: The package's ``__name__``.
        modules: Public name -> the module that defines it.

    Returns:
        The two functions, to be assigned at the package's top level.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__


def by_import_path(path: str) -> Any:
    """Return what ``path`` names, a module and an attribute of it.

    Raises:
        ImportError: If there is no such thing; the message says why.

    Example:
        >>> by_import_path("math.sqrt")(9)
        3.0
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # a path such as "..x" is a TypeError
        raise ImportError(str(error)) from error

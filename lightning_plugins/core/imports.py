"""What is imported when it is first used: the public names (PEP 562), and what a configuration names."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def declared_names(package: str) -> dict[str, str]:
    """Return public name -> module that defines it, as a package declares them.

    The imports under ``if TYPE_CHECKING:`` in its ``__init__.py`` are the one list of its names. Type checkers follow
    them as they stand; here they are read from the source, and none of the modules is imported.

    Args:
        package: The package's import path.

    Example:
        >>> declared_names("lightning_plugins.events")["Event"]
        'lightning_plugins.events.events'
    """
    spec = importlib.util.find_spec(package)
    source: str | None = spec.loader.get_source(package)  # type: ignore[union-attr]  # it is there: we are in it
    if source is None:
        raise ImportError(f"The source of `{package}` is needed to load its names. Install it with its .py files.")
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(found.module) for found in imports for alias in found.names}


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose declared names load on first use.

    Args:
        package: The package's ``__name__``.

    Returns:
        The three, to be assigned at the package's top level under the ``else`` of ``if TYPE_CHECKING:``. There, type
        checkers see no ``__getattr__`` that would accept any name.
    """
    modules = declared_names(package)

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in modules:
            near = {known.lower(): known for known in modules}
            found = difflib.get_close_matches(name.lower(), near, n=1)
            meant = f"; did you mean {near[found[0]]!r}?" if found else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{meant}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *modules})

    return sorted(modules), __getattr__, __dir__


def by_import_path(path: str) -> Any:
    """Return what ``path`` names, a module and an attribute of it.

    Raises:
        ImportError: If there is no such thing; the message says why.

    Example:
        >>> by_import_path("math.sqrt")(9)
        3.0
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError("an import path is written module.name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # a path such as "..x" is a TypeError
        raise ImportError(str(error)) from error

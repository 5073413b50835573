"""Replace attributes of objects that belong to Lightning, torch or the user, and put them back.

Setting an attribute on an instance never fails, so a method that a new release has renamed would be overridden without
any effect. Here the name is read first, and a missing one is an error.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

_ABSENT: Any = object()
_LIBRARIES = ("lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics")


class MissingNameError(RuntimeError):
    """An attribute that this package relies on is missing in the installed release of another library."""


def read(owner: Any, name: str) -> Any:
    """Return ``owner.name``.

    Raises:
        MissingNameError: If there is no such attribute. The message names the attribute, the class and its library's
            version.

    Example:
        >>> read([1, 2], "append_all")
        Traceback (most recent call last):
        ...
        lightning_plugins.core.patching.MissingNameError: `list` of builtins has no attribute `append_all`, which ...
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        if error.name is not None:  # of what a property asks for, if it is one
            owner, name = error.obj, error.name
        kind = owner if isinstance(owner, type) else type(owner)
        raise MissingNameError(
            f"`{kind.__name__}` of {_release(kind)} has no attribute `{name}`, which lightning_plugins relies on. "
            "Install a release that it declares to support, or a newer lightning_plugins."
        ) from error


def check_exists(owner: Any, name: str) -> None:
    """Raise what :func:`read` would, without running the code of a property.

    Raises:
        MissingNameError: If there is no such attribute.
    """
    try:
        inspect.getattr_static(owner, name)
    except AttributeError:
        read(owner, name)


class Patches:
    """Replacements of foreign attributes, undone together in reverse order.

    Only our own value is ever taken away: where another wrapper was laid over it since, that one stays and calls the
    original again. The order in which several owners undo theirs does not matter.

    Example:
        >>> class Loop:
        ...     def run(self):
        ...         return "ran"
        >>> loop, patches = Loop(), Patches()
        >>> patches.wrap(loop, "run", lambda original: original() + " twice")
        >>> loop.run()
        'ran twice'
        >>> patches.undo()
        >>> loop.run(), vars(loop)
        ('ran', {})
    """

    def __init__(self) -> None:
        self._patches: list[_Patch] = []

    def __bool__(self) -> bool:
        return bool(self._patches)

    def __reduce__(self) -> tuple[Any, ...]:
        return Patches, ()  # a copy has replaced nothing

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let ``owner.name(*args)`` call ``wrapper(original, *args)`` until :meth:`undo`.

        Args:
            owner: The object, not its class.
            name: A method of it.
            wrapper: Called with the method that was there and its arguments.

        Raises:
            MissingNameError: If there is no such method.
        """
        self._patches.append(_Patch(owner, name, _Wrapper(read(owner, name), wrapper)))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Let ``owner.name`` be ``value`` until :meth:`undo`.

        Raises:
            MissingNameError: If there is no such attribute.
        """
        read(owner, name)
        self._patches.append(_Patch(owner, name, value))

    def undo(self) -> None:
        """Put everything back; harmless when that is done."""
        while self._patches:
            self._patches.pop().undo()


class _Wrapper:
    """A method with another one around it; only the method itself once it is not active any more."""

    def __init__(self, original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original, updated=())  # inspect and Lightning look at the signature
        self.original, self.wrapper = original, wrapper
        self.active = True  # a foreign wrapper that was laid over this one goes on calling it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.original, *args, **kwargs) if self.active else self.original(*args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What torch's schedulers wrap a method of an optimizer by: the function, to be called with the owner first."""
        return lambda _, *args, **kwargs: self(*args, **kwargs)


class _Patch:
    """One replaced attribute."""

    in_force: ClassVar[weakref.WeakSet[_Patch]] = weakref.WeakSet()

    def __init__(self, owner: Any, name: str, ours: Any) -> None:
        self.owner, self.name, self.ours = owner, name, ours
        self.by_property = hasattr(getattr(type(owner), name, None), "__set__")
        self.before = self._now()
        self._put(ours)
        self.in_force.add(self)

    def undo(self) -> None:
        self.in_force.discard(self)
        if isinstance(self.ours, _Wrapper):
            self.ours.active = False
        for later in self.in_force:  # one of ours that was laid over this one must not bring it back
            if later.owner is self.owner and later.name == self.name and later.before is self.ours:
                later.before = self.before
                return
        if self._now() is self.ours:
            self._put(self.before)

    def _now(self) -> Any:
        return getattr(self.owner, self.name) if self.by_property else vars(self.owner).get(self.name, _ABSENT)

    def _put(self, value: Any) -> None:
        if self.by_property:
            setattr(self.owner, self.name, value)
        elif value is _ABSENT:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = value


def _release(kind: type) -> str:
    """Return the library that a class comes from, or the nearest of its bases, and its version: ``lightning 2.6.6``."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    package = next((found for found in packages if found in _LIBRARIES), packages[0])
    return f"{package} {getattr(sys.modules.get(package), '__version__', '')}".strip()

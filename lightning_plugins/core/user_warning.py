"""A warning that names a line of the code that called this package, as the line that can be changed."""

from __future__ import annotations

import inspect
import warnings

from lightning_plugins.core.validation import LightningPluginsWarning

_PACKAGE = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Warn with ``message`` at the line outside of this package that led here, however deep inside it was found.

    Python shows the same warning of one line once: two calls of yours are two lines.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, LightningPluginsWarning, stacklevel=level)

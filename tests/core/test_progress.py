"""When a bar is shown: on a terminal for long work, or as asked."""

import io
import sys

import pytest

from lightning_plugins.core.progress import with_progress

GIB = 2**30


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize(
    ("show", "size", "on_a_terminal", "elsewhere"),
    [
        (None, GIB, True, False),
        (None, GIB - 1, False, False),
        (True, GIB, True, True),
        (True, 1, True, True),
        (False, GIB, False, False),
        (False, 1, False, False),
    ],
)
def test_a_bar_is_shown_where_it_is_of_use(monkeypatch, terminal, show, size, on_a_terminal, elsewhere):
    errors = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    items = [("a", size // 4), ("b", size - size // 4)]
    assert list(with_progress(items, "reading", show=show)) == ["a", "b"]
    shown = on_a_terminal if terminal else elsewhere
    assert ("reading: 100%" in errors.getvalue(), bool(errors.getvalue())) == (shown, shown)

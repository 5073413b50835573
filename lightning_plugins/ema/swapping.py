"""What a module holds at any moment, its trained weights or their average: one place decides, from what is wanted."""

from __future__ import annotations

import copy
from typing import Any

from lightning_plugins.ema.shadow import Shadow, showing


class Stage:
    """Puts an average into its module and takes it out, as the wishes of a run come and go.

    Every hook only says what it wants; :meth:`settle` then makes it so: one way in and one way out, whatever exit a run
    takes.

    Attributes:
        blocks: Open ``with`` blocks that want the average; they come first.
        evaluating: What the evaluation under way wants, ``"average"`` or ``"raw"``; ``None`` when there is none.
        kept: Whether the average stays when nobody wants anything, as after a fit.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.evaluating: str | None = None
        self.kept = False
        self._displaced: Shadow | None = None  # whose average was in the module when ours came
        self._fingerprint: tuple[Any, ...] | None = ()  # None: a copy's, whose original was untouched

    def clear(self) -> None:
        """Forget every wish but what is kept."""
        self.blocks, self.evaluating = 0, None

    def settle(self, shadow: Shadow | None, *, ready: bool) -> bool:
        """Make the module of ``shadow`` hold what is wanted now.

        Args:
            shadow: The average, ``None`` when there is none.
            ready: Whether it has been updated: until then the module keeps its own weights.

        Returns:
            Whether the module holds something else now.
        """
        if shadow is None:
            return False
        rest = "average" if self.kept else "raw"
        wanted = "average" if self.blocks else self.evaluating or rest
        if wanted == "average" and ready and not shadow.swapped:
            self._displaced = showing(shadow.module)
            if self._displaced is not None:
                self._displaced.swap_out()
            shadow.swap_in()
        elif wanted == "raw" and shadow.swapped:
            shadow.swap_out()
            displaced, self._displaced = self._displaced, None
            if displaced is not None:
                displaced.swap_in()
        else:
            return False
        return True

    def for_copy(self, shadow: Shadow) -> Stage:
        """Return the stage of a copy of it all: writes are told by the tensors themselves, and a copy has others."""
        if not self.untouched(shadow):
            return self
        stage = copy.copy(self)
        stage._fingerprint = None
        return stage

    def remember(self, shadow: Shadow) -> None:
        """Take the weights as they are for ours."""
        self._fingerprint = shadow.fingerprint()

    def untouched(self, shadow: Shadow) -> bool:
        """Return whether nobody has written into the module since we last did."""
        if self._fingerprint is None:
            self.remember(shadow)
        return self._fingerprint == shadow.fingerprint()

"""What a module holds at any moment, its trained weights or their average: one place decides, from what is wanted."""

from __future__ import annotations

from lightning_plugins.ema.shadow import Shadow, showing


class Swapper:
    """Puts an average into its module and takes it out, as the wishes of a run come and go.

    Every hook only says what it wants; :meth:`apply` then makes it so: one way in and one way out, whatever exit a run
    takes.

    Attributes:
        blocks: Open ``with`` blocks that want the average; they come first.
        evaluating: What the evaluation under way wants, ``"average"`` or ``"raw"``; ``None`` when there is none.
        kept: Whether the average stays in the module otherwise, as after a fit.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.evaluating: str | None = None
        self.kept = False
        # whose average was in the module when ours came
        self._displaced: Shadow | None = None

    def forget(self) -> None:
        """Forget every wish but those of open blocks."""
        self.evaluating, self.kept, self._displaced = None, False, None

    def apply(self, shadow: Shadow, *, ready: bool, keep_shadows: bool) -> bool:
        """Make the module of ``shadow`` hold what is wanted now.

        Args:
            shadow: The average.
            ready: Whether it has been updated: until then the module keeps its own weights.
            keep_shadows: Whether the average must outlive what is written into the module meanwhile.

        Returns:
            Whether the module holds something else now.
        """
        rest = "average" if self.kept else "raw"
        wanted = "average" if self.blocks else self.evaluating or rest
        if wanted == "average" and ready and not shadow.swapped:
            self._displaced = showing(shadow.module)
            if self._displaced is not None:
                self._displaced.swap_out()
            shadow.swap_in(keep_shadows=keep_shadows)
        elif wanted == "raw" and shadow.swapped:
            shadow.swap_out()
            displaced, self._displaced = self._displaced, None
            if displaced is not None:
                displaced.swap_in(keep_shadows=keep_shadows)
        else:
            return False
        return True

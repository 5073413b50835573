"""The state of every random generator that a step or a validation draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable

import torch


class RandomState:
    """A copy of the generators of Python, NumPy and torch; :meth:`restore` puts them back.

    Args:
        devices: Accelerators whose generators count besides the host's; the CPU among them changes nothing. ``None``:
            every CUDA device, if CUDA is in use.

    Example:
        >>> kept = RandomState()
        >>> first = random.random(), torch.rand(())
        >>> kept.restore()
        >>> first == (random.random(), torch.rand(()))
        True
    """

    def __init__(self, devices: Iterable[torch.device] | None = None) -> None:
        self._host = torch.get_rng_state()
        self._python = random.getstate()
        # NumPy is only asked when the program has it: importing it here would cost more than the copy.
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        chosen = _all_devices() if devices is None else [device for device in devices if device.type == "cuda"]
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in chosen]

    def restore(self) -> None:
        """Put the generators back; may be called again."""
        torch.set_rng_state(self._host)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


def _all_devices() -> list[torch.device]:
    """Return the CUDA devices, none where CUDA is not in use: asking for a state would start it."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]

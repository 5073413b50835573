"""Averages of any length, made after the run: the arithmetic of post-hoc EMA.

A power average at step n gives the weights of step t a share proportional to t^gamma. A few of them, recorded now and
then during training (*snapshots*), span a space in which every other power average can be approximated by least
squares: the snapshot coefficients x solve A x = b, where A holds the inner products of the snapshots' profiles with one
another and b those with the profile that is wanted. Source: T. Karras et al., "Analyzing and improving the training
dynamics of diffusion models", 2023, arXiv:2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_plugins.core.progress import with_progress
from lightning_plugins.core.validation import a_path, shortened, shown, whole_number
from lightning_plugins.ema.power_exponent import power_exponent
from lightning_plugins.ema.snapshots import SnapshotFile, list_snapshots, read_frozen, steps_in

_MOST_AVERAGES = 5000
"""Most averages that a solution is sought for: a dense system of so many unknowns, 200 MB and some seconds."""


def synthesis_weights(
    snapshots: Sequence[tuple[int, float]], *, step: int, sigma_rel: float, normalize: bool = True
) -> list[float]:
    """Return the share of each snapshot in the average of length ``sigma_rel`` at ``step``.

    Args:
        snapshots: ``(step, sigma_rel)`` of every snapshot, in any order.
        step: Step of the average that is wanted.
        sigma_rel: Its relative standard deviation, above 0 and below 0.2887.
        normalize: Whether to scale the shares to sum to 1, as the paper's authors do, so that a constant weight comes
            out exactly.

    Returns:
        One number per snapshot, solved for in float64.

    Example:
        >>> [round(x, 6) for x in synthesis_weights([(5, 0.1), (10, 0.1)], step=10, sigma_rel=0.1)]
        [0.0, 1.0]
    """
    steps = torch.tensor([float(t) for t, _ in snapshots], dtype=torch.float64)
    exponents = torch.tensor([power_exponent(s) for _, s in snapshots], dtype=torch.float64)
    wanted_step = torch.tensor([float(step)], dtype=torch.float64)
    wanted_exponent = torch.tensor([power_exponent(sigma_rel)], dtype=torch.float64)
    inner = _inner_products(steps, exponents, steps, exponents)
    target = _inner_products(steps, exponents, wanted_step, wanted_exponent)
    try:
        shares = torch.linalg.solve(inner, target).flatten()
    # a singular matrix
    except RuntimeError as error:
        raise ValueError("`snapshots` must be of different steps or values of `sigma_rel`, got one twice.") from error
    if normalize:
        shares = shares / shares.sum()
    return [float(share) for share in shares]


def _inner_products(steps_a: Tensor, exponents_a: Tensor, steps_b: Tensor, exponents_b: Tensor) -> Tensor:
    """Return the inner products of power profiles, a matrix: rows for a, columns for b."""
    t_a, t_b = steps_a[:, None], steps_b[None, :]
    g_a, g_b = exponents_a[:, None], exponents_b[None, :]
    exponent = torch.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * torch.maximum(t_a, t_b))


def synthesize_ema(
    dirpath: str | Path, sigma_rel: float, step: int | None = None, *, progress: bool | None = None
) -> dict[str, Tensor]:
    """Reconstruct, from the snapshots of :class:`~lightning_plugins.PostHocEMA`, an average of any length.

    Args:
        dirpath: Directory of the snapshots.
        sigma_rel: Relative standard deviation that the average should have, above 0 and below 0.2887; best between
            those of the recorded averages, a little beyond them is fine.
        step: Step of the snapshot that it should end at; ``None`` for the last.
        progress: Show a bar on standard error. ``None``: only on a terminal and for more than 1 GB.

    Returns:
        A complete state dict in float32, for ``module.load_state_dict``: buffers as they were at that step.

    Raises:
        ValueError: If the directory has no snapshots, ``step`` is none of theirs, or ``sigma_rel`` is out of range.
    """
    power_exponent(sigma_rel)
    sigma_rel = float(sigma_rel)
    there = steps_in(a_path("dirpath", dirpath))
    if not there:
        raise ValueError(f"`dirpath` must be a directory with snapshots of PostHocEMA, got {shown(str(dirpath))}.")
    end = there[-1] if step is None else whole_number("step", step, at_least=1, unit="steps")
    if end not in there:
        listed = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
        raise ValueError(f"`step` must be that of a snapshot in {dirpath}, got {end}; there are {listed}.")
    used = list_snapshots(dirpath, up_to=end)
    other = next((snapshot for snapshot in used if snapshot.run != used[-1].run), None)
    if other is not None:
        raise ValueError(
            f"`dirpath` must hold snapshots of one run, but {other.path} and {used[-1].path} are of different ones. "
            "Move those of one run into a directory of their own."
        )
    averages = sum(len(snapshot.sigma_rels) for snapshot in used)
    if averages > _MOST_AVERAGES:
        raise ValueError(
            f"`dirpath` must hold {_MOST_AVERAGES} averages at most, got {averages}. Move some snapshots elsewhere: a "
            "few tens are enough."
        )
    return _combine(used, sigma_rel, read_frozen(dirpath), progress=progress)


def _combine(
    snapshots: list[SnapshotFile], sigma_rel: float, frozen: dict[str, Tensor], *, progress: bool | None
) -> dict[str, Tensor]:
    """Return the weighted sum of the snapshots, one mapped into memory at a time; the last gives everything else."""
    end = snapshots[-1]
    last = end.read()
    # a parameter that was replaced in mid-run is in the snapshots since then alone
    shares = {
        began: _shares([one for one in snapshots if one.step > began or one is end], sigma_rel)
        for began in {0, *last.began.values()}
    }
    sums: dict[str, Tensor] = {}
    sized = [(snapshot, snapshot.path.stat().st_size) for snapshot in snapshots]
    for snapshot in with_progress(sized, "synthesizing", show=progress):
        loaded = snapshot.read()
        for index, average in enumerate(loaded.averages):
            at_first = {loaded.first_names.get(name, name): tensor for name, tensor in average.items()}
            for name, like in last.averages[0].items():
                share = shares[last.began.get(name, 0)].get((snapshot.step, index))
                if share is not None:
                    # frozen until then: its own average
                    tensor = at_first.get(last.first_names.get(name, name), frozen.get(name))
                    _add(sums, name, tensor, share, like=like, path=snapshot.path)
    single = {name: total.to(torch.complex64 if total.is_complex() else torch.float32) for name, total in sums.items()}
    tied = {alias: single[name] for alias, name in last.tied.items()}
    return {**{name: value.clone() for name, value in {**frozen, **last.rest}.items()}, **single, **tied}


def _shares(snapshots: list[SnapshotFile], sigma_rel: float) -> dict[tuple[int, int], float]:
    """Return (step, number of the average) -> its share in the average that is wanted."""
    recorded = [(one.step, index, sigma) for one in snapshots for index, sigma in enumerate(one.sigma_rels)]
    profiles = [(step, sigma) for step, _, sigma in recorded]
    shares = synthesis_weights(profiles, step=snapshots[-1].step, sigma_rel=sigma_rel)
    return {(step, index): share for (step, index, _), share in zip(recorded, shares, strict=True)}


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor | None, share: float, *, like: Tensor, path: Path) -> None:
    if tensor is None or tensor.shape != like.shape:
        raise ValueError(
            f"`dirpath` must hold snapshots of one module, but `{shortened(name)}` in {path} is not as in the last one."
        )
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    if name not in sums:
        sums[name] = torch.zeros(tensor.shape, dtype=wide)
    sums[name].add_(tensor.to(wide), alpha=share)

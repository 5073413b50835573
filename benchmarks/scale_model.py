"""Arithmetic of scale: memory and time of every technique against parameters and ranks. Nothing is measured here.

Times are linear in what is moved, with a constant for every tensor, file or message; the constants are measured by
``benchmarks.scale`` on one machine. Sizes are in bytes, times in seconds, *ranks* are processes that share the weights
(FSDP2) unless said otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHADOW = 4
"""Bytes of an average per parameter: float32 whatever the weights are."""


@dataclass(frozen=True)
class Line:
    """A cost of a constant per piece and a constant per unit: ``pieces * per_piece + units * per_unit``."""

    per_piece: float
    per_unit: float

    def __call__(self, pieces: float, units: float) -> float:
        """Return the cost."""
        return pieces * self.per_piece + units * self.per_unit


def solve(first: tuple[float, float, float], second: tuple[float, float, float]) -> Line:
    """Return the line through two measurements.

    Args:
        first: Pieces, units and cost.
        second: The same of another size, not a multiple of the first.

    Raises:
        ValueError: If the two do not determine a line.

    Example:
        >>> solve((1, 10, 12.0), (2, 10, 14.0))
        Line(per_piece=2.0, per_unit=1.0)
    """
    (n, u, cost), (m, v, other) = first, second
    determinant = n * v - m * u
    if determinant == 0:
        raise ValueError(f"two sizes of one shape determine no line, got {first} and {second}.")
    return Line((cost * v - other * u) / determinant, (n * other - m * cost) / determinant)


@dataclass(frozen=True)
class Plane:
    """What averaging K files takes: a constant, something per byte that is read, and per byte of the result."""

    fixed: float
    per_read: float
    per_result: float

    def __call__(self, files: int, size: float) -> float:
        """Return the cost of averaging ``files`` files with ``size`` bytes of weights each."""
        return self.fixed + files * size * self.per_read + size * self.per_result


def fit_plane(points: Sequence[tuple[int, float, float]]) -> Plane:
    """Return the plane through three measurements, each files, bytes of one and cost.

    Two have files of one size, so that they differ in what is read alone; the third has another size.

    Example:
        >>> plane = fit_plane([(2, 100.0, 1.0 + 20.0 + 50.0), (4, 100.0, 1.0 + 40.0 + 50.0), (2, 200.0, 1.0 + 140.0)])
        >>> round(plane.fixed, 9), round(plane.per_read, 9), round(plane.per_result, 9)
        (1.0, 0.1, 0.5)
    """
    (k, size, few), (more, same, many), (others, larger, large) = points
    if size != same or k == more or larger == size:
        raise ValueError(f"the first two points must differ in files alone, the third in size, got {points}.")
    per_read = (many - few) / ((more - k) * size)
    rest, rest_larger = few - k * size * per_read, large - others * larger * per_read
    per_result = (rest_larger - rest) / (larger - size)
    return Plane(rest - size * per_result, per_read, per_result)


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines of a large run; every one can be argued with.

    Args:
        copy: Bytes per second that an accelerator's copy moves, reading and writing.
        efficiency: Share of a copy's bandwidth that an update of the average reaches.
        link: Bytes per second that one rank receives from the network.
        hop: Seconds of one hop of a small collective.
        disk: Bytes per second that one host writes to or reads from the run's file system.
        host_memory: Bytes of memory of the host of rank 0.
        device_memory: Bytes of one accelerator.
        flops: Floating-point operations per second that a rank sustains in training.
        tokens: Tokens that a rank trains on in one step.
    """

    copy: float = 3.0e12
    efficiency: float = 0.9
    link: float = 50e9
    hop: float = 10e-6
    disk: float = 2e9
    host_memory: float = 2e12
    device_memory: float = 80e9
    flops: float = 4e14
    tokens: float = 8192


def tensors(parameters: float) -> int:
    """Return how many tensors a transformer has: 12 a layer, 24 layers at 1 B parameters, as the cube root from there.

    Example:
        >>> tensors(1e9), tensors(1e12)
        (288, 2880)
    """
    return round(12 * 24 * (parameters / 1e9) ** (1 / 3))


def hops(ranks: int) -> int:
    """Return the hops of a small collective over ``ranks``: a tree up and down, none for one rank."""
    return 2 * math.ceil(math.log2(ranks)) if ranks > 1 else 0


def step_seconds(parameters: float, cluster: Cluster) -> float:
    """Return a training step's time: 6 operations per parameter and token."""
    return 6 * parameters * cluster.tokens / cluster.flops


def ema_memory(parameters: float, ranks: int, *, weight_bytes: int = 2, swapped: bool = False) -> float:
    """Return the bytes of an average on one rank: its share, and the stash of raw weights while swapped in."""
    stash = weight_bytes if swapped and weight_bytes < SHADOW else 0
    return (SHADOW + stash) * parameters / ranks


def ema_update_bytes(parameters: float, ranks: int, *, weight_bytes: int = 2) -> float:
    """Return what an update moves on one rank: the weight is read, the shadow read and written."""
    return (weight_bytes + 2 * SHADOW) * parameters / ranks


def ema_update_seconds(parameters: float, ranks: int, cluster: Cluster, *, weight_bytes: int = 2) -> float:
    """Return the time of an update on an accelerator; no communication."""
    return ema_update_bytes(parameters, ranks, weight_bytes=weight_bytes) / (cluster.copy * cluster.efficiency)


def gather_memory(parameters: float, *, weight_bytes: int = 2) -> float:
    """Return the bytes of rank 0's host while a full file is written: raw weights and the average, whole."""
    return (weight_bytes + SHADOW) * parameters


def gather_latency(parameters: float, ranks: int, cluster: Cluster) -> float:
    """Return what bringing both sets together costs were there no bytes: one collective per tensor and set."""
    return 2 * tensors(parameters) * hops(ranks) * cluster.hop


def gather_seconds(parameters: float, ranks: int, cluster: Cluster, *, weight_bytes: int = 2) -> float:
    """Return the time to bring both sets together: every rank receives of every tensor what it has not."""
    received = (weight_bytes + SHADOW) * parameters * (ranks - 1) / ranks
    return received / cluster.link + gather_latency(parameters, ranks, cluster)


def accumulation_seconds(ranks: int, cluster: Cluster) -> float:
    """Return what exact accumulation adds to a step on several ranks: one number is added up over them."""
    return hops(ranks) * cluster.hop


def statistics_seconds(per_row: float, rows: int, ranks: int, cluster: Cluster) -> float:
    """Return what statistics add to a step: their own time, and one sum over the ranks for every ``rows`` rows."""
    return per_row + hops(ranks) * cluster.hop / rows


def averaging_seconds(plane: Plane, parameters: float, files: int, readers: int, cluster: Cluster) -> float:
    """Return the time to average files of float32 weights into one: reading, arithmetic, writing by one host.

    Args:
        plane: What the arithmetic costs one process, measured with files in memory.
        parameters: Parameters of the model.
        files: Files to average.
        readers: Processes that read a share each; one of them writes.
        cluster: Whose disks.
    """
    size = SHADOW * parameters
    compute = plane.fixed + (files * size * plane.per_read + size * plane.per_result) / readers
    return compute + files * size / (readers * cluster.disk) + size / cluster.disk


def averaging_memory(parameters: float, readers: int, buffer: float) -> float:
    """Return the bytes of one process: a constant when one streams, its share of the result when several do."""
    return buffer if readers == 1 else buffer + SHADOW * parameters / readers


def largest_file(cluster: Cluster, *, weight_bytes: int = 2) -> float:
    """Return the parameters at which rank 0's host can no longer hold both sets of weights."""
    return cluster.host_memory / (weight_bytes + SHADOW)


def largest_replica(cluster: Cluster) -> float:
    """Return the parameters that fit one accelerator under DDP with Adam and an average.

    Sixteen bytes of mixed-precision training per parameter (weights, gradients, master weights, two moments), and the
    average's four.
    """
    return cluster.device_memory / (16 + SHADOW)

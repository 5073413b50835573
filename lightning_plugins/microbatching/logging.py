"""Merges the values logged by each micro-batch into one value for the batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_plugins.core.counting import Count
from lightning_plugins.core.metric_state import MetricState, metrics_in
from lightning_plugins.core.patching import Patches
from lightning_plugins.microbatching.merging import combine_logged, way_of


class PieceLogs:
    """Collects what is logged while the pieces run, and logs it once for the batch.

    Lightning's results would keep the last piece's value for ``on_step`` and weigh the pieces by their samples for
    ``on_epoch``. Collecting has a second use: an attempt that ran out of memory has logged nothing.

    Args:
        results: The training loop's result collection.
        ways: How the values of pieces make the batch's, by the name that is logged: one of :data:`WAYS`.

    Attributes:
        names: The names that were logged.
        bounds: Those that were taken for a bound of the batch, for what ``reduce_fx`` says.
    """

    def __init__(self, results: Any, ways: Mapping[str, str]) -> None:
        self.names: set[str] = set()
        self.bounds: set[str] = set()
        self._results = results
        self._ways = ways
        self._batch = results.batch
        self._piece = 0
        self._logged: dict[str, list[tuple[int, Any, int]]] = defaultdict(list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Catch what is logged; the results are as before when it ends, however it ends."""
        self._logged.clear()
        replaced = Patches()
        replaced.replace(self._results, "update_metrics", self._keep)
        try:
            yield
        finally:
            replaced.undo()
            self._show(self._batch)

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Forget what is logged inside."""
        kept = {key: list(entries) for key, entries in self._logged.items()}
        yield
        self._logged.clear()
        self._logged.update(kept)

    def begin(self, piece: int, batch: Any) -> None:
        """Say which piece logs from now on; its size is what a value without a batch size is weighted by."""
        self._piece = piece
        self._show(batch)

    def log(self, weights: Sequence[Count], sizes: Sequence[int]) -> None:
        """Log what was collected: one value of the whole batch for every call in ``training_step``.

        Args:
            weights: The pieces' shares of what the loss is a mean over.
            sizes: Their samples.

        Raises:
            ValueError: If it cannot be told what the whole batch would have logged.
        """
        for key, entries in self._logged.items():
            result = self._results[key]
            if not result.is_tensor:
                self._results.update_metrics(key, entries[-1][1], entries[-1][2])
                continue
            name, reduction = result.meta.name, result.meta.reduce_fx.__name__
            self.names.add(name)
            way = way_of(name, self._ways.get(name), reduction, [value for _, value, _ in entries], result.meta.fx)
            if way in ("max", "min") and name not in self._ways:
                self.bounds.add(name)
            for call in _calls(entries):
                values, counts = [value for _, value, _ in call], [count for _, _, count in call]
                samples = [sizes[piece] for piece, _, _ in call]
                shares = samples if way == "sample_mean" else [weights[piece] for piece, _, _ in call]
                # a number of its own that is the same for every piece is not what the pieces hold
                fixed = len(set(counts)) == 1 and counts != samples
                value = values[0] if len(values) == 1 else combine_logged(way, values, shares)
                self._results.update_metrics(key, value, counts[0] if fixed else sum(counts))

    def _keep(self, key: str, value: Any, batch_size: int) -> None:
        self._logged[key].append((self._piece, value, batch_size))

    def _show(self, batch: Any) -> None:
        self._results.batch = batch
        self._results.batch_size = None


def _calls(entries: Sequence[tuple[int, Any, int]]) -> list[list[tuple[int, Any, int]]]:
    """Return the entries by call: the first of every piece, the second of every piece, ..."""
    calls: list[list[tuple[int, Any, int]]] = []
    made: dict[int, int] = defaultdict(int)
    for entry in entries:
        number = made[entry[0]]
        made[entry[0]] += 1
        if number == len(calls):
            calls.append([])
        calls[number].append(entry)
    return calls


class BatchMetrics:
    """Lets torchmetrics objects see the pieces of a batch as one batch.

    While the pieces run, a metric starts from nothing; then its value is that of the batch, and what it had before is
    merged into it again. Metrics whose states cannot be merged keep the last piece's value for ``on_step``.

    Args:
        module: The module whose metrics are meant.
    """

    def __init__(self, module: nn.Module) -> None:
        metrics = metrics_in(module)
        self._mergeable = [m for m in metrics if m.full_state_update is False and not m.dist_sync_on_step]

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Make all updates inside count as those of one batch; on an error the metrics are as before."""
        before = [(metric, MetricState(metric)) for metric in self._mergeable]
        for metric in self._mergeable:
            metric.reset()
        try:
            yield
        except BaseException:
            for metric, state in before:
                state.restore(metric)
            raise
        for metric, state in before:
            _merge(metric, state)


def _merge(metric: Any, before: MetricState) -> None:
    """Add what was there before the batch, and leave the batch's own value where the logger looks for it."""
    if not metric.update_called:
        before.restore(metric)
        return
    # the step called `forward`, so it wants the batch's value
    if metric._forward_cache is not None:
        metric._to_sync, to_sync = False, metric._to_sync
        try:
            metric._forward_cache = metric.compute()
        finally:
            metric._to_sync = to_sync
    metric._computed = None
    metric._update_count = before.updates + 1
    if before.updates:
        # torchmetrics before 1.6 has no `merge_state`, which checks and does this
        getattr(metric, "merge_state", metric._reduce_states)(before.values)

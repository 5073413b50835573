"""Mutants that change nothing: what ``mutants.py`` cannot see killed, and why.

A key is the module, the text of the line, and the change.
"""

_BEGINS = "a window that holds no batch, or less than none, begins with the next batch"
_EITHER_ORDER = "the larger or smaller of two numbers is the same in either order"
_NO_READER = "without a reader every patience of 0 and less makes a flush due after one row, and no row is handed out"
_ONE_KIND = "all tensors of a group have one type and one device, so the last says the same as the first"
_ONE_LENGTH = "both are as long as the layout of the counts; `strict` asserts it"
_SCRATCH = "the size of a scratch buffer changes no number: every size is a choice between memory and time"
_SIGN = "scores are only compared: twice a score ranks as the score does"
_WIDER = "a range that reaches farther takes in more of the same file"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "lightning_plugins/accumulation/carried_windows.py",
        'self._begin = _started(trainer) - (loaded["position"] if loaded else 0)',
        "0 -> (-1)",
    ): _BEGINS,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "30 -> (31)"): _WIDER,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "2 -> (3)"): _WIDER,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "65535 -> (65536)"): _WIDER,
    ("lightning_plugins/checkpoints/selection.py", 'sign = 1 if mode == "min" else -1', "1 -> (2)"): _SIGN,
    ("lightning_plugins/ema/tensor_groups.py", "self._device = weights[0].device", "0 -> (-1)"): _ONE_KIND,
    (
        "lightning_plugins/ema/tensor_groups.py",
        "self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)",
        "4 -> (5)",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        "self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)",
        "4 -> (3)",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        "self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)",
        "32 -> (33)",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        "self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)",
        "32 -> (31)",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        'limit = (self._mib_on_gpu if device.type == "cuda" else 1) * _MIB // dtype.itemsize',
        "self._mib_on_gpu if device.type == \"cuda\" else 1 -> (1 if device.type == 'cuda' else self._mib_on_gpu)",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        'limit = (self._mib_on_gpu if device.type == "cuda" else 1) * _MIB // dtype.itemsize',
        "device.type == \"cuda\" -> (device.type != 'cuda')",
    ): _SCRATCH,
    (
        "lightning_plugins/ema/tensor_groups.py",
        "device, dtype = left[0].device, right[0].dtype",
        "0 -> (-1)",
    ): _ONE_KIND,
    (
        "lightning_plugins/schedules/families.py",
        "return float(min(ramp, replicas))",
        "min(ramp, replicas) -> (min(replicas, ramp))",
    ): _EITHER_ORDER,
    (
        "lightning_plugins/statistics/rows.py",
        "return min(map(_FLUSH_SECONDS, self.readers), default=0.0)",
        "0.0 -> (-1.0)",
    ): _NO_READER,
    (
        "lightning_plugins/statistics/rows.py",
        "per_row = (time.monotonic() - self._last_flush) / max(1, len(self._waiting))",
        "max(1, len(self._waiting)) -> (max(len(self._waiting), 1))",
    ): _EITHER_ORDER,
    (
        "lightning_plugins/statistics/running.py",
        "sums = dict(zip(self.labels.names, self._counts.unbind(), strict=True))",
        "True -> (False)",
    ): _ONE_LENGTH,
}

"""Mutants that change nothing: what ``mutants.py`` cannot see killed, and why.

A key is the module, the text of the line, and the change.
"""

_BEGINNING = "what tells the kinds of files apart stands in the first 262 bytes; it may be given some more or less"
_BEGINS = "a window that holds no batch, or less than none, begins with the next batch"
_FALSE = "asked as yes or no, and `None` is no"
_FROM_ABOVE = "a slope that is too steep by one takes shorter steps down to the same root, where rounding stops them"
_IS_THERE = "a row that was evaluated has its values, if none at all an empty dictionary; the type allows `None`"
_LIMIT = "a limit far from what ordinary runs and files have; its exact value is free"
_LONGER_WAY = "fields that are not alike are counted as well, and to the same number, by the way for all other batches"
_INDENTED = "how far the lines of JSON are indented changes nothing that is read from them"
_NO_FRAME = "Python gives its frames, and the outermost one is of the program that runs"
_NO_READER = "without a reader every patience of 0 and less makes a flush due after one row, and no row is handed out"
_NOWHERE = "a range below 0 fits no other, wherever it lies"
_ONE_KIND = "all tensors of a group have one type and one device, so the last says the same as the first"
_ONE_LENGTH = "one is made beside the other, an entry for each; `strict` asserts it"
_PAYS_NOTHING = "a gradient times 1 is that gradient: the condition saves the work"
_QUICKER = "a dictionary is a mapping as well: asking for it first saves time"
_RANDOM = "a random name that no other save has, of so many letters or of two more or less"
_SCRATCH = "the size of a scratch buffer changes no number: every size is a choice between memory and time"
_SIGN = "scores are only compared: twice a score ranks as the score does"
_SYMMETRIC = "whether two files, or numbers, are the same does not depend on which comes first"
_UNREAD = "a hook's argument that is not read, which has to be there"
_WIDER = "a range that reaches farther takes in more of the same file"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "lightning_plugins/accumulation/callback.py",
        "if isinstance(factor, Tensor) or factor != 1:",
        "1 -> (0)",
    ): _PAYS_NOTHING,
    (
        "lightning_plugins/accumulation/carried_windows.py",
        'self._begin = _started(trainer) - (loaded["position"] if loaded else 0)',
        "0 -> (-1)",
    ): _BEGINS,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "30 -> (31)"): _WIDER,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "2 -> (3)"): _WIDER,
    ("lightning_plugins/checkpoints/run_files.py", "header = 30 + 2 * 65535", "65535 -> (65536)"): _WIDER,
    ("lightning_plugins/checkpoints/selection.py", 'sign = 1 if mode == "min" else -1', "1 -> (2)"): _SIGN,
    (
        "lightning_plugins/checkpoints/streaming_mean.py",
        "if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):",
        "ratio < 2**20 -> (ratio <= 2 ** 20)",
    ): _LIMIT,
    (
        "lightning_plugins/checkpoints/streaming_mean.py",
        "if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):",
        "2 -> (3)",
    ): _LIMIT,
    (
        "lightning_plugins/checkpoints/streaming_mean.py",
        "if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):",
        "20 -> (21)",
    ): _LIMIT,
    (
        "lightning_plugins/checkpoints/streaming_mean.py",
        "if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):",
        "20 -> (19)",
    ): _LIMIT,
    (
        "lightning_plugins/cli/inspect.py",
        "print(json.dumps(found, indent=2, default=str))  # noqa: T201",
        "2 -> (1)",
    ): _INDENTED,
    (
        "lightning_plugins/cli/inspect.py",
        "print(json.dumps(found, indent=2, default=str))  # noqa: T201",
        "2 -> (3)",
    ): _INDENTED,
    (
        "lightning_plugins/core/batches.py",
        'if length is None or (listed and (self.reading == "samples" or (len(values) > 2 and alike(batch)))):',
        "len(values) > 2 and alike(batch) -> (len(values) > 2)",
    ): _LONGER_WAY,
    ("lightning_plugins/core/safetensors_file.py", "_LARGEST_HEADER = 50_000_000", "50_000_000 -> (50000001)"): _LIMIT,
    ("lightning_plugins/core/safetensors_file.py", "_LARGEST_HEADER = 50_000_000", "50_000_000 -> (49999999)"): _LIMIT,
    (
        "lightning_plugins/core/safetensors_file.py",
        'text = file.read(length) if length <= _LARGEST_HEADER else b""',
        "length <= _LARGEST_HEADER -> (length < _LARGEST_HEADER)",
    ): _LIMIT,
    ("lightning_plugins/core/safetensors_file.py", "start = file.read(512)", "512 -> (511)"): _BEGINNING,
    ("lightning_plugins/core/safetensors_file.py", "start = file.read(512)", "512 -> (513)"): _BEGINNING,
    ("lightning_plugins/core/save_marks.py", "return secrets.token_hex(16)", "16 -> (15)"): _RANDOM,
    ("lightning_plugins/core/save_marks.py", "return secrets.token_hex(16)", "16 -> (17)"): _RANDOM,
    ("lightning_plugins/core/sharded_directory.py", "return (-1, -1)", "1 -> (2)"): _NOWHERE,
    (
        "lightning_plugins/core/step_outputs.py",
        "_MOST_PIECES = 256  # calls of a module that are remembered within a batch",
        "256 -> (257)",
    ): _LIMIT,
    (
        "lightning_plugins/core/step_outputs.py",
        "_MOST_PIECES = 256  # calls of a module that are remembered within a batch",
        "256 -> (255)",
    ): _LIMIT,
    (
        "lightning_plugins/core/step_outputs.py",
        "return type(outputs) is dict or isinstance(outputs, Mapping)",
        "type(outputs) is dict or isinstance(outputs, Mapping) -> (isinstance(outputs, Mapping))",
    ): _QUICKER,
    (
        "lightning_plugins/core/temporary_files.py",
        "left = stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime >= grace",
        "time.time() - found.st_mtime >= grace -> (time.time() - found.st_mtime > grace)",
    ): _LIMIT,
    (
        "lightning_plugins/core/temporary_files.py",
        "left = os.path.samestat(found, path.lstat())",
        "os.path.samestat(found, path.lstat()) -> (os.path.samestat(path.lstat(), found))",
    ): _SYMMETRIC,
    ("lightning_plugins/core/torch_file.py", "start = file.read(512)", "512 -> (511)"): _BEGINNING,
    ("lightning_plugins/core/torch_file.py", "start = file.read(512)", "512 -> (513)"): _BEGINNING,
    (
        "lightning_plugins/core/user_warning.py",
        'while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:',
        (
            'frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE -> '
            "(frame.f_globals.get('__name__', '').partition('.')[0] == _PACKAGE)"
        ),
    ): _NO_FRAME,
    (
        "lightning_plugins/core/validation.py",
        "_WORD = 100  # characters of what may be a misspelt word: to compare longer ones takes long",
        "100 -> (99)",
    ): _LIMIT,
    (
        "lightning_plugins/core/validation.py",
        "_WORD = 100  # characters of what may be a misspelt word: to compare longer ones takes long",
        "100 -> (101)",
    ): _LIMIT,
    ("lightning_plugins/core/validation.py", "left, count = [value], 0", "0 -> (1)"): _LIMIT,
    ("lightning_plugins/core/validation.py", "left, count = [value], 0", "0 -> (-1)"): _LIMIT,
    ("lightning_plugins/core/validation.py", "count += 1", "1 -> (2)"): _LIMIT,
    ("lightning_plugins/ema/master_shadow.py", "return False", "return False -> return None"): _FALSE,
    (
        "lightning_plugins/ema/master_shadow.py",
        "return [list(parts) for parts in zip(*self._histories, strict=True)]",
        "True -> (False)",
    ): _ONE_LENGTH,
    (
        "lightning_plugins/ema/latest_shadow.py",
        "for found, history in zip(self._tensors, self._histories, strict=True):",
        "True -> (False)",
    ): _ONE_LENGTH,
    (
        "lightning_plugins/ema/pace.py",
        "rules = (rule for rule, given in zip(self.rules, self._given, strict=True) if given.is_open)",
        "True -> (False)",
    ): _ONE_LENGTH,
    ("lightning_plugins/ema/power_exponent.py", "slope = (3 * x + 14) * x + 16 - inverse", "16 -> (17)"): _FROM_ABOVE,
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
        "lightning_plugins/ema/zero_files.py",
        "and all(type(size) is int and 0 <= size < 2**40 for size in shape)",
        "2 -> (3)",
    ): _LIMIT,
    (
        "lightning_plugins/ema/zero_files.py",
        "and all(type(size) is int and 0 <= size < 2**40 for size in shape)",
        "40 -> (41)",
    ): _LIMIT,
    (
        "lightning_plugins/ema/zero_files.py",
        "and all(type(size) is int and 0 <= size < 2**40 for size in shape)",
        "40 -> (39)",
    ): _LIMIT,
    ("lightning_plugins/events/callback.py", "dataloader_idx: int = 0,", "0 -> (1)"): _UNREAD,
    ("lightning_plugins/events/callback.py", "dataloader_idx: int = 0,", "0 -> (-1)"): _UNREAD,
    ("lightning_plugins/microbatching/merging.py", "return False", "return False -> return None"): _FALSE,
    (
        "lightning_plugins/statistics/label_counter.py",
        "torch.eq(self._numbers, targets, out=self._equal)",
        "torch.eq(self._numbers, targets, out=self._equal) -> (torch.eq(targets, self._numbers, out=self._equal))",
    ): _SYMMETRIC,
    (
        "lightning_plugins/statistics/recording.py",
        "return {name: value for name, value in (row.values or {}).items() if name in self.statistics.names}",
        "row.values or {} -> (row.values)",
    ): _IS_THERE,
    (
        "lightning_plugins/statistics/rows.py",
        "return min(map(_FLUSH_SECONDS, self.readers), default=0.0)",
        "0.0 -> (-1.0)",
    ): _NO_READER,
    (
        "lightning_plugins/statistics/running.py",
        "sums = dict(zip(self.labels.names, self._counts.unbind(), strict=True))",
        "True -> (False)",
    ): _ONE_LENGTH,
}

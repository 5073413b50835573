"""Mutants that change nothing: what ``mutants.py`` cannot see killed, and why.

A row is the module, the text of the line, why nothing changes, and the changes.
"""

_ANY_ONE = "any one of several callbacks may do what is to be done once"
_BEGINNING = "what tells the kinds of files apart stands in the first 262 bytes; it may be given some more or less"
_BEYOND = "a range that begins beyond the end has no elements"
_COUNTED = "batches are known to be plain from the first one on, whose counts are there; the type allows `None`"
_FALSE = "asked as yes or no, and `None` is no"
_FROM_ABOVE = "a slope that is too steep by one takes shorter steps down to the same root, where rounding stops them"
_INDENTED = "how far the lines of JSON are indented changes nothing that is read from them"
_IS_THERE = "a row that was evaluated has its values, if none at all an empty dictionary; the type allows `None`"
_LIMIT = "a limit far from what ordinary runs and files have; its exact value is free"
_LONGER_WAY = "fields that are not alike are counted as well, and to the same number, by the way for all other batches"
_NO_FRAME = "Python gives its frames, and the outermost one is of the program that runs"
_NO_READER = "without a reader every patience of 0 and less makes a flush due after one row, and no row is handed out"
_NOWHERE = "a range below 0 fits no other, wherever it lies"
_ONE_KIND = "all tensors of a group have one type and one device, so the last says the same as the first"
_ONE_LENGTH = "one is made beside the other, an entry for each; `strict` asserts it"
_PAYS_NOTHING = "a gradient times 1 is that gradient: the condition saves the work"
_QUICKER = "a dictionary is a mapping as well: asking for it first saves time"
_OTHER_WAY = "a batch of a single label is counted by the way for all other batches, to the same numbers"
_RANDOM = "a random name that no other save has, of so many letters or of two more or less"
_SCRATCH = "the size of a scratch buffer changes no number: every size is a choice between memory and time"
_SEVERAL = "files of several numbers of ranks are more than one, so their number is no other"
_SIGN = "scores are only compared: twice a score ranks as the score does"
_SYMMETRIC = "whether two files, or numbers, are the same does not depend on which comes first"
_UNREAD = "a hook's argument that is not read, which has to be there"
_WIDER = "a range that reaches farther takes in more of the same file"

_ROWS = [
    ("accumulation/callback.py", "if isinstance(factor, Tensor) or factor != 1:", _PAYS_NOTHING, "1 -> (0)"),
    ("checkpoints/run_files.py", "header = 30 + 2 * 65535", _WIDER, "30 -> (31)", "2 -> (3)", "65535 -> (65536)"),
    ("checkpoints/run_identity.py", "return False", _FALSE, "return False -> return None"),
    ("checkpoints/selection.py", 'sign = 1 if mode == "min" else -1', _SIGN, "1 -> (2)"),
    (
        "checkpoints/streaming_mean.py",
        "if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):",
        _LIMIT,
        "ratio < 2**20 -> (ratio <= 2 ** 20)",
        "2 -> (3)",
        "20 -> (21)",
        "20 -> (19)",
    ),
    (
        "checkpoints/streaming_mean.py",
        "begins = range(0, stop - start, _CHUNK)",
        _BEYOND,
        "stop - start -> (stop + start)",
    ),
    (
        "cli/inspect.py",
        "print(json.dumps(found, indent=2, default=str))  # noqa: T201",
        _INDENTED,
        "2 -> (1)",
        "2 -> (3)",
    ),
    (
        "core/batches.py",
        'if length is None or (listed and (self.reading == "samples" or (len(values) > 2 and alike(batch)))):',
        _LONGER_WAY,
        "len(values) > 2 and alike(batch) -> (len(values) > 2)",
    ),
    (
        "core/safetensors_file.py",
        "_LARGEST_HEADER = 50_000_000",
        _LIMIT,
        "50_000_000 -> (50000001)",
        "50_000_000 -> (49999999)",
    ),
    (
        "core/safetensors_file.py",
        'text = file.read(length) if length <= _LARGEST_HEADER else b""',
        _LIMIT,
        "length <= _LARGEST_HEADER -> (length < _LARGEST_HEADER)",
    ),
    ("core/safetensors_file.py", "start = file.read(512)", _BEGINNING, "512 -> (511)", "512 -> (513)"),
    ("core/save_marks.py", "return secrets.token_hex(16)", _RANDOM, "16 -> (15)", "16 -> (17)"),
    (
        "core/sharded_directory.py",
        "_MOST_CORNERS = 2_000_000  # that are looked at to see whether the parts of a tensor make up the whole",
        _LIMIT,
        "2_000_000 -> (2000001)",
        "2_000_000 -> (1999999)",
    ),
    ("core/sharded_directory.py", "return (-1, -1)", _NOWHERE, "1 -> (2)"),
    (
        "core/step_outputs.py",
        "_MOST_PIECES = 256  # calls of a module that are remembered within a batch",
        _LIMIT,
        "256 -> (257)",
        "256 -> (255)",
    ),
    (
        "core/step_outputs.py",
        "return type(outputs) is dict or isinstance(outputs, Mapping)",
        _QUICKER,
        "type(outputs) is dict or isinstance(outputs, Mapping) -> (isinstance(outputs, Mapping))",
    ),
    (
        "core/temporary_files.py",
        "left = stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime >= grace",
        _LIMIT,
        "time.time() - found.st_mtime >= grace -> (time.time() - found.st_mtime > grace)",
    ),
    (
        "core/temporary_files.py",
        "left = os.path.samestat(found, path.lstat())",
        _SYMMETRIC,
        "os.path.samestat(found, path.lstat()) -> (os.path.samestat(path.lstat(), found))",
    ),
    ("core/torch_file.py", "start = file.read(512)", _BEGINNING, "512 -> (511)", "512 -> (513)"),
    (
        "core/user_warning.py",
        'while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:',
        _NO_FRAME,
        (
            'frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE -> '
            "(frame.f_globals.get('__name__', '').partition('.')[0] == _PACKAGE)"
        ),
    ),
    (
        "core/validation.py",
        "_WORD = 100  # characters of what may be a misspelt word: to compare longer ones takes long",
        _LIMIT,
        "100 -> (99)",
        "100 -> (101)",
    ),
    ("core/validation.py", "left, count = [value], 0", _LIMIT, "0 -> (1)", "0 -> (-1)"),
    ("core/validation.py", "count += 1", _LIMIT, "1 -> (2)"),
    ("ema/zero_files.py", "return False", _FALSE, "return False -> return None"),
    ("ema/master_shadow.py", "return False", _FALSE, "return False -> return None"),
    (
        "ema/master_shadow.py",
        "return [list(parts) for parts in zip(*self._histories, strict=True)]",
        _ONE_LENGTH,
        "True -> (False)",
    ),
    ("ema/checkpoint_hooks.py", "elif evaluator is None and averages(trainer)[0] is self:", _ANY_ONE, "0 -> (-1)"),
    (
        "ema/latest_shadow.py",
        "for found, history in zip(self._tensors, self._histories, strict=True):",
        _ONE_LENGTH,
        "True -> (False)",
    ),
    (
        "ema/pace.py",
        "rules = (rule for rule, given in zip(self.rules, self._given, strict=True) if given.is_open)",
        _ONE_LENGTH,
        "True -> (False)",
    ),
    ("ema/power_exponent.py", "slope = (3 * x + 14) * x + 16 - inverse", _FROM_ABOVE, "16 -> (17)"),
    ("ema/tensor_groups.py", "self._device = weights[0].device", _ONE_KIND, "0 -> (-1)"),
    (
        "ema/tensor_groups.py",
        "self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)",
        _SCRATCH,
        "4 -> (5)",
        "4 -> (3)",
        "32 -> (33)",
        "32 -> (31)",
    ),
    (
        "ema/tensor_groups.py",
        'limit = (self._mib_on_gpu if device.type == "cuda" else 1) * _MIB // dtype.itemsize',
        _SCRATCH,
        "self._mib_on_gpu if device.type == \"cuda\" else 1 -> (1 if device.type == 'cuda' else self._mib_on_gpu)",
        "device.type == \"cuda\" -> (device.type != 'cuda')",
    ),
    ("ema/tensor_groups.py", "device, dtype = left[0].device, right[0].dtype", _ONE_KIND, "0 -> (-1)"),
    (
        "ema/zero_files.py",
        "and all(type(size) is int and 0 <= size < 2**40 for size in shape)",
        _LIMIT,
        "2 -> (3)",
        "40 -> (41)",
        "40 -> (39)",
    ),
    (
        "events/callback.py",
        "self.release(trainer, pl_module)",
        _UNREAD,
        "self.release(trainer, pl_module) -> (self.release(pl_module, trainer))",
    ),
    ("events/callback.py", "dataloader_idx: int = 0,", _UNREAD, "0 -> (1)", "0 -> (-1)"),
    ("microbatching/merging.py", "return False", _FALSE, "return False -> return None"),
    ("ema/zero_files.py", "_MOST_RANKS = 100_000", _LIMIT, "100_000 -> (99999)", "100_000 -> (100001)"),
    ("ema/zero_files.py", "wanted = min(ranks) if len(ranks) == 1 else 0", _SEVERAL, "0 -> (1)"),
    (
        "schedules/layerwise.py",
        "kept = [(name, weights) for (name, _), weights in zip(layers, members, strict=True) if weights]",
        _ONE_LENGTH,
        "True -> (False)",
    ),
    (
        "schedules/layerwise.py",
        "for (name, _), weights in zip(layers, members, strict=True):",
        _ONE_LENGTH,
        "True -> (False)",
    ),
    (
        "statistics/label_counter.py",
        "if self.is_plain and counts is not None and self._plain.fits(predictions, targets):",
        _COUNTED,
        (
            "self.is_plain and counts is not None and self._plain.fits(predictions, targets) -> "
            "(self.is_plain and self._plain.fits(predictions, targets))"
        ),
    ),
    (
        "statistics/label_counter.py",
        "and 0 < targets.shape[0] == predictions.shape[0] <= _MOST_PLAIN_LABELS",
        _OTHER_WAY,
        "0 -> (1)",
    ),
    ("statistics/plot.py", "if len(labels) <= 20:", _LIMIT, "20 -> (21)", "20 -> (19)"),
    (
        "statistics/plot.py",
        'marker="o" if len(xs) < 50 and not own else None,',
        _LIMIT,
        "len(xs) < 50 -> (len(xs) <= 50)",
        "50 -> (51)",
        "50 -> (49)",
    ),
    (
        "statistics/label_counter.py",
        "torch.eq(self._numbers, targets, out=self._equal)",
        _SYMMETRIC,
        "torch.eq(self._numbers, targets, out=self._equal) -> (torch.eq(targets, self._numbers, out=self._equal))",
    ),
    (
        "statistics/recording.py",
        "return {name: value for name, value in (row.values or {}).items() if name in self.statistics.names}",
        _IS_THERE,
        "row.values or {} -> (row.values)",
    ),
    ("statistics/rows.py", "return min(map(_FLUSH_SECONDS, self.readers), default=0.0)", _NO_READER, "0.0 -> (-1.0)"),
    (
        "statistics/running.py",
        "sums = dict(zip(self.labels.names, self._counts.unbind(), strict=True))",
        _ONE_LENGTH,
        "True -> (False)",
    ),
]

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (f"lightning_plugins/{module}", line, change): reason
    for module, line, reason, *changes in _ROWS
    for change in changes
}

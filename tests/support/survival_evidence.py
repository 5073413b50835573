"""What a run has left on disk, read with plain readers, and compared with an uninterrupted run's."""

from __future__ import annotations

import csv
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins import synthesize_ema
from tests.support.survival_run import WIDTH, Plan, can_resume

CHECKPOINT = r"(epoch=\d+-step=\d+|last)(-v\d+)?\.ckpt"
# What may lie in a run's folder. Hidden files are what a kill can leave of a file that was being written.
DOCUMENTED = [
    r"(log|epochs)(\.replaced)?(\.\d+)?\.csv",
    r"tensorboard/[\d_-]+/(train|validation)/events\.out\.tfevents\.\d{10}\..+\.\d+",
    r"posthoc/(superseded-\d+/)?step=\d{10}\.pt",
    rf"checkpoints/({CHECKPOINT}|averaged\.ckpt|averaged_pool/{CHECKPOINT})",
]
HIDDEN = [
    r"\.(log|epochs)(\.replaced\.\d+)?\.csv\.\w+\.tmp",
    r"(tensorboard/)?\.probe\.\w{24}\.tmp",
    r"posthoc/\.step=\d{10}\.pt\.\w+\.tmp",
    r"checkpoints/\.averaged\.ckpt\.\w+\.tmp",
    r"checkpoints/\.(\.averaged\.draft\.ckpt\.\w+\.tmp|averaged\.draft\.ckpt)",
]


@dataclass
class Evidence:
    """What a folder holds.

    Args:
        rows: Name of a CSV file -> its rows without the time, the header first.
        scalars: Time stamp of a TensorBoard run -> (phase, tag) -> (place, value).
        snapshots: Path below the folder -> what the post-hoc snapshot holds, without the name of its run.
        runs: The names of the runs that those snapshots which were not set aside are of.
        checkpoints: Path below the folder -> what Lightning would load.
    """

    rows: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    scalars: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = field(default_factory=dict)
    snapshots: dict[str, Any] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def newest_scalars(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """The scalars of the run that was begun last."""
        return self.scalars[max(self.scalars)]

    @property
    def averaged(self) -> dict[str, Any] | None:
        return self.checkpoints.get("checkpoints/averaged.ckpt")

    def newest(self, plan: Plan) -> str | None:
        """The checkpoint that a user goes on from: the one with the most batches behind it."""
        can = {name: found for name, found in self.checkpoints.items() if is_full(name) and can_resume(found, plan)}
        return max(can, key=lambda name: (batches_done(can[name]), epochs_done(can[name]), name), default=None)


def is_full(name: str) -> bool:
    return re.fullmatch(f"checkpoints/{CHECKPOINT}", name) is not None


def batches_done(checkpoint: dict[str, Any]) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]


def epochs_done(checkpoint: dict[str, Any]) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["processed"]


def look(folder: Path) -> Evidence:
    """Read everything; a file that does not open, or that nobody has documented, is an AssertionError."""
    found = Evidence()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        hidden = any(re.fullmatch(pattern, name) for pattern in HIDDEN)
        assert hidden or any(re.fullmatch(pattern, name) for pattern in DOCUMENTED), f"{name} is no documented file"
        if hidden:
            continue
        if name.endswith(".csv"):
            found.rows[name] = read_rows(path)
        elif name.endswith(".pt"):
            found.snapshots[name] = snapshot = opened(path)
            run = snapshot.pop("run")
            if "superseded" not in name:
                found.runs.add(run)
        elif name.endswith(".ckpt"):
            found.checkpoints[name] = opened(path)
    for stamp in sorted(path for path in (folder / "tensorboard").glob("*") if path.is_dir()):
        found.scalars[stamp.name] = read_scalars(stamp)
    return found


def opened(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise AssertionError(f"{path} does not open: {error}") from error


def hidden_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(".*")}


def read_rows(path: Path) -> list[tuple[str, ...]]:
    """Return header and rows without the clock; the row that a write was cut in is told by its missing line end."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if not rows:
        return []
    keep = [number for number, column in enumerate(rows[0]) if column != "time"]
    assert all(len(row) == len(rows[0]) for row in rows), f"{path} has rows of several lengths"
    return [tuple(row[number] for number in keep) for row in rows]


def torn_files(folder: Path) -> set[str]:
    """Return the CSV files whose last row was cut."""
    contents = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    return {name for name, content in contents.items() if content and not content.endswith(b"\n")}


def read_scalars(stamp: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run."""
    found = {}
    for phase in ("train", "validation"):
        accumulator = EventAccumulator(str(stamp / phase)).Reload() if (stamp / phase).is_dir() else None
        for tag in accumulator.Tags()["scalars"] if accumulator else ():
            found[phase, tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        same_kind = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)  # noqa: PLR0124  # not a number


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places at which two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [text for key in one for text in differences(one[key], other[key], f"{where}[{key!r}]")]
    return [] if equal(one, other) else [f"{where}: {_short(one)} is not {_short(other)}"]


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) < 300 else f"{text[:200]} ... {text[-90:]}"


@dataclass
class Losses:
    """What a run has warned of: a file that cannot be written is lost, and the training goes on.

    Args:
        snapshots: Steps whose post-hoc snapshots may be missing.
        average: Whether the average may be missing, or be one of other checkpoints.
        pool: Whether files may lie in the pool that should have been deleted.
    """

    snapshots: set[int] = field(default_factory=set)
    average: bool = False
    pool: bool = False

    def add(self, warned: list[str]) -> None:
        """Read what was lost in the warnings of an attempt; one that names no loss is an AssertionError."""
        for text in warned:
            if found := re.search(r"the snapshot of step (\d+) could not be written", text):
                self.snapshots.add(int(found[1]))
            elif re.match(r"CheckpointAveraging (could not write .* The average will lack|made no)", text):
                self.average = True
            elif re.match(r"CheckpointAveraging could not delete", text):
                self.pool = True
            elif re.match(r"MicroBatching splits batches, and batch normalization", text):
                # every run says so: it is repeated as it was
                continue
            else:
                # the disk was full: what waits is written later, or again by the run that goes on
                wait = r"the (rows|events) wait|^\d+ (rows of|events for) .* could not be written"
                assert re.search(wait, text), f"what was lost? {text}"


NOTHING_LOST = Losses()


# What of a checkpoint is not the run's, but a clock's or a path's;
NOT_THE_RUNS = {"seconds", "stamp", "directory", "foreign", "time"}
# the name that a run gives itself;
NOT_THE_RUNS |= {"run"}
# a count of Lightning's, the x axis of its own loggers, that loses one when a run goes on from a batch's end;
NOT_THE_RUNS |= {"_batches_that_stepped"}
# and metrics of training, which Lightning does not save: a run that goes on inside a validation has the latter's only.
NOT_THE_RUNS |= {"train_loss", "train_accuracy"}


def essence(checkpoint: dict[str, Any], lost: Losses = NOTHING_LOST) -> dict[str, Any]:
    """Return what of a finished run's checkpoint must be equal in two runs that are the same run.

    The loops' progress is Lightning's own: of a run that was resumed at its end it is that of the checkpoint.
    """
    kept = {key: value for key, value in checkpoint.items() if key != "loops"}
    kept["callbacks"] = {
        re.sub(r"'[^']*/", "'", key): _without(state)
        for key, state in checkpoint.get("callbacks", {}).items()
        if not key.startswith("ModelCheckpoint")
    }
    (record,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    for key, state in kept["callbacks"].items():
        if "files" in state:
            state["files"] = _steps_and_keepers(state["files"], record)
        if (lost.average or lost.pool) and key.startswith("CheckpointAveraging"):
            del state["files"]  # those in the pool are other ones
    return kept


def _without(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    kept = {key: _without(value) for key, value in state.items() if key not in NOT_THE_RUNS}
    if isinstance(state.get("fits"), (list, tuple)):  # each has a name of its own, and a resume begins another
        steps = [step for _, step in state["fits"]]
        kept["fits"] = steps == sorted(steps)
    return kept


def _steps_and_keepers(files: dict[str, Any], record: dict[str, Any]) -> set[tuple[str, str]]:
    """Return of which steps a run says that it wrote files, the test's own left out.

    A resume can give a name a version, and ModelCheckpoint forgets which step it has saved last: it saves it again.
    What it has given up can still be there, when a kill came between a better file and the deletion.
    """
    kept = {*record["best_k_models"], record["last_model_path"]} if record["best_k_models"] else files
    found = {
        Path(path).name: keeper
        for path, (_, keeper) in files.items()
        if path in kept or not keeper.startswith("ModelCheckpoint")
    }
    named = {name: keeper for name, keeper in found.items() if re.fullmatch(CHECKPOINT, name)}
    return {(re.search(r"last|step=\d+", name)[0], re.sub(r"'[^']*/", "'", keeper)) for name, keeper in named.items()}


AVERAGES = ("EMA", "LatestWeightAveraging", "PostHocEMA")


def at_this_batch(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what of a full checkpoint the number of batches alone decides, wherever in the epoch's end it was cut."""
    optimizer = checkpoint["optimizer_states"][0]["state"]
    own = {key: checkpoint.get(key) for key in ("lightning_plugins_ema", "lightning_plugins_posthoc_ema")}
    counts = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith(AVERAGES)}
    step = {"step": checkpoint["global_step"], "state_dict": checkpoint["state_dict"], "optimizer": optimizer}
    return {**step, **own, "counts": {key: _without(state) for key, state in counts.items()}}


# the two comparisons


@dataclass
class Truth:
    """What an uninterrupted run leaves, and what it had at each batch.

    Args:
        result: What it had in memory at its end.
        evidence: What is on disk.
        batches: Batches done -> the full checkpoint that would have been written then.
        totals: Moment -> how often it comes in the run; under ``"time"`` its seconds.
    """

    result: dict[str, Any]
    evidence: Evidence
    batches: dict[int, dict[str, Any]]
    totals: dict[str, float]


def check_dead(found: Evidence, truth: Truth, lost: Losses = NOTHING_LOST) -> None:
    """Everything that lies there is true: it is what the uninterrupted run had at that place."""
    for name, rows in found.rows.items():
        whole = truth.evidence.rows[f"{name.partition('.')[0]}.csv"]
        if "replaced" in name:
            start = whole.index(rows[1]) if len(rows) > 1 else 0  # nothing but half a row was moved aside
            assert rows == [whole[0], *whole[start : start + len(rows) - 1]], f"{name} has other rows"
        else:
            assert rows == whole[: len(rows)], f"{name} does not begin as it should: {rows}"
    for stamp, scalars in found.scalars.items():
        for key, values in scalars.items():
            assert values == truth.evidence.newest_scalars[key][: len(values)], f"{stamp} {key}: {values}"
    for name, snapshot in found.snapshots.items():
        whole = truth.evidence.snapshots[f"posthoc/{Path(name).name}"]
        assert equal(snapshot, whole), f"{name} is not that of its step"
    for name, checkpoint in found.checkpoints.items():
        if lost.average and name == "checkpoints/averaged.ckpt":
            continue
        assert not (wrong := _untrue(name, checkpoint, truth)), f"{name}: {wrong}"


def _untrue(name: str, checkpoint: dict[str, Any], truth: Truth) -> list[str]:
    if name == "checkpoints/averaged.ckpt":
        return differences(_average(checkpoint), _average(truth.evidence.averaged))
    there = truth.batches[batches_done(checkpoint)]
    if is_full(name):
        return differences(at_this_batch(checkpoint), at_this_batch(there))
    return differences(checkpoint["state_dict"], there["state_dict"])


def _average(checkpoint: dict[str, Any] | None) -> Any:
    """Return an averaged file's content; of its sources the steps, for a name can have a version in the end."""
    if checkpoint is None:
        return None
    kept = {**checkpoint, "loops": _without(checkpoint["loops"])}
    manifest = dict(kept.pop("checkpoint_averaging"))
    files = [{key: value for key, value in file.items() if key != "path"} for file in manifest.pop("files")]
    manifest.pop("newest")
    return {**kept, "files": files, "manifest": manifest}


def compare(found: Evidence, result: dict[str, Any], truth: Truth, lost: Losses = NOTHING_LOST) -> list[str]:
    """Return where a finished run is not the uninterrupted one; nothing if they are the same, bit for bit.

    What the run has warned of may be missing, and what is made of it is made of the rest.
    """
    whole, expected = truth.evidence, dict(truth.result)
    wrong = [f"{name}: rows differ" for name in ("log.csv", "epochs.csv") if found.rows.get(name) != whole.rows[name]]
    if found.newest_scalars != whole.newest_scalars:
        wrong.append("TensorBoard's scalars differ")
    current = {name: content for name, content in found.snapshots.items() if "superseded" not in name}
    snapshots = {name: snapshot for name, snapshot in whole.snapshots.items() if _is_expected(name, current, lost)}
    wrong += differences(current, snapshots, "snapshots")
    if snapshots.keys() != whole.snapshots.keys():
        expected["posthoc"] = _synthesized(snapshots)
    wrong += [] if len(found.runs) == 1 else [f"the snapshots are of several runs: {found.runs}"]
    if lost.average:
        result = {**result, "scores": expected["scores"]}
    else:
        wrong += differences(_average(found.averaged), _average(whole.averaged), "averaged file")
        pool, whole_pool = _pool(found), _pool(whole)
        kept = pool.keys() & whole_pool.keys() if lost.pool else pool.keys()
        wrong += differences({step: pool[step] for step in kept}, whole_pool, "pool")
    rates = expected["rates"][len(expected["rates"]) - len(result["rates"]) :]  # those since the resume
    wrong += differences(result, {**expected, "rates": rates, "checkpoint": result["checkpoint"]}, "result")
    last, whole_last = essence(result["checkpoint"], lost), essence(expected["checkpoint"], lost)
    return wrong + differences(last, whole_last, "last checkpoint")


def _is_expected(name: str, current: dict[str, Any], lost: Losses) -> bool:
    return name in current or int(re.findall(r"\d+", name)[-1]) not in lost.snapshots


def _synthesized(snapshots: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the average that the test asks for, of these snapshots alone."""
    with tempfile.TemporaryDirectory() as folder:
        for name, snapshot in snapshots.items():
            torch.save(snapshot, Path(folder, Path(name).name))
        return synthesize_ema(folder, WIDTH)


def _pool(found: Evidence) -> dict[int, Any]:
    pool = [checkpoint for name, checkpoint in found.checkpoints.items() if "averaged_pool" in name]
    return {checkpoint["global_step"]: checkpoint["state_dict"] for checkpoint in pool}


def quietly(function: Any, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)

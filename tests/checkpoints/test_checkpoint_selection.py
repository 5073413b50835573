"""Which files are chosen: by the step inside, one per step, the best by ModelCheckpoint's record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_plugins import average_checkpoints, greedy_soup, select_checkpoints
from lightning_plugins.checkpoints import CheckpointError, plan_average
from lightning_plugins.checkpoints.average_plan import parse_steps
from lightning_plugins.checkpoints.record import read_record
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.checkpoints_models import assert_is_mean, float64_mean, load_state, write_files


def save(folder: Path, name: str, step: int | None = None, epoch: int = 0, **more) -> Path:
    content = {"state_dict": {"w": torch.tensor([float(step or 0)])}, "epoch": epoch, **more}
    torch.save(content if step is None else content | {"global_step": step}, folder / name)
    return folder / name


def scored(folder: Path, name: str, step: int, score: float, record: dict[str, float], mode: str = "min") -> Path:
    """A file as ModelCheckpoint writes it: its record names the best ones so far, by paths that may have moved."""
    best = {f"/elsewhere/{key}": torch.tensor(value) for key, value in record.items()}
    state = {"monitor": "val_loss", "current_score": torch.tensor(score), "best_k_models": best}
    key = f"ModelCheckpoint{{'monitor': 'val_loss', 'mode': '{mode}', 'every_n_train_steps': 0}}"
    return save(folder, name, step, callbacks={"Other": {"x": 1}, key: state})


def names(paths) -> list[str]:
    return [Path(path).name for path in paths]


def test_order_is_by_the_step_inside_not_by_name_or_date(tmp_path):
    for name, step in (("a.ckpt", 300), ("b.ckpt", 20), ("c.ckpt", 100)):
        save(tmp_path, name, step)
    os.utime(tmp_path / "b.ckpt", (2e9, 2e9))
    assert names(select_checkpoints(tmp_path)) == ["b.ckpt", "c.ckpt", "a.ckpt"]
    assert names(select_checkpoints(str(tmp_path), last=2)) == ["c.ckpt", "a.ckpt"]


def test_last_repeats_another_step_or_counts_by_itself(tmp_path):
    save(tmp_path, "epoch=0-step=10.ckpt", 10)
    save(tmp_path, "epoch=1-step=20.ckpt", 20)
    save(tmp_path, "last.ckpt", 20)
    assert names(select_checkpoints(tmp_path)) == ["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"]
    save(tmp_path, "last.ckpt", 25)
    assert names(select_checkpoints(tmp_path)) == ["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "last.ckpt"]
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=10.ckpt")
    save(tmp_path, "last-v1.ckpt", 20)
    assert names(select_checkpoints(tmp_path)) == ["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"]


def test_versions_go_by_their_step_and_the_highest_counts(tmp_path):
    save(tmp_path, "model.ckpt", 30)
    save(tmp_path, "model-v1.ckpt", 10)
    save(tmp_path, "model-v2.ckpt", 30)
    save(tmp_path, "model-v10.ckpt", 20)
    save(tmp_path, "model-v9.ckpt", 20)
    assert names(select_checkpoints(tmp_path)) == ["model-v1.ckpt", "model-v10.ckpt", "model-v2.ckpt"]


def test_ranges_of_steps_and_epochs_are_inclusive(tmp_path):
    for epoch in range(5):
        save(tmp_path, f"{epoch}.ckpt", 10 * epoch, epoch)
    assert names(select_checkpoints(tmp_path, min_step=10, max_step=30)) == ["1.ckpt", "2.ckpt", "3.ckpt"]
    assert names(select_checkpoints(tmp_path, min_epoch=3)) == ["3.ckpt", "4.ckpt"]
    assert names(select_checkpoints(tmp_path, max_epoch=1)) == ["0.ckpt", "1.ckpt"]
    assert names(select_checkpoints(tmp_path, max_step=30, last=2)) == ["2.ckpt", "3.ckpt"]


def test_best_goes_by_the_record_of_the_newest_file(tmp_path):
    scored(tmp_path, "a.ckpt", 10, 0.5, {"a.ckpt": 0.5})
    scored(tmp_path, "b.ckpt", 20, 0.2, {"a.ckpt": 0.5, "b.ckpt": 0.2})
    scored(tmp_path, "c.ckpt", 30, 0.3, {"a.ckpt": 0.5, "b.ckpt": 0.2, "c.ckpt": 0.3})
    assert names(select_checkpoints(tmp_path, best=1)) == ["b.ckpt"]
    assert names(select_checkpoints(tmp_path, best=2)) == ["b.ckpt", "c.ckpt"]
    assert names(select_checkpoints(tmp_path, best=2, max_step=20)) == ["a.ckpt", "b.ckpt"]


def test_best_of_the_highest_with_mode_max(tmp_path):
    for step, score in ((10, 0.9), (20, 0.7), (30, 0.5)):
        scored(tmp_path, f"{step}.ckpt", step, score, {f"{step}.ckpt": score}, mode="max")
    assert names(select_checkpoints(tmp_path, best=2)) == ["10.ckpt", "20.ckpt"]


def test_best_falls_back_to_each_files_own_metric(tmp_path):
    """Files of a ModelCheckpoint whose record does not name them any more, as after renaming."""
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.4), (40, float("nan"))):
        scored(tmp_path, f"{step}.ckpt", step, score, {"gone.ckpt": 0.0})
    assert names(select_checkpoints(tmp_path, best=2)) == ["10.ckpt", "30.ckpt"]


def test_best_without_scores_is_refused_and_fewer_than_asked_for_is_said(tmp_path):
    save(tmp_path, "a.ckpt", 10)
    with pytest.raises(CheckpointError, match="`best` needs scores, and these checkpoints hold none"):
        select_checkpoints(tmp_path, best=1)
    scored(tmp_path, "b.ckpt", 20, 0.5, {"b.ckpt": 0.5})
    with pytest.warns(LightningPluginsWarning, match="2 checkpoints were asked for, 1 with a score found"):
        assert names(select_checkpoints(tmp_path, best=2)) == ["b.ckpt"]
    with pytest.warns(LightningPluginsWarning, match=r"5 checkpoints were asked for, 2 found\.") as caught:
        assert names(select_checkpoints(tmp_path, last=5)) == ["a.ckpt", "b.ckpt"]
    assert caught[0].filename == __file__


def test_of_the_best_only_what_may_be_one_must_be_readable(tmp_path):
    scores = {"a.ckpt": 0.5, "b.ckpt": 0.2, "c.ckpt": 0.4}
    for number, (name, score) in enumerate(scores.items()):
        scored(tmp_path, name, 10 * number, score, scores)
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.warns(LightningPluginsWarning, match=r"Left out: .*a\.ckpt cannot be read as .* it is empty"):
        assert names(select_checkpoints(tmp_path, best=2)) == ["b.ckpt", "c.ckpt"]
    for name in ("b.ckpt", "unknown.ckpt"):
        kept = (tmp_path / name).read_bytes() if name in scores else None
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read .* may be one of the checkpoints asked for"):
            select_checkpoints(tmp_path, best=1)
        (tmp_path / name).unlink() if kept is None else (tmp_path / name).write_bytes(kept)


def test_a_directory_of_which_nothing_can_be_read_is_refused_with_all_reasons(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"")
    for options in ({}, {"last": 1}, {"best": 1}, {"min_step": 3}):
        with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read .*b\.ckpt cannot be read "):
            select_checkpoints(tmp_path, **options)


def test_averages_and_hidden_files_and_files_without_a_step_are_left_out(tmp_path):
    paths = write_files(tmp_path, 2)
    average_checkpoints(paths, tmp_path / "averaged.ckpt")
    average_checkpoints(paths, tmp_path / "averaged.safetensors")
    save(tmp_path, ".hidden.ckpt", 99)
    (tmp_path / "hparams.yaml").write_text("a: 1")
    (tmp_path / "folder").mkdir()
    assert select_checkpoints(tmp_path) == paths
    save(tmp_path, "nostep.ckpt")
    with pytest.warns(LightningPluginsWarning, match=r"Left out, as they hold no step: nostep\.ckpt\."):
        assert select_checkpoints(tmp_path) == paths


class Foreign:
    def __init__(self) -> None:
        self.items = [1]


class ForeignList(list):
    pass


def test_a_step_is_read_without_running_or_importing_what_the_file_names(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    monkeypatch.chdir(tmp_path)
    odd = {Foreign(): 1, "list": ForeignList([1, 2]), "set": {1}, "type": Foreign, "path": Path("x")}
    save(tmp_path, "bomb.ckpt", 7, epoch=3, hyper_parameters={"bomb": Bomb(), "odd": odd, "net": torch.nn.Linear(2, 2)})
    record = read_record(tmp_path / "bomb.ckpt")
    assert (record.step, record.epoch) == (7, 3)
    assert not (tmp_path / "pwned").exists()


def test_a_damaged_file_in_the_directory_is_an_error(tmp_path):
    good = save(tmp_path, "a.ckpt", 1)
    (tmp_path / "b.ckpt").write_bytes(good.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"b\.ckpt cannot be read as a checkpoint"):
        select_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"last": 1, "best": 1}, ValueError, "`last` and `best` cannot be given together, got last=1 and best=1"),
        ({"last": 0}, ValueError, "`last` must be at least 1 checkpoint, got 0"),
        ({"best": 1.5}, TypeError, "`best` must be a whole number of checkpoints, got 1.5"),
        ({"min_step": -1}, ValueError, "`min_step` must be at least 0, got -1"),
        ({"min_epoch": 3, "max_epoch": 2}, ValueError, "`min_epoch` must be at most `max_epoch`, got 3 and 2"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        select_checkpoints(tmp_path, **options)
    with pytest.raises(NotADirectoryError, match="is not a directory"):
        select_checkpoints(tmp_path / "nowhere")


# --- the greedy soup ---


def soup_files(folder: Path, values: list[float]) -> list[Path]:
    return [save(folder, f"{i}.ckpt", i, state_dict={"w": torch.tensor([v])}) for i, v in enumerate(values)]


def test_a_soup_takes_in_only_what_improves_it(tmp_path):
    """Score = -|w - 1|. Best single 1.5 (-0.5); with 0.25: 0.875 (-0.125), kept; with -3: worse; with 1.25: 1, kept."""
    paths = soup_files(tmp_path, [1.5, 0.25, -3.0, 2.5])
    calls = []

    def score(state):
        calls.append(state["w"].item())
        return -abs(state["w"].item() - 1.0)

    state, kept, best = greedy_soup(paths, score)
    # ranked: 1.5 (-0.5), 0.25 (-0.75), 2.5 (-1.5), -3 (-4); means tried: 0.875, then (1.5+0.25+2.5)/3, then with -3
    assert names(kept) == ["0.ckpt", "1.ckpt"]
    assert state["w"].item() == 0.875
    assert best == -0.125
    assert len(calls) == 2 * len(paths) - 1
    assert calls[4:] == [0.875, pytest.approx(4.25 / 3), pytest.approx(-1.25 / 3)]


def test_a_soup_is_never_worse_than_the_best_single(tmp_path):
    paths = soup_files(tmp_path, [0.0, 10.0, -10.0])
    state, kept, best = greedy_soup(paths, lambda state: state["w"].item() ** 2, mode="min")
    assert (names(kept), state["w"].item(), best) == (["0.ckpt"], 0.0, 0.0)


def test_a_soup_equals_the_mean_of_what_it_kept(tmp_path):
    paths = write_files(tmp_path, 4)
    target = float64_mean(paths[:3])["a.weight"]
    state, kept, _ = greedy_soup(paths, lambda s: float(((s["a.weight"].double().numpy() - target) ** 2).sum()), "min")
    assert len(kept) > 1
    assert_is_mean(state, float64_mean(kept))


def test_soups_of_nan_and_of_wrong_arguments(tmp_path):
    paths = soup_files(tmp_path, [1.0, 2.0])
    state, kept, best = greedy_soup(paths, lambda s: float("nan") if s["w"].item() != 2.0 else 5.0)
    assert (names(kept), best, state["w"].item()) == (["1.ckpt"], 5.0, 2.0)
    with pytest.raises(ValueError, match="`score` returned NaN for every checkpoint"):
        greedy_soup(paths, lambda s: float("nan"))
    with pytest.raises(ValueError, match="`mode` must be one of 'min', 'max', got 'up'"):
        greedy_soup(paths, lambda s: 0.0, mode="up")
    with pytest.raises(ValueError, match="`paths` must name at least one checkpoint, got none"):
        greedy_soup([], lambda s: 0.0)


# --- the command's plan ---


def test_a_plan_lists_what_will_be_averaged_and_runs_it(tmp_path):
    paths = write_files(tmp_path, 3)
    plan = plan_average([tmp_path], last=2, weights=[1, 3])
    assert plan.paths == paths[1:]
    assert [(row.step, row.epoch, row.weight, row.score) for row in plan.rows] == [
        (20, 1, 0.25, None),
        (30, 2, 0.75, None),
    ]
    assert plan.rows[0].nbytes == paths[1].stat().st_size
    lines = plan.table().splitlines()
    assert lines[0].split() == ["step", "epoch", "score", "weight", "MB", "checkpoint"]
    assert lines[1].split() == ["20", "1", "-", "0.2500", "0.0", str(paths[1])]
    written = plan.run(tmp_path / "out.ckpt")
    assert_is_mean(load_state(written), float64_mean(paths[1:], [1, 3]))


def test_plans_of_files_directories_steps_and_scores(tmp_path):
    files = write_files(tmp_path, 3)
    reverse = plan_average(files[::-1])
    assert reverse.paths == files[::-1]
    assert plan_average([str(tmp_path)]).paths == files
    assert plan_average([tmp_path], steps="10:20").paths == files[:2]
    assert plan_average([tmp_path], steps="20:").paths == files[1:]
    other = tmp_path / "other"
    other.mkdir()
    for step in (1, 2, 3):
        scored(other, f"{step}.ckpt", step, step / 10, {f"{step}.ckpt": step / 10})
    plan = plan_average([other], best=2)
    assert [row.score for row in plan.rows] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert "0.1" in plan.table()
    assert plan_average([other], last=5).notes == ["5 checkpoints were asked for, 3 found."]


def test_plans_that_cannot_be_are_refused(tmp_path):
    files = write_files(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        plan_average([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="At least two checkpoints are needed, found 1"):
        plan_average([files[0]])
    with pytest.raises(ValueError, match="`weights` must have one number for each of the 2"):
        plan_average(files, weights=[1])
    for text in ("5", "a:b", "1:2:3", "-1:"):
        with pytest.raises(ValueError, match="`steps` must be written A:B"):
            parse_steps(text)
    assert parse_steps(":9").max_step == 9

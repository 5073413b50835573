"""The arithmetic of averages under DeepSpeed's ZeRO, with stand-ins for its engine: parts, exchanges, files, counts."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins import average_checkpoints, extract_weights
from lightning_plugins.cli import main
from lightning_plugins.core import zero as zero_module
from lightning_plugins.core.zero import Zero, ZeroClock, load_full, zero_of
from lightning_plugins.core.zero_directory import full_weights, is_deepspeed_directory, step_of
from lightning_plugins.ema.master_shadow import LatestMasterShadow, MasterShadow
from lightning_plugins.ema.zero_files import files_of, read_part, write_part
from lightning_plugins.ema.zero_saves import ZeroSaves
from tests.support import zero_stand_ins as stand_ins

DECAY = 0.75
# elements 0 to 6 and 6 to 13 of all; the second layer's bias is on the last rank alone
CUTS = ((0, 6), (6, 13))


def net():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).to(torch.bfloat16)
    module.register_buffer("shift", torch.tensor([0.25]))
    return module


@pytest.fixture(params=["stage 2", "stage 3"])
def ranks(request, monkeypatch):
    """The engines of two ranks, each with a module of its own."""
    monkeypatch.setattr(zero_module.torch.distributed, "get_rank", lambda group: group)
    modules = [net(), net()]
    if request.param == "stage 2":
        optimizers = [stand_ins.Optimizer12(module, *cut) for module, cut in zip(modules, CUTS, strict=True)]
    else:
        optimizers = [stand_ins.Optimizer3(module, rank, 2) for rank, module in enumerate(modules)]
    return [(stand_ins.Engine(optimizer), module) for optimizer, module in zip(optimizers, modules, strict=True)]


def trained(ranks, steps=5):
    """Train the masters of every rank by pseudo-random steps; return the shadows and the recursion in float64."""
    generator, shadows, expected = torch.Generator().manual_seed(1), [], []
    for engine, module in ranks:
        shadow, flat = MasterShadow(Zero(engine), module), engine.optimizer.flat
        average = flat.double().numpy()
        for _ in range(steps):
            # too little for bfloat16 weights: most of it is lost there
            engine.step(1e-3 * torch.randn(flat.shape, generator=generator))
            shadow.update(DECAY)
            average = DECAY * average + (1 - DECAY) * flat.double().numpy()
        shadows.append(shadow)
        expected.append(average)
    return shadows, expected


def written(directory, shadows):
    for rank, shadow in enumerate(shadows):
        strategy = SimpleNamespace(broadcast=lambda path: path, save_checkpoint=lambda checkpoint, path: None)
        saves = ZeroSaves("ema")
        saves.watch(SimpleNamespace(strategy=strategy, global_rank=rank, world_size=2), lambda shadow=shadow: shadow)
        strategy.save_checkpoint({}, directory)


def deepspeed_directory(path, step=5):
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save({"global_steps": step, "dtype": np.dtype}, path / "checkpoint" / "mp_rank_00_model_states.pt")
    return path


def test_the_masters_are_averaged_and_not_the_weights_that_compute(ranks):
    shadows, expected = trained(ranks)
    for (engine, _), shadow, average in zip(ranks, shadows, expected, strict=True):
        found = torch.cat([part.values for part in shadow.averages()])
        numel = sum(part.values.numel() for part in shadow.parts)
        if numel == len(average):
            np.testing.assert_allclose(found.double().numpy(), average, rtol=0, atol=1e-7)
        assert found.dtype == torch.float32
        assert engine.optimizer.flat.abs().max() < 2


def test_an_exchange_makes_the_weights_anew_and_its_end_restores_everything_bit_for_bit(ranks):
    shadows, _ = trained(ranks)
    for (engine, module), shadow in zip(ranks, shadows, strict=True):
        flat = engine.optimizer.flat
        held = [zero_module.held_part(parameter)[1] for parameter in module.parameters()]
        before, masters = [value.clone() for value in held], flat.clone()
        averages = [part.values.clone() for part in shadow.averages()]
        shadow.swap_in()
        assert all(map(torch.equal, [part.values for part in shadow.parts], averages))
        assert not torch.equal(flat, masters)
        shadow.swap_out()
        assert torch.equal(flat, masters)
        assert all(map(torch.equal, held, before))
        shadow.alone = True
        calls = list(getattr(engine.optimizer, "calls", [])), getattr(engine.optimizer, "published", 0)
        shadow.swap_in()
        shadow.swap_out()
        assert calls == (list(getattr(engine.optimizer, "calls", [])), getattr(engine.optimizer, "published", 0))


def test_the_parts_of_all_ranks_make_up_the_average(ranks, tmp_path):
    shadows, _ = trained(ranks)
    written(tmp_path, shadows)
    deepspeed_directory(tmp_path)
    found = extract_weights(tmp_path)
    assert list(found) == list(net().state_dict())
    assert found["shift"] == 0.25
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        whole = torch.zeros(net().state_dict()[name].numel())
        for shadow in shadows:
            for part in shadow.averages():
                if part.found.names[0] == name:
                    whole[part.start : part.start + part.values.numel()] = part.values
        assert torch.equal(found[name].reshape(-1), whole)


def test_a_rank_finds_its_part_again_bit_for_bit(ranks, tmp_path):
    shadows, _ = trained(ranks)
    written(tmp_path, shadows)
    for rank, ((engine, module), shadow) in enumerate(zip(ranks, shadows, strict=True)):
        start, snapshots = read_part(tmp_path, "ema", step=5, rank=rank, ranks=2, parts=shadow.parts)
        assert snapshots == []
        again = MasterShadow(Zero(engine), module, start=start)
        assert all(torch.equal(a.values, b.values) for a, b in zip(again.averages(), shadow.averages(), strict=True))
    assert read_part(tmp_path, "other", step=5, rank=0, ranks=2, parts=shadows[0].parts) is None
    others = [torch.load(path)["others"] for path in files_of(tmp_path)["ema"]]
    # what is whole on every rank is written once
    assert [[part["names"] for part in found] for found in others] == [[["shift"]], []]


def test_the_mean_of_the_latest_snapshots_of_the_masters_is_found_again_bit_for_bit(ranks, tmp_path):
    generator, shadows = torch.Generator().manual_seed(1), []
    for rank, (engine, module) in enumerate(ranks):
        shadow, seen = LatestMasterShadow(Zero(engine), module, last=3), []
        for _ in range(5):
            engine.step(1e-3 * torch.randn(engine.optimizer.flat.shape, generator=generator))
            shadow.update()
            seen.append([part.values.double().numpy().copy() for part in shadow.parts])
        for number, part in enumerate(shadow.averages()):
            expected = np.mean([masters[number] for masters in seen[-3:]], axis=0)
            assert np.array_equal(part.values.numpy(), expected.astype(np.float32))
        shadow.swap_in()
        shadow.swap_out()
        shadows.append(shadow)
        parts = {"parts": shadow.averages(), "others": [], "snapshots": shadow.snapshots()}
        write_part(tmp_path, "lawa", step=5, rank=rank, ranks=2, keys=[], **parts)
    for rank, ((engine, module), shadow) in enumerate(zip(ranks, shadows, strict=True)):
        start, snapshots = read_part(tmp_path, "lawa", step=5, rank=rank, ranks=2, parts=shadow.parts)
        again = LatestMasterShadow(Zero(engine), module, last=3, start=start, snapshots=snapshots)
        for one, other in zip(again.snapshots(), shadow.snapshots(), strict=True):
            assert all(map(torch.equal, one, other))
        engine.step(1e-3)
        shadow.update()
        again.update()
        assert all(torch.equal(a.values, b.values) for a, b in zip(again.averages(), shadow.averages(), strict=True))


def test_what_does_not_belong_together_is_refused(ranks, tmp_path):
    shadows, _ = trained(ranks)
    written(tmp_path, shadows)
    deepspeed_directory(tmp_path, step=4)

    def read(**changes):
        return read_part(tmp_path, "ema", **{"step": 5, "rank": 0, "ranks": 2, "parts": shadows[0].parts, **changes})

    with pytest.raises(ValueError, match="must be of step 4, as the weights there, got step 5"):
        read(step=4)
    with pytest.raises(ValueError, match="must be of 3 ranks, as this run, but ema"):
        read(ranks=3)
    with pytest.raises(ValueError, match="must be cut as the weights of this run are"):
        read(parts=shadows[1].parts)
    with pytest.raises(ValueError, match=re.escape("are of several steps (4, 5)")):
        extract_weights(tmp_path)
    with pytest.raises(ValueError, match="got 'slow'; it has 'ema'"):
        extract_weights(tmp_path, name="slow")
    files_of(tmp_path)["ema"][1].unlink()
    with pytest.raises(ValueError, match="lacks the parts of some ranks"):
        extract_weights(tmp_path)


PART = {"names": ["a"], "shape": [2], "start": 0, "values": torch.zeros(2)}
DAMAGE = [
    {"names": "a"},
    {"names": []},
    {"names": [1]},
    {"names": ("a",)},
    {"shape": (2,)},
    {"shape": 2},
    {"shape": [2.0]},
    {"shape": [True, 2]},
    {"shape": [-2, -1]},
    {"shape": [-1, -1], "values": torch.zeros(1)},
    {"shape": [2**64, 1]},
    {"start": 0.0},
    {"start": False},
    {"start": -1},
    {"start": 1},
    {"values": [0.0, 0.0]},
    {"values": torch.zeros(1, 2)},
    {"values": torch.zeros(3)},
    {"more": 1},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of version 1, got 2"),
        ({"version": True}, "of version 1, got True"),
        *(({what: [{**PART, **damage}]}, "it is damaged") for what in ("parts", "others") for damage in DAMAGE),
        ({"parts": [[]]}, "it is damaged"),
        ({"parts": [{"names": ["a"]}]}, "it is damaged"),
        ({"snapshots": ([torch.zeros(2)],), "parts": [PART]}, "it is damaged"),
        ({"snapshots": [1], "parts": [PART]}, "it is damaged"),
        ({"snapshots": [(torch.zeros(2),)], "parts": [PART]}, "it is damaged"),
        ({"snapshots": [["a"]], "parts": [PART]}, "it is damaged"),
        ({"snapshots": [[torch.zeros(3)]], "parts": [PART]}, "it is damaged"),
        ({"rank": 0.0}, "it is damaged"),
        ({"ranks": True}, "it is damaged"),
        ({"keys": "a"}, "it is damaged"),
        ({"parts": {}}, "it is damaged"),
        ({"step": "5"}, "it is damaged"),
        ({"snapshots": [[torch.zeros(2)]]}, "it is damaged"),
        ({"parts": [{**PART, "shape": [4]}]}, "do not make up the whole"),
        ({"parts": [{**PART, "shape": [3], "start": 1}]}, "do not make up the whole"),
        ({"parts": [PART, {**PART, "start": 1, "values": torch.zeros(1)}]}, "do not make up the whole"),
        (
            {"parts": [{**PART, "values": torch.zeros(1)}, {**PART, "start": 1, "values": torch.zeros(1).half()}]},
            "whole",
        ),
        (
            {
                "parts": [
                    {**PART, "values": torch.zeros(1)},
                    {**PART, "shape": [1, 2], "start": 1, "values": torch.zeros(1)},
                ]
            },
            "whole",
        ),
    ],
)
def test_damaged_parts_are_refused(tmp_path, change, message):
    part_of_a_directory(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        extract_weights(tmp_path)


def part_of_a_directory(path, change):
    deepspeed_directory(path)
    good = {"version": 1, "step": 5, "rank": 0, "ranks": 1, "keys": ["a"], "parts": [], "others": []}
    (path / "lightning_plugins_ema").mkdir()
    torch.save({**good, **change}, path / "lightning_plugins_ema" / "ema.00000-of-00001.pt")


def test_parts_of_any_shape_make_up_the_whole(tmp_path):
    parts = [
        {**PART, "names": ["a", "b"], "shape": [1, 3], "start": 2, "values": torch.tensor([3.0])},
        {**PART, "names": ["a", "b"], "shape": [1, 3], "values": torch.tensor([1.0, 2.0])},
        {**PART, "names": ["empty"], "shape": [0, 4], "values": torch.zeros(0)},
        {**PART, "names": ["scalar"], "shape": [], "values": torch.tensor([5.0])},
        {**PART, "names": ["large"], "shape": [2, 3000], "values": torch.arange(6000.0)},
    ]
    part_of_a_directory(tmp_path, {"parts": parts, "keys": ["b", "a", "scalar", "empty", "large"]})
    found = extract_weights(tmp_path)
    assert list(found) == ["b", "a", "scalar", "empty", "large"]
    assert torch.equal(found["large"], torch.arange(6000.0).view(2, 3000))
    assert found["a"].tolist() == found["b"].tolist() == [[1, 2, 3]]
    assert (found["scalar"].item(), found["empty"].shape) == (5, (0, 4))


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_part_names_is_never_run(tmp_path, capsys):
    part_of_a_directory(tmp_path, {"keys": [Planted(tmp_path / "run")]})
    with pytest.raises(ValueError, match=r"cannot be read as a part of an average: it names .*mkdir"):
        extract_weights(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read as a part of an average: it names .*mkdir"):
        read_part(tmp_path, "ema", step=5, rank=0, ranks=1, parts=[])
    assert main(["inspect", str(tmp_path)]) != 0
    assert "cannot be read as a part of an average" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_files_of_another_number_of_ranks_go(ranks, tmp_path):
    shadows, _ = trained(ranks)
    written(tmp_path, shadows)
    write_part(tmp_path, "ema", step=5, rank=0, ranks=1, keys=[], parts=[], others=[])
    assert [path.name for path in files_of(tmp_path)["ema"]] == ["ema.00000-of-00001.pt"]


def test_only_applied_steps_count(ranks):
    for engine, _ in ranks:
        engine.step()
        clock = ZeroClock(Zero(engine), applied=10)
        engine.step(0.1)
        engine.step()
        engine.step(0.1)
        assert clock.applied == 12
        clock.restore(3)
        engine.step(0.1)
        assert clock.applied == 4


def test_another_fit_goes_on_only_with_the_same_cuts(ranks):
    shadows, _ = trained(ranks)
    before = [part.values.clone() for part in shadows[0].averages()]
    other = net()
    if hasattr(ranks[0][0].optimizer, "update_lp_params"):
        same, different = stand_ins.Optimizer12(ranks[0][1], *CUTS[0]), stand_ins.Optimizer12(other, 0, 13)
        shadows[0].rebind_to(Zero(stand_ins.Engine(same)))
        assert all(map(torch.equal, before, [part.values for part in shadows[0].averages()]))
        # the masters of this fit are followed from now on
        same.flat.add_(1)
        shadows[0].update(DECAY)
        masters = [part.values for part in Zero(stand_ins.Engine(same)).masters(ranks[0][1])]
        for old, now, part in zip(before, masters, shadows[0].averages(), strict=True):
            torch.testing.assert_close(part.values, DECAY * old + (1 - DECAY) * now)
        shadows[0].module = other
        with pytest.raises(ValueError, match="must go on with the stage and optimizer"):
            shadows[0].rebind_to(Zero(stand_ins.Engine(different)))


def test_full_weights_are_loaded_in_parts(ranks):
    expected = {name: torch.full_like(value, 7) for name, value in net().state_dict().items()}
    for _, module in ranks:
        load_full(module, expected)
        for parameter in module.parameters():
            assert (zero_module.held_part(parameter)[1] == 7).all()


def test_what_a_directory_says_of_itself(tmp_path):
    directory = deepspeed_directory(tmp_path / "good", step=7)
    assert is_deepspeed_directory(directory)
    assert step_of(directory) == 7
    torch.save({"global_steps": 8}, directory / "checkpoint" / "zero_pp_rank_1_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="the files of its ranks are of several steps"):
        step_of(directory)
    (directory / "latest").write_text("../good/checkpoint")
    assert not is_deepspeed_directory(directory)
    assert not is_deepspeed_directory(tmp_path)
    with pytest.raises(ValueError, match="holds objects of DeepSpeed, which its own conversion opens"):
        extract_weights(deepspeed_directory(tmp_path / "raw"), "raw")


def test_without_deepspeed_the_way_to_convert_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.utils.zero_to_fp32", None)
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"There, `python .*/zero_to_fp32.py .* OUTPUT` writes its weights"):
        full_weights(deepspeed_directory(tmp_path / "raw"), trust=True)


def test_what_is_not_zero_is_told_apart(ranks):
    engine = ranks[0][0]
    assert zero_of(SimpleNamespace(strategy=SimpleNamespace(model=engine))) is None
    assert zero_of(SimpleNamespace(strategy=stand_ins.strategy_of(nn.Linear(1, 1)))) is None
    assert zero_of(SimpleNamespace(strategy=stand_ins.strategy_of(engine))).optimizer is engine.optimizer
    engine.optimizer = SimpleNamespace()
    with pytest.raises(ValueError, match="must train with its ZeRO optimizer of stage 1, 2 or 3, got SimpleNamespace"):
        zero_of(SimpleNamespace(strategy=stand_ins.strategy_of(engine)))


def test_the_command_line_opens_such_directories(ranks, tmp_path, capsys):
    shadows, _ = trained(ranks)
    directory = deepspeed_directory(tmp_path / "run")
    written(directory, shadows)
    assert main(["inspect", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "DeepSpeed" in said
    assert "average of EMA 'ema'" in said
    assert main(["extract", str(directory), "--weights", "average", "--output", str(tmp_path / "ema.pt")]) == 0
    found, expected = torch.load(tmp_path / "ema.pt"), extract_weights(directory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"is a directory of DeepSpeed\. .*--weights raw --trust --output FILE.pt"):
        average_checkpoints([directory, deepspeed_directory(tmp_path / "other")])


def test_a_run_without_zero_has_nothing_to_read():
    trainer = SimpleNamespace(strategy=SimpleNamespace(), ckpt_path="a directory")
    assert ZeroSaves("ema").read(trainer, nn.Linear(1, 1)) is None

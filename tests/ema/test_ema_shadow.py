"""The average itself: exact, bounded in memory, interruptible."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_plugins.core.module_state import averaged_tensors, clean_name, load_named, named_tensors
from lightning_plugins.ema import tensor_groups as group_module
from lightning_plugins.ema.decay import WarmupDecay
from lightning_plugins.ema.shadow import Shadow, showing
from lightning_plugins.ema.tensor_groups import Group
from tests.support.ema_runs import THETA, clone_state, same


class Mixed(nn.Module):
    """Everything a module may have: tied, frozen, tiny, large, empty, odd types and orders, buffers of both kinds."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(700, 900))  # more than a mebibyte
        self.tiny = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in (1, 3, 0, 7))
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.precise = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.gaps = nn.Parameter(torch.randn(4, 10)[:, ::2])
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.decoder = nn.Linear(900, 700, bias=False)
        self.decoder.weight = self.embed
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.randn(2), persistent=False)
        if dtype != torch.float32:
            for parameter in self.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def drift(self):
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.1)
        self.norm.running_mean += 1
        self.norm.num_batches_tracked += 1


def reference(module, decays):
    """The average in float64, one parameter at a time, over len(decays) drifts."""
    wide = {
        name: p.detach().to(torch.complex128 if p.is_complex() else torch.float64).clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    for decay in decays:
        module.drift()
        for name, p in module.named_parameters():
            if name in wide:
                wide[name] = decay * wide[name] + (1 - decay) * p.detach().to(wide[name].dtype)
    return wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_average_equals_the_formula_in_float64(dtype):
    module, decays = Mixed(dtype), [0.9, 0.5, 0.99, 0.0, 0.7]
    twin = copy.deepcopy(module)
    shadow = Shadow(module)
    torch.manual_seed(1)
    expected = reference(twin, decays)
    torch.manual_seed(1)
    for decay in decays:
        module.drift()
        shadow.update(decay)
    average = shadow.collect("average")
    assert set(average) == {*expected, "decoder.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(average[name].to(value.dtype), value, rtol=2e-6, atol=2e-6)
        assert average[name].dtype in (torch.float32, torch.float64, torch.complex64)
    assert average["precise"].dtype == torch.float64


def test_golden_table_in_float64():
    table = json.loads((Path(__file__).parents[1] / "golden" / "ema" / "warmup_0.9.json").read_text())
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    shadow, rule, got = Shadow(module), WarmupDecay(0.9), []
    for n, theta in enumerate(THETA, start=1):
        module.weight.data.fill_(theta)
        shadow.update(rule(n))
        got.append(shadow.collect("average")["weight"].item())
    assert got == pytest.approx(table["shadow"], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_exchanges_exactly_and_back(dtype):
    module = Mixed(dtype)
    shadow = Shadow(module)
    module.drift()
    shadow.update(0.5)
    raw, average = clone_state(module), shadow.collect("average", copies=True)
    assert showing(module) is None
    for _ in range(3):
        shadow.swap_in()
        shadow.swap_in()  # nothing happens twice
        assert showing(module) is shadow
        for name, value in module.state_dict().items():
            expected = average[name].to(value.dtype) if name in average else raw[name]
            assert torch.equal(value, expected), name
        assert same(shadow.collect("average"), average)
        assert same(shadow.collect("raw"), {name: raw[name] for name in average})
        shadow.swap_out()
        shadow.swap_out()
        assert same(clone_state(module), raw)
        assert same(shadow.collect("average"), average)
    assert showing(module) is None


def test_half_precision_average_does_not_freeze_and_is_never_rounded():
    """In bfloat16 this average would stay at 1 for ever; swapping must not round it either."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    module.weight.data.fill_(1)
    shadow = Shadow(module)
    module.weight.data.fill_(1.1)
    target = module.weight.item()
    for _ in range(5000):
        shadow.update(0.999)
    shadow.swap_in()
    shadow.swap_out()
    expected = 1 + (target - 1) * (1 - 0.999**5000)
    assert shadow.collect("average")["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == target


def test_tied_weights_are_averaged_once_under_both_names():
    module = Mixed()
    shadow = Shadow(module)
    before = module.embed.detach().clone()
    module.drift()
    shadow.update(0.9)
    average = shadow.collect("average")
    torch.testing.assert_close(average["embed"], 0.9 * before + 0.1 * module.embed.detach())
    assert average["embed"] is average["decoder.weight"]
    assert shadow.tied == {"decoder.weight": "embed"}


def test_frozen_weights_and_integers_are_not_averaged():
    module = Mixed()
    names = set(Shadow(module, buffers=True).names)
    assert "frozen" not in names
    assert "norm.num_batches_tracked" not in names
    assert "cache" not in names  # not part of the state dict
    assert {"norm.running_mean", "norm.running_var"} <= names
    assert "norm.running_mean" not in Shadow(module).names


def test_averaged_buffers_follow_also_when_assigned_anew():
    module = nn.BatchNorm1d(1)
    shadow = Shadow(module, buffers=True)
    module.running_mean = torch.ones(1)  # not in place
    shadow.update(0.75)
    assert shadow.collect("average")["running_mean"].item() == 0.25
    shadow.swap_in()
    assert module.running_mean.item() == 0.25
    shadow.swap_out()
    assert module.running_mean.item() == 1
    del module.running_mean
    module.register_buffer("running_mean", None)
    with pytest.raises(RuntimeError, match="'running_mean' was removed while it was averaged"):
        shadow.update(0.5)


@pytest.mark.parametrize("size", [6, 600_000])
def test_weights_that_share_memory_survive_a_swap(size):
    """Two parameters over the same memory, in one batch of the swap and in several."""
    module = nn.Module()
    module.whole = nn.Parameter(torch.arange(float(size)))
    module.part = nn.Parameter(module.whole.data[2 : size // 2 + 1])
    shadow = Shadow(module)
    module.whole.data.add_(10)
    shadow.update(0.5)
    raw = clone_state(module)
    shadow.swap_in()
    assert torch.equal(module.whole, torch.arange(float(size)) + 5)
    shadow.swap_out()
    assert same(clone_state(module), raw)
    assert torch.equal(shadow.collect("average")["whole"], torch.arange(float(size)) + 5)


class Interrupt:
    """Raises KeyboardInterrupt around the n-th copy, before or after it was done."""

    def __init__(self, monkeypatch, at, after):
        self.left = at
        original = group_module.copy

        def interrupted(target, source):
            self.left -= 1
            if self.left == 0 and not after:
                raise KeyboardInterrupt
            original(target, source)
            if self.left == 0 and after:
                raise KeyboardInterrupt

        monkeypatch.setattr(group_module, "copy", interrupted)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c_inside_a_swap_loses_nothing(monkeypatch, dtype, after):
    for at in range(1, 80):
        torch.manual_seed(0)
        module = Mixed(dtype)
        shadow = Shadow(module)
        module.drift()
        shadow.update(0.5)
        raw, average = clone_state(module), shadow.collect("average", copies=True)
        with monkeypatch.context() as patch:
            Interrupt(patch, at, after)
            try:
                shadow.swap_in()
                shadow.swap_out()
            except KeyboardInterrupt:
                pass
            else:
                assert at > 6
                return
        assert same(shadow.collect("raw"), {name: raw[name] for name in average})
        shadow.swap_out()
        assert same(clone_state(module), raw)
        assert same(shadow.collect("average"), average)
    pytest.fail("the swap has more copies than were interrupted")


def test_average_cannot_be_updated_while_it_is_in_the_module():
    shadow = Shadow(nn.Linear(1, 1))
    shadow.swap_in()
    with pytest.raises(RuntimeError, match="cannot be updated while the module holds it"):
        shadow.update(0.5)


def test_lazy_weights_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`0\.weight` must have a shape before it can be averaged"):
        Shadow(nn.Sequential(nn.LazyLinear(3)))


def test_newly_trainable_weights_join_as_they_are():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[0].requires_grad_(False)
    shadow = Shadow(module)
    module[1].weight.data.fill_(3)
    shadow.update(0.5)
    module[0].requires_grad_(True)
    module[0].weight.data.fill_(1)
    assert shadow.follow() == ["0.weight", "0.bias"]
    assert shadow.follow() == []
    module[0].weight.data.fill_(2)
    shadow.update(0.5)
    assert shadow.collect("average")["0.weight"].item() == 1.5
    assert len(shadow) == 4


def test_compiled_modules_keep_their_plain_names_and_see_the_swap():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    module[0] = torch.compile(module[0], backend="aot_eager")
    x = torch.randn(2, 3)
    module(x)
    shadow = Shadow(module)
    assert shadow.names == ["0.weight", "0.bias"]
    assert clean_name("_orig_mod.0._orig_mod.weight") == "0.weight"
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    raw = module(x)
    shadow.update(0.5)
    shadow.swap_in()
    average = shadow.collect("average")
    expected = torch.relu(x @ average["0.weight"].T + average["0.bias"])
    torch.testing.assert_close(module(x), expected)
    shadow.swap_out()
    torch.testing.assert_close(module(x), raw)


def test_tensors_made_under_inference_mode_can_be_trained_on():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    half = nn.Linear(2, 2).bfloat16()
    narrow = Shadow(half)
    with torch.inference_mode():
        for each in (shadow, narrow):
            each.swap_in()
            each.swap_out()
    for each in (shadow, narrow):
        each.update(0.5)
        each.swap_in()
        each.swap_out()
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None


def test_moved_or_cast_modules_are_followed():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    module.double()
    shadow.rebind()
    module.weight.data.fill_(1.0)
    shadow.update(0.0)
    assert shadow.collect("average")["weight"].tolist() == [[1, 1], [1, 1]]
    module.half()
    shadow.rebind()
    shadow.swap_in()
    module.weight.data = module.weight.data.clone()  # as a move to another device does
    shadow.rebind()
    assert shadow.collect("raw")["weight"].dtype == torch.float16
    shadow.swap_out()
    assert module.weight.tolist() == [[1, 1], [1, 1]]


def test_fingerprint_changes_with_the_weights_only():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    assert not shadow.untouched()
    shadow.remember()
    module.weight.data = module.weight.data.clone()
    module.load_state_dict(module.state_dict())
    assert shadow.untouched()
    assert copy.deepcopy(shadow).untouched()
    with torch.no_grad():
        module.weight[0].neg_()
    assert not shadow.untouched()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_that_holds_the_average_shows_it_and_gives_it_back(copied):
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    raw = clone_state(module)
    shadow = Shadow(module)
    with torch.no_grad():
        module.weight.add_(1)
    trained = clone_state(module)
    module_copy, twin = copied((module, shadow))
    assert same(twin.collect("raw"), trained)
    assert showing(module_copy) is None
    shadow.swap_in()
    module_copy, twin = copied((module, shadow))
    assert same(twin.collect("average"), raw)
    assert showing(module_copy) is twin
    assert showing(module) is shadow
    twin.swap_out()
    assert showing(module_copy) is None
    assert same(module_copy.state_dict(), trained)
    assert showing(module) is shadow


def test_streaming_off_the_device_gives_the_same_numbers():
    """The path of device="cpu" on a GPU run, forced on tensors of one device."""
    torch.manual_seed(0)
    weights = [torch.randn(700, 900), torch.randn(3), torch.randn(5).bfloat16().float()]
    near = [torch.randn_like(w) for w in weights]
    far = [s.clone() for s in near]
    Group([0, 1, 2], weights, near, exchanges=True, same_device=True).blend(0.1)
    Group([0, 1, 2], weights, far, exchanges=True, same_device=False).blend(0.1)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    half = [w.bfloat16() for w in weights]
    Group([0, 1, 2], half, near, exchanges=False, same_device=True).blend(0.1)
    Group([0, 1, 2], half, far, exchanges=False, same_device=False).blend(0.1)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_and_absent_weights_are_fine(dtype):
    """A rank may hold nothing but empty shards, and a module nothing trainable."""
    module = nn.ParameterList([torch.zeros(0, dtype=dtype), torch.zeros(0, 3, dtype=dtype)])
    for each in (module, nn.Identity(), nn.Linear(1, 1).requires_grad_(False)):
        shadow = Shadow(each)
        shadow.update(0.5)
        shadow.swap_in()
        shadow.swap_out()
        assert len(shadow.collect("average")) == len(shadow)


def test_load_writes_by_name():
    module = Mixed()
    load_named(module, {"precise": torch.full((4,), 7.0)})
    assert module.precise.tolist() == [7] * 4
    assert {name for found in named_tensors(module) for name in found.names} == set(module.state_dict())
    also = averaged_tensors(module, also=lambda found: "frozen" in found.names)
    assert any("frozen" in found.names for found in also)

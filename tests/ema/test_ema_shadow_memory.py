"""How the average lies in memory, and how it is filled by name."""

import gc
import weakref
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_plugins.core.module_state import misfits
from lightning_plugins.ema import tensor_groups
from lightning_plugins.ema.shadow import Shadow, disown, showing
from lightning_plugins.ema.tensor_groups import Group, Layout


def test_layout_packs_small_tensors_and_cuts_large_ones(monkeypatch):
    monkeypatch.setattr(tensor_groups, "_MIB", 4 * 256)
    left = [torch.zeros(n) for n in (10, 300, 3, 0, 2, 700)]
    layout = Layout(mib_on_gpu=4)
    batches = layout.batches(left, [t.clone() for t in left])
    sizes = [sum(piece.numel() for piece in batch.left) for batch in batches]
    assert max(sizes) <= 256
    assert sum(sizes) == 1015
    assert layout.batches(left, [t.clone() for t in left]) is not batches  # the right ones moved
    right = [t.clone() for t in left]
    assert layout.batches(left, right) is layout.batches(left, right)


def test_extra_memory_is_bounded(monkeypatch):
    """Beyond the shadow, an update and two swaps of 40 MB of weights allocate less than 8 MB at any time."""
    module = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(10))
    shadow = Shadow(module)
    with torch.profiler.profile(profile_memory=True) as profile:
        shadow.update(0.9)
        shadow.swap_in()
        shadow.swap_out()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 8e6


def test_what_is_collected_is_copied_only_where_that_is_asked_for():
    shadow = Shadow(nn.Linear(2, 2))
    first, again, copied = (shadow.collect("average", copies=copies)["weight"] for copies in (False, False, True))
    assert first.data_ptr() == again.data_ptr() != copied.data_ptr()


def test_a_dropped_average_leaves_no_trace():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    shadow.swap_in()
    gone = weakref.ref(shadow)
    del shadow
    gc.collect()
    assert gone() is None
    assert showing(module) is None
    disown(module)


def test_misfits_are_listed_and_shortened():
    module = nn.Linear(2, 2)
    wrong = {f"extra{i}": torch.zeros(1) for i in range(7)} | {"weight": torch.zeros(3)}
    assert misfits(module, wrong) == [
        "unexpected: extra0, extra1, extra2, extra3, extra4 and 2 more",
        "misshapen: weight (3,) for (2, 2)",
    ]
    assert misfits(module, dict(module.state_dict())) == []


def test_what_the_average_that_it_begins_with_lacks_is_named_once_by_its_first_name():
    module = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcd"})
    module["c"].weight = module["b"].weight
    whole = Shadow(module).collect("average")
    assert Shadow(module, start=whole).changes is None
    assert Shadow(module).changes is None
    first = {name: value for name, value in whole.items() if name == "a.weight"}
    assert Shadow(module, start=first).changes.news == [
        "b.weight, d.weight joined: the average begins at the present value."
    ]


def test_the_host_waits_for_the_gpu_where_shadows_are_streamed_off_it(monkeypatch):
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waits.append(device.type) or stream)
    with FakeTensorMode():
        gpu, host = torch.empty(3, device="cuda"), torch.empty(3)
        for weight, shadow in ((gpu, gpu), (host, host), (gpu, host)):
            group = Group([0], [weight], [shadow], exchanges=True, same_device=weight.device == shadow.device)
            assert waits == []
            group.wait()
    assert waits == ["cuda", "wait"]

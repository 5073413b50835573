"""What a rank does with its shares of tensors, against closed forms, in one process."""

import weakref

import pytest
import torch

from lightning_plugins.core import flat_shards
from lightning_plugins.core.flat_shards import FlatShard
from lightning_plugins.core.module_state import state_of
from lightning_plugins.core.sharding import any_sharded, is_sharded, local, reshard


@pytest.fixture
def two_alike(monkeypatch):
    """Two ranks that hold the same, so that a sum over them is twice what this one has."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group=None: tensor.mul_(2))


class Record:
    """What FSDP1 keeps of a flat parameter."""

    def __init__(self, **fields):
        vars(self).update(fields)


class Part(torch.Tensor):
    """A rank's part of a parameter, whose gradient has the shape of the whole while a window is open."""

    grad = None


PART = torch.tensor([1.0, 2.0, 3.0])
# the part is the elements from the second on
PLACED = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
OWN = torch.arange(8.0).view(2, 4)


def shard_of(flat):
    handle = Record(flat_param=flat)
    shard = FlatShard(OWN.shape, 1, 2, weakref.ref(handle), torch.device("cpu"), None)
    return shard, handle


def test_a_share_lies_where_it_was_cut_from(two_alike):
    shard, _ = shard_of(None)
    assert torch.equal(shard.gather(PART), 2 * PLACED)
    assert torch.equal(shard.scatter(PLACED, 3), PART)


WINDOWS = {
    "no gradient yet": (None, None, None, 0 * OWN),
    "a window is over": (None, PART, None, 8 * PLACED),
    "the first window is open": (OWN, OWN, None, 2 * OWN),
    "the first window is open, without a batch that reached it": (OWN, None, None, 0 * OWN),
    "a later window is open": (OWN, OWN, torch.cat([torch.ones(2), PART, torch.ones(2)]), 2 * OWN + 8 * PLACED),
    "this rank's gradient is that of the shard": (PART, PART, None, 8 * PLACED),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_gradient_is_the_sum_over_the_ranks(two_alike, window):
    """The mean over four ranks, of which two have a share, is a quarter of their sum."""
    gathered, gradient, saved, expected = WINDOWS[window]
    shard, handle = shard_of(Record(grad=gathered, _unpadded_unsharded_size=OWN.shape, _saved_grad_shard=saved))
    parameter = torch.zeros(3).as_subclass(Part)
    parameter.grad = gradient
    assert handle
    assert torch.equal(shard.gradient(parameter, 4), expected)


def test_only_what_fsdp_has_made_is_given_back_to_its_shards():
    called = []

    class Sharded(torch.nn.Module):
        def unshard(self):
            called.append("unshard")

        def reshard(self):
            called.append("reshard")

    class Own(torch.nn.Module):
        def reshard(self):
            called.append("a function of the user's")

    class Half(torch.nn.Module):
        def unshard(self):
            called.append("unshard")

    reshard(torch.nn.Sequential(Own(), Half(), Sharded()))
    assert called == ["reshard"]


class Placed(torch.Tensor):
    """A user's own, which says where it belongs."""

    placements = "left"


class Cached(torch.Tensor):
    """Another, which can be brought to a local disk."""

    def to_local(self):
        raise AssertionError


@pytest.mark.parametrize("kind", [torch.Tensor, Placed, Cached])
def test_a_tensor_with_half_of_a_dtensors_names_is_whole(kind):
    tensor = torch.ones(3).as_subclass(kind)
    assert not is_sharded(tensor)
    assert not any_sharded([None, "x", tensor])
    assert local(tensor) is tensor


class FullyShardedDataParallel(torch.nn.Module):
    """What FSDP1 wraps a module in, as far as it is read."""

    def __init__(self, module, handle):
        super().__init__()
        self.module, self._handle = module, handle


def wrapped(module, **handle):
    """Wrap a module of two parameters, of which the second has nothing on this rank."""
    placed = [
        Record(intra_param_start_idx=2, offset_in_shard=1),
        Record(intra_param_start_idx=None, offset_in_shard=None),
    ]
    parameters = list(module.parameters())
    flat = Record(_params=parameters, _shapes=[parameter.shape for parameter in parameters], _shard_param_infos=placed)
    record = {"flat_param": flat, "uses_sharded_strategy": True, "device": torch.device("cpu"), "process_group": None}
    return FullyShardedDataParallel(module, Record(**{**record, **handle}))


def test_what_lies_on_a_rank_is_read_and_may_be_nothing():
    module = torch.nn.Linear(3, 2)
    model = wrapped(module)
    flat_shards.look_up(model, module)
    assert flat_shards.are_in(module)
    assert is_sharded(module)
    found = [flat_shards.of(parameter) for parameter in (module.weight, module.bias)]
    assert [(shard.shape, shard.start, shard.offset) for shard in found] == [((2, 3), 2, 1), ((2,), 0, 0)]
    assert found[1].scatter(torch.ones(2), 0).tolist() == []


class Handle(Record):
    """Writes down what it is told."""

    def reshard(self, free):
        self.called.append(("reshard", free))

    def post_reshard(self):
        self.called.append("after")


@pytest.mark.parametrize(
    ("used", "sharded", "called"),
    [(True, True, [("reshard", True), "after"]), (False, True, []), (True, False, [])],
    ids=["gathered", "before the first forward", "not cut"],
)
def test_what_is_gathered_is_freed(used, sharded, called):
    module = torch.nn.Linear(3, 2)
    model = wrapped(module)
    handle = model._handle = Handle(**{**vars(model._handle), "uses_sharded_strategy": sharded, "called": []})
    if used:
        handle.flat_param._local_shard = torch.ones(4)
    flat_shards.look_up(model, module)
    reshard(module)
    assert handle.called == called
    # FSDP1 is taken off
    del handle, model._handle
    reshard(module)


def test_what_fsdp_leaves_whole_is_no_share():
    module = torch.nn.Linear(3, 2)
    flat_shards.look_up(wrapped(module, uses_sharded_strategy=False), module)
    assert flat_shards.are_in(module)
    assert not is_sharded(module)
    alone = torch.nn.Linear(3, 2)
    flat_shards.look_up(None, alone)
    flat_shards.look_up(FullyShardedDataParallel(alone, None), alone)
    assert not flat_shards.are_in(alone)


def test_parameters_that_fsdp_hides_are_refused():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="`use_orig_params` must be True under FSDP1, got False"):
        flat_shards.look_up(wrapped(module, flat_param=Record(_params=None)), module)
    with pytest.raises(ValueError, match="`use_orig_params` must be True under FSDP1, got False"):
        flat_shards.check_shown(Record(kwargs={"use_orig_params": False}))
    for strategy in (Record(kwargs={"use_orig_params": True}), Record(kwargs={}), Record()):
        flat_shards.check_shown(strategy)


def test_a_parameter_without_a_share_has_the_other_ranks_gradient(two_alike):
    """In a later window, in which this rank has the whole gradient of its own batches, and no share of the earlier."""
    module = torch.nn.Linear(3, 2)
    model = wrapped(module)
    flat_shards.look_up(model, module)
    flat = model._handle.flat_param
    flat.grad, flat._unpadded_unsharded_size, flat._saved_grad_shard = torch.ones(2), torch.Size([2]), torch.ones(4)
    share = torch.zeros(0).as_subclass(Part)
    share.grad = torch.ones(2)
    assert flat_shards.of(module.bias).gradient(share, 4).tolist() == [2, 2]


class Buffers(torch.nn.Linear):
    """A layer without a bias, with a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__(3, 2, bias=False)
        self.register_buffer("count", torch.ones(1))
        self.register_buffer("cache", torch.ones(1), persistent=False)


def test_a_state_dict_in_shards_has_the_names_of_the_whole_one():
    """FSDP1's own would gather them; the names that its wrappers add are taken out."""
    module = torch.nn.Sequential(Buffers(), torch.nn.Linear(2, 2))
    expected = module.state_dict(keep_vars=True)
    module[1] = wrapped(module[1])
    flat_shards.look_up(module, module)
    found = state_of(module)
    assert [name.replace("module.", "") for name in found] == list(expected)
    assert all(found[name] is value for name, value in zip(found, expected.values(), strict=True))

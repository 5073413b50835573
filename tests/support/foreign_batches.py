"""Stand-ins with the interface of batches of libraries that the tests do without."""

from __future__ import annotations

import collections
import dataclasses

import torch


class Graphs:
    """torch_geometric's ``Batch``: nodes of several graphs in one tensor, with functions to take it apart."""

    def __init__(self, graphs):
        self.x = torch.cat([graph.x for graph in graphs])
        self.y = torch.tensor([graph.y for graph in graphs])
        self._graphs = list(graphs)

    @property
    def num_graphs(self):
        return len(self._graphs)

    def keys(self):
        return ["x", "y"]

    def to_data_list(self):
        return list(self._graphs)

    @classmethod
    def from_data_list(cls, graphs):
        return cls(graphs)


class Graph:
    """torch_geometric's ``Data``: one graph, which does not say how many samples it is."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    @property
    def num_graphs(self):
        raise ValueError("Can not infer the number of graphs")


class Frame(collections.abc.MutableMapping):
    """TensorDict: a mapping that is no sequence of fields but is sliced along ``batch_size``."""

    __hash__ = None

    def __init__(self, content, batch_size):
        self._content, self.batch_size = dict(content), torch.Size(batch_size)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._content[key]
        content = {name: value[key] for name, value in self._content.items()}
        return Frame(content, next(iter(content.values())).shape[:1])

    def __setitem__(self, key, value):
        raise TypeError("locked")

    def __delitem__(self, key):
        raise TypeError("locked")

    def __iter__(self):
        return iter(self._content)

    def __len__(self):
        return len(self._content)


class Encoding(collections.UserDict):
    """transformers' ``BatchEncoding``: its keys are attributes, too."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """transformers' ``ModelOutput``: an ordered dictionary and a dataclass, without ``update``."""

    loss: object = None
    logits: object = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def update(self, *args, **kwargs):
        raise RuntimeError("You cannot use ``update`` on a Output instance.")

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass
class Neighbors:
    """A batch that says how many of its nodes are samples."""

    nodes: torch.Tensor
    batch_size: int


class Syntax:
    """A node of a syntax tree, as Python's ``ast`` has them: its ``_fields`` are no named tuple's."""

    _fields = ("left", "right")

    def __init__(self):
        self.left = self.right = torch.zeros(4)

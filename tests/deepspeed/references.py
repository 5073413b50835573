"""The same training in one process and plain torch: every step has the gradient of the mean over its whole window."""

from itertools import zip_longest

import torch
from torch import nn


def twin():
    """Return the network of the runs in float64, by the names of its master weights."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    frozen, last = nn.Linear(5, 3).requires_grad_(False), nn.Linear(3, 1)
    third.weight = second.weight
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, frozen, last).double()
    names = {
        "first.weight": first.weight,
        "first.bias": first.bias,
        "second.weight": second.weight,
        "last.weight": last.weight,
        "last.bias": last.bias,
    }
    return net, names


def full_batch_steps(windows, rates=None, clip=None):
    """Train on windows, each a list of batches of all ranks, with the rate of each; return the weights."""
    return full_batch_trajectory(windows, rates, clip)[-1]


def full_batch_trajectory(windows, rates=None, clip=None):
    """Return the weights of such a training as it began, then after every step."""
    net, names = twin()
    trajectory = [_copied(names)]
    optimizer = torch.optim.SGD(names.values(), lr=0.1, momentum=0.9)
    for window, rate in zip(windows, rates or [0.1] * len(windows), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        x, y = (torch.cat(parts).double() for parts in zip(*window, strict=True))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x) + 0.25, y).backward()
        if clip:
            nn.utils.clip_grad_norm_(names.values(), clip)
        optimizer.step()
        trajectory.append(_copied(names))
    return trajectory


def _copied(names):
    return {name: value.detach().clone() for name, value in names.items()}


def windows_of(ranks, length, epochs=1):
    """Return the windows of an epoch, in which every rank has its list of batches; the last may be short."""
    begins = range(0, len(ranks[0]), length)
    return [[batch for batches in ranks for batch in batches[begin : begin + length]] for begin in begins] * epochs


def recursion(trajectory, decays):
    """Return the average of weights that came one after another, in float64.

    Args:
        trajectory: The weights as the training began, then after every step.
        decays: Of every step.
    """
    average = {name: value.double() for name, value in trajectory[0].items()}
    for weights, decay in zip_longest(trajectory[1:], decays):
        for name, value in weights.items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    return average

"""One thread, a fixed seed, a directory of its own, and no event files or hooks left by a test."""

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch


@pytest.fixture(autouse=True)
def _calm(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[unified, classic], ids=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    return request.param

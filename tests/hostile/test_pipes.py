"""Pipes and devices where files are expected: a plain open would wait for ever."""

import os
import threading

import pytest

from lightning_plugins import average_checkpoints, extract_weights, synthesize_ema
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.plot import plot_log
from tests.support.damage import bounded
from tests.support.damaged_cases import command, write_whole_files

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
PIPES = ["1.ckpt", "average.safetensors", "sharded/.metadata", "sharded/meta.pt", "sharded/__0_0.distcp"]
PIPES += [
    "snapshots/step=0000000005.pt",
    "snapshots/frozen.pt",
    "snapshots-safe/step=0000000010.safetensors",
    "log.csv",
]


@pytest.mark.parametrize("place", PIPES)
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_an_error_at_once(tmp_path, place, kind):
    write_whole_files(tmp_path)
    path = tmp_path / place
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    folder, output = tmp_path / place.partition("/")[0], tmp_path / "x.ckpt"
    uses = [
        lambda: average_checkpoints([folder, tmp_path / "2.ckpt"], strict=False),
        lambda: extract_weights(path),
        lambda: synthesize_ema(folder, 0.07),
        lambda: plot_log(path),
        lambda: command("inspect", path),
        lambda: command("average", folder, tmp_path / "2.ckpt", "--output", output),
        lambda: CSVFile(path).resume({"rows": 3, "last": ["1", "3", "train"]}),
        lambda: CSVFile(path).add([{"epoch": "1"}]),
    ]
    threads = threading.active_count()
    for use in uses:
        with bounded(10, 1):
            try:
                use()
            except (ValueError, OSError) as error:
                assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert threading.active_count() == threads
    assert kind != "pipe" or not path.is_file()

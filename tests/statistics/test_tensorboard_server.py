"""A real TensorBoard shows what the callback writes."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest

from lightning_plugins import StatisticsRecorder, TensorBoardStatisticsLogger
from tests.support.statistics_runs import (
    WithHyperparameters,
    expected_rows,
    fit,
)


class Server:
    """A real tensorboard on the loopback."""

    def __init__(self, folder, fast):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(folder), "--host",
                   "127.0.0.1", "--port", str(self.port), f"--load_fast={fast}"]  # fmt: skip
        environment = {**os.environ, "no_proxy": "127.0.0.1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def ask(self, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        data = response.read()
        assert response.status == 200, (response.status, data[:300])
        return json.loads(data)

    def wait_for(self, path, ready, seconds=60):
        answer = None
        for _ in range(seconds * 5):
            assert self.process.poll() is None
            try:
                answer = self.ask(path)
                if ready(answer):
                    return answer
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"the server did not get there: {answer}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


PHASES = (("train", 3), ("validation", 2))  # and their last batches


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["true", "false"], ids=["data server", "plain"])
def test_a_real_server_shows_both_phases_on_one_chart(fast):
    logger = TensorBoardStatisticsLogger("tb")
    _, model = fit([logger, StatisticsRecorder(["accuracy"])], WithHyperparameters)
    stamp = logger.run_directory.name
    train, validation = f"{stamp}/train", f"{stamp}/validation"
    server = Server(Path("tb").resolve(), fast)
    try:
        tags = server.wait_for("/data/plugin/scalars/tags", lambda answer: len(answer.get(train, {})) == 6)
        assert set(tags) == {train, validation}
        assert set(tags[train]) == {
            "batch_loss", "batch_accuracy", "batch_loss_step", "batch_lr", "epoch_loss", "epoch_accuracy"
        }  # fmt: skip
        assert set(tags[validation]) == {"epoch_loss", "epoch_accuracy"}
        expected = expected_rows(model.seen)
        for run, phase, last in ((train, "train", 3), (validation, "validation", 2)):
            query = urllib.parse.urlencode({"run": run, "tag": "epoch_loss"})
            points = server.ask(f"/data/plugin/scalars/scalars?{query}")
            losses = [values["loss"] for p, batch, values in expected if (p, batch) == (phase, last)]
            assert [(step, value) for _, step, value in points] == [
                (3, pytest.approx(losses[0])),
                (6, pytest.approx(losses[1])),
            ]
        assert set(server.ask("/data/runs")) == {train, validation}
        _check_hyperparameters(server, expected)
        _check_sections(server, expected)
    finally:
        server.stop()


def _check_sections(server, expected):
    """The charts of epochs come first, open, and show both phases."""
    epochs, batches = server.ask("/data/plugin/custom_scalars/layout")["category"]
    assert (epochs["title"], epochs.get("closed", False)) == ("epochs", False)
    assert (batches["title"], batches["closed"]) == ("batches", True)
    assert [chart["title"] for chart in epochs["chart"]] == ["epoch_loss", "epoch_accuracy"]
    assert [chart["title"] for chart in batches["chart"]] == [
        "batch_loss", "batch_accuracy", "batch_loss_step", "batch_lr"
    ]  # fmt: skip
    (pattern,) = epochs["chart"][0]["multiline"]["tag"]
    for run in server.ask("/data/runs"):
        query = urllib.parse.urlencode({"run": run, "tag": pattern})
        series = server.ask(f"/data/plugin/custom_scalars/scalars?{query}")["tag_to_events"]
        last = dict(PHASES)[phase := run.rpartition("/")[2]]
        ends = [values["loss"] for found, batch, values in expected if (found, batch) == (phase, last)]
        assert [value for *_, value in series["epoch_loss"]] == pytest.approx(ends)


def _check_hyperparameters(server, expected):
    experiment = server.ask("/data/plugin/hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"lr", "name", "wide", "layers"}
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    groups = server.ask(
        "/data/plugin/hparams/session_groups",
        {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"],
         "colParams": columns, "startIndex": 0, "sliceSize": 10},
    )  # fmt: skip
    ends = {p: [v["loss"] for found, batch, v in expected if (found, batch) == (p, n)] for p, n in PHASES}
    assert len(groups["sessionGroups"]) == 2
    for group in groups["sessionGroups"]:
        assert group["hparams"] == {"lr": 0.1, "name": "small", "wide": False, "layers": "(1, 2)"}
        values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        phase = group["name"].rpartition("/")[2]
        assert values["epoch_loss"] == pytest.approx(ends[phase][-1])

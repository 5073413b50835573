"""``plot``: the curves in a log that a real run wrote."""

import pytest

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.cli import main
from tests.support.training import loader, make_module, make_trainer

PNG = b"\x89PNG\r\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    make_trainer(tmp_path, callbacks=[StatisticsRecorder(), CSVStatisticsLogger(str(path))]).fit(
        make_module(), loader(6)
    )
    return path


def test_draws_beside_the_log_or_where_it_is_told(log, tmp_path, capsys):
    assert main(["plot", str(log)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'log.png'}\n"
    assert main(["plot", str(log), "--output", str(tmp_path / "curves.png")]) == 0
    for name in ("log.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.parametrize(("text", "message"), [("a,b\n1,2\n", "must have the columns"), ("", "no rows to plot")])
def test_another_file_is_one_line_and_status_2(tmp_path, capsys, text, message):
    (tmp_path / "other.csv").write_text(text)
    assert main(["plot", str(tmp_path / "other.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_file(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "none.csv")]) == 2
    assert "No such file" in capsys.readouterr().err

"""Looking before training: pictures, sketches, and the command line."""

import builtins
import subprocess
import sys

import pytest

from lightning_plugins import Cosine, Join, Linear, Noam, Schedule, Segment, Segments, WarmupCosine
from lightning_plugins.cli import main
from lightning_plugins.schedules import parse_schedule, plot_schedules, sketch
from lightning_plugins.schedules.plot import draw_panels

PNG = b"\x89PNG\r\n"


# -- pictures


def test_plot_writes_a_picture_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "lr.png"
    assert WarmupCosine("5%").plot(1000, path, compare={"constant": Linear(0, 0, 1)}, base_lr=0.1) == path
    assert path.read_bytes().startswith(PNG)


def test_the_picture_shows_every_schedule_with_units(tmp_path):
    plot_schedules({"two": Noam(768, 40) * 2, "six": Noam(768, 40) * 6}, 200, tmp_path / "noam.svg")
    plot_schedules({"two": Noam(768, 40)}, 200, tmp_path / "rate.svg", base_lr=2.0)
    assert (tmp_path / "noam.svg").read_text().count('id="line2d_') > (tmp_path / "rate.svg").read_text().count(
        'id="line2d_'
    )
    for text in ("two", "six", "optimizer step", "factor of the base learning rate"):
        assert f"<!-- {text} -->" in (tmp_path / "noam.svg").read_text()
    assert "<!-- learning rate -->" in (tmp_path / "rate.svg").read_text()


def test_the_curve_that_is_drawn_is_the_schedule(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    original = Axes.plot

    def note(self, steps, values, label):
        drawn[label] = (steps, values)
        return original(self, steps, values, label=label)

    monkeypatch.setattr(Axes, "plot", note)
    plot_schedules({"run": WarmupCosine("1ep")}, 30, tmp_path / "a.png", base_lr=0.5, steps_per_epoch=10)
    resolved = WarmupCosine(10, total=30)
    assert drawn["run"] == (list(range(30)), [0.5 * resolved(step) for step in range(30)])
    plot_schedules({"long": Linear(None, 1, 0)}, 10**6, tmp_path / "b.png")
    steps, values = drawn["long"]
    assert len(steps) <= 2002
    assert (steps[0], steps[-1], values[-1]) == (0, 10**6 - 1, pytest.approx(1e-6))


def test_axes_begin_at_0_but_for_a_panel_whose_values_lie_close_together(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    rate = {"head": [0.1, 0.05, 0.0], "body": [0.01, 0.005, 0.0]}
    panels = {"learning rate": rate, "decay": {"ema": [0.996, 0.998, 1.0]}, "flat": {"all": [0.5, 0.5, 0.5]}}
    draw_panels(panels, range(3), tmp_path / "three.png")
    draw_panels({"decay": panels["decay"]}, range(3), tmp_path / "one.png")
    three, one = figures
    assert [axes.get_ylim()[0] for axes in three.axes] == [0, pytest.approx(0.996, abs=0.001), 0]
    assert [axes.get_ylabel() for axes in three.axes] == list(panels)
    assert [axes.get_xlabel() for axes in three.axes] == ["", "", "optimizer step"]
    assert {axes.get_xlim() for axes in three.axes} == {(0, 3)}
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in three.axes] == list(
        map(list, panels.values())
    )
    assert three.legends == []
    # a picture of one panel has its names above it
    assert one.axes[0].get_ylim()[0] == 0
    assert one.axes[0].get_legend() is None
    assert [text.get_text() for text in one.legends[0].get_texts()] == ["ema"]
    assert tuple(three.get_size_inches()) == pytest.approx((7, 3 * 3.2 + 4 * 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 10, "x.png"), "`schedules` must hold at least one"),
        (({"a": Linear(1, 0, 1)}, 0, "x.png"), "`total_steps` must be at least 1 step, got 0"),
        (({"a": Linear(1, 0, 1)}, 10, "x.what"), "Format 'what' is not supported"),
    ],
)
def test_bad_pictures(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        plot_schedules(*arguments)
    with pytest.raises(ValueError, match="`base_lr` must be above 0"):
        plot_schedules({"a": Linear(1, 0, 1)}, 10, "x.png", base_lr=0)
    for size in ((0, 4), (7, 0)):
        with pytest.raises(ValueError, match="`size` must be above 0, got 0"):
            plot_schedules({"a": Linear(1, 0, 1)}, 10, "x.png", size=size)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install lightning-plugins\[plot\]"):
        Linear(1, 0, 1).plot(10, tmp_path / "x.png")


# -- sketches


def test_sketch_of_a_line():
    picture = sketch(Linear(None, 0, 1), 8, width=8, height=8).splitlines()
    assert [line[11:] for line in picture[:8]] == [" " * (7 - row) + "*" for row in range(8)]
    assert picture[0].split()[0] == "0.875"  # the axis ends at the highest value that is used
    assert picture[-1].split() == ["step", "7", "0.875"]


def test_a_single_peak_is_never_lost_between_two_columns():
    peak = Join([Linear(500, 0, 0), Linear(1, 1, 1), Linear(0, 0, 0)], [500, 501])
    assert sketch(peak, 1000, width=10).splitlines()[0].count("*") == 1


def test_sketch_of_nothing_and_of_rates():
    assert "step 0  0" in sketch(Linear(0, 0, 0), 1)
    assert sketch(Linear(1, 1, 1), 5, base_lr=0.3).splitlines()[0].split()[0] == "0.3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "`width` must be at least 8 characters, got 7"),
        ({"height": 1}, "`height` must be at least 2 lines, got 1"),
        ({"base_lr": -1}, "`base_lr` must be above 0, got -1"),
    ],
)
def test_bad_sketches(options, message):
    with pytest.raises(ValueError, match=message):
        sketch(Linear(1, 0, 1), 10, **options)


# -- expressions


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("WarmupCosine(warmup='5%', hold=10)", WarmupCosine("5%", 10)),
        (" Linear(5, 0, 1e-3) * 2 ", Linear(5, 0, 1e-3) * 2),
        ("0.5 * Linear(5, 0, 1)", Linear(5, 0, 1) * 0.5),
        ("Noam(512, 400).hold_every(4).delay(500).floor(1e-4)", Noam(512, 400).hold_every(4).delay(500).floor(1e-4)),
        ("Linear(5,0,1).cycle(5, count=3) * Cosine(9, 1, 0)", Linear(5, 0, 1).cycle(5, count=3) * Cosine(9, 1, 0)),
        ("Join([Linear(2, 0, 1), Cosine(None, 1, 0)], ['10%'])", Join([Linear(2, 0, 1), Cosine(None, 1, 0)], ["10%"])),
        (
            "Segments((Segment(end=1, steps=10), Segment('cosine', end=0)), endpoint=True)",
            Segments([Segment(end=1, steps=10), Segment("cosine", end=0)], endpoint=True),
        ),
    ],
)
def test_expressions(text, schedule):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("WarmupCosin(5)", "did you mean WarmupCosine?"),
        ("open('file')", "`open` is not a schedule; there are Constant"),
        ("__import__('os').system('true')", "is no schedule and none of the methods"),
        ("Linear(5, 0, 1).__class__", "neither a schedule nor a literal"),
        ("Linear(5, 0, 1).to_dict()", "none of the methods cycle, delay, floor"),
        ("Shape('os.getcwd', 5, 0, 1)", "a text must be a duration such as '5%' or '2ep', or one of 'linear'"),
        ("Linear(*[5, 0, 1])", "neither a schedule nor a literal"),
        ("Linear(**{})", "`\\*\\*` is not allowed"),
        ("Linear(5, 0, 1) + 1", "neither a schedule nor a literal"),
        ("2 * 3", "`\\*` multiplies a schedule"),
        ("5", "is not a schedule; write for example"),
        ("Segment(end=1)", "is not a schedule; write for example"),
        ("Linear(5, 0", "is not an expression"),
        ("", "is not an expression"),
        ("Linear(5, 0, -1)", "`end` must be at least 0, got -1"),
        ("Linear(5, 0, 1, 2, 3)", "positional arguments"),
        ("lambda: 0", "neither a schedule nor a literal"),
        ("(" * 500 + ")" * 500, "is not an expression"),
    ],
)
def test_expressions_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)


# -- the command


def test_schedule_command_sketches(capsys):
    assert main(["schedule", "WarmupCosine(warmup='5%')", "--total", "10000"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("WarmupCosine(warmup='5%')\n")
    assert "step 500  1\n" in out
    assert "step 9999" in out


def test_schedule_command_draws(tmp_path, capsys):
    path = tmp_path / "lr.png"
    command = ["schedule", "Noam(768, 4000) * 2", "Noam(768, 4000) * 6", "--total", "20000", "--output", str(path)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(PNG)


def test_schedule_command_takes_epochs_and_a_base_rate(capsys):
    command = ["schedule", "WarmupCosine('1ep')", "--total", "100", "--steps-per-epoch", "10", "--base-lr", "0.3"]
    assert main(command) == 0
    assert "step 10  0.3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WarmupCosin(5)", "--total", "10"], "did you mean WarmupCosine?"),
        (["WarmupCosine(50)", "--total", "10"], "got 50 + 0 > 10 steps"),
        (["Linear('2ep', 0, 1)", "--total", "10"], "the length of an epoch is not known"),
        (["Linear(5, 0, 1)", "--total", "0"], "`total_steps` must be at least 1 step, got 0"),
        (["Linear(5, 0, 1)", "--total", "10", "--output", "/dev/null/x.png"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["schedule", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-plugins: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule"],
        ["schedule", "Constant()"],
        ["nothing"],
        ["schedule", "Linear(5, 0, 1)", "--total", "10", "--output", "x.what"],
    ],
)
def test_usage_errors_have_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-plugins")
    assert error.count("\n") == 1
    assert "--help)" in error


def test_help_and_version(capsys):
    for arguments, text in ((["--help"], "draw learning-rate schedules"), (["--version"], "lightning-plugins 0.")):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out


def test_the_installed_command_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from lightning_plugins.cli import main; "
        "main(['schedule', 'Linear(5, 0, 1)', '--total', '9']); "
        "print([name for name in ('torch', 'lightning', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("[]\n")
    assert isinstance(parse_schedule("Linear(5, 0, 1)"), Schedule)

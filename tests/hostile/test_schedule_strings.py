"""Whatever stands after ``lightning-plugins schedule``: a picture, or status 2 and one line; nothing is evaluated."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from lightning_plugins.cli import main
from lightning_plugins.core.validation import printable
from lightning_plugins.schedules import SCHEDULES
from tests.support import counts
from tests.support.audit_events import code_run, listening, paths_changed

NASTY = [
    "lr=__import__('os').system('touch pwned')",
    "__import__('os')/x=Constant()",
    "../../etc/lr=Constant()",
    "lr/\x1b[2J=Constant()",
    "",
    " ",
    "\0",
    "\ud800",
    "\n\n",
    "WarmupCosine('5%')\n;import os",
    "__import__('os').system('touch pwned')",
    "WarmupCosine(__import__('os').getpid())",
    "WarmupCosine(warmup=(lambda: 1)())",
    "WarmupCosine(*[5])",
    "WarmupCosine(**{'warmup': 5})",
    "WarmupCosine(5)(3)",
    "WarmupCosine(5).__class__",
    "WarmupCosine(5).__class__.__mro__[1].__subclasses__()",
    "WarmupCosine(5)._factor(1)",
    "WarmupCosine(5).plot(5, 'pwned.png')",
    "WarmupCosine(5).from_dict({'class': 'os.system'}, True)",
    "WarmupCosine.floor(1)",
    "Shape('os.system', 5, 1, 0)",
    "Shape('subprocess.run', steps=5, start=1, end=0)",
    "Shape(print, 5, 1, 0)",
    "Segment('antigravity.x', end=1)",
    "[print(x) for x in (1, 2)]",
    "{x for x in (1, 2)}",
    "(yield)",
    "await x",
    "(x := 5)",
    "f'{print(1)}'",
    "WarmupCosine(f'{5}%')",
    "WarmupCosine('5' '%')",
    "WarmupCosine(b'5%')",
    "WarmupCosine(5j)",
    "WarmupCosine(...)",
    "WarmupCosine(-True)",
    "WarmupCosine('\\d')",
    "WarmupCosine(5) if 1 else 2",
    "WarmupCosine(5) ** 2",
    "WarmupCosine(5) / 0",
    "WarmupCosine(5) @ 3",
    "WarmupCosine(1/0)",
    "WarmupCosine(10**10**10)",
    "WarmupCosine(" + "9" * 5000 + ")",
    "WarmupCosine(" + "9" * 400 + ")",
    "WarmupCosine(0x" + "f" * 5000 + ")",
    "WarmupCosine(" + "9" * 400 + ".0)",
    "WarmupCosine('" + "9" * 5000 + "%')",
    "WarmupCosine('" + "9" * 400 + "ep')",
    "WarmupCosine('٣%')",
    "\uff37armupCosine(5)",
    "Warmup\u0421osine(5)",  # a Cyrillic letter
    "Constant(1e308) * 1e308",
    "Constant(1e308).scale(1e308).floor(1)",
    "Constant(1e308) * Constant(1e308) * Constant(0)",
    "Constant(5e-324)",
    "Constant(-0.0)",
    "Constant().cycle(1, None, 1e308, 0)",
    "Constant().cycle(9223372036854775807)",
    "Constant().hold_every(9223372036854775807).hold_every(9223372036854775807)",
    "Constant().shift(9223372036854775807).shift(9223372036854775807)",
    "Join([Constant()], [])",
    "Join([Constant()] * 1000000000, [])",
    "Join([Constant(), Constant()], [10])",
    "PiecewiseConstant([], [])",
    "Segments([])",
    "Segments([Segment(end=1)] * 5)",
    "Segment(end=1)",
    "Constant",
    "Constant()()",
    "Constant(*)",
    "Plateau('x')",
    "Schedule()",
    "EMA()",
    "LearningRateScheduler(Constant())",
    "5 * 5",
    "'x' * 1000000000",
    "Constant(value='x' * 1000000000)",
    "Constant(value=[0] * 1000000000)",
    "Constant() * 'x'",
    "Constant(value=1, value=2)",
    "Constant(1, 2, 3)",
    "Constant(nothing=1)",
    "(" * 150 + "Constant()" + ")" * 150,
    "(" * 5000 + "Constant()" + ")" * 5000,
    "[" * 5000,
    "-" * 50_000 + "1",
    "not " * 50_000 + "1",
    "Constant()" + " * 1" * 60,
    "Constant()" + " * 1" * 900,
    "Constant()" + " * 1" * 50_000,
    "1 * " * 900 + "Constant()",
    "Constant()" + ".scale(1)" * 900,
    "Constant()" + ".scale(1)" * 50_000,
    "Join([" * 300 + "Constant()" + "], [])" * 300,
    "Constant(" + "[" * 190 + "]" * 190 + ")",
    "Constant(" + "1, " * 50_000 + ")",
    "Constant(" + "(1," * 90 + ")" * 91,
    "a" * 1_000_000,
    "a." * 50_000 + "a",
    "a" + "()" * 50_000,
    "a" + "[0]" * 50_000,
    "lambda: " * 20_000 + "0",
    "x if x else " * 20_000 + "x",
    "'" + "x" * 1_000_000 + "'",
    "# nothing",
    "\\",
    "\t\f\v",
    "\r\nConstant()",
]


@pytest.fixture
def draw(capsys, tmp_path, monkeypatch, record_property):
    """Draw an expression; return the status and what was printed. No code runs and no file changes meanwhile."""
    monkeypatch.chdir(tmp_path)
    main(["schedule", "--total", "5", "--", "Constant()"])  # what is imported on first use is imported now

    tried = []

    def run(text, total="40"):
        tried.append(text)
        capsys.readouterr()
        with listening() as events:
            status = main(["schedule", "--total", total, "--steps-per-epoch", "10", "--", text])
        compiled = [arguments[0] for name, arguments in events if name == "compile"]
        texts = [source.decode() if isinstance(source, bytes) else source for source in compiled]
        # parsed once, at most: all of it, or what stands after `lr=`
        assert texts in ([], [text.strip()], [text.partition("=")[2].strip()])
        assert code_run(events) == []
        assert paths_changed(events) == []
        printed = capsys.readouterr()
        if status == 0:
            assert printed.err == ""
            assert printed.out.startswith(printable(text))
        else:
            assert status == 2
            assert printed.out == ""
            assert len(printed.err.splitlines()) == 1
            assert len(printed.err) < 2000
            assert printed.err.startswith("lightning-plugins: error: ")
        return status, printed

    yield run
    counts.record(record_property, "hostile inputs", {"schedule strings": len(tried)})


@pytest.mark.parametrize("number", range(len(NASTY)), ids=lambda number: f"{number} {NASTY[number][:25]!r}")
def test_a_nasty_expression_is_drawn_or_refused_in_one_line(draw, number):
    draw(NASTY[number])


@pytest.mark.parametrize("expression", ["Constant()" + " * 1" * 40, "Join([Constant(0.5), 2 * Noam(4, 8)], ['50%'])"])
def test_what_a_person_would_write_is_drawn(draw, expression):
    assert draw(expression)[0] == 0


def test_a_very_long_run_is_drawn_from_some_of_its_steps(draw):
    status, printed = draw("WarmupCosine(warmup='5%')", total="1000000000000")
    assert status == 0
    assert "step 999999999999" in printed.out


@pytest.mark.parametrize("depth", [100_000, 1_000_000])
def test_no_depth_ends_the_process(depth):
    """In a process of its own: a parser that runs out of stack takes the process along."""
    for text in ("-" * depth + "1", "Constant()" + ".scale(1)" * (depth // 10), "(" * depth):
        program = f"from lightning_plugins.cli import main; exit(main(['schedule', '--total', '5', '--', {text!r}]))"
        done = subprocess.run(
            [sys.executable, "-"], input=program, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2, done.stderr[-300:]
        assert len(done.stderr.splitlines()) == 1


names = st.sampled_from([*SCHEDULES, "Schedule", "EMA", "print", "eval", "open", "__import__", "x", "schedule"])
literals = st.one_of(
    st.integers(-3, 60).map(str),
    st.integers(-(10**400), 10**400).map(str),
    st.floats().map(repr),
    st.sampled_from(["'5%'", "'2ep'", "'1-sqrt'", "'linear'", "'os.system'", "None", "True", "'x'", "1e999", "b''"]),
)
words = st.sampled_from(["warmup", "total", "steps", "start", "end", "value", "curve", "shape", "factor", "__class__"])
methods = st.sampled_from(["cycle", "delay", "floor", "hold_every", "scale", "shift", "plot", "__mul__", "resolve"])


def call(arguments):
    name, positional, named = arguments
    return f"{name}({', '.join([*positional, *(f'{word}={value}' for word, value in named)])})"


def larger(inner):
    return st.one_of(
        st.tuples(names, st.lists(inner, max_size=4), st.lists(st.tuples(words, inner), max_size=2)).map(call),
        st.tuples(inner, methods, st.lists(inner, max_size=2)).map(lambda t: f"{t[0]}.{t[1]}({', '.join(t[2])})"),
        st.tuples(inner, st.sampled_from(["*", "+", "**", "@", "if", "."]), inner).map(" ".join),
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        inner.map(lambda text: f"(lambda: {text})()"),
        inner.map(lambda text: f"[{text} for x in [1]]"),
    )


expressions = st.recursive(st.one_of(literals, names.map("{}()".format)), larger, max_leaves=12)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=expressions)
@example(text="Constant(1e308) * Noam(1, 1) * 1e308")
def test_an_expression_of_the_grammar_is_drawn_or_refused_in_one_line(draw, text):
    draw(text)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.text(max_size=60), cut=st.integers(0, 40))
def test_any_text_is_drawn_or_refused_in_one_line(draw, text, cut):
    draw(text)
    whole = "WarmupStableDecay(warmup='5%', decay=0.2, end=0.1).floor(0.1) * 2"
    draw(whole[:cut] + text[:3] + whole[cut + 2 :])

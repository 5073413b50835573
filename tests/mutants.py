"""Change the package one place at a time and see whether a test notices: ``make mutants``.

A mutant is the package with one small fault: a comparison turned around, an operand dropped, two arguments swapped, a
number off by one, a statement removed. Each runs against the tests that execute its line, which a measured run of
the suite tells. The share that some test kills says what the suite sees; every survivor is a test that is missing, or a
change that changes nothing.

    python -m tests.mutants --number 400 --seed 1 --contexts .coverage
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_plugins"
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: the text between two places of a file, and what stands there instead."""

    path: str
    line: int
    last_line: int
    start: int
    end: int
    text: str
    kind: str

    def of(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield every small fault that a piece of syntax can have, with its kind."""
    yield from CHANGES.get(type(node), lambda _: ())(node)


def _comparison(node: ast.Compare) -> Iterator[tuple[str, ast.AST]]:
    if len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield "comparison", ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)


def _and_or(node: ast.BoolOp) -> Iterator[tuple[str, ast.AST]]:
    for index in range(len(node.values)):
        rest = node.values[:index] + node.values[index + 1 :]
        yield "operand dropped", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    yield "and, or", ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)


def _sign(node: ast.UnaryOp) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.op, (ast.Not, ast.USub)):
        yield "negation dropped", node.operand


def _arithmetic(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if type(node.op) in COMPUTED:
        yield "arithmetic", ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield "constant", ast.Constant(node.value + 1)
        yield "constant", ast.Constant(node.value - 1)


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    if len(node.args) == 2 and not any(isinstance(argument, ast.Starred) for argument in node.args):
        yield "arguments swapped", ast.Call(node.func, node.args[::-1], node.keywords)


def _choice(node: ast.IfExp) -> Iterator[tuple[str, ast.AST]]:
    yield "branches swapped", ast.IfExp(node.test, node.orelse, node.body)


def _return(node: ast.Return) -> Iterator[tuple[str, ast.AST]]:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield "return", ast.Return(ast.Constant(None))


def _statement(node: ast.Expr | ast.AugAssign) -> Iterator[tuple[str, ast.AST]]:
    # a text that stands by itself is a document
    if not isinstance(node.value, ast.Constant):
        yield "statement removed", ast.Pass()


CHANGES = {
    ast.Compare: _comparison, ast.BoolOp: _and_or, ast.UnaryOp: _sign, ast.BinOp: _arithmetic, ast.Constant: _constant,
    ast.Call: _call, ast.IfExp: _choice, ast.Return: _return, ast.Expr: _statement, ast.AugAssign: _statement,
}  # fmt: skip


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module; annotations, documents, messages and imports are left as they are."""
    starts = [0]
    for text in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    for node in _code(ast.parse(source)):
        for kind, changed in changes(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            if isinstance(node, ast.expr):
                text = f"({text})"
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(path, node.lineno, node.end_lineno, start, end, text, kind)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the pieces of syntax that do something."""
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "type_params"} or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, (ast.expr, ast.stmt)):
                yield child
            yield from _code(child)


def tests_of(contexts: Path) -> dict[str, dict[int, set[str]]]:
    """Return module -> line -> the tests that execute it, from the data of a run with ``--cov-context=test``."""
    from coverage import CoverageData

    data = CoverageData(str(contexts))
    data.read()
    found: dict[str, dict[int, set[str]]] = {}
    for file in data.measured_files():
        relative = f"{PACKAGE}/{file.split(f'/{PACKAGE}/', 1)[-1]}"
        lines = found.setdefault(relative, {})
        for line, names in data.contexts_by_lineno(file).items():
            lines.setdefault(line, set()).update(name.split("|")[0] for name in names if "::" in name)
    return found


def chosen(mutant: Mutant, tests: dict[str, dict[int, set[str]]], most: int) -> list[str]:
    """Return the tests to try on a mutant, those beside its module first; all of its folder where no line is known."""
    lines = tests.get(mutant.path, {})
    names = set().union(*(lines.get(line, set()) for line in range(mutant.line, mutant.last_line + 1)))
    folder = f"tests/{mutant.path.split('/')[1].removesuffix('.py')}"
    if not names:
        # a line that runs when the module is imported
        names = set().union(*lines.values()) if lines else set()
    others = random.Random(mutant.line).sample(sorted(names), len(names))
    ordered = sorted(others, key=lambda name: (not name.startswith(folder), "distributed" in name or "resume" in name))
    return ordered[:most] or [folder if (ROOT / folder).exists() else "tests/core"]


def fails(tree: Path, names: list[str], seconds: float) -> str:
    """Return how the tests end in a copy of the tree: ``killed``, ``killed (time)`` or ``survived``."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        listing.write("\n".join(names))
        listing.flush()
        options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", f"@{listing.name}"]
        command = [sys.executable, "-m", "pytest", *options]
        where = {"PYTHONPATH": f"{tree}:{tree / 'examples'}", "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, cwd=tree, env={**os.environ, **where}, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "killed (time)"
    return "survived" if code == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description="Change the package one place at a time and see whether a test fails.")
    parser.add_argument("--number", type=int, default=400, help="how many mutants")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument(
        "--contexts", type=Path, default=ROOT / ".coverage", help="data of a run with --cov-context=test"
    )
    parser.add_argument("--only", default="", help="modules whose path has this text")
    parser.add_argument("--most", type=int, default=150, help="tests to try on each")
    parser.add_argument("--seconds", type=float, default=300, help="a mutant that takes longer is killed")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()

    tests = tests_of(arguments.contexts)
    modules = sorted(path for path in (ROOT / PACKAGE).rglob("*.py") if arguments.only in str(path))
    all_of_them = [m for path in modules for m in mutants_of(str(path.relative_to(ROOT)), path.read_text())]
    drawn = random.Random(arguments.seed).sample(all_of_them, min(arguments.number, len(all_of_them)))
    print(f"{len(drawn)} of {len(all_of_them)} mutants, seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp())
    trees = [folder / str(number) for number in range(arguments.jobs)]
    for tree in trees:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
        for name in listed.decode().split("\0")[:-1]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)

    def tried(mutant: Mutant) -> tuple[Mutant, str]:
        tree = trees.pop()
        file = tree / mutant.path
        source = file.read_bytes()
        try:
            file.write_bytes(mutant.of(source))
            return mutant, fails(tree, chosen(mutant, tests, arguments.most), arguments.seconds)
        finally:
            file.write_bytes(source)
            trees.append(tree)

    ends: Counter[str] = Counter()
    with ThreadPool(arguments.jobs) as pool:
        for number, (mutant, end) in enumerate(pool.imap_unordered(tried, drawn), 1):
            ends[end] += 1
            if end == "survived":
                before = (ROOT / mutant.path).read_bytes()[mutant.start : mutant.end].decode()
                print(
                    f"survived  {mutant.path}:{mutant.line}  {mutant.kind}: {before!r} -> {mutant.text!r}", flush=True
                )
            elif number % 20 == 0:
                print(f"{number} tried: {dict(ends)}", flush=True)
    shutil.rmtree(folder)
    killed = len(drawn) - ends["survived"]
    print(f"{killed} of {len(drawn)} killed: {killed / len(drawn):.1%}")


if __name__ == "__main__":
    main()

"""Small faults in the text of a module: what ``tests/mutants.py`` tries."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

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
    # the lines of the piece, of its statement, of its function, ...: the first that a test executes names its tests
    spans: tuple[tuple[int, int], ...]
    start: int
    end: int
    text: str
    kind: str

    def of(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def key(self, source: bytes) -> tuple[str, str, str]:
        """Return what names this mutant as long as its line says the same."""
        line = source.splitlines()[self.spans[0][0] - 1].decode().strip()
        before = " ".join(source[self.start : self.end].decode().split())
        return self.path, line, f"{before} -> {' '.join(self.text.split())}"


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
    # of two numbers the larger and the smaller are the same in either order
    either = isinstance(node.func, ast.Name) and node.func.id in {"max", "min"}
    if len(node.args) == 2 and not either and not any(isinstance(argument, ast.Starred) for argument in node.args):
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


def mutants_of(path: str, source: bytes) -> Iterator[Mutant]:
    """Yield all mutants of a module; annotations, documents, messages and imports are left as they are."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    for node, spans in _code(ast.parse(source), ()):
        for kind, changed in changes(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            if isinstance(node, ast.expr):
                text = f"({text})"
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(path, spans, start, end, text, kind)


def _code(node: ast.AST, around: tuple[tuple[int, int], ...]) -> Iterator[tuple[ast.AST, tuple[tuple[int, int], ...]]]:
    """Yield the pieces of syntax that do something, with their lines and the lines of what is around them."""
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "type_params"} or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
                continue
            if isinstance(child, (ast.If, ast.Assign)) and re.match("if TYPE_CHECKING|__all__", ast.unparse(child)):
                continue
            # the defaults of an overload are for type checkers
            if isinstance(child, ast.FunctionDef) and "overload" in map(ast.unparse, child.decorator_list):
                continue
            spans = around
            if isinstance(child, (ast.expr, ast.stmt)):
                spans = ((child.lineno, child.end_lineno), *around)
                yield child, spans
            yield from _code(child, spans)


def same(first: CodeType, second: CodeType) -> bool:
    """Whether two pieces of code do the same, wherever their lines stand."""
    return _bare(first) == _bare(second)


def _bare(code: CodeType) -> CodeType:
    constants = tuple(_bare(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_linetable=b"", co_firstlineno=1, co_consts=constants)


def differs(mutant: Mutant, source: bytes) -> bool:
    try:
        return not same(compile(mutant.of(source), "", "exec"), compile(source, "", "exec"))
    except SyntaxError:
        return False

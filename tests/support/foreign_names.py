"""Which attributes of other libraries' objects the source relies on: found by reading it, without running it."""

import ast

_SETTING = {"setattr", "wrap", "replace"}  # `text.replace` has two arguments
_POSITIONS = {"get": 0, "pop": 0} | dict.fromkeys({"getattr", "hasattr", "delattr", "read", *_SETTING}, 1)  # of a name
_FOREIGN_ROOTS = {"trainer", "_trainer", "pl_module", "strategy", "_strategy", "optimizer", "parameter"}
_PUBLIC = {"_fields", "_make", "_replace", "_asdict"}  # of a named tuple, documented


def private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name.strip("_") != ""


def own_attributes(source):
    """Return the attributes that the classes and modules of a file define, or set on themselves."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.ClassDef, ast.Module)):
            for part in node.body:
                targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def foreign_attributes(source, own):
    """Yield (line, attribute): private ones that are read, all that are set, of objects that are not ours.

    Args:
        source: A file's text.
        own: Attributes that are ours, except on what is Lightning's by its name, such as ``trainer``.
    """
    for node in ast.walk(ast.parse(source)):
        for name, is_set, root in _attributes(node):
            foreign = bool(_names(root) & _FOREIGN_ROOTS) if root is not None else True
            ours = name in _PUBLIC or (name in own and not foreign)
            if not ours and (private(name) or (is_set and not _is_self(root))):
                yield node.lineno, name


def _attributes(node):
    """Yield (name, whether it is set, the object) of the attributes that a node names."""
    if isinstance(node, ast.Attribute):
        yield node.attr, isinstance(node.ctx, (ast.Store, ast.Del)), node.value
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [*node.args, None, None][_POSITIONS.get(called, -1)]
        if isinstance(given, ast.Constant) and isinstance(given.value, str):
            owner = node.args[0] if _POSITIONS[called] else node.func.value
            yield given.value, called in _SETTING and len(node.args) > 2, owner
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        yield str(node.slice.value), False, node.value


def _names(node):
    """Return every name in an expression such as ``self._trainer.fit_loop``."""
    parts = ast.walk(node)
    return {part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in parts}


def _is_self(node):
    return (isinstance(node, ast.Name) and node.id in {"self", "cls"}) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )

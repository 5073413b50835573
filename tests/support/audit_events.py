"""The interpreter's audit events: every file that is written, moved or removed, and all code that is run, in a block.

Python's audit hooks cannot be removed, so there is one for the whole process, which does nothing outside of the blocks.
"""

import contextlib
import os
import sys
from pathlib import Path

RUNS = ("exec", "import", "marshal.loads", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system")
"""Events of code that is run, or could be: also those below."""
_RUNS_BELOW = ("ctypes.", "shutil.", "socket.", "subprocess.", "webbrowser.", "urllib.", "http.", "ftplib.")
_PATHS = {  # event -> which of its arguments are paths that are changed
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_blocks: list[list[tuple[str, tuple]]] = []


def _note(event, arguments):
    for block in _blocks:
        block.append((event, arguments))


sys.addaudithook(_note)


@contextlib.contextmanager
def listening():
    """Yield the list of all events of the block, ``(name, arguments)``."""
    block = []
    _blocks.append(block)
    try:
        yield block
    finally:
        _blocks[:] = [other for other in _blocks if other is not block]


def code_run(events):
    """Return the events of a block that run code, start programs or talk to a network."""
    return [(name, arguments) for name, arguments in events if name in RUNS or name.startswith(_RUNS_BELOW)]


def paths_changed(events):
    """Return the absolute paths that the events write, make, move or remove, seen from the working directory."""
    found = []
    for name, arguments in events:
        if name == "open" and _writes(*arguments[1:3]):
            found.append(arguments[0])
        else:
            found += [arguments[index] for index in _PATHS.get(name, ())]
    # a number is an open file, whose opening was heard; links are not followed, for one is judged by where it lies
    return [Path(os.path.normpath(Path.cwd() / os.fsdecode(path))) for path in found if not isinstance(path, int)]


def _writes(mode, flags):
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & _WRITING)


def outside(events, *folders):
    """Return the paths that were changed and lie in none of ``folders``, links followed."""
    allowed = [Path(folder).resolve() for folder in folders]
    changed = {path for path in paths_changed(events) if "__pycache__" not in path.parts}  # of what is imported
    return sorted(
        path
        for path in changed - {Path(os.devnull)}
        if not any((path.parent.resolve() / path.name).is_relative_to(folder) for folder in allowed)
    )

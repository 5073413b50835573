"""Mutants that change nothing: what ``mutants.py`` cannot see killed, and why.

A key is the module, the text of the line, and the change.
"""

EQUIVALENT: dict[tuple[str, str, str], str] = {}

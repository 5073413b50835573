"""What the tool behind ``make mutants`` makes of a module, and what it holds for equivalent."""

import pytest

from tests.equivalent_mutants import EQUIVALENT
from tests.support.faults import differs, mutants_of
from tests.support.snippets import ROOT


@pytest.mark.parametrize("key", EQUIVALENT, ids=str)
def test_a_mutant_that_is_said_to_be_equivalent_is_one_of_its_module(key):
    source = (ROOT / key[0]).read_bytes()
    assert key in {mutant.key(source) for mutant in mutants_of(key[0], source)}


def test_only_other_programs_are_drawn():
    source = (
        b"__all__ = [1]\n@overload\ndef f(a: 'x' = 1): ...\n"
        b"def f(a: 'x' = 0) -> int:\n    'Says 1.'\n    return max(a, 1) + len(a and b'')\n"
    )
    found = {mutant.of(source) for mutant in mutants_of("m.py", source) if differs(mutant, source)}
    assert source not in found
    assert {text.splitlines()[-1].decode().strip() for text in found if b"= 0)" in text} == {
        "return (max(a, 1) - len(a and b''))",
        "return max(a, (2)) + len(a and b'')",
        "return max(a, (0)) + len(a and b'')",
        "return max(a, 1) + len((a or b''))",
        "return max(a, 1) + len((a))",
        "return max(a, 1) + len((b''))",
        "return None",
    }
    assert len(found) == 9  # two further ones are of the default

"""The warnings that versions of Lightning, torch and others are known to give in the tests, each with its reason.

Every warning is an error in the tests. What no version should warn of is let through in pyproject.toml; what only some
versions do stands here, so that a warning that a new version brings fails, and one that went away is not let through.
"""

import sys
from dataclasses import dataclass

from tests.support.conditions import installed

TORCH, SCIKIT_LEARN = installed("torch"), installed("scikit-learn")


@dataclass(frozen=True)
class Expected:
    """A warning that is let through.

    Args:
        filter: What Python's filters take: action, message, category.
        given: Whether the installed versions give it.
        reason: Why it is no concern of ours.
    """

    filter: str
    given: bool
    reason: str


EXPECTED = (
    Expected(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
        TORCH >= (2, 7),
        "torch deprecates what Lightning calls in every Trainer.fit",
    ),
    Expected(
        "ignore:The number of unique classes is greater than 50%:UserWarning",
        SCIKIT_LEARN < (1, 9),
        "scikit-learn guesses a regression where a test has more classes than rows to compare our report with",
    ),
    Expected(
        r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning",
        sys.version_info[:3] == (3, 13, 0),
        "torch.compile says that the next Python is faster",
    ),
)


def filters() -> list[str]:
    """Return the filters for the versions that are installed."""
    return [expected.filter for expected in EXPECTED if expected.given]

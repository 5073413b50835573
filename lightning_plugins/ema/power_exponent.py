"""The exponent of a power average, whose length is a fixed share of the training so far."""

from __future__ import annotations

import functools
import math

from lightning_plugins.core.validation import real_number

LARGEST_SIGMA_REL = 12**-0.5
# of a billion steps the last one; far below it the cubes overflow
_SMALLEST_SIGMA_REL = 1e-9


def power_exponent(sigma_rel: float) -> float:
    """Return the exponent gamma of the power average with relative standard deviation ``sigma_rel``.

    The largest real root of x^3 + 7 x^2 + (16 - sigma^-2) x + (12 - sigma^-2) = 0.

    Raises:
        TypeError: If ``sigma_rel`` is not a number.
        ValueError: If it is not above 0 and below 12^(-1/2) = 0.2887, where gamma is 0.

    Example:
        >>> round(power_exponent(0.10), 6)
        6.937204
    """
    return exponent(check_sigma_rel("sigma_rel", sigma_rel))


def check_sigma_rel(name: str, value: float) -> float:
    """Return the relative standard deviation that the argument ``name`` gives.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not above 0 and below 12^(-1/2) = 0.2887.
    """
    sigma = real_number(name, value, above=0, below=LARGEST_SIGMA_REL)
    return float(real_number(name, sigma, at_least=_SMALLEST_SIGMA_REL))


@functools.lru_cache
def exponent(sigma: float) -> float:
    """Return the exponent of a relative standard deviation that was checked; a value is computed once."""
    inverse = sigma**-2
    # the polynomial is positive and convex from here down to its largest root
    x = math.sqrt(inverse)
    while True:
        value = ((x + 7) * x + 16 - inverse) * x + 12 - inverse
        slope = (3 * x + 14) * x + 16 - inverse
        smaller = x - value / slope
        if smaller >= x:
            # Newton's method from above descends until rounding stops it
            return x
        x = smaller

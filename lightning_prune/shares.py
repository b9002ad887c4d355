"""Shares as the numbers that a user writes: 0.29 of 100 weights are 29, though the nearest float is below 0.29."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real
from typing import Any

Share = float | Fraction
# No float with more digits than these is written by hand.
_WRITTEN = 10**15
_RATIO = 10**6


def exact_share(value: Share) -> Fraction:
    """The decimal or ratio that a number is written as.

    Of a float, numpy's included, that is the shortest decimal that stands for it; or, if that has more digits than
    anybody writes, a ratio of small numbers that does.

    >>> exact_share(0.29), exact_share(1 / 3)
    (Fraction(29, 100), Fraction(1, 3))
    """
    if isinstance(value, Fraction):
        return value
    decimal = Fraction(str(value))
    if decimal.denominator * 10 > _WRITTEN:
        ratio = decimal.limit_denominator(_RATIO)
        if float(ratio) == float(value):
            return ratio
    return decimal


def count_of(share: Share, size: int) -> int:
    """How many of `size` things a share is, rounded down; the only place where a share becomes a count.

    >>> count_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(exact_share(share) * size)


def is_share(value: Any) -> bool:
    """Whether a value is a number in [0, 1], numpy's included; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1

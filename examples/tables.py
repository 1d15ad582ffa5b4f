# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Tables in Markdown, and rates with their intervals."""

import statistics
from collections.abc import Iterable


Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95 % interval


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate that was seen in `count` trials."""
    middle = (rate + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * (rate * (1 - rate) / count + Z * Z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def rate_cell(outcomes: Iterable[bool]) -> str:
    """The rate of true outcomes and its interval; a dash for none."""
    outcomes = list(outcomes)
    if not outcomes:
        return "–"
    rate = sum(outcomes) / len(outcomes)
    return "{:.2f} ({:.2f} to {:.2f})".format(rate, *wilson(rate, len(outcomes)))


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

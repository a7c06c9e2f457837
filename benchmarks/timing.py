"""Times of functions that are called in turn, shared by benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median times of functions that are called in turn; the first round is a warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]

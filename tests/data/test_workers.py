"""Work in other processes: results in order, errors at the caller, no process left behind."""

from __future__ import annotations

import os
import time

import pytest

from vitds.data.workers import work_through
from vitds.errors import DataError, ResourceError


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def refuse_ninety(number: int) -> int:
    if number == 90:
        raise DataError(f"{number} is refused")
    return number


def die_at_ninety(number: int) -> int:
    if number == 90:
        os._exit(9)
    return number


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_come_in_order_with_their_items(workers):
    assert list(work_through(slow_square, range(250), workers=workers)) == [(number, number * number) for number in range(250)]


def test_only_a_bounded_number_of_results_waits():
    taken = work_through(slow_square, range(10_000), workers=2)
    assert [next(taken)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    taken.close()  # ends in order, long before ten thousand are done


def test_an_error_of_the_function_reaches_the_caller():
    with pytest.raises(DataError, match="90 is refused"):
        list(work_through(refuse_ninety, range(200), workers=2))


def test_the_death_of_a_worker_is_an_error_and_not_a_wait():
    with pytest.raises(ResourceError, match=r"a worker process died: out of memory \(try fewer --workers\), or, where a script"):
        list(work_through(die_at_ninety, range(200), workers=2))

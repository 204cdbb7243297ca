"""Storage that fails for a moment, for long, or for good: what is tried again, how often, and what is said."""

from __future__ import annotations

import errno
import itertools
import logging

import pytest

from mmagent import retries
from mmagent.retries import TRANSIENT, WAITS, retried


class Failing:
    """A read that raises ``numbers`` one after the other, then succeeds."""

    def __init__(self, *numbers: int):
        self.numbers, self.calls = list(numbers), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.numbers:
            raise OSError(self.numbers.pop(0), "out of order")
        return "data"


def test_what_fails_for_a_moment_is_read_in_the_end_and_counted(caplog):
    slept, before = [], retries.total()
    read = Failing(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET)
    with caplog.at_level(logging.WARNING):
        assert retried(read, "a/shard.tar", sleep=slept.append) == "data"
    assert slept == list(WAITS[:4])
    assert retries.total() - before == 4
    assert "a/shard.tar: Input/output error; try 2 of 7 in 0.25 s" in caplog.text
    assert "try 5 of 7" in caplog.text


def test_what_stays_is_an_error_that_names_the_file():
    slept, read = [], Failing(*[errno.ESTALE] * 99)
    with pytest.raises(OSError, match=r"7 times in 16 s; is the storage there\?: 'a/shard.tar'") as raised:
        retried(read, "a/shard.tar", sleep=slept.append)
    assert raised.value.errno == errno.ESTALE
    assert read.calls == len(WAITS) + 1
    assert slept == list(WAITS)
    assert all(later == 2 * wait for wait, later in itertools.pairwise(WAITS))  # exponential


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EISDIR, errno.EROFS, errno.EMFILE])
def test_what_will_not_mend_itself_is_an_error_at_once(number):
    read = Failing(number)
    with pytest.raises(OSError) as raised:
        retried(read, "x", sleep=lambda seconds: pytest.fail("waited"))
    assert raised.value.errno == number
    assert read.calls == 1
    assert number not in TRANSIENT


def test_other_errors_are_not_touched():
    with pytest.raises(ZeroDivisionError):
        retried(lambda: 1 // 0, "x")

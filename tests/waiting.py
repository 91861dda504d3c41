"""Waiting for what another thread or process does."""
import time


def wait_until(condition, seconds: float = 30):
    "The first true value of a condition; an AssertionError if it has none in time."
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return result

"""Tokens that several processes make at the same time."""
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlops_nb.errors import MlopsError
from mlops_nb.serving.places import WorkspacePlaces
from mlops_nb.workspace import tokens


def test_no_token_is_lost_when_several_are_made_at_once(tmp_path, monkeypatch):
    places, load = WorkspacePlaces(tmp_path), tokens.load_tokens
    def load_slowly(*args):
        known = load(*args)
        time.sleep(0.02)
        return known
    monkeypatch.setattr(tokens, "load_tokens", load_slowly)
    names = {f"user{number}" for number in range(6)}
    with ThreadPoolExecutor(6) as threads: list(threads.map(lambda name: tokens.make_token(places, name), names))
    assert set(load(places)) == names


@pytest.mark.parametrize("days", [1e7, 1e300, float("inf")])
def test_a_time_that_no_calendar_has_is_refused(tmp_path, days):
    with pytest.raises(MlopsError, match="are too many"): tokens.make_token(WorkspacePlaces(tmp_path), "ann", days=days)

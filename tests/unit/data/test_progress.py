"""Which times a run must compute, whatever was computed before."""
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.data.progress import AFTER_ALL, BEFORE_ALL, Progress, digest_of, named_fields, span_to_compute

START = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = st.integers(0, 20).map(lambda day: START + timedelta(days=day))


@given(st.lists(st.tuples(DAYS, st.none() | DAYS), min_size=1, max_size=8))  # cut, and the day of a correction
def test_runs_in_any_order_leave_every_time_computed_from_the_newest_facts(runs):
    progress, computed, facts = None, {}, {START + timedelta(days=day): 0 for day in range(-1, 21)}
    for number, (cut, corrected) in enumerate(runs):
        if corrected: facts = {day: number if day >= corrected else value for day, value in facts.items()}
        span = span_to_compute(progress, cut, corrected or AFTER_ALL)
        until = max(cut, progress.until) if progress else cut
        if span:
            since, end = span
            assert end == until
            computed |= {day: facts[day] for day in facts if since <= day < end}
            progress = Progress(until)
        assert computed == {day: value for day, value in facts.items() if day < until}


def test_a_run_computes_nothing_twice():
    progress = Progress(START)
    assert span_to_compute(progress, START, AFTER_ALL) is None
    assert span_to_compute(progress, START + timedelta(days=1), AFTER_ALL) == (START, START + timedelta(days=1))
    assert span_to_compute(Progress(AFTER_ALL), AFTER_ALL, AFTER_ALL) is None
    assert span_to_compute(Progress(AFTER_ALL), AFTER_ALL, BEFORE_ALL) == (BEFORE_ALL, AFTER_ALL)


def test_only_columns_that_a_query_names_are_compared():
    fields = [SimpleNamespace(name=name) for name in ("id", "delay", "comment")]
    assert [field.name for field in named_fields(fields, "SELECT id, sum(delay) FROM {trips}")] == ["id", "delay"]
    assert named_fields(fields, "SELECT * FROM {trips}") == fields
    counted = named_fields(fields, "SELECT count(*) FROM {trips} WHERE delay > 1")
    assert [field.name for field in counted] == ["delay"]
    assert named_fields(fields, "") == fields


def test_a_digest_depends_on_each_part():
    parts = [(), ("a",), ("a", "b"), ("ab",), ("a\nb",), (("a", "b"),)]
    assert len({digest_of(*values) for values in parts}) == 6 and digest_of("a", {"b": 1}) == digest_of("a", {"b": 1})

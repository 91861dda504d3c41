"""Quartz schedules, compared with the fire times that Quartz 2.3.2 computed for these expressions."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.bundle.schedule import item_values, next_fire_time, time_zone, translate
from mlops_nb.errors import MlopsError

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)

# Quartz' next times after NOON, in UTC
FIRES = {
    "0 0 6 1 * ?": ["2026-02-01 06:00:00", "2026-03-01 06:00:00"],
    "0 30 5 * * ?": ["2026-01-16 05:30:00", "2026-01-17 05:30:00"],
    "0 0 6 L * ?": ["2026-01-31 06:00:00", "2026-02-28 06:00:00"],
    "0 0 6 ? * 6L": ["2026-01-30 06:00:00", "2026-02-27 06:00:00"],
    "0 0 6 ? * 6#3": ["2026-01-16 06:00:00", "2026-02-20 06:00:00"],
    "0 0 6 ? * FRIL": ["2026-01-30 06:00:00", "2026-02-27 06:00:00"],
    "0 0 6 ? * FRI#2": ["2026-02-13 06:00:00", "2026-03-13 06:00:00"],
    "0 0 22-2 ? * FRI-MON": ["2026-01-16 00:00:00", "2026-01-16 01:00:00"],
    "0 0 6 ? NOV-FEB 1": ["2026-01-18 06:00:00", "2026-01-25 06:00:00"],
    "0 /5 6 ? * 1": ["2026-01-18 06:00:00", "2026-01-18 06:05:00"],
    "0 0 6 ? * L": ["2026-01-17 06:00:00", "2026-01-24 06:00:00"],
    "0 0 6 ? * mon,tue": ["2026-01-19 06:00:00", "2026-01-20 06:00:00"],
    "0 0 6 1,2-4,5/3 * ?": ["2026-01-17 06:00:00", "2026-01-20 06:00:00"],
    "0 0 6 ? * */2": ["2026-01-17 06:00:00", "2026-01-18 06:00:00"],
    "0 0 6 1 * ? 2027/2": ["2027-01-01 06:00:00", "2027-02-01 06:00:00"],
    "0 0 6 ? * MON-WED,FRI": ["2026-01-16 06:00:00", "2026-01-19 06:00:00"],
    "0 0 6 30 2 ?": [],
    "0 0 6 1 * ? 2020": [],
}
REFUSED = [
    "0 0 6 1 * *",
    "0 0 6 ? * ?",
    "0 0 6 ? * 0",
    "0 0 6 ? * 8",
    "60 0 6 ? * 1",
    "0 5/70 6 ? * 1",
    "0 0 6 1,L * ?",
    "0 0 6 ? * 2#1,3#2",
    "0 0 24 1 * ?",
    "0 0 6 0 * ?",
    "0 0 6 32 * ?",
    "0 0 6 1 13 ?",
    "0 0 6 1 * ? 2029-2027",
    "0 0 6",
    "0 0 6 W * ?",
    "0 0 6 ? * 6#6",
    "0 0 6 ? * 6#0",
    "0 0 6 H * ?",
    "a 0 6 1 * ?",
    "-1 0 6 1 * ?",
    "0 0 6 ? * 6L,2",
    "* * * ? * MON-5",
    "0 0 6 ? 1-FEB 2",
    "0 0 6 ? * XYZL",
]
# Quartz accepts these, but reads them differently from what they seem to mean
REFUSED_THOUGH_QUARTZ_DOES_NOT = [
    "0 0 6 ? * MON/2",
    "0 0 6 1,,2 * ?",
    "0 0 6 ? * MONDAY",
    "0 */0 6 ? * 1",
    "0 0 6 ? * L-3",
    "0 0 6 1-5W * ?",
    "0 0 6 1 * ? * *",
]


@pytest.mark.parametrize("expression", FIRES)
def test_a_schedule_fires_when_quartz_says(expression):
    time, fire_times = NOON, []
    for _ in range(2):
        time = next_fire_time(expression, time)
        if time is None:
            break
        fire_times.append(f"{time:%Y-%m-%d %H:%M:%S}")
    assert fire_times == FIRES[expression]


@pytest.mark.parametrize("expression", REFUSED + REFUSED_THOUGH_QUARTZ_DOES_NOT)
def test_an_invalid_schedule_is_refused(expression):
    with pytest.raises(MlopsError, match=r".+\n.+") as error:
        next_fire_time(expression, NOON)
    assert repr(expression) in str(error.value)


@pytest.mark.parametrize("expression", ["0 0 6 15W * ?", "0 0 6 LW * ?", "0 0 6 L-3 * ?"])
def test_working_days_are_valid(expression):
    assert next_fire_time(expression, NOON) is not None


@given(st.integers(0, 59), st.integers(0, 23), st.integers(1, 28), st.integers(1, 12))
def test_plain_numbers_say_what_they_say(minute, hour, day, month):
    time = next_fire_time(f"0 {minute} {hour} {day} {month} ?", NOON)
    assert (time.minute, time.hour, time.day, time.month) == (minute, hour, day, month) and time > NOON


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_a_range_is_walked_round_the_week(first, last, step):
    walked, day = [], first
    while True:
        walked.append(day)
        if day == last:
            break
        day = day % 7 + 1
    assert item_values(f"{first}-{last}/{step}", "day-of-week") == walked[::step]


@given(st.text(st.sampled_from("0159*?/-,LW# JANMO"), max_size=20))
def test_any_text_is_translated_or_refused(text):
    try:
        assert len(translate(text).split()) in (6, 7)
    except MlopsError:
        pass


def test_daylight_saving_moves_the_time_in_utc():
    new_york = time_zone("America/New_York")
    before, after = (next_fire_time("0 30 5 * * ?", datetime(2026, 3, day, 12, tzinfo=new_york)) for day in (6, 8))
    assert (before.astimezone(UTC).hour, after.astimezone(UTC).hour) == (10, 9)


@pytest.mark.parametrize("name", ["America/NewYork", "", "../etc/passwd", "Nowhere"])
def test_unknown_time_zones(name):
    with pytest.raises(MlopsError, match="no time zone"):
        time_zone(name)

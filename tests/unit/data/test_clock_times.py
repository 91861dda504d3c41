"Times of day, against a clock that is read minute by minute."
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlops_nb.data.clock_times import is_invalid_clock, next_clock_time

often = settings(max_examples=60, deadline=None)  # on a busy machine too
ZONES = ["America/New_York", "America/Phoenix", "America/Denver", "Pacific/Honolulu", "America/St_Thomas"]


def shows(moment: datetime, clock: int, zone: str) -> bool:
    local = moment.astimezone(ZoneInfo(zone))
    return local.hour * 100 + local.minute == clock


def next_time(moment: datetime, clock: int, zone: str) -> datetime:
    departure = pd.Series([moment]).astype("datetime64[us, UTC]")
    return next_clock_time(departure, pd.Series([clock]), zone)[0].to_pydatetime()


# Half of the moments lie in the nights on which the clocks change
MOMENTS = st.one_of(st.datetimes(datetime(2013, 1, 1), datetime(2013, 12, 31)),
                    st.datetimes(datetime(2013, 3, 9), datetime(2013, 3, 11)),
                    st.datetimes(datetime(2013, 11, 2), datetime(2013, 11, 4))
                    ).map(lambda t: t.replace(second=0, microsecond=0, tzinfo=UTC))


@often
@given(MOMENTS, st.integers(0, 23), st.integers(0, 59), st.sampled_from(ZONES))
def test_the_next_clock_time_is_the_first_minute_that_shows_it(moment, hour, minute, zone):
    clock, waited = hour * 100 + minute, moment + timedelta(minutes=1)
    while not shows(waited, clock, zone):
        waited += timedelta(minutes=1)
    assume(waited - moment <= timedelta(hours=25))  # otherwise the clocks skipped it on that day
    arrival = next_time(moment, clock, zone)
    skipped = zone in ZONES[0:3:2] and moment < datetime(2013, 3, 10, 10, tzinfo=UTC) and 200 <= clock < 300
    assert arrival == waited or (skipped and moment < arrival < waited)


def test_a_time_that_the_clocks_skip_counts_an_hour_later():
    evening = datetime(2013, 3, 10, 3, 0, tzinfo=UTC)
    assert next_time(evening, 215, "America/New_York") == datetime(2013, 3, 10, 7, 15, tzinfo=UTC)
    assert next_time(evening, 155, "America/New_York") == datetime(2013, 3, 10, 6, 55, tzinfo=UTC)


def test_midnight_as_2400_is_the_end_of_the_day():
    assert next_time(datetime(2013, 6, 1, 20, tzinfo=UTC), 2400, ZONES[0]) == datetime(2013, 6, 2, 4, tzinfo=UTC)


@often
@given(st.integers(-100, 3000))
def test_a_clock_shows_hours_and_minutes(number):
    good = 0 <= number <= 2400 and number % 100 < 60
    assert is_invalid_clock(pd.Series([number])).tolist() == [not good]

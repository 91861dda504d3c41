"Days of New York, as_of, and the cut of a job."
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.flights.days import CALENDAR, ZONE, same_day
from mlops_nb.workflow.calendars import sql_moment

often = settings(deadline=None)  # on a busy machine too
days_with_data = st.dates(CALENDAR.first_day, CALENDAR.last_day)


@often
@given(st.dates(date(1990, 1, 1), date(2030, 12, 31)))
def test_midnight_is_that_of_pandas(day):
    assert pd.Timestamp(CALENDAR.midnight(day)) == pd.Timestamp(day).tz_localize(ZONE)
    assert CALENDAR.midnight(day).utcoffset() == timedelta(0)


@often
@given(st.dates(date(1990, 1, 1), date(2030, 12, 31)))
def test_a_day_has_23_to_25_hours_and_its_midnight_belongs_to_it(day):
    length = CALENDAR.midnight(day + timedelta(days=1)) - CALENDAR.midnight(day)
    assert timedelta(hours=23) <= length <= timedelta(hours=25)
    assert pd.Timestamp(CALENDAR.midnight(day)).tz_convert(ZONE).date() == day
    before = pd.Timestamp(CALENDAR.midnight(day)) - pd.Timedelta("1us")
    assert before.tz_convert(ZONE).date() == day - timedelta(days=1)


@often
@given(days_with_data, st.dates(date(2020, 1, 1), date(2040, 12, 31)))
def test_a_date_does_not_depend_on_the_trigger_date(day, triggered):
    assert CALENDAR.as_of_day(day.isoformat(), triggered) == day


@often
@given(st.dates(date(2020, 1, 1), date(2040, 12, 31)))
def test_latest_is_the_same_day_of_the_year_of_the_data(triggered):
    day = same_day(triggered)
    assert day.year == 2013 and day.month == triggered.month
    assert day.day == triggered.day or (triggered.month, triggered.day, day.day) == (2, 29, 28)
    if triggered.timetuple().tm_yday > 1: assert CALENDAR.as_of_day("latest", triggered) == day


def test_the_first_of_january_is_refused():
    with pytest.raises(MlopsError, match="as_of=latest .triggered on 2027-01-01. is 2013-01-01, a day without data"):
        CALENDAR.as_of_day("latest", date(2027, 1, 1))


@pytest.mark.parametrize("day", ["2013-01-01", "2012-12-31", "2014-01-02", "1999-05-05"])
def test_days_without_data_are_refused(day):
    with pytest.raises(MlopsError, match="a day without data") as caught: CALENDAR.as_of_day(day, date(2026, 5, 5))
    assert "2013-01-02 to 2014-01-01" in caught.value.hint


@pytest.mark.parametrize("text", ["", "Latest", "yesterday", "2013-02-30", "01/04/2013", "2013-04-01T00:00:00"])
def test_texts_that_are_not_dates_are_refused(text):
    with pytest.raises(MlopsError, match="which is not a date"): CALENDAR.as_of_day(text, date(2026, 5, 5))


@often
@given(days_with_data, st.integers(0, 366))
def test_the_cut_is_the_midnight_after_the_replayed_days(day, replayed):
    end = day + timedelta(days=replayed)
    if end <= CALENDAR.last_day: assert CALENDAR.cut_of(day, replayed) == CALENDAR.midnight(end)
    else:
        with pytest.raises(MlopsError, match=f"{end}, a day without data"): CALENDAR.cut_of(day, replayed)


@pytest.mark.parametrize(("day", "days", "limit"), [
    (date(2014, 5, 1), 1, "up to 2013-12-31"), (date(2013, 12, 30), 9, "up to 2013-12-23, or fewer days"),
    (date(2012, 1, 1), 1, "from 2013-01-01 on")])
def test_the_limit_of_a_replayed_day_is_that_of_the_day(day, days, limit):
    with pytest.raises(MlopsError) as caught: CALENDAR.cut_of(day, days)
    assert caught.value.hint == f"write a day {limit}"
    CALENDAR.cut_of(date.fromisoformat(limit.split()[2 if "up" in limit else 1].strip(",")), days)


@pytest.mark.parametrize("replayed", [-1, 367, 10**12])
def test_an_impossible_number_of_replay_days_is_refused(replayed):
    with pytest.raises(MlopsError, match="replay_days"): CALENDAR.cut_of(date(2013, 4, 1), replayed)


@often
@given(st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)).map(lambda t: t.replace(microsecond=0, tzinfo=UTC)))
def test_a_moment_in_sql_is_the_moment_in_utc(moment):
    text = sql_moment(pd.Timestamp(moment).tz_convert("Asia/Tokyo").to_pydatetime())
    assert datetime.fromisoformat(text.removeprefix("TIMESTAMP'").removesuffix("'")).replace(tzinfo=UTC) == moment

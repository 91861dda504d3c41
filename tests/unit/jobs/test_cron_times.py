"""Fire times against an enumeration of every minute, and days against croniter."""
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_nb.bundle.schedule import translate
from mlops_nb.errors import MlopsError
from mlops_nb.jobs.cron_times import days_of_month, newest_time, next_time, parse_cron

ZONES = ("UTC", "America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kolkata", "America/Sao_Paulo")
SHIFTS = [datetime(2013, 3, 10), datetime(2013, 11, 3), datetime(2013, 3, 31), datetime(2013, 10, 27),
          datetime(2013, 4, 7), datetime(2013, 10, 6), datetime(2013, 10, 20), datetime(2013, 7, 1)]


def by_minutes(minutes: set, hours: set, zone: str, start: datetime, end: datetime) -> list[datetime]:
    "The instants at which the clock shows one of these minutes and hours; of a time that it shows twice the second."
    shown, moment = {}, start - timedelta(hours=3)
    while moment <= end + timedelta(hours=3):
        wall = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        if wall.minute in minutes and wall.hour in hours: shown[wall] = moment
        moment += timedelta(minutes=1)
    return sorted(moment for moment in shown.values() if start < moment <= end)


def list_text(values: set) -> str: return ",".join(map(str, sorted(values)))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(ZONES), st.sampled_from(SHIFTS), st.sets(st.integers(0, 59), min_size=1, max_size=4),
       st.sets(st.integers(0, 23), min_size=1, max_size=8), st.integers(-36 * 60, 36 * 60))
@example("America/New_York", datetime(2013, 3, 10), {30}, {2}, -600)
@example("America/New_York", datetime(2013, 11, 3), {0, 30}, set(range(24)), 0)
@example("Australia/Lord_Howe", datetime(2013, 4, 7), {0, 15, 45}, {0, 1, 2}, -60)
def test_fire_times_around_each_change_of_the_clock_are_those_that_a_watcher_sees(zone, day, minutes, hours, offset):
    start = day.replace(tzinfo=UTC) + timedelta(minutes=offset)
    end = start + timedelta(hours=30)
    expected = by_minutes(minutes, hours, zone, start, end)
    cron = parse_cron(f"0 {list_text(minutes)} {list_text(hours)} * * ?", zone)
    times, moment = [], start
    while (moment := next_time(cron, moment)) and moment <= end: times.append(moment)
    assert times == expected
    newest = newest_time(cron, end)
    assert newest == expected[-1] if expected else newest <= start


def fields():
    days = st.sampled_from(["*", "1", "15", "28-31", "L", "1/10", "L-3", "LW", "1W", "15W"])
    weekdays = st.sampled_from(["MON-FRI", "SUN", "2#1", "6L", "7", "L", "FRI#5"])
    return st.tuples(st.sampled_from(["*", "1", "2", "JUN-AUG", "1/5"]), days, weekdays, st.booleans())


@settings(max_examples=100, deadline=None)
@given(fields(), st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1)))
def test_days_and_months_are_those_of_croniter(names, start):
    month, day, weekday, by_weekday = names
    expression = f"0 20 4 ? {month} {weekday}" if by_weekday else f"0 20 4 {day} {month} ?"
    cron, moment = parse_cron(expression, "UTC"), start.replace(tzinfo=UTC)
    if not by_weekday and (day.endswith("W") or day == "L-3"): return  # croniter has none of these
    peer = croniter(translate(expression), start, second_at_beginning=True)
    for _ in range(4):
        moment, expected = next_time(cron, moment), peer.get_next(datetime).replace(tzinfo=UTC)
        if expected.year > 2099: expected = None  # the last year of Quartz
        assert moment == expected
        if moment is None: break
        assert newest_time(cron, moment) == moment and newest_time(cron, moment - timedelta(seconds=1)) < moment


@given(st.integers(2000, 2099), st.integers(1, 12), st.integers(1, 31))
def test_the_nearest_weekday_stays_in_its_month(year, month, day):
    days = days_of_month(f"{day}W", year, month)
    try: wanted = datetime(year, month, day)
    except ValueError:
        assert days == []
        return
    near = [wanted + timedelta(days=d) for d in (0, -1, 1, -2, 2)]
    best = next(one for one in near if one.isoweekday() < 6 and one.month == month)
    assert days == [best.day]


def test_seconds_years_and_the_end_of_all_times():
    cron = parse_cron("15/20 59 23 31 12 ? 2014,2016", "Asia/Kolkata")
    first = next_time(cron, datetime(2013, 1, 1, tzinfo=UTC))
    assert first == datetime(2014, 12, 31, 18, 29, 15, tzinfo=UTC)
    assert newest_time(cron, datetime(2020, 1, 1, tzinfo=UTC)) == datetime(2016, 12, 31, 18, 29, 55, tzinfo=UTC)
    assert next_time(cron, datetime(2017, 1, 1, tzinfo=UTC)) is None
    assert newest_time(cron, datetime(2014, 1, 1, tzinfo=UTC)) is None


@pytest.mark.parametrize("expression, zone, message", [("0 61 1 * * ?", "UTC", "not a valid minute"),
                                                       ("0 0 1 * * *", "UTC", "exactly one"), ("", "UTC", "0 fields"),
                                                       ("0 0 1 * * ?", "Mars/Olympus", "no time zone")])
def test_a_wrong_schedule_is_an_error_of_the_project(expression, zone, message):
    with pytest.raises(MlopsError, match=message): parse_cron(expression, zone)

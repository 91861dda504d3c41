"""The report on a replay against scikit-learn and pandas, and the order of the days of a replay."""
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, root_mean_squared_error

from mlops_nb.commands import demo
from mlops_nb.errors import MlopsError, ParameterError
from mlops_nb.models.problem_types import BINARY, REGRESSION
from mlops_nb.workflow import replay, year_report
from mlops_nb.workflow.calendars import Calendar

DAY = date(2021, 3, 1)


def predictions(problem, days=60, seed=0):
    "Rows of days: the loop is the truth, and the frozen model predicts too near to the middle."
    random = np.random.default_rng(seed)
    number = np.repeat(np.arange(days), random.integers(20, 40, days))
    loop = random.uniform(0.1, 0.9, len(number))
    label = random.random(len(number)) < loop if problem is BINARY else loop + random.normal(0, 0.1, len(number))
    frozen = 0.5 * loop + 0.3
    return pd.DataFrame({"as_of": [DAY + timedelta(int(n)) for n in number], "label": label.astype(float), "loop": loop,
                         "frozen": frozen, "heuristic": 0.5, "version": np.where(number < 30, 1, 2)})


@pytest.mark.parametrize("problem, loss", [(BINARY, log_loss), (REGRESSION, root_mean_squared_error)])
def test_losses_by_month_are_those_of_scikit_learn(problem, loss):
    rows = predictions(problem)
    table = year_report.losses_by(problem, rows, "M")
    months = pd.to_datetime(rows.as_of).dt.to_period("M")
    assert list(table.index.astype(str)) == ["2021-03", "2021-04"] and table["rows"].sum() == len(rows)
    for month, part in rows.groupby(months):
        assert table.loc[month, "mean label"] == pytest.approx(part.label.mean())
        for side in year_report.COMPARED:
            assert table.loc[month, side] == pytest.approx(loss(part.label, part[side]), rel=1e-9)


@pytest.mark.parametrize("problem, loss", [(BINARY, log_loss), (REGRESSION, root_mean_squared_error)])
def test_the_verdict_is_the_change_of_the_loss_with_its_interval(problem, loss):
    rows = predictions(problem)
    verdict = year_report.year_verdict(problem, rows)
    change = loss(rows.label, rows.loop) / loss(rows.label, rows.frozen) - 1
    assert verdict.change == pytest.approx(change) and verdict.low < change < verdict.high < 0 and verdict.is_better
    swapped = rows.rename(columns={"loop": "frozen", "frozen": "loop"})
    assert year_report.loop_result(year_report.year_verdict(problem, swapped), rows, 1) == (
        "The loop is worse than the frozen model")


def test_without_a_promotion_the_verdict_says_so_and_why():
    rows = predictions(BINARY).assign(version=1)
    rows["loop"] = rows.frozen
    history = [row("train", "promoted", DAY), row("train", "refused", DAY + timedelta(31)),
               row("hold", None, DAY + timedelta(35), "cooldown"), row("hold", None, DAY + timedelta(36), "cooldown"),
               row("stop", None, DAY + timedelta(40), reason="1 Challenger in a row was refused")]
    text = year_report.verdict_text(year_report.year_verdict(BINARY, rows), BINARY, rows, 1, history)
    assert text.startswith("No Challenger has replaced v1, so the loop is the frozen model: 2021-03-01 to 2021-04-29")
    assert "equal to that of v1" in text
    assert text.endswith("2 trainings: 1 promoted, 1 refused, 2 causes held back (2 by cooldown), stopped on "
                         "2021-04-10: 1 Challenger in a row was refused.")


def row(decision, outcome, day, rule=None, reason=""):
    return {"decision": decision, "outcome": outcome, "as_of": day, "rule": rule, "reason": reason}


@given(st.sets(st.integers(0, 60)))
def test_spans_cover_the_days_once_and_are_apart(numbers):
    days = [DAY + timedelta(number) for number in numbers]
    spans = year_report.day_spans(days)
    assert [first + timedelta(i) for first, count in spans for i in range(count)] == sorted(days)
    ends = [first + timedelta(count) for first, count in spans]
    assert all(end < first for end, (first, _) in zip(ends, spans[1:], strict=False))


def test_only_changes_of_an_alert_are_listed_and_only_of_the_target_and_the_days():
    def evaluation(day, state, alert="prod/drift"):
        time = datetime(2021, 3, day, tzinfo=UTC).timestamp() * 1000
        return {"alert": alert, "time": time, "state": state, "value": "0.25", "threshold": None}
    states = [(1, "OK"), (8, "OK"), (15, "TRIGGERED"), (22, "TRIGGERED"), (29, "OK")]
    newest_first = [evaluation(day, state) for day, state in states][::-1]
    newest_first += [evaluation(9, "TRIGGERED", "dev/drift"), evaluation(9, "OK", "prod/loss")]
    table = year_report.alert_days(newest_first, "prod/", date(2021, 3, 5), date(2021, 3, 31))
    drift = table[table.alert == "drift"]
    assert list(zip([day.day for day in drift.day], drift.state, strict=True)) == [
        (8, "OK"), (15, "TRIGGERED"), (29, "OK")]
    assert list(table.alert[table.alert != "drift"]) == ["loss"]
    assert set(table.value) == {0.25} and table.threshold.isna().all()


def test_events_are_alerts_of_the_log_and_outcomes_of_causes():
    days = pd.DataFrame({"alerts": ["", None, "drift/2021-03-03; loss/2021-03-03"]},
                        index=[DAY + timedelta(i) for i in range(3)])
    history = [row("train", "promoted", DAY), row("hold", None, DAY + timedelta(2)), row("train", "running", DAY)]
    events = year_report.replay_events(days, history)
    assert [(day.day, lane) for day, lane in events.itertuples(index=False)] == [
        (3, "alert drift"), (3, "alert loss"), (1, "promoted"), (3, "held back")]


def replay_with_log(monkeypatch, last):
    "A replay whose log ends at a day; None: no log."
    monkeypatch.setattr(replay, "next_day", lambda _, first: last + timedelta(days=1) if last else first)
    calendar = Calendar(first_day=DAY, last_day=DAY + timedelta(days=30))
    return SimpleNamespace(use_case=SimpleNamespace(calendar=calendar))


def test_a_replay_continues_after_its_last_day(monkeypatch):
    first, last = DAY + timedelta(days=2), DAY + timedelta(days=6)
    days = replay.days_to_replay(replay_with_log(monkeypatch, None), first, last)
    assert days == [first + timedelta(i) for i in range(5)]
    assert replay.days_to_replay(replay_with_log(monkeypatch, days[2]), first, last) == days[3:]
    assert replay.days_to_replay(replay_with_log(monkeypatch, last), first, last) == []
    with pytest.raises(ParameterError, match="is after the last one"):
        replay.days_to_replay(replay_with_log(monkeypatch, None), last, first)
    with pytest.raises(ParameterError):
        replay.days_to_replay(replay_with_log(monkeypatch, None), first, DAY + timedelta(days=60))


def test_a_day_measures_then_trains_for_each_cause_then_scores(monkeypatch):
    calls = []
    def noted(name, value): return lambda *arguments: calls.append((name, *arguments[1:])) or value
    monkeypatch.setattr(replay, "measure_morning", noted("measure", ["drift/x", "loss/x"]))
    monkeypatch.setattr(replay, "champion_version", lambda *_: SimpleNamespace(version="1"))
    monkeypatch.setattr(replay, "bring_up", noted("bring up", None))
    monkeypatch.setattr(replay, "score_days", noted("score", {DAY: (3, 50), DAY + timedelta(days=1): (3, 40)}))
    monkeypatch.setattr(replay, "write_records", lambda _, records: calls.append(("record", records)))
    monkeypatch.setattr(replay, "scored_before", lambda *_: {})
    days = SimpleNamespace(env=None, model="m", use_case=SimpleNamespace(calendar=Calendar()),
                           retrain=lambda day, cause: calls.append(("retrain", cause)) or f"{cause} held back")
    record, second = replay.replay_step(days, [DAY, DAY + timedelta(days=1)])  # the first of a month, and the next day
    assert [call[0] for call in calls] == ["measure", "bring up", "retrain", "retrain", "retrain", "score", "record"]
    assert [call[1] for call in calls if call[0] == "retrain"] == ["schedule", "drift/x", "loss/x"]
    assert (record.version, record.rows) == (3, 50) and record.retraining[0] == "schedule held back"
    assert (second.version, second.rows, second.retraining, second.alerts) == (3, 40, [], [])
    calls.clear()
    monkeypatch.setattr(replay, "scored_before", lambda *_: {DAY: (1, 50)})  # killed after it was scored
    assert replay.replay_step(days, [DAY])[0].retraining == []
    assert [call[0] for call in calls] == ["measure", "score", "record"]


def test_a_first_training_without_a_champion_ends_the_replay_with_its_reason(monkeypatch):
    monkeypatch.setattr(replay, "measure_morning", lambda *_: [])
    monkeypatch.setattr(replay, "scored_before", lambda *_: {})
    monkeypatch.setattr(replay, "bring_up", lambda *_: None)
    monkeypatch.setattr(replay, "champion_version", lambda *_: None)
    days = SimpleNamespace(env=None, model="m", use_case=SimpleNamespace(calendar=Calendar()),
                           retrain=lambda day, cause: "v1 was refused: 12 held-out days")
    with pytest.raises(MlopsError, match="no Champion can score 2021-03-01: v1 was refused: 12 held-out days"):
        replay.replay_step(days, [DAY])


def test_a_use_case_without_days_is_refused_before_anything_is_read(monkeypatch):
    for use_case, reason in ((SimpleNamespace(model="churn", has_time=False, ingest=print), "have no time"),
                             (SimpleNamespace(model="churn", has_time=True, ingest=None), "has no `ingest`")):
        with pytest.raises(MlopsError, match=reason): year_report.load_year(use_case, "no target", "", "latest")


def log_of(**rows):  # by day of March: rows that were scored
    days = pd.Index([date(2021, 3, int(name[1:])) for name in rows], name="day")
    return pd.DataFrame({"rows": list(rows.values()), "champion_version": 1, "alerts": ""}, index=days)


def test_days_without_rows_interrupt_the_lines_and_alone_they_are_a_sentence():
    from matplotlib import pyplot
    rows = predictions(BINARY)
    gap = (rows.as_of >= date(2021, 3, 15)) & (rows.as_of < date(2021, 3, 25))  # the week from 15 March has no row
    figure = year_report.plot_compared_losses(BINARY, rows[~gap])
    line = figure.axes[0].lines[0]
    assert list(np.flatnonzero(np.isnan(line.get_ydata()))) == [2] and line.get_marker() == "o"
    days = log_of(d22=0, d23=0)
    report = year_report.YearReport(SimpleNamespace(problem=BINARY), None, None, days.index[0], date(2021, 3, 24), days,
                                    rows.iloc[:0])
    text = "Nothing to compare: 0 rows of 2021-03-22 to 2021-03-23 were scored, and none of them has a label"
    assert year_report.year_text(report).startswith(text)
    assert year_report.plot_year_losses(report).get_suptitle().replace("\n", " ").startswith(text)
    assert year_report.month_table(report).data.empty
    pyplot.close("all")


def test_the_report_names_the_replayed_days_if_it_is_asked_for_others(monkeypatch):
    monkeypatch.setattr(year_report.tables, "exists", lambda *_: True)
    monkeypatch.setattr(year_report.tables, "read", lambda *_: None)
    monkeypatch.setattr(year_report, "to_pandas", lambda _: log_of(d2=5, d3=0, d9=4).reset_index())
    env = SimpleNamespace(target="prod")
    assert list(year_report.read_replay(None, env, date(2021, 3, 3), None)["rows"]) == [0, 4]
    assert list(year_report.read_replay(None, env, None, date(2021, 3, 9))["rows"]) == [5, 0]
    with pytest.raises(MlopsError, match="no day from 2021-04-01 on was replayed in target prod") as error:
        year_report.read_replay(None, env, date(2021, 4, 1), None)
    assert error.value.hint.startswith("the replayed days are 2021-03-02 to 2021-03-09; replay others: ")


@pytest.mark.parametrize(("last_day", "end", "expected"), [
    (date(2014, 1, 1), "2013-09-01", date(2014, 1, 1)), (None, "2013-09-01", date(2013, 9, 1)), (None, "", None)])
def test_the_data_end_where_the_calendar_or_the_job_demo_says(monkeypatch, last_day, end, expected):
    calendar = SimpleNamespace(last_day=last_day)
    monkeypatch.setattr(demo, "the_use_case", lambda _: SimpleNamespace(calendar=calendar))
    jobs = {"demo": {"parameters": [{"name": "end", "default": end}]}}
    assert demo.last_end(SimpleNamespace(jobs=jobs)) == expected


class Replaced(Exception): "In place of a new process."


@pytest.mark.parametrize("already", [0, 14, 20, 30])
def test_a_long_replay_continues_in_a_new_process_and_the_last_one_reports(monkeypatch, already):
    days, calls = [DAY + timedelta(i) for i in range(30)], []
    def begin_again(): raise Replaced
    def replay_days(_, first, last):
        todo = [day for day in days[already:] if day <= last]
        calls.extend(todo)
        return [replay.DayRecord(day) for day in todo]
    monkeypatch.setattr(demo, "begin_again", begin_again)
    monkeypatch.setattr(demo, "open_replay", lambda *_: SimpleNamespace(env=SimpleNamespace(variables={}),
                                                                        monitored_on=9))  # no weekday
    monkeypatch.setattr(demo, "report_year", lambda target, variables, first, last: calls.append("report"))
    monkeypatch.setattr(replay, "days_to_replay", lambda *_: days[already:])
    monkeypatch.setattr(replay, "replay_days", replay_days)
    rest = days[already:]
    if len(rest) > demo.PROCESS_STEPS:
        with pytest.raises(Replaced): demo.run_year("prod", {}, days[0], days[-1], 1)
        assert calls == rest[:demo.PROCESS_STEPS]
    else:
        demo.run_year("prod", {}, days[0], days[-1], 1)
        assert calls == [*rest, "report"]

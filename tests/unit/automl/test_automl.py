"""AutoML without processes: preparation of rows, splits, families, notebooks, pruning, the summary."""
import datetime
import json
import math
import os
import tomllib
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.automl import search, trials
from mlops_nb.automl.dataset import (
    PARTS,
    SPLIT,
    is_identifier,
    prepare,
    read_dataset,
    split_by_hash,
    split_by_time,
)
from mlops_nb.automl.registration import class_tags, period_tags, read_as_of, require_inputs, require_same_tags
from mlops_nb.automl.summary import AutoMLSummary, TrialInfo, better_first, classify, regress
from mlops_nb.errors import MlopsError
from mlops_nb.jobs.execute import Outcome
from mlops_nb.models.conversion import as_time, model_frame

ROOT = Path(__file__).parents[3]
optuna.logging.set_verbosity(optuna.logging.WARNING)


def orders(rows: int = 200) -> pd.DataFrame:
    "Return a small table with numbers, text and missing values."
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"amount": generator.gamma(2, 50, rows), "country": generator.choice(["NL", "DE", None], rows),
                          "items": generator.integers(1, 9, rows)})
    return frame.assign(returned=np.where(generator.random(rows) < 0.3, "yes", "no"))


@pytest.mark.parametrize("column, reason", [
    (pd.Series([None] * 200), "all values are missing"), (pd.Series([7] * 200), "constant, 7"),
    (pd.Series([[1]] * 200), "neither numbers nor text"), (pd.Series([b"x"] * 200), "neither numbers nor text"),
    (pd.Series([f"id {i}" for i in range(200)]), "nearly every row"),
    (pd.Series([Decimal("12345678901234567890123.01") + i % 7 / Decimal(100) for i in range(200)]),
     "its 7 different values are equal as float64"), (pd.Series([Decimal(1), 2.5] * 100), "types Decimal, float"),
    (pd.Series(["a", 3] * 100), "types int, str"),
    (pd.Series(pd.date_range("2013-01-01", periods=200)), "dates are not used"),
    (pd.Series([datetime.date(2013, 1, 1)] * 200), "dates are not used")])
def test_useless_columns_are_left_out_and_named(column, reason):
    ready = prepare(orders().assign(odd=column), "returned", "classify")
    assert ready.features == ["amount", "country", "items"]
    assert [w for w in ready.warnings if w.startswith("odd: left out") and reason in w], ready.warnings


def test_infinities_are_missing_values_with_a_warning():
    frame = orders()
    frame.loc[:3, "amount"] = [1e39, np.inf, -np.inf, -1e300]
    frame["items"] = pd.Series([10**400, -10**400, *frame["items"][2:]], dtype=object)
    ready = prepare(frame, "returned", "classify")
    assert ready.frame[["amount", "items"]].isna().sum().tolist() == [2, 2]
    assert {"amount: 2 infinite values are treated as missing",
            "items: 2 values beyond the range of float64 are treated as missing"} <= set(ready.warnings)
    assert any(w.startswith("amount: models see 2 values beyond ±3.4e38") for w in ready.warnings)


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_every_family_takes_numbers_beyond_float32_in_training_and_in_prediction(kind):
    x = np.random.default_rng(0).normal(size=80)
    raw = pd.DataFrame({"x": x, "large": [1e39, -1e300, 1.7e308, np.inf, *x[:76]], "word": ["a", "b"] * 40})
    rows = model_frame(raw, {"x": "number", "large": "number", "word": "text"})
    target = pd.Series(np.digitize(x, [-0.5, 0.5]) if kind == "classify" else 3 * x)
    data = SimpleNamespace(kind=kind, train=rows, train_target=target, categories=["word"], numbers=["x", "large"],
                           seed=0, threads=1)
    for family in trials.find_families(None).values():
        names = {}
        exec(family.source, names)
        parameters = {name: entry["default"] for name, entry in family.space.items()}
        parameters |= {name: 10 for name in ("trees", "rounds") if name in parameters}
        model = names["fit"](parameters, data, lambda *_: None)
        predict = model.predict_proba if kind == "classify" else model.predict
        whole, single = predict(rows), [predict(rows.iloc[[i]])[0] for i in range(6)]
        assert np.isfinite(whole).all(), family.name
        np.testing.assert_allclose(whole[:6], single, err_msg=family.name)


def test_columns_have_types_that_parquet_and_models_accept(tmp_path):
    frame = orders().assign(exact=[Decimal("1.5")] * 199 + [None], flag=[True, False] * 100, gap=[True, None] * 100,
                            kind=pd.Categorical(["a", "b"] * 100))
    ready = prepare(frame, "returned", "classify")
    ready.frame.to_parquet(tmp_path / "x.parquet")
    types = pd.read_parquet(tmp_path / "x.parquet").dtypes.astype(str).to_dict()
    expected = {"exact": "float64", "flag": "bool", "gap": "float64", "kind": "object", "items": "int64"}
    assert {name: types[name] for name in expected} == expected


NUMBERS = st.one_of(st.none(), st.integers(-2**80, 2**80), st.floats(), st.booleans(), st.decimals(), st.just(pd.NA),
                    st.integers(0, 2**64 - 1).map(np.uint64), st.integers(-2**63, 2**63 - 1).map(np.int64))


def as_double(value) -> float:
    "The double of a number in the range of float32; NaN for missing and infinite values."
    if value is None or value is pd.NA or (isinstance(value, Decimal) and value.is_nan()): return np.nan
    if not abs(float(value)) < np.inf: return np.nan
    return float(value) if abs(float(value)) < 3.4e38 else math.copysign(float(np.float32(3.4028235e38)), value)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(NUMBERS.filter(lambda v: not (isinstance(v, Decimal) and v.is_snan())),
                          st.one_of(st.none(), st.text())), min_size=1, max_size=8))
def test_every_value_is_converted_alone_as_among_others(values):
    frame = pd.DataFrame({"n": pd.Series([n for n, _ in values], dtype=object),
                          "t": pd.Series([t for _, t in values], dtype=object)})
    kinds = {"t": "text", "n": "number"}
    whole = model_frame(frame, kinds)
    single = pd.concat([model_frame(frame.iloc[[i]], kinds) for i in range(len(frame))])
    rebuilt = pd.concat([model_frame(pd.DataFrame([row], index=[i]), kinds) for i, row in frame.iterrows()])
    pd.testing.assert_frame_equal(whole, single)
    pd.testing.assert_frame_equal(whole, rebuilt)
    np.testing.assert_array_equal(whole.n, [as_double(n) for n, _ in values])
    assert whole.t.tolist() == [t for _, t in values]


def with_gaps(values): return [None if i % 4 == 1 else value for i, value in enumerate(values)]


@pytest.mark.parametrize("column, first", [
    (pd.Categorical(with_gaps([1, 2] * 100)), 1.0), (pd.array(with_gaps([3, 4] * 100), "Int64"), 3.0),
    (pd.cut(np.arange(200) % 9, [-1, 3, 9], labels=[1, 2]), 1.0),
    (pd.array(with_gaps([True, False] * 100), "boolean"), 1.0),
    (pd.Series(with_gaps([False, True] * 100), dtype=object), 0.0), ([2**70, 2**71] * 100, 2.0**70),
    (np.array([2**63, 2**63 + 2**60] * 100, dtype="uint64"), 2.0**63),
    (with_gaps([Decimal("0.5"), Decimal(3)] * 100), 0.5),
    (pd.array(with_gaps([5, 6] * 100), "int64[pyarrow]"), 5.0), (pd.Series([10**400, 7] * 100, dtype=object), np.nan)])
def test_columns_of_numbers_are_doubles_and_gaps_are_nan(column, first):
    raw = orders().assign(odd=column)
    ready = prepare(raw, "returned", "classify")
    odd = ready.frame.odd.astype("float64")
    assert "odd" in ready.features and odd.isna().sum() == raw.odd.isna().sum() + (100 if np.isnan(first) else 0)
    np.testing.assert_equal(odd[0], first)


@pytest.mark.parametrize("column, reason", [
    (np.array([2**63 + i for i in range(200)], dtype="uint64"), "identifier"),
    ([2**70 - i for i in range(200)], "identifier"),
    (pd.array(with_gaps(range(200)), "Int64"), "identifier"), ([7 * i // 2 for i in range(200)], "identifier"),
    ([i * 77 % 200 for i in range(200)], "identifier"), ([Decimal(1000 + i) for i in range(200)], "identifier"),
    (with_gaps([Decimal(2**60) + i * 77 % 200 for i in range(200)]), "identifier"),
    ([Decimal(2**60) + i % 5 for i in range(200)], "whole numbers that are equal as float64"),
    ([2**60 + i % 5 for i in range(200)], "equal as float64"),
    ([f"2013-04-{i % 28 + 1:02d}" for i in range(200)], "times as text"),
    ([f"2013-04-01 {i % 24:02d}:00:00+02:00" for i in range(200)], "times as text"),
    ([datetime.date(9999, 12, 31), datetime.date(2020, 1, 1)] * 100, "dates are not used"),
    (["9999-12-31", None] * 100, "times as text"),
    (pd.date_range("2013", periods=200, tz="Asia/Tokyo"), "dates are not")])
def test_identifiers_and_times_are_left_out_and_named(column, reason):
    ready = prepare(orders().assign(odd=column), "returned", "classify")
    assert ready.features == ["amount", "country", "items"]
    assert [w for w in ready.warnings if w.startswith("odd: left out") and reason in w], ready.warnings


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 10**6), st.randoms())
def test_a_counter_is_an_identifier_and_a_measure_is_not(most_repeats, start, random):
    counter = [start]
    while len(counter) < 120: counter += [counter[-1] + random.randint(1, 9)] * random.randint(1, most_repeats)
    column = pd.Series(counter)
    if column.nunique() > len(column) / 2: assert is_identifier(column) and is_identifier(column[::-1])
    measure = pd.Series([random.randint(0, 1000) for _ in range(500)])
    assert not is_identifier(measure) and not is_identifier(column.astype(float))
    shuffled = column.sample(frac=1, random_state=random.randint(0, 9))
    assert is_identifier(shuffled) == (column.nunique() >= 0.95 * len(column) and column.nunique() >= (
        column.max() - column.min() + 1) / 2)


def test_times_as_text_are_offered_only_without_a_time_column():
    frame = orders().assign(day=[f"2013-04-{i % 28 + 1:02d}" for i in range(200)], other="2013-04-01T10:00")
    offers = [w for w in prepare(frame, "returned", "classify").warnings if "pass time_col=" in w]
    assert len(offers) == 1 and "pass time_col='day'" in offers[0], "a column with one time cannot split the rows"
    split = prepare(frame, "returned", "classify", time_col="day")
    assert not any("pass time_col=" in w for w in split.warnings) and "other" not in split.features


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.datetimes())), st.sampled_from([datetime.UTC, None, "dates", "text"]))
def test_times_of_all_years_are_kept(moments, form):
    if form == "dates": moments = [moment and datetime.datetime.combine(moment, datetime.time()) for moment in moments]
    if form == "dates": values = [moment and moment.date() for moment in moments]
    elif form == "text": values = [moment and moment.isoformat() for moment in moments]
    else: values = [moment and moment.replace(tzinfo=form) for moment in moments]
    converted = as_time(pd.Series(values, dtype=object))
    np.testing.assert_array_equal(converted.to_numpy(), np.array(moments, dtype="datetime64[us]"))


def test_columns_with_numbers_as_names_are_named_by_text_or_number():
    values = orders().set_axis([0, 1, 2, 3], axis=1)
    for target in (3, "3"):
        ready = prepare(read_dataset(values, None), target, "classify", time_col=0, exclude_cols=[1])
        assert (ready.features, ready.target_col, ready.time_col) == (["2"], "3", "0")


def test_attributes_of_a_frame_stay_with_the_caller():
    "Spark Connect adds the metrics of a query, which pandas would copy in each operation of the search."
    values = orders()
    values.attrs["metrics"] = ["the plan"]
    assert read_dataset(values, None).attrs == {} and values.attrs == {"metrics": ["the plan"]}


def test_a_target_of_booleans_with_gaps_stays_boolean():
    ready = prepare(orders().assign(late=with_gaps([True, False] * 100)), "late", "classify")
    assert set(ready.frame.late) == {True, False} and ready.frame.late.dtype == bool
    assert "late: 50 rows without a target are left out" in ready.warnings


def test_a_column_with_the_name_of_the_split_is_refused_unless_it_is_excluded():
    frame = orders().assign(**{SPLIT: "train"})
    with pytest.raises(MlopsError, match=f"has a column '{SPLIT}'"): prepare(frame, "returned", "classify")
    assert set(prepare(frame, "returned", "classify", exclude_cols=[SPLIT]).frame[SPLIT]) == set(PARTS)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_a_search_has_a_valid_name_for_every_target(target):
    from mlops_nb.env import check_name
    name = search.default_name(target, datetime.datetime(2013, 4, 1))
    assert check_name(name).startswith("automl_") and len(name.encode()) < 255


def test_a_name_given_by_the_user_is_checked(tmp_path):
    options = search.Settings(experiment_name="a.b", experiment_dir=tmp_path)
    with pytest.raises(MlopsError, match="name 'a.b' contains '.'"):
        search.open_search(prepare(orders(), "returned", "classify"), "f1", options, None, {})
    options = search.Settings(experiment_name="é" * 200, experiment_dir=tmp_path)  # 200 characters, but 400 bytes
    with pytest.raises(MlopsError, match="is not a valid name of a search"):
        search.open_search(prepare(orders(), "returned", "classify"), "f1", options, None, {})
    assert not list(tmp_path.iterdir())


def test_the_tags_of_a_version_name_the_days_of_its_split():
    days = pd.date_range("2020-01-01 08:00", periods=200, freq="6h", tz="UTC")
    ready = prepare(orders().assign(at=days), "returned", "classify", time_col="at")
    tags = period_tags(ready, datetime.date(2020, 3, 1))
    at = pd.Series(days).dt.tz_localize(None)
    last = at[ready.frame[SPLIT] != "test"].max().date()
    held_out = [day.date() for day in at if day.date() > last]
    assert tags == {"as_of": "2020-03-01", "trained_through": str(last), "held_out_from": str(min(held_out)),
                    "held_out_to": str(max(held_out))}
    with pytest.raises(MlopsError, match="not before as_of 2020-02-01"): period_tags(ready, datetime.date(2020, 2, 1))
    assert class_tags(ready, "no", 0.2) == {"pos_label": "no", "threshold": "0.2"}
    for threshold in (2, "0.5", float("nan"), True, None):
        with pytest.raises(MlopsError, match="write a probability"): class_tags(ready, "no", threshold)
    by_step = prepare(orders().assign(at=range(200)), "returned", "classify", time_col="at")
    assert period_tags(by_step, datetime.date(2020, 3, 1)) == {"as_of": "2020-03-01", "trained_through": "2020-02-29"}


@pytest.mark.parametrize("target, labels, text", [
    ([True, False], [1, True, np.True_, "True", None], "True"), ([1.0, 0.0, None], [True, 1.0, "1", np.int64(1)], "1"),
    ([0.5, 1.5], ["0.5", 0.5], "0.5"), (["1", "2"], [1, "1"], "1"), ([Decimal(1), Decimal(0)], [True, "1"], "1")])
def test_the_positive_class_has_the_text_by_which_the_model_names_it(target, labels, text):
    ready = prepare(orders().assign(y=pd.Series((target * 100)[:200], dtype=object)), "y", "classify")
    assert text in [str(label) for label in np.unique(ready.frame.y)], "the columns of the model's probabilities"
    assert {class_tags(ready, label, 0.5)["pos_label"] for label in labels} == {text}
    for label in ("2013", pd.NA, [1, 2], np.array([0, 1])):
        with pytest.raises(MlopsError, match="no pos_label"): class_tags(ready, label, 0.5)


def test_a_day_is_given_as_a_date_a_midnight_or_text():
    day = datetime.date(2020, 4, 1)
    for value in (day, datetime.datetime(2020, 4, 1), pd.Timestamp(day), pd.Timestamp(day, tz="UTC"), "2020-04-01"):
        assert read_as_of(value) == day and type(read_as_of(value)) is datetime.date
    for value in ("April", "", 20200401, None, pd.NaT, pd.Timestamp("2020-04-01 08:00"), pd.Timestamp(day, tz="Japan")):
        with pytest.raises(MlopsError, match="as_of is .*\n.*write a day"): read_as_of(value)


def test_a_registered_trial_keeps_its_tags_and_rows_need_the_features():
    version = SimpleNamespace(name="dev.a.b", version="3", tags={"threshold": "0.5", "pos_label": "1", "git_sha": "x"})
    require_same_tags(version, {"threshold": "0.5", "pos_label": "1"})
    with pytest.raises(MlopsError, match="v3 of dev.a.b with threshold 0.5, note not set, not threshold 0.3, note 7"):
        require_same_tags(version, {"threshold": "0.3", "pos_label": "1", "note": 7})
    require_inputs("dev.a.b v3", ["amount", "items"], orders())
    with pytest.raises(MlopsError, match="lack the columns \\['amount'\\] that dev.a.b v3 needs\n.*country, items"):
        require_inputs("dev.a.b v3", ["amount", "items"], orders().drop(columns="amount"))


@pytest.mark.parametrize("change, target, kind, options, words", [
    (lambda f: f, "retruned", "classify", {},
     "no target column 'retruned' in the dataset\n.*did you mean 'returned'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": ["amonut"]},
     "no column 'amonut' in the dataset\n.*did you mean 'amount'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": "amount"}, "exclude_cols is a list"),
    (lambda f: f, "returned", "classify", {"time_col": "day"}, "no time column 'day'"),
    (lambda f: f.assign(returned="no"), "returned", "classify", {}, "one value only, 'no'"),
    (lambda f: f.head(20), "returned", "classify", {}, "20 rows .* at least 50"),
    (lambda f: f.head(0), "returned", "classify", {}, "0 rows .* at least 50"),
    (lambda f: f.assign(returned=None), "returned", "classify", {}, "0 rows .* at least 50"),
    (lambda f: f, "returned", "regress", {}, "is not numeric: it contains"),
    (lambda f: f, "amount", "classify", {}, "use regress"),
    (lambda f: f[["country", "returned"]].assign(country=None), "returned", "classify", {},
     "no feature column is left"),
    (lambda f: f.assign(day="2013-01-01"), "returned", "classify", {"time_col": "day"},
     "part 'validate' of the split is empty"),
    (lambda f: f.assign(day="some day"), "returned", "classify", {"time_col": "day"},
     "contains values that are no times: Time data some day is not ISO8601 format, at position 0\n  write times"),
    (lambda f: f.assign(returned=[2**63 + (0, 1, 5000)[i % 3] for i in range(200)]), "returned", "classify", {},
     "the target 'returned': 3 different numbers become 2\n.*as text"),
    (lambda f: f.assign(returned=[2**63 + i % 2 for i in range(200)]), "returned", "classify", {}, "2 .* become 1"),
    (lambda f: f.assign(returned=[2**63 + i % 2 for i in range(200)]), "returned", "regress", {},
     "the 2 different values of the target 'returned' are equal as float64"),
    (lambda f: f.assign(returned=with_gaps([Decimal("90071992547409920000") + (0, 1, 50000)[i % 3]
                                            for i in range(200)])), "returned", "classify", {}, "3 .* become 2"),
    (lambda f: f.assign(returned=[2**63 + 5000 * (i % 2) for i in range(200)]), "returned", "classify", {},
     "float64 changes the classes"),
    (lambda f: f.assign(returned=["a", "a\0"] * 100), "returned", "classify", {}, "only after a NUL character"),
    (lambda f: f.assign(returned=["a", 1] * 100), "returned", "classify", {}, "mixes values of the types int, str"),
    (lambda f: f.assign(country=["\ud800a", "b"] * 100), "returned", "classify", {},
     "column 'country' contains the text .*which UTF-8 cannot encode"),
    (lambda f: f.rename(columns={"amount": ""}), "returned", "classify", {}, "has a column named ''"),
    (lambda f: f.rename(columns={"amount": "\ud800"}), "returned", "classify", {}, "a column named .*ud800"),
    (lambda f: f.set_axis(["amount", "amount", "items", "returned"], axis=1), "returned", "classify", {},
     "several columns named amount")])
def test_bad_input_is_explained(change, target, kind, options, words):
    with pytest.raises(MlopsError, match=words): prepare(change(orders()), target, kind, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=60, max_size=200), st.randoms())
def test_the_split_by_hash_does_not_depend_on_the_order_and_keeps_the_shares(rows, random):
    frame = pd.DataFrame(rows, columns=["x", "y"])
    frame["noise"] = np.arange(len(frame)) * 0.1
    order = list(range(len(frame)))
    random.shuffle(order)
    parts = split_by_hash(frame[["x", "noise"]], frame.y)
    shuffled = frame.iloc[order]
    assert (split_by_hash(shuffled[["x", "noise"]], shuffled.y) == parts[order]).all()
    for _, class_parts in pd.Series(parts).groupby(frame.y.to_numpy()):
        training = (class_parts == "train").sum()
        assert training > 0 and abs(training - 0.6 * len(class_parts)) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=10, max_size=100))
def test_the_split_by_time_never_trains_on_later_rows(moments):
    time = pd.Series(moments, name="t")
    parts = split_by_time(time)
    borders = [time[parts == part] for part in PARTS if (parts == part).any()]
    assert all(a.max() < b.min() for a, b in zip(borders, borders[1:], strict=False))


def test_classes_that_occur_only_later_are_left_out():
    frame = orders().assign(day=range(200))
    frame.loc[195:, "returned"] = "lost"
    ready = prepare(frame, "returned", "classify", time_col="day")
    assert set(ready.frame.returned) == {"yes", "no"}
    assert "5 rows of classes that the training part lacks" in "\n".join(ready.warnings)
    assert "day" not in ready.features


SOURCE = 'SPACE = {"depth": {"low": 1, "high": 9, "default": 3}}\ndef fit(parameters, data, report): ...\n'


@pytest.mark.parametrize("source, words", [
    (SOURCE.replace("SPACE", "SPACES"), "no name 'SPACE' in new.py\n.*SPACES"),
    (SOURCE.replace("fit", "fitt"), "no function 'fit' in new.py\n.*fitt"),
    (SOURCE.replace("high", "hihg"), "depth in SPACE of new.py: hihg: no key 'hihg'\n.*did you mean 'high'"),
    (SOURCE.replace('"default": 3', '"default": 30'), "default 30 is not between"),
    (SOURCE.replace('"low": 1', '"low": "1"'), "it must be a number; remove the quotes"),
    (SOURCE.replace('"low": 1', '"low": 1 + x'), "is not a literal dictionary"),
    (SOURCE.replace('"high": 9, ', ""), "high: the key is missing"), (SOURCE.replace("{", "{{", 1), "new.py, line 1")])
def test_a_family_with_a_mistake_is_explained(tmp_path, source, words):
    (tmp_path / "new.py").write_text(source)
    with pytest.raises(MlopsError, match=words): trials.find_families([str(tmp_path / "new.py")])


def test_families_are_chosen_by_name():
    assert set(trials.find_families(None)) >= {"lightgbm", "histogram_boosting", "random_forest", "linear"}
    assert "linear" not in trials.find_families(None, exclude=["linear"])
    with pytest.raises(MlopsError, match="did you mean 'linear'"): trials.find_families(None, exclude=["linaer"])


def test_every_proposed_value_is_in_its_space():
    families, study = trials.find_families(None), optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(40):
        family, parameters = trials.propose(study.ask(), families)
        for name, entry in family.space.items():
            value = parameters[name]
            assert value in entry["choices"] if "choices" in entry else entry["low"] <= value <= entry["high"]


def test_a_notebook_of_a_trial_does_not_import_this_project(tmp_path):
    for family in trials.find_families(None).values():
        trials.compose(family, tmp_path / f"{family.name}.ipynb")
        cells = json.loads((tmp_path / f"{family.name}.ipynb").read_text())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        assert any("def model_frame(frame" in c and "Placeholder" not in c for c in code)
        assert family.source in code and not any("mlops_nb" in c or "eval: false" in c for c in code)
        for cell in code: compile(cell, family.name, "exec")


def test_a_wheel_contains_the_notebooks():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / setuptools["package-dir"]["mlops_nb.automl.templates"]
    packed = {p for pattern in setuptools["package-data"]["mlops_nb.automl.templates"] for p in folder.glob(pattern)}
    assert packed >= {folder / "trial.ipynb", folder / "exploration.ipynb", *(folder / "families").glob("*.py")}
    packages = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mlops_nb").rglob("*.py")}
    expected = packages | {"mlops_nb.automl.templates", "mlops_nb.projects.template"}
    assert set(setuptools["packages"]) == expected, "pyproject.toml lists the packages of a wheel"


def test_a_poor_trial_is_stopped_until_it_improves(tmp_path):
    study = search.open_study(tmp_path / "optuna.db", "maximize", 0)
    for value in (0.8, 0.82, 0.84, 0.86, 0.9):
        good = study.ask()
        for step in (20, 40): good.report(value, step)
        study.tell(good, value)
    for value, is_pruned in ((0.95, False), (0.5, True)):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "progress.jsonl").write_text(json.dumps({"step": 40, "value": value}) + '\n{"step": 60, "va')
        trial = trials.RunningTrial(study.ask(), None, folder, None)
        search.watch(SimpleNamespace(primary_metric="f1"), trial)
        assert (folder / "stop").exists() == is_pruned
        if is_pruned:
            reason = "val_f1_score was 0.50000 after 40%; others were better at that point"
            assert (folder / "stop").read_text() == reason
        later_value = 0.99 if is_pruned else 0.7
        with (folder / "progress.jsonl").open("a") as file: file.write(f'lue": {later_value}}}\n')
        search.watch(SimpleNamespace(primary_metric="f1"), trial)
        assert study.get_trials()[-1].intermediate_values[60] == later_value, "a line that was written in two steps"
        assert not (folder / "stop").exists(), "a trial that has become better continues"


def test_the_notebook_stops_in_a_search_and_not_by_hand(tmp_path, monkeypatch, capsys):
    cells = json.loads((trials.notebooks_folder() / "trial.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "class Pruned" in "".join(c["source"]))
    part = pd.Series(["train", "validate"])
    def report_cell():
        names = {"os": os, "json": json, "Path": Path, "primary": "f1_score", "rows": part, "target": part,
                 "part": part, "model_metrics": lambda *_: {"f1_score": 0.5}}
        exec(source, names)
        return names
    monkeypatch.delenv("AUTOML_FOLDER", raising=False)
    report_cell()["report"](0.2, None)
    monkeypatch.setenv("AUTOML_FOLDER", str(tmp_path))
    cell = report_cell()
    cell["report"](0.2, None)
    (tmp_path / "stop").write_text("others were better")
    with pytest.raises(cell["Pruned"], match="others were better"): cell["report"](0.4, None)
    cell["report"](1.0, None)  # a complete fit is not pruned
    reports = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert [json.loads(report)["step"] for report in reports] == [20, 40, 100]


def test_a_pruned_trial_and_a_metric_that_is_not_a_number(tmp_path):
    outcome = Outcome("FAILED", "Pruned: f1 was 0.5\n  in x", "Pruned")
    assert trials.trial_result(tmp_path, outcome, "f1").state == "PRUNED"
    result = {"metrics": {"val_f1_score": float("nan")}, "fit_seconds": 1, "model_uri": "m"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert trials.trial_result(tmp_path, Outcome("SUCCESS"), "f1").state == "FAILED", "NaN is not a valid metric"


@pytest.mark.parametrize("metric, best", [("f1", 0.9), ("log_loss", 0.7)])
def test_the_summary_puts_the_best_first_and_failures_last(metric, best):
    name = trials.metric_name(metric)
    infos = []
    for number, value in enumerate((0.8, None, 0.9, 0.7)):
        state, reason = ("COMPLETE", "") if value else ("FAILED", "<b>no</b> luck")
        metrics = {name: value, name.replace("val", "test"): value}
        infos.append(TrialInfo(number, "linear", {"a<b": 1}, state, reason, value, metrics, 1.0, 1.0,
                               Path("x"), "r", "m"))
    summary = AutoMLSummary(None, better_first(metric, infos), metric, ["x: it is constant"], Path("e"), Path("."))
    assert summary.best_trial.evaluation_metric_score == best and summary.trials[-1].number == 1
    page = summary._repr_html_()
    assert "image/png" in page and "x: it is constant" in page and "&lt;b&gt;no" in page and "<b>no" not in page
    line = summary.plot().axes[0].lines[0].get_ydata()
    assert list(line) == ([0.8, 0.9, 0.9] if metric == "f1" else [0.8, 0.8, 0.7])


def test_settings_are_checked_before_anything_runs():
    env = SimpleNamespace()
    for options, words in (({"max_trial": 3}, "no setting 'max_trial'"), ({"max_trials": 0}, "max_trials is 0"),
                           ({"timeout_minutes": "5"}, "timeout_minutes is '5'"),
                           ({"families": "linear"}, "families is a list, not 'linear'\n.*\\['linear'\\]"),
                           ({"exclude_frameworks": 3}, "exclude_frameworks is a list, not 3")):
        with pytest.raises(MlopsError, match=words): classify(orders(), "returned", env=env, **options)
    with pytest.raises(MlopsError, match="no pos_label 'maybe'.*\n.*yes"):
        classify(orders(), "returned", env=env, pos_label="maybe")
    with pytest.raises(MlopsError, match="not int"): classify(3, "returned", env=env)
    with pytest.raises(MlopsError, match="a regression has none"):
        regress(orders(), "amount", env=env, pos_label=1)


def test_a_search_with_other_rows_needs_another_name(tmp_path):
    ready, families = prepare(orders(), "returned", "classify"), trials.find_families(["linear"])
    identity = search.search_identity(ready, "f1", search.Settings(), families)
    search.open_folder(tmp_path / "a", identity, ready)
    search.open_folder(tmp_path / "a", identity, ready)
    other = prepare(orders(150), "returned", "classify")
    with pytest.raises(MlopsError, match="already exists with other rows"):
        other_identity = search.search_identity(other, "f1", search.Settings(), families)
        search.open_folder(tmp_path / "a", other_identity, other)
    assert set(pd.read_parquet(tmp_path / "a/dataset.parquet")[SPLIT]) == set(PARTS)


@pytest.mark.slow
def test_a_repeatable_search_proposes_the_same_trials_again(tmp_path):
    families = trials.find_families(["lightgbm", "linear"])

    def proposals(name: str) -> list:
        "The family and the parameters of 14 trials, four of them after the random ones."
        study = search.open_study(tmp_path / name, "minimize", 0, prunes=False)
        proposed = []
        for number in range(14):
            trial = study.ask()
            proposed.append(trials.propose(trial, families))
            for step in (10, 50, 100): trial.report(float(number), step)
            assert not trial.should_prune()
            study.tell(trial, abs(len(proposed[-1][1]) - 6) + number % 3)
        return [(family.name, parameters) for family, parameters in proposed]

    assert proposals("a.db") == proposals("b.db")
    assert search.Settings(repeatable=True, max_parallel=8).parallel == 1


def test_a_search_ends_when_all_trials_fail(tmp_path):
    study = search.open_study(tmp_path / "optuna.db", "maximize", 0)
    settings, families = search.Settings(max_trials=50), {"linear": None}
    failing = search.Search(None, tmp_path, None, "f1", settings, families, "1", study, deadline=float("inf"))
    for number in range(3):
        assert failing.wants_more() and not failing.all_failed(), number
        trial = study.ask()
        trial.set_user_attr("state", "FAILED")
        trial.set_user_attr("reason", "no such library")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert failing.all_failed() and not failing.wants_more() and failing.best is None
    assert search.first_reason(failing) == "no such library"


def test_trials_on_databricks_reach_mlflow_and_no_file_holds_the_token(monkeypatch, tmp_path):
    for name in ("DATABRICKS_TOKEN", "DATABRICKS_RUNTIME_VERSION", "DATABRICKS_ENV_VERSION"):
        monkeypatch.delenv(name, raising=False)
    assert trials.databricks_login() == {}
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    config = SimpleNamespace(host="https://workspace", authenticate=lambda: {"Authorization": "Bearer of the notebook"})
    monkeypatch.setattr("databricks.sdk.config.Config", lambda: config)
    assert trials.databricks_login() == {"DATABRICKS_HOST": "https://workspace", "DATABRICKS_TOKEN": "of the notebook"}
    started = []
    warm = SimpleNamespace(start=lambda folder, task, environment: started.extend([task, environment]))
    trials.start_notebook(warm, tmp_path, {"seed": 0}, 10)
    assert "of the notebook" not in json.dumps(started)

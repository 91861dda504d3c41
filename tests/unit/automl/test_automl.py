"""AutoML without processes: preparation of rows, splits, families, notebooks, pruning, the summary."""
import datetime
import json
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
from mlops_nb.automl.dataset import PARTS, SPLIT, prepare, split_by_hash, split_by_time
from mlops_nb.automl.summary import AutoMLSummary, TrialInfo, better_first, classify
from mlops_nb.errors import MlopsError
from mlops_nb.jobs.execute import Outcome

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
    (pd.Series(pd.date_range("2013-01-01", periods=200)), "dates are not used"),
    (pd.Series([datetime.date(2013, 1, 1)] * 200), "dates are not used")])
def test_useless_columns_are_left_out_and_named(column, reason):
    ready = prepare(orders().assign(odd=column), "returned", "classify")
    assert ready.features == ["amount", "country", "items"]
    assert [w for w in ready.warnings if w.startswith("odd: left out") and reason in w], ready.warnings


def test_infinities_are_missing_values_with_a_warning():
    frame = orders()
    frame.loc[[1, 2], "amount"] = [np.inf, -np.inf]
    ready = prepare(frame, "returned", "classify")
    assert "amount: 2 infinite values are treated as missing" in ready.warnings and ready.frame.amount.isna().sum() == 2


def test_columns_have_types_that_parquet_and_models_accept(tmp_path):
    frame = orders().assign(exact=[Decimal("1.5")] * 199 + [None], flag=[True, False] * 100, gap=[True, None] * 100,
                            kind=pd.Categorical(["a", "b"] * 100))
    ready = prepare(frame, "returned", "classify")
    ready.frame.to_parquet(tmp_path / "x.parquet")
    types = pd.read_parquet(tmp_path / "x.parquet").dtypes.astype(str).to_dict()
    expected = {"exact": "float64", "flag": "bool", "gap": "float64", "kind": "object", "items": "int64"}
    assert {name: types[name] for name in expected} == expected


@pytest.mark.parametrize("change, target, kind, options, words", [
    (lambda f: f, "retruned", "classify", {},
     "no target column 'retruned' in the dataset\n.*did you mean 'returned'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": ["amonut"]},
     "no column 'amonut' in the dataset\n.*did you mean 'amount'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": "amount"}, "exclude_cols is a list"),
    (lambda f: f, "returned", "classify", {"time_col": "day"}, "no time column 'day'"),
    (lambda f: f.assign(returned="no"), "returned", "classify", {}, "one value only, 'no'"),
    (lambda f: f.head(20), "returned", "classify", {}, "20 rows .* at least 50"),
    (lambda f: f, "returned", "regress", {}, "is not numeric: it contains"),
    (lambda f: f, "amount", "classify", {}, "use regress"),
    (lambda f: f[["country", "returned"]].assign(country=None), "returned", "classify", {},
     "no feature column is left"),
    (lambda f: f.assign(day="2013-01-01"), "returned", "classify", {"time_col": "day"},
     "part 'validate' of the split is empty"),
    (lambda f: f.assign(day="some day"), "returned", "classify", {"time_col": "day"},
     "column 'day' contains values that are no times"),
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
    (SOURCE.replace("high", "hihg"), "no key 'hihg' in depth in SPACE of new.py\n.*did you mean 'high'"),
    (SOURCE.replace('"default": 3', '"default": 30'), "default 30 is not between"),
    (SOURCE.replace('"low": 1', '"low": "1"'), "write numbers"),
    (SOURCE.replace('"low": 1', '"low": 1 + x'), "is not a literal dictionary"),
    (SOURCE.replace('"high": 9, ', ""), "has no high"), (SOURCE.replace("{", "{{", 1), "new.py, line 1")])
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
        assert family.source in code and not any("mlops_nb" in c or "eval: false" in c for c in code)
        for cell in code: compile(cell, family.name, "exec")


def test_a_wheel_contains_the_notebooks():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / setuptools["package-dir"]["mlops_nb.automl.templates"]
    packed = {p for pattern in setuptools["package-data"]["mlops_nb.automl.templates"] for p in folder.glob(pattern)}
    assert packed >= {folder / "trial.ipynb", folder / "exploration.ipynb", *(folder / "families").glob("*.py")}
    packages = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mlops_nb").rglob("*.py")}
    expected = packages | {"mlops_nb.automl.templates"}
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
                           ({"timeout_minutes": "5"}, "timeout_minutes is '5'")):
        with pytest.raises(MlopsError, match=words): classify(orders(), "returned", env=env, **options)
    with pytest.raises(MlopsError, match="no pos_label 'maybe'.*\n.*yes"):
        classify(orders(), "returned", env=env, pos_label="maybe")
    with pytest.raises(MlopsError, match="not int"): classify(3, "returned", env=env)


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

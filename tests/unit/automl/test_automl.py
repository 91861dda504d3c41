"""AutoML without a process: rows made ready, splits, families, notebooks, pruning, the summary."""
import datetime
import json
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
    "A small table of everyday kinds."
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"amount": generator.gamma(2, 50, rows), "country": generator.choice(["NL", "DE", None], rows),
                          "items": generator.integers(1, 9, rows)})
    return frame.assign(returned=np.where(generator.random(rows) < 0.3, "yes", "no"))


@pytest.mark.parametrize("column, reason", [
    (pd.Series([None] * 200), "all values are missing"), (pd.Series([7] * 200), "constant, 7"), (pd.Series([[1]] * 200), "neither numbers nor text"),
    (pd.Series([b"x"] * 200), "neither numbers nor text"), (pd.Series([f"id {i}" for i in range(200)]), "nearly every row"),
    (pd.Series(pd.date_range("2013-01-01", periods=200)), "dates are not used"), (pd.Series([datetime.date(2013, 1, 1)] * 200), "dates are not used")])
def test_useless_columns_are_left_out_and_named(column, reason):
    ready = prepare(orders().assign(odd=column), "returned", "classify")
    assert ready.features == ["amount", "country", "items"]
    assert [w for w in ready.warnings if w.startswith("odd: left out") and reason in w], ready.warnings


def test_infinities_are_missing_and_that_is_said():
    frame = orders()
    frame.loc[[1, 2], "amount"] = [np.inf, -np.inf]
    ready = prepare(frame, "returned", "classify")
    assert "amount: 2 infinite values are treated as missing" in ready.warnings and ready.frame.amount.isna().sum() == 2


def test_types_that_parquet_and_models_take(tmp_path):
    frame = orders().assign(exact=[Decimal("1.5")] * 199 + [None], flag=[True, False] * 100, told=[True, None] * 100, kind=pd.Categorical(["a", "b"] * 100))
    ready = prepare(frame, "returned", "classify")
    ready.frame.to_parquet(tmp_path / "x.parquet")
    types = pd.read_parquet(tmp_path / "x.parquet").dtypes.astype(str).to_dict()
    assert {k: types[k] for k in ("exact", "flag", "told", "kind", "items")} == \
        {"exact": "float64", "flag": "bool", "told": "float64", "kind": "object", "items": "int64"}


@pytest.mark.parametrize("change, target, kind, options, words", [
    (lambda f: f, "retruned", "classify", {}, "no target column 'retruned' in the dataset\n.*did you mean 'returned'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": ["amonut"]}, "no column 'amonut'.*\n.*did you mean 'amount'"),
    (lambda f: f, "returned", "classify", {"exclude_cols": "amount"}, "exclude_cols is a list"),
    (lambda f: f, "returned", "classify", {"time_col": "day"}, "no time column 'day'"),
    (lambda f: f.assign(returned="no"), "returned", "classify", {}, "one value only, 'no'"),
    (lambda f: f.head(20), "returned", "classify", {}, "20 rows .* at least 50"),
    (lambda f: f, "returned", "regress", {}, "is not numeric: it contains"),
    (lambda f: f, "amount", "classify", {}, "use regress"),
    (lambda f: f[["country", "returned"]].assign(country=None), "returned", "classify", {}, "no feature column is left"),
    (lambda f: f.assign(day="2013-01-01"), "returned", "classify", {"time_col": "day"}, "part 'validate' of the split is empty"),
    (lambda f: f.assign(day="some day"), "returned", "classify", {"time_col": "day"}, "column 'day' contains values that are no times"),
    (lambda f: f.set_axis(["amount", "amount", "items", "returned"], axis=1), "returned", "classify", {}, "several columns named amount")])
def test_bad_input_is_explained(change, target, kind, options, words):
    with pytest.raises(MlopsError, match=words): prepare(change(orders()), target, kind, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=60, max_size=200), st.randoms())
def test_the_split_by_hash_knows_no_order_and_keeps_the_shares(rows, random):
    frame = pd.DataFrame(rows, columns=["x", "y"])
    frame["noise"] = np.arange(len(frame)) * 0.1
    order = list(range(len(frame)))
    random.shuffle(order)
    parts = split_by_hash(frame[["x", "noise"]], frame.y)
    again = frame.iloc[order]
    assert (split_by_hash(again[["x", "noise"]], again.y) == parts[order]).all()
    for _, mine in pd.Series(parts).groupby(frame.y.to_numpy()):
        assert abs((mine == "train").sum() - 0.6 * len(mine)) <= 1 and "train" in set(mine)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=10, max_size=100))
def test_the_split_by_time_never_learns_from_later_rows(moments):
    time = pd.Series(moments, name="t")
    parts = split_by_time(time)
    borders = [time[parts == part] for part in PARTS if (parts == part).any()]
    assert all(a.max() < b.min() for a, b in zip(borders, borders[1:], strict=False))


def test_classes_that_only_come_later_are_left_out():
    frame = orders().assign(day=range(200))
    frame.loc[195:, "returned"] = "lost"
    ready = prepare(frame, "returned", "classify", time_col="day")
    assert set(ready.frame.returned) == {"yes", "no"} and [w for w in ready.warnings if "5 rows of classes that the training part lacks" in w]
    assert "day" not in ready.features


SOURCE = 'SPACE = {"depth": {"low": 1, "high": 9, "default": 3}}\ndef fit(parameters, data, report): ...\n'


@pytest.mark.parametrize("source, words", [
    (SOURCE.replace("SPACE", "SPACES"), "no name 'SPACE' in mine.py\n.*SPACES"), (SOURCE.replace("fit", "fitt"), "no function 'fit' in mine.py\n.*fitt"),
    (SOURCE.replace("high", "hihg"), "no key 'hihg' in depth in SPACE of mine.py\n.*did you mean 'high'"),
    (SOURCE.replace('"default": 3', '"default": 30'), "default 30 does not lie"), (SOURCE.replace('"low": 1', '"low": "1"'), "these are numbers"),
    (SOURCE.replace('"low": 1', '"low": 1 + x'), "no plain dictionary"), (SOURCE.replace('"high": 9, ', ""), "has no high"),
    (SOURCE.replace("{", "{{", 1), "mine.py, line 1")])
def test_a_family_with_a_mistake_is_explained(tmp_path, source, words):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(MlopsError, match=words): trials.find_families([str(tmp_path / "mine.py")])


def test_families_are_chosen_by_name():
    assert set(trials.find_families(None)) >= {"lightgbm", "histogram_boosting", "random_forest", "linear"}
    assert "linear" not in trials.find_families(None, exclude=["linear"])
    with pytest.raises(MlopsError, match="did you mean 'linear'"): trials.find_families(None, exclude=["linaer"])


def test_every_proposal_lies_in_its_space():
    families, study = trials.find_families(None), optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(40):
        family, parameters = trials.propose(study.ask(), families)
        for name, entry in family.space.items():
            value = parameters[name]
            assert value in entry["choices"] if "choices" in entry else entry["low"] <= value <= entry["high"]


def test_a_trials_notebook_is_readable_source_alone(tmp_path):
    for family in trials.find_families(None).values():
        trials.compose(family, tmp_path / f"{family.name}.ipynb")
        cells = json.loads((tmp_path / f"{family.name}.ipynb").read_text())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        assert family.source in code and not any("mlops_nb" in c or "eval: false" in c for c in code)
        for cell in code: compile(cell, family.name, "exec")


def test_a_wheel_takes_the_notebooks_along():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / told["package-dir"]["mlops_nb.automl.templates"]
    packed = {p for pattern in told["package-data"]["mlops_nb.automl.templates"] for p in folder.glob(pattern)}
    assert packed >= {folder / "trial.ipynb", folder / "exploration.ipynb", *(folder / "families").glob("*.py")}
    packages = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mlops_nb").rglob("*.py")}
    assert packages | {"mlops_nb.automl.templates"} == set(told["packages"]), "pyproject.toml lists the packages of a wheel"


def test_a_hopeless_trial_is_asked_to_stop(tmp_path):
    study = search.open_study(tmp_path / "optuna.db", "maximize", 0)
    for value in (0.8, 0.82, 0.84, 0.86, 0.9):
        good = study.ask()
        for step in (20, 40): good.report(value, step)
        study.tell(good, value)
    for value, asked in ((0.95, False), (0.5, True)):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "progress.jsonl").write_text(json.dumps({"step": 40, "value": value}) + '\n{"step": 60, "va')
        run = trials.Running(study.ask(), None, folder, None)
        search.watch(SimpleNamespace(primary_metric="f1"), run)
        assert (folder / "stop").exists() == asked
        if asked:
            assert (folder / "stop").read_text() == "val_f1_score was 0.50000 after 40%; others were better at that point"
        with (folder / "progress.jsonl").open("a") as file: file.write('lue": 0.99}\n' if asked else 'lue": 0.7}\n')
        search.watch(SimpleNamespace(primary_metric="f1"), run)
        assert run.asked.study.get_trials()[-1].intermediate_values[60] == (0.99 if asked else 0.7), "the rest of a line that was half written"
        assert not (folder / "stop").exists(), "who has become better may go on"


def test_the_notebook_obeys_and_is_free_by_hand(tmp_path, monkeypatch, capsys):
    cells = json.loads((trials.notebooks_folder() / "trial.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "class Pruned" in "".join(c["source"]))
    part = pd.Series(["train", "validate"])
    def report_cell():
        names = {"os": __import__("os"), "json": json, "Path": Path, "primary": "f1_score", "rows": part, "target": part, "part": part,
                 "judge": lambda *_: {"f1_score": 0.5}}
        exec(source, names)
        return names
    monkeypatch.delenv("AUTOML_FOLDER", raising=False)
    report_cell()["report"](0.2, None)
    monkeypatch.setenv("AUTOML_FOLDER", str(tmp_path))
    cell = report_cell()
    cell["report"](0.2, None)
    (tmp_path / "stop").write_text("others were better")
    with pytest.raises(cell["Pruned"], match="others were better"): cell["report"](0.4, None)
    cell["report"](1.0, None)  # what has learnt to its end is worth its metric
    assert [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()] == [20, 40, 100]


def test_how_a_trial_ended(tmp_path):
    assert trials.result_of(tmp_path, Outcome("FAILED", "Pruned: f1 was 0.5\n  in x", "Pruned"), "f1").state == "PRUNED"
    (tmp_path / "result.json").write_text(json.dumps({"metrics": {"val_f1_score": float("nan")}, "fit_seconds": 1, "model_uri": "m"}))
    assert trials.result_of(tmp_path, Outcome("SUCCESS"), "f1").state == "FAILED", "a metric that is no number is no result"


@pytest.mark.parametrize("metric, best", [("f1", 0.9), ("log_loss", 0.7)])
def test_the_summary_puts_the_best_first_and_failures_last(metric, best):
    name = trials.metric_name(metric)
    infos = [TrialInfo(i, "linear", {"a<b": 1}, "COMPLETE" if v else "FAILED", "" if v else "<b>no</b> luck", v,
                       {name: v, name.replace("val", "test"): v}, 1.0, 1.0, Path(f"{i}"), "r", "m") for i, v in enumerate((0.8, None, 0.9, 0.7))]
    summary = AutoMLSummary(None, better_first(metric, infos), metric, ["x: it is constant"], Path("e"), Path("."))
    assert summary.best_trial.evaluation_metric_score == best and summary.trials[-1].number == 1
    shown = summary._repr_html_()
    assert "image/png" in shown and "x: it is constant" in shown and "&lt;b&gt;no" in shown and "<b>no" not in shown
    line = summary.plot().axes[0].lines[0].get_ydata()
    assert list(line) == ([0.8, 0.9, 0.9] if metric == "f1" else [0.8, 0.8, 0.7])


def test_settings_are_checked_before_anything_runs():
    env = SimpleNamespace()
    for given_, words in (({"max_trial": 3}, "no setting 'max_trial'"), ({"max_trials": 0}, "max_trials is 0"), ({"timeout_minutes": "5"}, "timeout_minutes is '5'")):
        with pytest.raises(MlopsError, match=words): classify(orders(), "returned", env=env, **given_)
    with pytest.raises(MlopsError, match="no pos_label 'maybe'.*\n.*yes"):
        classify(orders(), "returned", env=env, pos_label="maybe")
    with pytest.raises(MlopsError, match="not int"): classify(3, "returned", env=env)


def test_another_question_needs_another_name(tmp_path):
    ready, families = prepare(orders(), "returned", "classify"), trials.find_families(["linear"])
    facts = search.facts_of(ready, "f1", search.Settings(), families)
    search.open_folder(tmp_path / "a", facts, ready)
    search.open_folder(tmp_path / "a", facts, ready)
    other = prepare(orders(150), "returned", "classify")
    with pytest.raises(MlopsError, match="there already, with other rows"):
        search.open_folder(tmp_path / "a", search.facts_of(other, "f1", search.Settings(), families), other)
    assert set(pd.read_parquet(tmp_path / "a/dataset.parquet")[SPLIT]) == set(PARTS)


def test_a_search_in_which_nothing_works_gives_up(tmp_path):
    study = search.open_study(tmp_path / "optuna.db", "maximize", 0)
    found = search.Search(None, tmp_path, None, "f1", search.Settings(max_trials=50), {"linear": None}, "1", study, deadline=float("inf"))
    for number in range(3):
        assert found.wants_more() and not found.hopeless(), number
        asked = study.ask()
        asked.set_user_attr("state", "FAILED")
        asked.set_user_attr("reason", "no such library")
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
    assert found.hopeless() and not found.wants_more() and found.best is None
    assert search.first_reason(found) == "no such library"


def test_trials_on_databricks_reach_mlflow_and_no_file_holds_the_token(monkeypatch, tmp_path):
    for name in ("DATABRICKS_TOKEN", "DATABRICKS_RUNTIME_VERSION", "DATABRICKS_ENV_VERSION"):
        monkeypatch.delenv(name, raising=False)
    assert trials.databricks_login() == {}
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    config = SimpleNamespace(host="https://workspace", authenticate=lambda: {"Authorization": "Bearer of the notebook"})
    monkeypatch.setattr("databricks.sdk.config.Config", lambda: config)
    assert trials.databricks_login() == {"DATABRICKS_HOST": "https://workspace", "DATABRICKS_TOKEN": "of the notebook"}
    told = []
    warm = SimpleNamespace(start=lambda folder, task, environment: told.extend([task, environment]))
    trials.start(warm, tmp_path, {"seed": 0}, 10)
    assert "of the notebook" not in json.dumps(told)

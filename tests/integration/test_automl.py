"""AutoML with real trials: notebooks in processes, MLflow on SQLite, kills, full disks, and notebooks run by hand."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import mlflow
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from mlflow.tracking import MlflowClient
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.metrics import log_loss

from mlops_nb.automl import dataset
from mlops_nb.automl import summary as automl
from mlops_nb.automl.dataset import SPLIT
from mlops_nb.automl.registration import automl_contender, register_best
from mlops_nb.data import tables
from mlops_nb.deployment import promotion, validation
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.models.problem_types import BINARY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FAMILY = '''"""{name}"""
import time, resource
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
SPACE = {{"penalty": {{"low": 0.1, "high": 10.0, "default": 1.0}}}}
TRUSTED = ["numpy.dtype"]
def fit(parameters, data, report):
    {before}
    prepare = ColumnTransformer([("numbers", "passthrough", data.numbers[-5:])])
    pipeline = Pipeline([("prepare", prepare), ("model", LogisticRegression(max_iter=5000))])
    pipeline.fit(data.train.fillna(0), data.train_target)
    {after}
    return pipeline
'''


def family(folder: Path, name: str, before: str = "pass", after: str = "pass") -> str:
    "Write a family file with extra code before and after the fit, and return its path."
    file = folder / f"{name}.py"
    file.write_text(FAMILY.format(name=name, before=before, after=after))
    return str(file)


def settings(state: Path, **more) -> dict:
    "Return settings with an environment whose store and folders belong to this test."
    store = f"sqlite:///{state / 'mlflow.db'}"
    env = replace(load_env("dev", root=ROOT), state=state, tracking_uri=store, registry_uri=store)
    return {"env": env, "timeout_minutes": 3, **more}


@pytest.fixture(scope="module")
def state(tmp_path_factory): return tmp_path_factory.mktemp("state")


def awkward() -> pd.DataFrame:
    "Return rows with missing values, rare categories, booleans, leakage, constants and infinite values."
    frame = load_breast_cancer(as_frame=True).frame
    frame["diagnosis"] = frame.pop("target").map({0: "malignant", 1: "benign"})
    # most rare categories do not occur in training
    frame["clinic"] = [("a", "b", None, f"rare {i}")[i % 4] for i in range(len(frame))]
    frame["left handed"] = [i % 2 == 0 for i in range(len(frame))]
    frame["known after"] = frame.diagnosis.map({"malignant": 1.0, "benign": 0.0})
    frame = frame.assign(nothing=None, always=1)
    frame.loc[:9, "mean area"] = float("inf")
    return frame


def search(state: Path, families: list[str]):  # -> the summary of a search
    return automl.classify(awkward(), "diagnosis", "log_loss", families=families, max_trials=len(families),
                           exclude_cols=["mean radius"], **settings(state))


@pytest.fixture(scope="module")
def classified(state):
    "The summary of one small search, with a family that fails."
    failing = family(state, "failing", before="raise ValueError('fit failed')")
    return search(state, ["lightgbm", "linear", failing])


def check_trials(summary, expected: dict[str, str]):  # state by family
    "Check that every trial has a notebook and a closed run, and that no file is a pickle."
    client = MlflowClient(summary.trials[0].env.tracking_uri)
    assert {t.family: t.state for t in summary.trials} == expected, [t.reason for t in summary.trials]
    for trial in summary.trials:
        run = client.get_run(trial.mlflow_run_id)
        assert run.info.experiment_id == summary.experiment.experiment_id
        assert run.info.status == ("FINISHED" if trial.state == "COMPLETE" else "FAILED")
        assert run.data.tags["automl_family"] == trial.family and trial.notebook_path.exists()
        if trial.state == "COMPLETE":
            assert run.data.metrics["val_log_loss"] == pytest.approx(trial.evaluation_metric_score)
    assert client.search_registered_models() == []
    assert client.search_runs([summary.experiment.experiment_id], "attributes.status = 'RUNNING'") == []
    artifacts = summary.trials[0].env.state / "artifacts"
    suffixes = {path.suffix for path in [*summary.folder.rglob("*"), *artifacts.rglob("*")] if path.is_file()}
    assert ".skops" in suffixes and not suffixes & {".pkl", ".pickle", ".joblib"}


def check_models(summary):
    "Check that every model gives its trial's metric on the validation part, and predicts for unseen categories."
    rows = pd.read_parquet(summary.folder / "dataset.parquet")
    validation = rows[rows[SPLIT] == "validate"]
    for trial in [t for t in summary.trials if t.state == "COMPLETE"]:
        loaded = trial.load_model()
        features = [c.name for c in loaded.metadata.get_input_schema()]
        assert "mean radius" not in features and "clinic" in features
        model = loaded.unwrap_python_model().pipeline
        loss = log_loss(validation.diagnosis, model.predict_proba(validation[features]), labels=model.classes_)
        assert loss == pytest.approx(trial.evaluation_metric_score, abs=1e-9)
    unseen = awkward().tail(3).assign(clinic="an unseen clinic")
    assert set(summary.best_trial.load_model().predict(unseen)) <= {"malignant", "benign"}


def test_every_trial_has_a_notebook_a_run_and_no_pickle(classified):
    check_trials(classified, {"lightgbm": "COMPLETE", "linear": "COMPLETE", "failing": "FAILED"})
    reason, = (t.reason for t in classified.trials if t.family == "failing")
    assert "fit failed" in reason and "failing.ipynb" not in reason


def test_models_give_the_metrics_of_their_trials(classified, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    check_models(classified)


@pytest.mark.full
def test_the_other_families_and_one_with_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    summary = search(tmp_path, ["histogram_boosting", "random_forest", family(tmp_path, "full_disk", after=limit)])
    check_trials(summary, {"histogram_boosting": "COMPLETE", "random_forest": "COMPLETE", "full_disk": "FAILED"})
    reason, = (t.reason for t in summary.trials if t.family == "full_disk")
    messages = ("File too large", "disk I/O error", "disk is full", "unable to open")
    assert any(message in reason for message in messages), reason
    check_models(summary)


def test_the_summary_has_warnings_about_the_data(classified):
    summary = classified
    warnings = "\n".join(summary.warnings)
    for text in ("nothing: left out, all values are missing", "always: left out, it is constant",
                 "mean area: 10 infinite values", "known after: alone it predicts the target almost perfectly",
                 "clinic: it has"):
        assert text in warnings, warnings
    code = [cell for cell in nbformat.read(summary.data_exploration, 4).cells if cell.cell_type == "code"]
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    for name in ("nothing", "always"):
        assert [text for text in summary.warnings if text.startswith(f"{name}:") and "left out" not in text] == []
    assert "known after" in summary._repr_html_() and summary.frame().iloc[0].state == "COMPLETE"


def test_a_notebook_run_by_hand_without_this_project_gives_the_same_metrics(classified, tmp_path):
    summary = classified
    blocked = tmp_path / "blocked" / "mlops_nb"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('mlops_nb is blocked')")
    trial = next(t for t in summary.trials if t.family == "lightgbm")
    before = MlflowClient(trial.env.tracking_uri).get_run(trial.mlflow_run_id).to_dictionary()
    parameters = json.loads((trial.notebook_path.parent / "task.json").read_text())["notebook_parameters"]
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    command = [Path(sys.executable).parent / "papermill", trial.notebook_path, tmp_path / "output.ipynb",
               "-f", tmp_path / "parameters.json", "--cwd", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(blocked.parent), "AUTOML_FOLDER": ""}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    client = MlflowClient(trial.env.tracking_uri)
    runs = client.search_runs([summary.experiment.experiment_id], "tags.automl_trial = 'by hand'")
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    metrics = {name: value for name, value in runs[0].data.metrics.items() if name != "fit_seconds"}
    assert metrics == pytest.approx(trial.metrics, abs=1e-9)
    assert client.get_run(trial.mlflow_run_id).to_dictionary() == before, "the run of the search is unchanged"


SEARCH = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from sklearn.datasets import load_wine
import test_automl as tests
from mlops_nb.automl import summary
summary.classify(load_wine(as_frame=True).frame, "target", "f1", experiment_name="wine", families=sys.argv[2].split(),
                 max_trials=2, explore=False, **tests.settings(Path(sys.argv[1])))
"""


def test_a_killed_search_resumes(tmp_path, state):
    quick = tmp_path / "quick"
    wait = f"import os; time.sleep(0 if os.path.exists({str(quick)!r}) else 60)"
    families = ["linear", family(tmp_path, "slow", before=wait)]
    command = [sys.executable, "-c", SEARCH, state, " ".join(families), Path(__file__).parent]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process.stdout as lines: first = next(line for line in lines if "trial 0" in line)
    assert "linear COMPLETE" in first
    deadline = time.monotonic() + 20
    while not list(state.glob("automl/wine/trials/*slow/task.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, "all processes of a killed search end"
    quick.touch()
    summary = automl.classify(load_wine(as_frame=True).frame, "target", "f1", experiment_name="wine", families=families,
                              max_trials=2, explore=False, **settings(state))
    killed = [t for t in summary.trials if "killed" in t.reason]
    finished = {(t.number, t.family) for t in summary.trials if t.state in ("COMPLETE", "PRUNED")}
    assert finished == {(0, "linear"), (2, "slow")}, "only the interrupted trial is repeated"
    assert [(t.number, t.family, t.state) for t in killed] == [(1, "slow", "FAILED")]
    runs = MlflowClient(summary.trials[0].env.tracking_uri).search_runs([summary.experiment.experiment_id])
    assert "RUNNING" not in {r.info.status for r in runs}


def test_the_time_limit_ends_the_search_and_its_processes(tmp_path, state):
    began = time.monotonic()
    with pytest.raises(MlopsError, match="no trial of the search succeeded: the search ended before this trial"):
        slow = family(tmp_path, "slow", before="time.sleep(100)")
        options = settings(state) | {"timeout_minutes": 0.1}
        automl.classify(load_wine(as_frame=True).frame, "target", families=[slow], explore=False, **options)
    assert time.monotonic() - began < 20
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not any("mlops_nb.jobs.warm" in command for command in commands)


def test_regression_on_a_table_with_a_split_by_time(state, spark, env):
    rows = load_diabetes(as_frame=True).frame.assign(day=pd.date_range("2020-01-01", periods=442, freq="D"))
    tables.overwrite(spark, env, "diabetes", spark.createDataFrame(rows))
    table = dataset.read_dataset("diabetes", env)
    summary = automl.regress(table, "target", "rmse", time_col="day", families=["linear"], max_trials=1,
                             **settings(state))
    split = pd.read_parquet(summary.folder / "dataset.parquet").groupby(SPLIT).day.agg(["min", "max"])
    assert split.loc["train", "max"] < split.loc["validate", "min"]
    assert split.loc["validate", "max"] < split.loc["test", "min"]
    best, limit = summary.best_trial, 70  # the standard deviation of the target is 77
    assert best.evaluation_metric_score == min(t.evaluation_metric_score for t in summary.trials) < limit
    assert best.metrics["test_root_mean_squared_error"] < limit and len(best.load_model().predict(rows.head(4))) == 4


ODD_TARGET = "$late{}\\ 'x' \"y\"/15."


def gaps(values) -> list: return [None if i % 7 == 3 else value for i, value in enumerate(values)]


def odd_columns(rows: int = 150) -> pd.DataFrame:
    "Return rows with columns that pandas and MLflow represent in many ways, and names with all kinds of characters."
    generator = np.random.default_rng(0)
    x = generator.normal(size=rows)
    whole, letters = (x * 9).astype(int).tolist(), generator.choice(["a", "b", "c'"], rows).tolist()
    columns = {
        "x": x, "flag": x > 1, "flag gap": pd.Series(gaps((x > 0).tolist()), dtype=object),
        "flag.null": pd.array(gaps((x > 0.5).tolist()), dtype="boolean"), "cat/int": pd.Categorical(gaps(whole)),
        "cut": pd.cut(x, [-9, -1, 0, 1], labels=[1, 2, 3]), "Int'64": pd.array(gaps(whole), dtype="Int64"),
        "u\"64": 2**63 + generator.integers(0, 9, rows).astype("uint64") * np.uint64(2**59),
        "big{}": [2**70 * int(k) for k in generator.integers(1, 9, rows)], "infinite": np.where(x > 1.5, np.inf, x),
        "exact": gaps([Decimal(str(round(value, 2))) for value in x]), "arrow": pd.array(gaps(whole), "int64[pyarrow]"),
        "c\nat": pd.Categorical(gaps(letters)), "string": pd.array(gaps(letters), dtype="string"), "$a_{": letters,
        "end": [date(9999, 12, 31), date(2020, 1, 1)] * (rows // 2),
        "text\\time": ["2020-01-01", "2020-02-01"] * (rows // 2),
        "at": pd.date_range("2020-01-01", periods=rows, tz="Europe/Amsterdam"), "order": range(rows)}
    is_late = x + generator.normal(size=rows) * 0.5 > 0
    return pd.DataFrame(columns).assign(**{ODD_TARGET: np.where(is_late, "yes $\\frac{", "no")})


@pytest.fixture(scope="module")
def odd_search(state):  # -> the frame, and the summary of a search on it
    frame = odd_columns()
    return frame, automl.classify(frame, ODD_TARGET, "accuracy", time_col="at", families=["lightgbm", "linear"],
                                  max_trials=2, **settings(state))


def test_a_model_takes_the_rows_that_it_learnt_from_whole_and_one_by_one(odd_search):
    frame, summary = odd_search
    excluded = {"end", "text\\time", "at", "order"}
    assert [trial.state for trial in summary.trials] == ["COMPLETE"] * 2, [trial.reason for trial in summary.trials]
    validation_rows = frame[(summary.dataset.frame[SPLIT] == "validate").to_numpy()]
    for trial in summary.trials:
        model = mlflow.pyfunc.load_model(trial.model_path)
        assert set(model.metadata.get_input_schema().input_names()) == set(frame) - excluded - {ODD_TARGET}
        whole = model.predict(frame).tolist()
        probabilities = model.predict(frame, params={"probabilities": True})
        assert [model.predict(frame.iloc[[i]])[0] for i in range(0, 150, 7)] == whole[::7]
        assert model.predict(pd.DataFrame([frame.iloc[3].to_dict()]))[0] == whole[3]
        assert model.predict(pd.read_parquet(summary.folder / "dataset.parquet")).tolist() == whole
        assert list(probabilities) == ["no", "yes $\\frac{"] and probabilities.idxmax(axis=1).tolist() == whole
        single = model.predict(frame.iloc[[7]], params={"probabilities": True})
        assert single.iloc[0].tolist() == pytest.approx(probabilities.iloc[7].tolist(), abs=1e-12)
        accuracy = (model.predict(validation_rows) == validation_rows[ODD_TARGET]).mean()
        assert accuracy == pytest.approx(trial.metrics["val_accuracy_score"]), "the trial's own predictions"


def test_the_best_trial_is_registered_and_becomes_champion(odd_search, env, spark):
    frame, summary = odd_search
    store = summary.trials[0].env
    target = replace(env, state=store.state, tracking_uri=store.tracking_uri, registry_uri=store.registry_uri)
    positive, as_of = "yes $\\frac{", date(2020, 6, 1)
    version = register_best(summary, target, "late_order", as_of, pos_label=positive)
    assert register_best(summary, target, "late_order", str(as_of)).version == version.version, "registered once"
    with pytest.raises(MlopsError, match="with threshold 0.5, not threshold 0.2"):
        register_best(summary, target, "late_order", as_of, threshold=0.2)
    expected = {"as_of": "2020-06-01", "trained_through": "2020-04-28", "held_out_from": "2020-04-29",  # days in UTC
                "held_out_to": "2020-05-28", "threshold": "0.5", "pos_label": positive, "target_col": ODD_TARGET}
    assert {name: version.tags.get(name) for name in expected} == expected
    assert version.tags["owner"] and version.tags["git_sha"] and "Best of 2 trials" in version.description
    later = frame[frame["at"] >= pd.Timestamp("2020-05-01", tz="Europe/Amsterdam")]
    names = ["flag gap", "flag.null", "Int'64", "exact", "string", "$a_{"]
    spark_frame = spark.createDataFrame(frame[names].set_axis(list("abcdef"), axis=1))
    table = dataset.read_dataset(spark_frame, env)
    best = summary.best_trial.load_model()
    from_spark = frame.assign(**dict(zip(names, [table[name] for name in table], strict=True)))
    assert best.predict(from_spark).tolist() == best.predict(frame).tolist(), "as Spark returns these columns"
    labels = (later[ODD_TARGET] == positive).to_numpy(int)
    with pytest.raises(MlopsError, match="lack the columns"): automl_contender(version, later.drop(columns="x"))
    prediction = automl_contender(version, later).prediction
    loss = -np.mean(np.log(np.where(labels == 1, prediction, 1 - prediction)))
    assert loss < math.log(2)
    checks = {"probabilities": lambda: BINARY.check_predictions(prediction, len(later))}
    with pytest.raises(MlopsError, match="has not passed validation"):
        promotion.deploy(spark, target, version, {}, {}, None)
    validation.validate_version(target, version.name, version.version, checks)

    def match(challenger, champion):
        constant = promotion.Contender("a constant", np.full(len(later), 0.5), {"threshold": 0.5})
        days, new = later["at"].dt.date.to_numpy(), automl_contender(challenger, later)
        return promotion.Match(labels, days, new, constant, BINARY)

    rule = {"mode": "compare", "metric": "log_loss", "greater_is_better": False, "min_rows": 10,
            "min_relative_change": 0, "confidence": 0.8, "floor": 0.7}
    text, comparison, _ = promotion.deploy(spark, target, version, rule, {"missed": 2, "false_warning": 1}, match)
    assert comparison.metrics.iloc[:, 0]["log_loss"] == pytest.approx(loss) and "is Champion" in text
    champion = mlflow.pyfunc.load_model(f"models:/{version.name}@champion")
    assert champion.predict(later).tolist() == best.predict(later).tolist()

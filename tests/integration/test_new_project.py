"""The files of projects that `mlops new` makes: exported, clean, valid, and with tests that pass."""
import os
from pathlib import Path

import generated
import pytest

from mlops_nb.bundle.load import load_bundle
from mlops_nb.job_homes import problems_of

VARIANTS = {f"{problem}_{'time' if has_time else 'no_time'}": (problem, has_time)
            for problem in ("binary", "regression") for has_time in (False, True)}


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> dict[str, Path]:
    "A project of each variant; its package is named after the variant."
    folder = tmp_path_factory.mktemp("new")
    with pytest.MonkeyPatch.context() as patch:
        return {name: generated.write(folder / name, generated.made_up(*variant), patch)
                for name, variant in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_package_is_what_nbdev_exports_and_the_notebooks_are_clean(projects, name):
    before = generated.contents(projects[name])
    assert {f"{name}/use_case.py", "nbs/01_use_case.ipynb", ".github/workflows/ci.yml"} <= set(before)
    generated.run_in(projects[name], "nbdev_clean", "--fname", "nbs")
    (projects[name] / name / "use_case.py").unlink()
    generated.run_in(projects[name], "nbdev_export")
    after = generated.contents(projects[name])
    assert set(after) == set(before)
    assert [path for path in before if before[path] != after[path]] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_the_code_is_tidy_and_the_bundle_is_valid(projects, name, monkeypatch):
    generated.run_in(projects[name], "ruff", "check", "--no-cache", ".")
    monkeypatch.chdir(projects[name])
    for target in ("dev", "prod"): assert problems_of(load_bundle(target=target)) == []


def test_the_command_says_that_the_bundle_is_valid(projects):
    assert "no problem" in generated.run_in(projects["binary_time"], "mlops", "validate", "-t", "prod")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_word_of_the_template_is_left(projects, name):
    files = {path: content.decode() for path, content in generated.contents(projects[name]).items()}
    for word in ("my_project", "[[", "]]", "[%", "customers", "flight"):
        assert {path for path, text in files.items() if word in text.lower()} <= {"requirements.lock"}, word


@pytest.mark.slow
def test_the_tests_of_the_projects_pass(projects, monkeypatch):
    "One process tests all four: their packages have different names."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, projects.values())))
    folders = [project / "tests" for project in projects.values()]
    first = projects["binary_time"]
    printed = generated.run_in(first, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *folders)
    assert f"{8 * len(VARIANTS)} passed" in printed


def test_a_use_case_declares_what_the_options_say(projects):
    "The time decides whether rows are held out by days or by a hash; the problem decides the metrics."
    for name, (problem, has_time) in VARIANTS.items():
        code = (projects[name] / name / "use_case.py").read_text()
        train, gates = (projects[name].joinpath("conf", f"{file}.yml").read_text() for file in ("train", "validation"))
        assert f"problem={problem.upper()}" in code and ("time='ordered_at'" in code) == has_time
        assert ("held_out_days:" in train, "held_out_share:" in train) == (has_time, not has_time)
        metric = "log_loss" if problem == "binary" else "root_mean_squared_error"
        assert f"metric: {metric}" in gates


EDITED = """
import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from mlops_nb.models.learners import sklearn_learner

def weight_squared(weight: float) -> float:
    "The square of the weight."
    return np.square(weight)

def make_forest(**parameters):
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    encoded = make_column_transformer((codes, ["carrier"]), remainder="passthrough")
    return make_pipeline(encoded, RandomForestRegressor(random_state=1, **parameters))

USE_CASE = table_use_case(
    SOURCE, model="days", problem=REGRESSION, features=["carrier", "weight_squared"], categorical=("carrier",),
    functions={weight_squared: ()}, learner=sklearn_learner(make_forest))
"""


@pytest.mark.slow
@pytest.mark.full
def test_a_project_takes_an_on_demand_feature_and_an_estimator_of_scikit_learn(tmp_path, monkeypatch):
    "As docs/declarations.md shows them; the weight is looked up for the function, and is no feature itself."
    project = generated.write(tmp_path / "parcels", generated.made_up("regression", False), monkeypatch)
    with (project / "parcels/use_case.py").open("a") as module: module.write(EDITED)
    settings = project / "conf/train.yml"
    text = settings.read_text()
    start, end = text.index("rounds:"), text.index("min_slice_rows")
    settings.write_text(text[:start] + "parameters: {n_estimators: 20}\n" + text[end:text.index("search_space")])
    generated.commit(project)
    generated.run_in(project, "mlops", "run", "features")
    assert "dev.parcels.days v1 is Champion" in generated.run_in(project, "mlops", "run", "train")
    assert "400 rows" in generated.run_in(project, "mlops", "run", "batch_inference")

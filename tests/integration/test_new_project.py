"""The files of projects that `mlops new` makes: exported, clean, valid, and with tests that pass."""
import os
from pathlib import Path

import generated
import pytest

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
def test_the_code_is_tidy_and_the_bundle_is_valid(projects, name):
    generated.run_in(projects[name], "ruff", "check", "--no-cache", ".")
    for target in ("dev", "prod"):
        assert "no problem" in generated.run_in(projects[name], "mlops", "validate", "-t", target)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_word_of_the_template_is_left(projects, name):
    files = {path: content.decode() for path, content in generated.contents(projects[name]).items()}
    for word in ("my_project", "[[", "]]", "[%", "customers", "flight"):
        assert {path for path, text in files.items() if word in text.lower()} <= {"requirements.lock"}, word


def test_the_tests_of_the_projects_pass(projects, monkeypatch):
    "One process tests all four: their packages have different names."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, projects.values())))
    folders = [project / "tests" for project in projects.values()]
    first = projects["binary_time"]
    printed = generated.run_in(first, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *folders)
    assert f"{7 * len(VARIANTS)} passed" in printed


def test_a_use_case_declares_what_the_options_say(projects):
    "The time decides whether rows are held out by days or by a hash; the problem decides the metrics."
    for name, (problem, has_time) in VARIANTS.items():
        code = (projects[name] / name / "use_case.py").read_text()
        train, gates = (projects[name].joinpath("conf", f"{file}.yml").read_text() for file in ("train", "validation"))
        assert f"problem={problem.upper()}" in code and ("time='ordered_at'" in code) == has_time
        assert ("held_out_days:" in train, "held_out_share:" in train) == (has_time, not has_time)
        metric = "log_loss" if problem == "binary" else "root_mean_squared_error"
        assert f"metric: {metric}" in gates

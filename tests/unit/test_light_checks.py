"""The checks of a bundle import LightGBM alone, unless a learner may need its wrappers for scikit-learn."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
from pathlib import Path
from mlops_nb.bundle.load import load_bundle
from mlops_nb.job_homes import problems_of
problems = problems_of(load_bundle(Path(sys.argv[1])))
print(*problems, sep="\\n")
print("imported" if "sklearn" in sys.modules else "not imported")
"""
LEARNER = """
from mlops_nb.models.learners import sklearn_learner

def make(n_estimators: int):
    from lightgbm import LGBMClassifier
    return LGBMClassifier(n_estimators=n_estimators, verbose=-1)

LEARNER = sklearn_learner(make, ("lightgbm",))
"""


def checked(root: Path) -> list[str]:
    "What a new process prints of the checks of a project."
    command = [sys.executable, "-c", CHECK, root]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def test_the_default_learner_is_checked_without_scikit_learn():
    assert checked(ROOT) == ["", "not imported"]


@pytest.fixture
def other_learner(tmp_path):
    "This project with an estimator of LightGBM's wrappers, in the package `wrapped`."
    root = tmp_path / "project"
    for name in ("nbs", "conf", "resources"): shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "databricks.yml", root)
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / "wrapped").mkdir()
    (root / "wrapped/__init__.py").touch()
    (root / "wrapped/use_case.py").write_text(
        f"from dataclasses import replace\nfrom mlops_nb.flights import use_case\n{LEARNER}\n"
        "def as_use_case(one): return replace(one, learner=LEARNER)\n\nFLIGHTS = as_use_case(use_case.FLIGHTS)\n")
    for notebook in (root / "nbs/flights").glob("*.ipynb"):
        notebook.write_text(notebook.read_text().replace("mlops_nb.flights.use_case import", "wrapped.use_case import"))
    train = yaml.safe_load((ROOT / "conf/train.yml").read_text()) | {"parameters": {"n_estimators": 20}}
    of_other = ("rounds", "search_space", "options")
    (root / "conf/train.yml").write_text(yaml.safe_dump({k: v for k, v in train.items() if k not in of_other}))
    return root


def test_an_estimator_of_the_wrappers_can_be_checked(other_learner):
    *problems, end = checked(other_learner)
    assert end == "imported"
    assert [problem for problem in problems if "conf/train.yml" in problem] == []

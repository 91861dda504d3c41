"""A later version of the platform in a project that was edited: `mlops update`."""
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import mlops_nb
from mlops_nb.bundle.load import load_bundle
from mlops_nb.cli import app
from mlops_nb.errors import MlopsError
from mlops_nb.job_homes import problems_of
from mlops_nb.projects import update
from mlops_nb.projects.data_files import read_data
from mlops_nb.projects.new_project import Options, plan_project, write_project
from mlops_nb.projects.platform_wheel import built_wheel, packed_wheel

ROOT = Path(mlops_nb.__file__).parents[1]
TEMPLATE = "mlops_nb/projects/template/"
DAMPED = "  lambda_l2: 5\n"
NEW_TASK_NOTEBOOK = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}

pytestmark = pytest.mark.slow


def git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.com", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", ".")
    git(root, "commit", "-qm", "a state")


def customers(rows: int = 400) -> pd.DataFrame:
    random = np.random.default_rng(1)
    visits = random.poisson(3, rows)
    return pd.DataFrame({"customer": range(rows), "visits": visits, "plan": random.choice(["a", "b", "c"], rows),
                         "age": random.integers(18, 80, rows),
                         "leaves": np.where(random.random(rows) * 6 > visits, "yes", "no")})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel of this clone."
    return built_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, wheel) -> Path:
    "A new project, committed. Read-only."
    folder = tmp_path_factory.mktemp("projects")
    customers().to_csv(folder / "customers.csv", index=False)
    data = read_data(str(folder / "customers.csv"))
    options = Options(str(folder / "customers.csv"), "leaves", ("customer",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlops_nb.projects.new_project.platform_wheel", lambda vendor: shutil.copy(wheel, vendor))
        project = plan_project(folder / "club", options, data, date(2025, 1, 1), mlops_nb.__version__)
        write_project(folder / "club", project, data)
    git(folder / "club", "init", "-q")
    commit(folder / "club")
    return folder / "club"


@pytest.fixture
def project(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "club"))


def later_wheel(wheel: Path, folder: Path, version: str = "9.0.0", changes=lambda files: None) -> Path:
    "The wheel of a later version, whose template differs."
    with zipfile.ZipFile(wheel) as archive: files = {name: archive.read(name) for name in archive.namelist()}
    old = mlops_nb.__version__
    files = {name.replace(f"mlops_nb-{old}", f"mlops_nb-{version}"): content for name, content in files.items()
             if not name.endswith("/RECORD")}
    metadata = f"mlops_nb-{version}.dist-info/METADATA"
    files[metadata] = files[metadata].replace(f"Version: {old}".encode(), f"Version: {version}".encode())
    changes(files)
    folder.mkdir(exist_ok=True)
    return packed_wheel(files, version, folder)


def edit(files: dict[str, bytes], name: str, old: str, new: str) -> None:
    text = files[TEMPLATE + name].decode()
    assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
    files[TEMPLATE + name] = text.replace(old, new).encode()


def edit_file(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def changed_template(files: dict[str, bytes]) -> None:
    "What the later version changes: settings, a notebook, a job, the README, a lock; a file more, a file less."
    edit(files, "conf/train.yml.jinja", DAMPED, "  lambda_l2: 7\n")
    edit(files, "conf/train.yml.jinja", "rounds: 150", "rounds: 160")
    edit(files, "nbs/02_ingest.ipynb", "# Ingest", "# The ingest")
    edit(files, "nbs/01_use_case.ipynb", "# Use case", "# The use case")
    edit(files, "resources/explore.job.yml", "name: explore\n", "name: explore\n          timeout_seconds: 3600\n")
    edit(files, "README.md.jinja", "make test\n", "make test check\n")
    files[TEMPLATE + "docs/decisions.md.jinja"] = b"# Decisions of [[ package ]] [[ tone | default('here') ]]\n"
    files[TEMPLATE + "conf/README.md"] = b"The platform's text\n"
    del files[TEMPLATE + "resources/reproduce.job.yml"]
    files[TEMPLATE + "requirements.lock"] += b"a-new-package==1.0\n"


def edited_by_its_team(project: Path) -> None:
    edit_file(project / "conf/train.yml", DAMPED, "  lambda_l2: 9\n")
    edit_file(project / "conf/governance.yml", "The team of club", "Ada")
    edit_file(project / "README.md", "# club", "# The club")
    notebook = project / "nbs/01_use_case.ipynb"
    edit_file(notebook, "'visits', ", "")
    contract = project / "conf/features.yml"
    contract.write_text("".join(line for line in contract.read_text().splitlines(True) if "visits:" not in line))
    own = {**NEW_TASK_NOTEBOOK, "cells": [{"cell_type": "markdown", "id": "own", "metadata": {}, "source": ["# Ours"]}]}
    (project / "nbs/20_own.ipynb").write_text(json.dumps(own, indent=1, sort_keys=True) + "\n")
    (project / "conf/README.md").write_text("Our text\n")
    (project / "resources/compare.job.yml").unlink()
    export(project)
    commit(project)


def run(project: Path, *command: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(project), str(ROOT)])
    return subprocess.run([sys.executable, *command], cwd=project, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths, "MLOPS_STATE": str(project / ".mlops")})


def export(project: Path) -> None:
    assert update.export_failure(project) == ""


def contents(project: Path) -> dict[str, bytes]:
    return {str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*")
            if path.is_file() and not {".git", "__pycache__", ".mlops"} & set(path.parts)}


@pytest.fixture(scope="module")
def edited(written, tmp_path_factory) -> Path:
    "A project that its team has edited, committed. Read-only."
    project = Path(shutil.copytree(written, tmp_path_factory.mktemp("edited") / "club"))
    edited_by_its_team(project)
    return project


@pytest.fixture(scope="module")
def updated(edited, wheel, tmp_path_factory) -> tuple[Path, update.PlatformUpdate]:
    "An edited project after an update. Read-only."
    folder = tmp_path_factory.mktemp("updated")
    project = Path(shutil.copytree(edited, folder / "club"))
    return project, update.update_project(project, later_wheel(wheel, folder, changes=changed_template))


def test_the_edits_of_the_team_are_kept(updated):
    project, result = updated
    assert "owner: Ada" in (project / "conf/governance.yml").read_text()
    assert (project / "nbs/20_own.ipynb").exists() and not (project / "resources/compare.job.yml").exists()
    use_case = (project / "nbs/01_use_case.ipynb").read_text()
    assert "features=['plan', 'age']" in use_case and "# The use case" in use_case
    assert "features=['plan', 'age']" in (project / "club/use_case.py").read_text()


def test_the_changes_of_the_platform_arrive(updated):
    project, result = updated
    assert "# The ingest" in (project / "nbs/02_ingest.ipynb").read_text()
    assert "timeout_seconds: 3600" in (project / "resources/explore.job.yml").read_text()
    readme = (project / "README.md").read_text()
    assert readme.startswith("# The club\n") and "make test check\n" in readme
    assert (project / "docs/decisions.md").read_text() == "# Decisions of club here\n"
    assert not (project / "resources/reproduce.job.yml").exists()
    assert "a-new-package==1.0" in (project / "requirements.lock").read_text()
    assert [path.name for path in (project / "vendor").iterdir()] == ["mlops_nb-9.0.0-py3-none-any.whl"]
    assert json.loads((project / "mlops.json").read_text())["platform_version"] == "9.0.0"
    dependencies = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    assert dependencies == ["mlops_nb>=9.0.0"]


def test_conflicts_are_marked_or_left_to_a_person(updated):
    project, result = updated
    assert result.paths("conflict") == ["conf/README.md", "conf/train.yml"]
    settings = (project / "conf/train.yml").read_text()
    assert ("<<<<<<< this project\n  lambda_l2: 9\n" in settings and settings.count("<<<<<<<") == 1
            and "  lambda_l2: 7\n>>>>>>> mlops_nb 9.0.0\n" in settings and "rounds: 160" in settings)
    assert (project / "conf/README.md").read_text() == "Our text\n"
    assert (project / "conf/README.md.new").read_text() == "The platform's text\n"


def test_every_file_is_reported_as_what_became_of_it(updated):
    project, result = updated
    assert result.export_failure == "" and not result.was_interrupted
    assert result.paths("added") == ["docs/decisions.md"] and result.paths("removed") == ["resources/reproduce.job.yml"]
    assert result.paths("merged") == ["README.md", "nbs/01_use_case.ipynb"] and result.paths("kept") == []
    assert result.paths("updated") == ["nbs/02_ingest.ipynb", "pyproject.toml", "requirements.lock",
                                       "resources/explore.job.yml"]
    changed = set(re.findall(r"^.. (.+)$", git(project, "status", "--porcelain", "-uall"), re.M))
    reported = {path for path, state in result.states.items() if state not in ("unchanged", "kept")}
    vendor = {f"vendor/mlops_nb-{version}-py3-none-any.whl" for version in (mlops_nb.__version__, "9.0.0")}
    assert changed == (reported - {"conf/README.md"}) | vendor | {"conf/README.md.new", "mlops.json"}


def test_the_project_is_valid_and_its_tests_pass(updated, tmp_path):
    project = Path(shutil.copytree(updated[0], tmp_path / "club"))
    settings = (project / "conf/train.yml").read_text()
    theirs = re.sub(r"<<<<<<<.*?=======\n(.*?)>>>>>>>[^\n]*\n", r"\1", settings, flags=re.S)
    (project / "conf/train.yml").write_text(theirs)
    commit(project)
    export(project)
    assert git(project, "status", "--porcelain") == ""  # the exported modules are those of the notebooks
    assert [problem for target in ("dev", "prod") for problem in problems_of(load_bundle(project, target))] == []
    process = run(project, "-m", "pytest", "-q")
    assert process.returncode == 0 and re.search(r"[5-9] passed", process.stdout), process.stdout + process.stderr


def test_a_second_update_changes_nothing(updated, wheel, tmp_path):
    project = Path(shutil.copytree(updated[0], tmp_path / "club"))
    before = contents(project)
    assert update.update_project(project, project / "vendor/mlops_nb-9.0.0-py3-none-any.whl").states == {}
    assert contents(project) == before
    commit(project)
    again = update.update_project(project, later_wheel(wheel, tmp_path, "9.0.1", changed_template))
    assert again.paths("updated") == ["pyproject.toml"]
    assert set(again.states.values()) == {"updated", "unchanged"}


def test_an_interrupted_update_is_finished_by_the_next_one(updated, edited, wheel, tmp_path, monkeypatch):
    project = Path(shutil.copytree(edited, tmp_path / "club"))
    path = later_wheel(wheel, tmp_path, changes=changed_template)
    replace_file = update.replace_file
    for count in (0, 3, 8):  # files written before the interruption
        number = iter(range(100))
        def interrupted(*arguments, count=count, number=number):
            if next(number) == count: raise KeyboardInterrupt
            replace_file(*arguments)
        monkeypatch.setattr(update, "replace_file", interrupted)
        with pytest.raises(KeyboardInterrupt): update.update_project(project, path)
    monkeypatch.setattr(update, "replace_file", replace_file)
    result = update.update_project(project, path)
    assert result.was_interrupted and result.states == updated[1].states
    assert contents(project) == contents(updated[0])
    assert not update.plan_folder(project).exists()


def test_an_edit_after_an_interruption_stops_the_update(project, wheel, tmp_path, monkeypatch):
    path = later_wheel(wheel, tmp_path, changes=changed_template)
    monkeypatch.setattr(update, "write_planned", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError): update.update_project(project, path)
    monkeypatch.undo()
    (project / "README.md").write_text("My own\n")
    before = contents(project)
    with pytest.raises(MlopsError, match="README.md was changed after an update to mlops_nb 9.0.0 was interrupted"):
        update.update_project(project, path)
    assert contents(project) == before


def test_refusals_write_nothing(project, wheel, tmp_path):
    before = contents(project)
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(MlopsError, match=message): update.update_project(project, path)
        assert contents(project) == before and not update.plan_folder(project).exists()
    later = later_wheel(wheel, tmp_path)
    refuses(later_wheel(wheel, tmp_path, "0.0.9"), "has mlops_nb 0.1.0, which is later than 0.0.9")
    damaged = Path(shutil.copy(later, tmp_path / "mlops_nb-9.0.1-py3-none-any.whl"))
    refuses(damaged, "metadata of .* name mlops_nb 9.0.0, not mlops_nb 9.0.1")
    content = bytearray(later.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    refuses(damaged, "is damaged")
    needs_more = later_wheel(wheel, tmp_path, "9.0.2", lambda files: edit(files, "README.md.jinja", "# [[ package ]]",
                                                                           "# [[ owner ]]"))
    refuses(needs_more, "9.0.2 cannot render its template .* 'owner' is undefined")
    (project / "notes.txt").write_text("not committed")
    before = contents(project)
    refuses(later, "1 files have changes that are not committed: notes.txt")


def test_the_command_takes_an_earlier_version_with_force(project, wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(update, "export_failure", lambda root: "nbdev is not installed")
    earlier = later_wheel(wheel, tmp_path, "0.0.9", lambda files: edit(files, "conf/train.yml.jinja", DAMPED, ""))
    assert isinstance(CliRunner().invoke(app, ["update", str(earlier)]).exception, MlopsError)
    result = CliRunner().invoke(app, ["update", str(earlier), "--force"], catch_exceptions=False)
    assert result.exit_code == 0 and f"vendor/: mlops_nb {mlops_nb.__version__} → 0.0.9" in result.output
    assert "run make tidy: nbdev is not installed" in result.output
    assert "mlops_nb>=0.0.9" in (project / "pyproject.toml").read_text()
    assert "lambda_l2: 5" not in (project / "conf/train.yml").read_text()


def test_the_command_ends_with_1_for_a_conflict(edited, wheel, tmp_path, monkeypatch):
    project = Path(shutil.copytree(edited, tmp_path / "club"))
    monkeypatch.chdir(project)
    monkeypatch.setattr(update, "export_failure", lambda root: "")
    def changed(files: dict[str, bytes]) -> None: edit(files, "nbs/01_use_case.ipynb", "# Use case", "# Case")
    later = later_wheel(wheel, tmp_path, changes=changed)
    notebook = project / "nbs/01_use_case.ipynb"
    edit_file(notebook, "# Use case", "# Our case")
    commit(project)
    before = notebook.read_text()
    result = CliRunner().invoke(app, ["update", str(later)], catch_exceptions=False)
    assert result.exit_code == 1 and "in conflict" in result.output and "compare each file NAME.new" in result.output
    assert notebook.read_text() == before
    assert "# Case" in (project / "nbs/01_use_case.ipynb.new").read_text()


@pytest.mark.parametrize(("target", "exclude"), [("dev", []), ("staging", ["data/**"]), ("prod", ["data/**"])])
def test_what_databricks_gets(written, target, exclude):
    bundle = load_bundle(written, target, {"source": f"/Volumes/{target}/club/landing/customers.csv"})
    assert bundle.data["sync"]["exclude"] == ["tests/**", "docs/**", *exclude]
    parameters = {entry["name"]: entry["default"] for entry in bundle.jobs["features"]["parameters"]}
    assert parameters["source"] == f"/Volumes/{target}/club/landing/customers.csv"
    for name, job in bundle.jobs.items():
        keys = {task["environment_key"] for task in job["tasks"] if "notebook_task" in task}
        packages = [entry["spec"]["dependencies"] for entry in job.get("environments", [])]
        assert keys <= {entry["environment_key"] for entry in job.get("environments", [])}, name
        assert all(listed[:2] == ["./vendor/*.whl", "./dist/*.whl"] for listed in packages)
    assert len(list(written.glob("vendor/*.whl"))) == 1
    assert "pip wheel --no-deps --wheel-dir dist ." in bundle.data["artifacts"]["wheel"]["build"]


def test_the_wheel_of_a_clone_has_its_files(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {"mlops_nb": "mlops_nb", **{name.replace(".", "/"): folder for name, folder
                                          in project["tool"]["setuptools"]["package-dir"].items()}}
    expected = {f"{name}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
                for name, folder in folders.items() for path in (ROOT / folder).rglob("*")
                if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"mlops_nb-{mlops_nb.__version__}.dist-info/METADATA").decode()
    assert packed == expected
    requirements = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.M)
    assert sorted(requirements) == sorted(re.match(r"[\w.-]+", text)[0] for text in project["project"]["dependencies"])


def test_an_installed_wheel_is_packed_again(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive: archive.extractall(tmp_path / "installed")
    code = ("from pathlib import Path; from mlops_nb.projects.platform_wheel import platform_wheel, source_root; "
            "assert source_root() is None; platform_wheel(Path('.'))")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")})
    assert process.returncode == 0, process.stderr
    files = [{name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
             for archive in map(zipfile.ZipFile, (wheel, tmp_path / wheel.name))]
    assert files[0] == files[1]


def test_equal_sources_give_equal_wheels_and_an_untouched_clone(wheel, tmp_path):
    before = git(ROOT, "status", "--porcelain", "--ignored")
    assert built_wheel(ROOT, tmp_path).read_bytes() == wheel.read_bytes()
    assert git(ROOT, "status", "--porcelain", "--ignored") == before

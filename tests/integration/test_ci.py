"""What CI runs: a job in a temporary catalog, dropped or kept, and the check of the metrics on a worse commit."""
import json
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from states import MODEL, ROOT, TRAINED_AS_OF, client_of, env_of, environment, mlops

from mlops_nb.bundle.load import load_bundle
from mlops_nb.ci import commit_metrics, metric_change, temporary_places
from mlops_nb.ci.integration import examine_command, run_integration
from mlops_nb.ci.temporary_places import temporary_env
from mlops_nb.deployment import copying
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.temporary_catalogs import temporary_catalog
from mlops_nb.workflow import deploying

pytestmark = pytest.mark.slow
WRITES = """from mlops_nb import get_spark, load_env, tables
env = load_env(target, {"catalog": catalog}); spark = get_spark(env)
tables.merge(spark, env, "numbers", spark.sql("SELECT 1 AS id"), ["id"])"""


@pytest.fixture
def pipelines(project, monkeypatch):
    "A project whose job writes a table of the catalog, then succeeds or fails by a parameter."
    names = 'target: str = "dev"\ncatalog: str = ""\nbroken: str = "no"'
    notebook = project.notebook("writes", WRITES, 'if broken == "yes": raise ValueError("the | second cell")',
                                parameters=names)
    project.job("integration", [{"task_key": "write", "notebook_task": notebook}], parameters=[
        {"name": "target", "default": "${bundle.target}"}, {"name": "catalog", "default": "${var.catalog}"},
        {"name": "broken", "default": "no"}])
    monkeypatch.chdir(project.root)
    return load_env("dev", root=project.root)


def places(env): return sorted(path.name for path in (env.state / "ci").iterdir())


def test_a_success_leaves_the_report_and_no_catalog(pipelines, tmp_path):
    result = run_integration(pipelines, "integration", {}, {}, tmp_path / "report")
    assert (result.exit_code, result.kept, places(pipelines)) == (0, False, [])
    text = result.report.read_text()
    assert text.startswith("### Integration on dev: SUCCESS in ")
    assert f"- catalog: {result.place.catalog} (dropped)" in text
    assert (tmp_path / "report/notebooks/write.ipynb").is_file() and (tmp_path / "report/page.html").is_file()


def test_a_failure_names_notebook_and_cell_and_its_catalog_can_be_examined_until_it_is_swept(pipelines, tmp_path):
    result = run_integration(pipelines, "integration", {}, {"broken": "yes"}, tmp_path / "report")
    assert (result.exit_code, result.kept, places(pipelines)) == (1, True, [result.place.catalog])
    text = result.report.read_text()
    for words in ("**write** FAILED: notebook `writes.ipynb`, cell `[", "ValueError: the | second cell",
                  "Executed copy: `notebooks/write.ipynb`", examine_command(result.place)): assert words in text, text
    copy = json.loads((tmp_path / "report/notebooks/write.ipynb").read_text())
    assert any(o["output_type"] == "error" for cell in copy["cells"] for o in cell.get("outputs", []))
    command = f"env {examine_command(result.place)}"
    shown = subprocess.run(command, shell=True, cwd=pipelines.root, capture_output=True, text=True,
                           env=environment(pipelines.state) | {"PATH": f"{ROOT}/.venv/bin:/usr/bin:/bin"})
    assert f"{result.place.catalog}.s.numbers" in shown.stdout, shown.stdout + shown.stderr
    later = datetime.now(UTC) + timedelta(days=1, minutes=1)
    assert temporary_places.sweep(pipelines, later - timedelta(days=1), timedelta(days=1)) == []
    assert temporary_places.sweep(pipelines, later, timedelta(days=1)) == [result.place.catalog]
    assert places(pipelines) == []


def test_mistakes_are_seen_before_a_catalog_is_made(pipelines, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/thesis.txt").touch()
    with pytest.raises(MlopsError, match="has other files than a report"):
        run_integration(pipelines, "integration", {}, {}, tmp_path / "report")
    assert run_integration(pipelines, "no_job", {}, {}, tmp_path / "other").exit_code == 2
    assert not (pipelines.state / "ci").exists() or places(pipelines) == []


def test_tables_and_models_in_shared_places_are_dropped_too(pipelines, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    monkeypatch.setenv("MLOPS_LAKEHOUSE", str(tmp_path / "lake"))
    shutil.copy(pipelines.state / "mlflow.db", tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    env = load_env("dev", root=pipelines.root)
    place = temporary_env(env, temporary_catalog("dev", datetime.now(UTC)))
    client = MlflowClient(place.tracking_uri, place.registry_uri)
    for name in (f"{place.catalog}.s.model", "dev.s.model"): client.create_registered_model(name)
    for name in (place.experiment("model"), env.experiment("model")): client.create_experiment(name)
    for catalog in (place.catalog, "dev"): (tmp_path / "lake" / catalog / "s/t").mkdir(parents=True)
    temporary_places.drop_place(place)
    assert [model.name for model in client.search_registered_models()] == ["dev.s.model"]
    assert {e.name for e in client.search_experiments()} == {"Default", "/dev/model"}
    assert [path.name for path in (tmp_path / "lake").iterdir()] == ["dev"]


def test_a_commit_is_compared_with_the_champion_of_a_shared_registry(own_trained, tmp_path, monkeypatch):
    "The Champion is a copy of the version of dev, so nothing changes; both are scored on rows after their training."
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own_trained / 'mlflow.db'}")
    monkeypatch.delenv("MLOPS_STATE", raising=False)
    here = replace(load_env("dev", root=ROOT), state=tmp_path, lakehouse=str(own_trained / "lakehouse"))
    use_case = commit_metrics.project_use_case(load_bundle(ROOT, "dev"))
    champion = commit_metrics.shared_champion(here, use_case)
    assert (champion.name, int(champion.version)) == (MODEL, 1)
    copying.copy_version(replace(load_env("prod", root=ROOT), state=tmp_path, read=("prod", "dev")), f"{MODEL}/1")
    client_of(own_trained).set_registered_model_alias(MODEL.replace("dev.", "prod."), "champion", "1")
    champion = commit_metrics.shared_champion(here, use_case)
    assert champion.name == MODEL.replace("dev.", "prod.")
    change = commit_metrics.champion_change(use_case, here, champion, deploying.deployment_settings(use_case, here))
    assert list(change.metrics) == [f"{MODEL} v1", f"{champion.name} v1"] and change.comparison.change == 0
    assert change.comparison.rows > 20_000 and not metric_change.is_worse(change)


@pytest.fixture(scope="module")
def worse_commit(tmp_path_factory):
    "A worktree of this commit in which conf/train.yml trains too few rounds, with the files that are not committed."
    folder = tmp_path_factory.mktemp("worse") / "project"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, folder], check=True)
    for name in ("mlops_nb", "nbs", "conf", "resources", "databricks.yml"):
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else: shutil.copy(source, folder / name)
    train = folder / "conf/train.yml"
    train.write_text(train.read_text().replace("\nrounds: 200\n", "\nrounds: 12\n"))
    assert "rounds: 12\n" in train.read_text()
    return folder


@pytest.mark.full
def test_a_commit_that_lowers_the_metric_is_refused_unless_it_is_accepted(worse_commit, own_trained, tmp_path):
    "The results of main are those of the shared state, which was trained on the same rows."

    state, base = tmp_path / "state", subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=worse_commit, capture_output=True, text=True, check=True).stdout.strip()
    results = metric_change.read_results(env_of(own_trained), MODEL.split(".")[2], f"main ({base[:7]})")
    metric_change.save_results(results, state / "ci/results" / f"{base}_{TRAINED_AS_OF}")
    printed = mlops(state, "ci", "metrics", "--base", "HEAD", "--report", tmp_path / "report", code=1, cwd=worse_commit)
    for words in ("**Refused:** this commit lowers the metric. `log_loss` is", "To mend it: correct the commit, or",
                  f"| metric | main ({base[:7]}) | this commit | change |"): assert words in printed, printed
    assert (tmp_path / "report/losses.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (state / "ci").iterdir()) == ["results"]
    rows = metric_change.load_results(state / "ci/results" / f"{base}_{TRAINED_AS_OF}").predictions
    assert rows.row.is_unique and len(rows) == results.metrics["example_count"]
    loss = -np.log(np.where(rows.label == 1, rows.prediction, 1 - rows.prediction)).mean()
    assert loss == pytest.approx(results.metrics["log_loss"], rel=1e-9)

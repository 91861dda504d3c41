"""What a made-up project learns from: labels that are known late, facts after as_of, and rows that are held out."""
import shutil
import zlib
from datetime import date, timedelta
from pathlib import Path

import generated
import numpy as np
import pandas as pd
import pytest
import yaml
from states import client_of

pytestmark = pytest.mark.slow
OF_THE_RUN = {"git_sha", "git_dirty", "read_versions"}  # tags that name the run, not the data


def trained(project: Path, as_of: date) -> Path:
    "Commit the project, and run the jobs `features` and the training of `train` as of a day."
    generated.commit(project)
    generated.run_in(project, "mlops", "run", "features", "--param", f"as_of={as_of}")
    generated.run_in(project, "mlops", "run", "train", "--only", "train", "--param", f"as_of={as_of}")
    return project


def other_project(project: Path, folder: Path, frame: pd.DataFrame) -> Path:
    "The same project in another folder, on other data."
    copy = Path(shutil.copytree(project, folder / project.name, ignore=shutil.ignore_patterns(".git", ".mlops")))
    frame.to_csv(copy / "data" / f"{project.name}.csv", index=False)
    return copy


def rows(project: Path, name: str) -> pd.DataFrame:
    from deltalake import DeltaTable
    table = DeltaTable(str(project / ".mlops/lakehouse/dev" / project.name / name)).to_pyarrow_dataset().to_table()
    return table.to_pandas().sort_values("order_id", ignore_index=True)


def only_version(project: Path):
    "The registered version, and the data of its run."
    client = client_of(project / ".mlops")
    version, = client.search_model_versions(f"name = 'dev.{project.name}.days'")
    return version, client.get_run(version.run_id).data


def predictions(project: Path, frame: pd.DataFrame) -> np.ndarray:
    "Predictions of the registered version for rows of the table."
    import mlflow
    mlflow.set_tracking_uri(f"sqlite:///{project / '.mlops/mlflow.db'}")
    model = mlflow.pyfunc.load_model(only_version(project)[0].source)
    return np.asarray(model.predict(frame[model.metadata.signature.inputs.input_names()]), float)


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    "A project whose labels are known three days late, its table, and the day as of which it is trained."
    frame = generated.made_up("regression", has_time=True, is_late=True)
    with pytest.MonkeyPatch.context() as patch:
        project = generated.write(tmp_path_factory.mktemp("late") / "orders", frame, patch)
    jobs = yaml.safe_load((project / "resources/demo.job.yml").read_text())["resources"]["jobs"]
    as_of = next(p["default"] for p in jobs["demo"]["parameters"] if p["name"] == "first_day")
    return trained(project, date.fromisoformat(as_of)), frame, date.fromisoformat(as_of)


def test_a_label_that_is_known_later_is_not_in_the_bronze_table(late):
    project, frame, as_of = late
    questions = frame[frame.ordered_at < pd.Timestamp(as_of)]
    expected = questions.days.where(questions.known_on < pd.Timestamp(as_of))
    assert 0 < expected.isna().sum() < len(expected)
    bronze = rows(project, "bronze_orders")
    assert bronze.order_id.tolist() == questions.order_id.tolist()
    np.testing.assert_array_equal(bronze.days.to_numpy(float), expected.to_numpy(float))


def test_a_version_learns_from_labels_that_were_known_when_its_held_out_days_began(late):
    project, frame, as_of = late
    version, run = only_version(project)
    begin = pd.Timestamp(version.tags["held_out_from"])
    training = frame[(frame.ordered_at < begin) & (frame.known_on < begin)]
    held_out = frame[(frame.ordered_at >= begin) & (frame.known_on < pd.Timestamp(as_of))]
    assert len(training) < (frame.ordered_at < begin).sum()  # the rule excludes rows
    assert (int(run.params["training_rows"]), run.metrics["example_count"]) == (len(training), len(held_out))
    assert float(version.tags["baseline_value"]) == pytest.approx(training.days.mean())
    errors = predictions(project, held_out) - held_out.days.to_numpy()
    assert run.metrics["root_mean_squared_error"] == pytest.approx(np.sqrt((errors**2).mean()))


def test_without_any_fact_after_as_of_the_tables_and_the_version_are_the_same(late, tmp_path):
    "Later rows are deleted, and labels that were known later are empty."
    project, frame, as_of = late
    known = frame[frame.ordered_at < pd.Timestamp(as_of)].copy()
    known.loc[known.known_on >= pd.Timestamp(as_of), ["days", "known_on"]] = None
    blind = trained(other_project(project, tmp_path, known), as_of)
    assert len(known) < len(frame)
    for name in ("bronze_orders", "orders_features"):
        pd.testing.assert_frame_equal(rows(project, name), rows(blind, name), check_exact=True)
    (version, run), (other, other_run) = only_version(project), only_version(blind)
    assert (run.metrics, run.params) == (other_run.metrics, other_run.params)
    assert {k: v for k, v in version.tags.items() if k not in OF_THE_RUN} == {
        k: v for k, v in other.tags.items() if k not in OF_THE_RUN}


@pytest.mark.full
def test_a_run_as_of_an_earlier_day_removes_no_label_that_is_known(late):
    project, frame, as_of = late
    later = as_of + timedelta(days=10)
    for day in (later, as_of):
        printed = generated.run_in(project, "mlops", "run", "features", "--only", "ingest", "--param", f"as_of={day}")
    questions = frame[frame.ordered_at < pd.Timestamp(later)]
    expected = questions.days.where(questions.known_on < pd.Timestamp(later))
    np.testing.assert_array_equal(rows(project, "bronze_orders").days.to_numpy(float), expected.to_numpy(float))
    known = frame[(frame.ordered_at < pd.Timestamp(as_of)) & (frame.known_on < pd.Timestamp(as_of))]
    assert f"{len(known)} of them with a label known before {as_of}" in printed, "the counts are those of the day"


@pytest.mark.full
def test_no_held_out_label_of_rows_without_a_time_moves_the_model(tmp_path):
    "The labels of the held-out rows are inverted: the metrics change, the model does not."
    frame = generated.made_up("binary", has_time=False)
    with pytest.MonkeyPatch.context() as patch: project = generated.write(tmp_path / "orders", frame, patch)
    held_out = np.array([zlib.crc32(str(key).encode()) % 200 < 40 for key in frame.order_id])
    inverted = frame.assign(days=np.where(held_out, frame.days.map({"yes": "no", "no": "yes"}), frame.days))
    (tmp_path / "other").mkdir()
    other = other_project(project, tmp_path / "other", inverted)
    as_of = generated.TODAY + timedelta(days=1)
    for folder in (project, other): trained(folder, as_of)
    (version, run), (other_version, other_run) = only_version(project), only_version(other)
    assert int(run.params["training_rows"]) == (~held_out).sum() and run.metrics["example_count"] == held_out.sum()
    assert run.metrics["roc_auc"] == pytest.approx(1 - other_run.metrics["roc_auc"])
    assert version.tags["baseline_value"] == other_version.tags["baseline_value"]
    np.testing.assert_array_equal(predictions(project, frame), predictions(other, frame))

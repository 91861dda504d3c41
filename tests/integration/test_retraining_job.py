"""The job `retrain` of a new project: a kill between decision and training, the training, a cause that is held back."""
from contextlib import closing
from sqlite3 import connect

import generated
import pandas as pd
import pytest
from deltalake import DeltaTable

from mlops_nb.bundle.load import load_bundle

pytestmark = [pytest.mark.slow, pytest.mark.full]


def test_a_new_project_trains_once_for_a_decision_and_holds_the_next_cause(tmp_path, monkeypatch):
    project = generated.write(tmp_path / "orders", generated.made_up("binary", True), monkeypatch)
    generated.commit(project)
    first = next(p["default"] for p in load_bundle(project).job("demo")["parameters"] if p["name"] == "first_day")

    def run(job, *words, code=0): return generated.run_in(project, "mlops", "run", job, *words, code=code)
    run("features", "-p", f"as_of={first}")
    day = ["-p", f"as_of={first}"]
    assert "training as of" in run("retrain", *day, "--only", "decide")  # as if the run were killed after it
    assert f"v1 as of {first} was promoted" in run("retrain", *day)
    assert "held back: cooldown" in run("retrain", *day, "-p", "cause=prediction_drift")
    assert "names no alert" in run("retrain", *day, "-p", "cause=loss ratio", code=2)
    assert "no alert 'loss_ratio'" in run("retrain", *day, "-p", "cause=loss_ratio", code=2)
    with closing(connect(project / ".mlops/runs.db")) as store:
        assert store.execute("select count(*) from runs where job = 'train'").fetchone()[0] == 1
    log = DeltaTable(project / ".mlops/lakehouse/dev/orders/retraining_log").to_pyarrow_table().to_pandas()
    log = log.set_index("number").sort_index()
    assert list(log.decision) == ["train", "hold"] and list(log.cause) == ["schedule", "prediction_drift"]
    assert log.outcome[1] == "promoted" and log.train_version[1] == 1 and pd.isna(log.outcome[2])
    shown = generated.run_in(project, "mlops", "retraining", "log")
    assert "v1 has not learnt" not in shown and "at least 21 are required" in shown

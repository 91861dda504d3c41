"""States written by jobs: the lakehouse, MLflow's store and the runs; and the command `mlops` on them."""
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from filelock import FileLock

from mlops_nb import addresses
from mlops_nb.env import Env, load_env

ROOT, MLOPS = Path(__file__).parents[2], Path(sys.executable).parent / "mlops"
TABLES_AS_OF = "2013-04-01"  # of the tables of the shared state
TRAINED_AS_OF = "2013-03-15"  # of its model: the tables also hold the two weeks after it
MODEL = "dev.flights.late_arrival"
PROVENANCE = {"moved_at", "moved_by", "reason", "run_id"}  # columns that describe a run, not the data


def environment(state: Path) -> dict[str, str]:
    "The environment of this process without the settings of other tests (MLflow stores its address in it)."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLOPS_", "SPARK_"))}
    return kept | {"MLOPS_STATE": str(state), "COLUMNS": "250", "MLOPS_SCHEDULER": "0"}


def mlops(state: Path, *words, code: int = 0, cwd: Path = ROOT) -> str:
    "Run the command on the real bundle, or on a copy of it, with this state, and return its output."
    process = subprocess.run([MLOPS, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=900,
                             env=environment(state))
    output = process.stdout + process.stderr
    assert process.returncode == code, output
    return output


def code_digest() -> str:
    "A digest of every file that decides what a job writes."
    folders = ("mlops_nb", "nbs", "conf", "resources", "tests/integration")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    code = [file for file in files if file.suffix in (".py", ".ipynb", ".yml")]
    digest = hashlib.sha256()
    for file in [*sorted(code), ROOT / "databricks.yml", ROOT / "requirements.lock"]:
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def make_trained(state: Path) -> None:
    "Run the jobs `features` and `train`; their output is kept as a text file in the state."
    for job, as_of in (("features", TABLES_AS_OF), ("train", TRAINED_AS_OF)):
        printed = mlops(state, "run", job, "--param", f"as_of={as_of}")
        (state / f"{job}.txt").write_text(printed)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id) -> Path:
    """The state after the jobs `features` and `train`, made once for all workers. Read-only; `own_trained` is a copy.

    MLOPS_TEST_STATE names a folder that keeps the state for later test runs; it is made anew when the code changes."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master": folder = folder.parent  # of all workers
    if kept := os.environ.get("MLOPS_TEST_STATE"): folder = Path(kept) / code_digest()
    folder.mkdir(parents=True, exist_ok=True)
    state, made = folder / "trained", folder / "trained.made"
    with FileLock(folder / "trained.lock"):
        if not made.exists():
            shutil.rmtree(state, ignore_errors=True)  # the rest of a failed worker
            make_trained(state)
            made.touch()
    return state


def copy_state(source: Path, target: Path) -> Path:
    "Copy a state. Its databases hold addresses of files; those of the copy name the copied files."
    shutil.copytree(source, target)
    addresses.use_here(target)
    return target


def copy_tables(source: Path, target: Path) -> Path:
    "A state with the tables of another one, without what its models wrote."
    of_models = shutil.ignore_patterns("predictions*", "deployment_log")
    shutil.copytree(source / "lakehouse", target / "lakehouse", ignore=of_models)
    return target


def env_of(state: Path) -> Env:
    "Target dev on Sail with this state."
    store = f"sqlite:///{state / 'mlflow.db'}"
    return replace(load_env("dev", root=ROOT), state=state, lakehouse=f"{state}/lakehouse", engine="sail", home="local",
                   tracking_uri=store, registry_uri=store)


def table(state: Path, name: str, without: tuple[str, ...] = ()) -> pd.DataFrame:
    "All rows of a table, in a fixed order, without PROVENANCE and the given columns."
    from deltalake import DeltaTable
    rows = ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris(),
                      partitioning="hive").to_table().to_pandas()
    rows = rows[[c for c in sorted(rows) if c not in {*PROVENANCE, *without}]]
    return rows.iloc[np.argsort(row_hashes(rows), kind="stable")].reset_index(drop=True)


def row_hashes(rows: pd.DataFrame) -> np.ndarray:
    "A number for each row that depends on its values alone: equal rows have equal numbers."
    def hashes(column):
        try: return pd.util.hash_pandas_object(column, index=False)
        except TypeError: return pd.util.hash_pandas_object(column.astype(str), index=False)  # lists
    return pd.util.hash_pandas_object(rows.apply(hashes), index=False).to_numpy()


def client_of(state: Path):  # -> MlflowClient
    from mlflow import MlflowClient
    store = f"sqlite:///{state / 'mlflow.db'}"
    return MlflowClient(store, registry_uri=store)  # MLflow remembers another test's registry


def registered(state: Path) -> tuple[dict, dict]:
    "The versions of the model by number, and the aliases."
    client = client_of(state)
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{MODEL}'")}
    return versions, {a: int(v) for a, v in client.get_registered_model(MODEL).aliases.items()}


def registry(state: Path) -> dict:
    "The aliases, and the tags and metrics of all versions, without what describes a run only."
    by_number, aliases = registered(state)
    versions = [by_number[number] for number in sorted(by_number)]
    of_run = ("read_versions", "git_sha", "git_dirty")
    return {"aliases": aliases,
            "versions": [{k: v for k, v in version.tags.items() if k not in of_run} for version in versions],
            "metrics": [client_of(state).get_run(version.run_id).data.metrics for version in versions]}


def scored_by(env: Env) -> set[int]:
    "The versions whose predictions the next batch writes."
    from mlops_nb.data import session, tables
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.models.scoring import version_by_alias
    from mlops_nb.workflow.batch_scoring import PREDICTIONS, write_predictions
    spark, version, day = session.get_spark(env), version_by_alias(env, MODEL), date.fromisoformat(TRAINED_AS_OF)
    write_predictions(FLIGHTS, spark, env, version, day, 1)
    rows = tables.read(spark, env, PREDICTIONS).where(f"{FLIGHTS.day} = DATE'{day}'")
    return {row[0] for row in rows.select("model_version").distinct().collect()}

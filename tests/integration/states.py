"""States that jobs have left: the lakehouse, MLflow's store and the runs, and the command `mlops` on them."""
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.dataset as ds

from mlops_nb.env import Env, load_env

ROOT, MLOPS = Path(__file__).parents[2], Path(sys.executable).parent / "mlops"
TABLES_AS_OF = "2013-04-01"  # how far the tables of the shared state go
TRAINED_AS_OF = "2013-03-15"  # when its model stands: two weeks of what came later are in the tables
MODEL = "dev.flights.late_arrival"
PROVENANCE = {"moved_at", "moved_by", "reason", "run_id"}  # columns that tell of a run, not of the data


def environment(state: Path) -> dict[str, str]:
    "Ours, without what other tests of this process may have left there (MLflow keeps its address in it)."
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLOPS_", "SPARK_"))}
    return ours | {"MLOPS_STATE": str(state), "COLUMNS": "250"}


def mlops(state: Path, *words, code: int = 0) -> str:
    "What the command prints, on the real bundle with this state."
    done = subprocess.run([MLOPS, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment(state))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def code_digest() -> str:
    "Of every file that decides what a job leaves."
    code = [file for folder in ("mlops_nb", "nbs", "conf", "resources", "tests/integration") for file in (ROOT / folder).rglob("*")
            if file.suffix in (".py", ".ipynb", ".yml")]
    digest = hashlib.sha256()
    for file in [*sorted(code), ROOT / "databricks.yml", ROOT / "requirements.lock"]:
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def make_trained(state: Path) -> None:
    "Run the jobs `features` and `train`; what they printed stands beside what they left."
    for job, as_of in (("features", TABLES_AS_OF), ("train", TRAINED_AS_OF)):
        printed = mlops(state, "run", job, "--param", f"as_of={as_of}")
        (state / f"{job}.txt").write_text(printed)


def copy_state(source: Path, target: Path) -> Path:
    "A state of one's own. The stores hold addresses of files: in the copy they name the copies."
    shutil.copytree(source, target)
    for store in ("mlflow.db", "runs.db"): replace_text(target / store, str(source), str(target))
    return target


def replace_text(file: Path, old: str, new: str) -> None:
    "Replace a text wherever it stands in a SQLite file."
    with sqlite3.connect(file) as store:
        tables = [name for name, in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = [row[1] for row in store.execute(f'PRAGMA table_info("{table}")')]
            for column in columns:
                store.execute(f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)', (old, new, old))
    store.close()


def copy_tables(source: Path, target: Path) -> Path:
    "A state with the tables of another one, and none of what its models have left."
    shutil.copytree(source / "lakehouse", target / "lakehouse", ignore=shutil.ignore_patterns("predictions*", "deployment_log"))
    return target


def env_of(state: Path) -> Env:
    "Target dev on Sail with this state."
    store = f"sqlite:///{state / 'mlflow.db'}"
    return replace(load_env("dev", root=ROOT), state=state, lakehouse=f"{state}/lakehouse", engine="sail", home="local",
                   tracking_uri=store, registry_uri=store)


def table(state: Path, name: str) -> pd.DataFrame:
    "A table as it is, in an order of its own."
    from deltalake import DeltaTable
    rows = ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris()).to_table().to_pandas()
    rows = rows[[c for c in sorted(rows) if c not in PROVENANCE]]
    return rows.sort_values(list(rows), ignore_index=True, key=lambda c: c.astype(str))


def client_of(state: Path):  # -> MlflowClient
    from mlflow import MlflowClient
    store = f"sqlite:///{state / 'mlflow.db'}"
    return MlflowClient(store, registry_uri=store)  # without it, MLflow takes the registry that another test had named


def registered(state: Path) -> tuple[dict, dict]:
    "The versions of the model by number, and the aliases."
    client = client_of(state)
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{MODEL}'")}
    return versions, {a: int(v) for a, v in client.get_registered_model(MODEL).aliases.items()}


def registry(state: Path) -> dict:
    "Versions, their tags and metrics, and the aliases, without what only tells of a run."
    versions, aliases = registered(state)
    versions = [versions[number] for number in sorted(versions)]
    return {"aliases": aliases,
            "versions": [{k: v for k, v in version.tags.items() if k not in ("read_versions", "git_sha", "git_dirty")} for version in versions],
            "metrics": [client_of(state).get_run(version.run_id).data.metrics for version in versions]}

"""Runs a scenario on Sail and on Apache Spark with Delta, each in the environment that brings its own pyspark.

To hold another part of the project against both engines, write a script of steps like `tables_scenario.py` and a test
file that asks `each_engine` for its results."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PYTHON = {"sail": Path(sys.executable), "spark": ROOT / ".venv-spark/bin/python",
          "connect": ROOT / ".venv-connect/bin/python"}


@pytest.fixture(scope="session")
def spark_ready():
    "Skips where Apache Spark cannot run, with what to do about it."
    if not PYTHON["spark"].exists():
        pytest.skip("no environment for Apache Spark in .venv-spark: run `make test-spark`, which makes it")
    try: java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except FileNotFoundError: pytest.skip("no Java: apt-get install openjdk-17-jre-headless")
    major = int(java.split('"')[1].split(".")[0])
    if major < 17: pytest.skip(f"Java {major} is too old for Apache Spark 4: apt-get install openjdk-17-jre-headless")


@pytest.fixture(scope="session")
def spark_jars(spark_ready, tmp_path_factory):
    "What Spark wants from Maven Central, fetched by one worker: two that start with an empty cache spoil each other's files."
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: folder = folder.parent  # of all workers
    start = "from mlops_nb.data.session import start_spark; start_spark()[0].stop()"
    with FileLock(folder / "jars.lock"):
        for _ in range(3):  # a download that broke off is tried again; what fails for good is told by the first scenario
            if (folder / "jars.made").exists(): return
            if subprocess.run([PYTHON["spark"], "-c", start], capture_output=True, timeout=600, cwd=HERE).returncode == 0:
                (folder / "jars.made").touch()


@pytest.fixture(scope="session")
def connect_ready():
    "Skips where there is no Databricks Connect."
    if not PYTHON["connect"].exists():
        pytest.skip("no environment for Databricks Connect in .venv-connect: run `make test-spark`, which makes it")


def run(engine: str, name: str, *arguments, python: str = "", **variables) -> None:
    "Run a script of this folder on an engine, in the environment that brings it; what it said comes with a failure."
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "MLOPS_", "MLFLOW_", "DATABRICKS_"))}
    ours |= {"SPARK_CONF_DIR": str(HERE / "spark-conf"), "TZ": "America/New_York"}  # no result may follow this zone
    done = subprocess.run([PYTHON[python or engine], HERE / name, engine, *map(str, arguments)], env=ours | variables,
                          capture_output=True, text=True, timeout=900, cwd=HERE)
    if "unresolved dependency: io.delta" in done.stderr:
        pytest.skip("Delta could not be had from Maven Central: run `make test-spark` once where it can be reached")
    assert done.returncode == 0, f"{name} on {engine}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    print(*(line for line in done.stderr.splitlines() if line.startswith(f"{engine}: ")), sep="\n")


@pytest.fixture(scope="session")
def run_on(): return run


@pytest.fixture(scope="session")
def each_engine(spark_jars, tmp_path_factory):
    """Gives the results of a scenario, {"sail": {step: result}, "spark": {step: result}}; it is run once in a session.

    Afterwards each engine reads what the other has written: results "own tables" and "the other's tables"."""
    done = {}
    def each_engine(name: str) -> dict:
        if name in done: return done[name]
        folder = tmp_path_factory.mktemp(name)
        sail, spark = folder / "sail lake", folder / "spark lake"
        run("sail", name, sail, folder / "sail.json")
        run("spark", name, spark, folder / "spark.json", sail)
        run("sail", "side_by_side.py", sail, folder / "again.json", spark)
        got = {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in ("sail", "spark")}
        got["sail"]["the other's tables"] = json.loads((folder / "again.json").read_text())["the other's tables"]
        return done.setdefault(name, got)
    return each_engine

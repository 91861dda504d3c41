"""Run a scenario on Sail and on Apache Spark with Delta, each in an environment with its own pyspark.

To test another part of the project on both engines, write a script of steps like `tables_scenario.py`, and a test file
that uses the results of `each_engine`."""
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
    "Skip if Apache Spark cannot run, with a message that says what to install."
    if not PYTHON["spark"].exists():
        pytest.skip("no environment for Apache Spark in .venv-spark: run `make test-spark`, which makes it")
    try: java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except FileNotFoundError: pytest.skip("no Java: apt-get install openjdk-17-jre-headless")
    major = int(java.split('"')[1].split(".")[0])
    if major < 17: pytest.skip(f"Java {major} is too old for Apache Spark 4: apt-get install openjdk-17-jre-headless")


@pytest.fixture(scope="session")
def spark_jars(spark_ready, tmp_path_factory):
    """Download Spark's packages from Maven Central, in one worker only.

    Two workers that start with an empty cache would corrupt each other's files."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: folder = folder.parent  # of all workers
    start = "from mlops_nb.data.session import start_spark; start_spark()[0].stop()"
    with FileLock(folder / "jars.lock"):
        for _ in range(3):  # repeat an interrupted download; a permanent failure is reported by the first scenario
            if (folder / "jars.made").exists(): return
            process = subprocess.run([PYTHON["spark"], "-c", start], capture_output=True, timeout=600, cwd=HERE)
            if process.returncode == 0: (folder / "jars.made").touch()


@pytest.fixture(scope="session")
def connect_ready():
    "Skip if Databricks Connect is not installed."
    if not PYTHON["connect"].exists():
        pytest.skip("no environment for Databricks Connect in .venv-connect: run `make test-spark`, which makes it")


def run(engine: str, name: str, *arguments, python: str = "", **variables) -> None:
    "Run a script of this folder on an engine, in the engine's environment; a failure includes the script's output."
    settings = ("SPARK_", "MLOPS_", "MLFLOW_", "DATABRICKS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    # No result may depend on this time zone
    environment |= {"SPARK_CONF_DIR": str(HERE / "spark-conf"), "TZ": "America/New_York"}
    process = subprocess.run([PYTHON[python or engine], HERE / name, engine, *map(str, arguments)],
                             env=environment | variables, capture_output=True, text=True, timeout=900, cwd=HERE)
    if "unresolved dependency: io.delta" in process.stderr:
        pytest.skip("Delta could not be downloaded from Maven Central: run `make test-spark` once with access to it")
    assert process.returncode == 0, f"{name} on {engine}:\n{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
    print(*(line for line in process.stderr.splitlines() if line.startswith(f"{engine}: ")), sep="\n")


@pytest.fixture(scope="session")
def run_on(): return run


@pytest.fixture(scope="session")
def each_engine(spark_jars, tmp_path_factory):
    """Return the results of a scenario, {"sail": {step: result}, "spark": {step: result}}; it runs once per session.

    Afterwards each engine reads the tables of the other: results "own tables" and "the other's tables"."""
    results = {}
    def each_engine(name: str) -> dict:
        if name in results: return results[name]
        folder = tmp_path_factory.mktemp(name)
        sail, spark = folder / "sail lake", folder / "spark lake"
        run("sail", name, sail, folder / "sail.json")
        run("spark", name, spark, folder / "spark.json", sail)
        run("sail", "side_by_side.py", sail, folder / "again.json", spark)
        both = {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in ("sail", "spark")}
        both["sail"]["the other's tables"] = json.loads((folder / "again.json").read_text())["the other's tables"]
        return results.setdefault(name, both)
    return each_engine

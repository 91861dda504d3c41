"""Runs a scenario on Sail and on Apache Spark with Delta, each in the environment that brings its own pyspark.

To hold another part of the project against both engines, write a script of steps like `tables_scenario.py` and a test file that asks
`each_engine` for its results."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PYTHON = {"sail": Path(sys.executable), "spark": ROOT / ".venv-spark/bin/python"}


@pytest.fixture(scope="session")
def spark_ready():
    "Skips where Apache Spark cannot run, with what to do about it."
    if not PYTHON["spark"].exists(): pytest.skip("no environment for Apache Spark in .venv-spark: run `make test-spark`, which makes it")
    try: java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except FileNotFoundError: pytest.skip("no Java: apt-get install openjdk-17-jre-headless")
    major = int(java.split('"')[1].split(".")[0])
    if major < 17: pytest.skip(f"Java {major} is too old for Apache Spark 4: apt-get install openjdk-17-jre-headless")


def run(engine: str, script: Path, *arguments) -> None:
    "Run a script in an engine's environment; what it says there comes with a failure."
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "MLOPS_", "MLFLOW_", "DATABRICKS_"))}
    variables |= {"SPARK_CONF_DIR": str(HERE / "spark-conf"), "TZ": "America/New_York"}  # no result may follow the machine's zone
    done = subprocess.run([PYTHON[engine], script, engine, *map(str, arguments)], env=variables, capture_output=True, text=True,
                          timeout=600, cwd=HERE)
    if "unresolved dependency: io.delta" in done.stderr:
        pytest.skip("Delta could not be had from Maven Central: run `make test-spark` once where it can be reached")
    assert done.returncode == 0, f"{script.name} on {engine}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    print(*(line for line in done.stderr.splitlines() if line.startswith(f"{engine}: ")), sep="\n")


@pytest.fixture(scope="session")
def each_engine(spark_ready, tmp_path_factory):
    """Gives the results of a scenario by engine: {"sail": {step: result}, "spark": {step: result}}; run once for a session.

    Afterwards each engine reads what the other has written: results "own tables" and "the other's tables"."""
    done = {}
    def each_engine(name: str) -> dict:
        if name in done: return done[name]
        folder = tmp_path_factory.mktemp(name)
        lakes = {engine: folder / f"{engine} lake" for engine in PYTHON}
        run("sail", HERE / name, lakes["sail"], folder / "sail.json")
        run("spark", HERE / name, lakes["spark"], folder / "spark.json", lakes["sail"])
        run("sail", HERE / "side_by_side.py", lakes["sail"], folder / "again.json", lakes["spark"])
        got = {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in PYTHON}
        got["sail"]["the other's tables"] = json.loads((folder / "again.json").read_text())["the other's tables"]
        return done.setdefault(name, got)
    return each_engine

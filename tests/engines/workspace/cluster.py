"""The compute of the stand-in workspace: Apache Spark with Delta, and one forked process for each notebook.

It reads requests from standard input, one JSON object per line, and answers each with one line. A forked process has
the imported packages of this one, which saves their time, but neither its sessions nor the project."""
import importlib
import json
import os
import sys
import time
from pathlib import Path

from notebook_shell import run_notebook
from unity_catalog import UnityCatalog

KEPT = Path(os.environ["STAND_IN_STATE"])
PACKAGES = ("pandas", "mlflow", "mlflow.pyfunc", "mlflow.lightgbm", "lightgbm", "shap", "seaborn", "sklearn.metrics",
            "scipy.stats", "IPython.core.interactiveshell", "pyspark.sql.connect.session", "pyspark.sql.functions")


def session(address: str):
    "The session `spark` of a notebook."
    from pyspark.sql.connect.session import SparkSession
    os.environ["SPARK_CONNECT_MODE_ENABLED"] = "1"
    return SparkSession.builder.remote(address).create()


def feature_dependencies(model_folder: str) -> str:
    "What Databricks' own build of MLflow records of a model that its feature client has logged."
    file = next(Path(model_folder).rglob("feature_spec.yaml"), None)
    return file.read_text() if file else ""


def use_own_build_of_mlflow() -> None:
    "MLflow from PyPI refuses to register a model of the feature client; the one of the runtime does not."
    from mlflow.store._unity_catalog.registry import rest_store
    rest_store.get_feature_dependencies = feature_dependencies


def answer(request: dict, address: str) -> dict:
    "Run a notebook, or a SQL statement, in this process."
    began = time.monotonic()
    os.environ.update(request["environment"])
    options = {key: tuple(request[key]) for key in ("existing", "foreign_schemas") if key in request}
    UnityCatalog(KEPT / "unity.json", **options).patch()
    if "sql" in request: return {"rows": [list(row) for row in session(address).sql(request["sql"]).collect()]}
    result = run_notebook(Path(request["notebook"]), Path(request["folder"]), session(address), request["widgets"],
                          request["values"])
    return result | {"seconds": time.monotonic() - began}


def forked(request: dict, address: str) -> dict:
    "Run a notebook in a process of its own."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = json.dumps(answer(request, address))
            with os.fdopen(writing, "w") as pipe: pipe.write(result)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe: text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"result_state": "FAILED", "message": "the process of the notebook died"}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from mlops_nb.data.session import start_spark
    server, address = start_spark()
    for name in PACKAGES: importlib.import_module(name)
    use_own_build_of_mlflow()
    for name in [name for name in sys.modules if name.split(".")[0] == "mlops_nb"]: del sys.modules[name]
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin: print(json.dumps(forked(json.loads(line), address)), file=replies, flush=True)
    server.stop()


if __name__ == "__main__": main()

"""Scenarios: steps that run on one engine, with results that can be compared with those of another engine.

A scenario is a script of steps. Each engine's own Python runs it, `python tables_scenario.py ENGINE LAKEHOUSE RESULTS`,
and it writes the result of each step to RESULTS, as JSON. The fixture `each_engine` runs the scripts, and the tests
compare the results. Given the other engine's lakehouse too, the results contain the tables that are read there."""
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace as changed
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))  # special_numbers


class Scenario:
    "Steps in the order of their definition; each is a function of session and target."

    def __init__(self): self.steps: dict[str, Callable] = {}

    def __call__(self, step: Callable) -> Callable:
        self.steps[step.__name__] = step
        return step

    def run(self, engine: str, lakehouse: str, results: str, other: str = ""):
        "Run every step on an engine; a failed step is recorded as a result, and the next steps still run."
        from mlops_nb.data.session import get_spark, stop
        from mlops_nb.env import load_env
        env = changed(load_env("dev", root=ROOT), engine=engine, lakehouse=lakehouse)
        began = time.time()
        spark = get_spark(env)
        print(f"{engine}: session after {time.time() - began:.1f} s", file=sys.stderr)
        results_by_step = {}
        for name, step in self.steps.items():
            began = time.time()
            try: results_by_step[name] = plain(step(spark, env))
            except Exception: results_by_step[name] = {"failed": traceback.format_exc()}
            print(f"{engine}: {name} {time.time() - began:.1f} s", file=sys.stderr)
        results_by_step["own tables"] = everything(spark, env)
        if other: results_by_step["the other's tables"] = everything(spark, changed(env, lakehouse=other))
        Path(results).write_text(json.dumps(results_by_step, indent=1))
        stop()

    def main(self): self.run(*sys.argv[1:])


def plain(value):
    "Convert a value for JSON; floats by `repr`, which distinguishes NaN and -0.0."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple): return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str): return value
    return value.isoformat() if isinstance(value, date) else repr(value)


def rows(df) -> list:
    "Return the rows as dictionaries, sorted; maps are sorted too."
    from pyspark.sql.types import MapType
    maps = {f.name for f in df.schema.fields if isinstance(f.dataType, MapType)}
    records = df.toArrow().to_pylist()
    for row in records: row.update({name: sorted(row[name]) for name in maps if row[name] is not None})
    return sorted((plain(row) for row in records), key=repr)


def schema(df) -> list:
    "Return name, type and nullability of every column."
    return [(f.name, f.dataType.simpleString(), f.nullable) for f in df.schema.fields]


def everything(spark, env) -> dict:
    "Return the rows and columns that the engine reads from each table folder of a lakehouse."
    from mlops_nb.data.lakehouse import location, stored_tables
    names = [name for catalog in ("dev", "prod") for name in stored_tables(env, catalog)]
    frames = {name: spark.read.format("delta").load(location(env, name)) for name in names}
    result = {name: {"rows": rows(df), "columns": [c[:2] for c in plain(schema(df))]} for name, df in frames.items()}
    for name, df in frames.items():
        if not name.endswith(".numbers"): continue
        from special_numbers import read_facts
        df.createOrReplaceTempView("numbers_of_both")
        result[name]["facts"] = plain(read_facts(spark, "numbers_of_both", {"c0": "DOUBLE"}))
    return result


def refused(call: Callable) -> str:
    "Return the error message of a call that must fail, with its hint."
    from mlops_nb.errors import MlopsError
    try: return f"NOT REFUSED, but: {call()!r}"
    except MlopsError as error: return str(error)


if __name__ == "__main__": Scenario().main()

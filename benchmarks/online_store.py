"""The online store beside its limits, and the stores on servers that are installed here: `python benchmarks/online_store.py`."""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import open_store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
import stores

ROWS, TABLES, FEATURES = 1_000_000, 4, 10
AIRPORTS = 10_000


def many_rows(count: int) -> pa.Table:
    "Rows of a key, eight doubles and a moment."
    import numpy as np
    dice = np.random.default_rng(1)
    columns = {"id": np.arange(count)} | {f"x{i}": dice.normal(size=count) for i in range(8)}
    return pa.table(columns).append_column("at", pa.array(np.arange(count) + 1_372_680_000_000_000, pa.timestamp("us", "UTC")))


def publish_rate(uri: str, count: int) -> float:
    "Rows a second that a store takes."
    rows = many_rows(count)
    layout = layout_of("dev.bench.rows", rows.schema, "id")
    with open_store(uri, timeout=60) as online:
        began = time.perf_counter()
        if online.upsert(layout, rows, 1) != count: sys.exit("not every row was written")
        online.finish(layout.table, 1)
        return count / (time.perf_counter() - began)


def feature_tables(online) -> list:
    "Readers of four tables, ten features in all but the key, which is an airport's."
    readers, names = [], [f"f{i}" for i in range(FEATURES)]
    for n in range(TABLES):
        mine = names[n::TABLES]
        rows = pa.table({"airport": [f"A{i}" for i in range(AIRPORTS)]} | {c: [i / 7 for i in range(AIRPORTS)] for c in mine})
        layout = layout_of(f"dev.bench.features{n}", rows.schema, "airport")
        online.upsert(layout, rows, 1)
        readers.append(online.reader(layout.table, mine))
    return readers


def lookup(uri: str, rounds: int) -> tuple[float, float]:
    "The median and the 99th percentile of seconds that one airport's features take."
    with open_store(uri, timeout=60) as online:
        readers, taken = feature_tables(online), []
        for i in range(rounds + 100):
            key, features = f"A{i * 7919 % AIRPORTS}", {}
            began = time.perf_counter()
            for reader in readers: features |= reader(key)
            taken.append(time.perf_counter() - began)
            if len(features) != FEATURES: sys.exit(f"features are missing: {features}")
    return statistics.median(taken[100:]), statistics.quantiles(taken[100:], n=100)[-1]


def shown(seconds: tuple[float, float]) -> str: return f"{seconds[0] * 1e6:.0f} us, 99 % in {seconds[1] * 1e6:.0f} us"


def online_store(folder: Path) -> list[tuple]:
    "Lookups and a publish on SQLite, and on the servers that are here."
    os.environ.update(stores.SECRETS)
    ours = lookup(f"sqlite:///{folder}/lookup.db", 20_000)
    rate = publish_rate(f"sqlite:///{folder}/publish.db", ROWS)
    what = f"{FEATURES} features of {TABLES} tables"
    rows = [(f"{what}, SQLite", shown(ours), "", "", "100 us"),
            (f"publish {ROWS:,} rows, SQLite", f"{rate:,.0f} rows/s", "", "", "100,000 rows/s")]
    for kind, count in (("redis", 100_000), ("postgresql", 100_000)):
        try:
            with stores.running(kind) as uri:
                theirs, speed = lookup(uri, 2000), publish_rate(uri, count)
            rows += [(f"{what}, {kind}", "", shown(theirs), f"{ours[0] / theirs[0]:.2f}", ""),
                     (f"publish {count:,} rows, {kind}", "", f"{speed:,.0f} rows/s", f"{rate / speed:.2f}", "")]
        except stores.Missing as missing: rows.append((f"{what}, {kind}", "", str(missing), "", ""))
    return rows


def main() -> None:
    table = Table(title=f"{os.cpu_count()} processors, Python {sys.version.split()[0]}", title_justify="left", box=None)
    for column in ("what", "ours", "peer", "ratio", "limit"): table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for row in online_store(Path(folder)): table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__": main()

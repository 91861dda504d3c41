"""The online store compared with its limits and with installed servers: `python benchmarks/online_store.py`."""
import os
import statistics
import sys
import time
from pathlib import Path

import pyarrow as pa
from comparison_table import print_comparison

from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import open_store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
import stores

ROWS, TABLES, FEATURES = 1_000_000, 4, 10
FEATURE_NAMES = [f"f{i}" for i in range(FEATURES)]
AIRPORTS = 10_000


def many_rows(count: int) -> pa.Table:
    "Return rows with a key, eight doubles and a timestamp."
    import numpy as np
    random = np.random.default_rng(1)
    columns = {"id": np.arange(count)} | {f"x{i}": random.normal(size=count) for i in range(8)}
    times = pa.array(np.arange(count) + 1_372_680_000_000_000, pa.timestamp("us", "UTC"))
    return pa.table(columns).append_column("at", times)


def publish_rate(uri: str, count: int) -> float:
    "Return the number of rows per second that a store writes."
    rows = many_rows(count)
    layout = layout_of("dev.bench.rows", rows.schema, "id")
    with open_store(uri, timeout=60) as online:
        began = time.perf_counter()
        if online.upsert(layout, rows, 1) != count: sys.exit("not every row was written")
        online.finish(layout.table, 1)
        return count / (time.perf_counter() - began)


def feature_tables(online) -> list:
    "Return the readers of four tables with ten features in total; the key is an airport."
    readers = []
    for n in range(TABLES):
        features = FEATURE_NAMES[n::TABLES]
        columns = {"airport": [f"A{i}" for i in range(AIRPORTS)]}
        for name in features: columns[name] = [i / 7 for i in range(AIRPORTS)]
        rows = pa.table(columns)
        layout = layout_of(f"dev.bench.features{n}", rows.schema, "airport")
        online.upsert(layout, rows, 1)
        readers.append(online.reader(layout.table, features))
    return readers


def lookup(uri: str, rounds: int, joined: bool = False) -> tuple[float, float]:
    "Return the median and the 99th percentile of the seconds to look up the features of one airport."
    with open_store(uri, timeout=60) as online:
        readers, durations = feature_tables(online), []
        read = online.joined_reader([(f"dev.bench.features{n}", FEATURE_NAMES[n::TABLES]) for n in range(TABLES)])
        for i in range(rounds + 100):
            key, features = f"A{i * 7919 % AIRPORTS}", {}
            began = time.perf_counter()
            if joined: features = read([[(key,)] * TABLES])[0]
            else:
                for reader in readers: features |= reader(key)
            durations.append(time.perf_counter() - began)
            if len(features) != FEATURES: sys.exit(f"features are missing: {features}")
    return statistics.median(durations[100:]), statistics.quantiles(durations[100:], n=100)[-1]


def microseconds(seconds: tuple[float, float]) -> str:
    "Format the median and the 99th percentile."
    return f"{seconds[0] * 1e6:.0f} us, 99 % in {seconds[1] * 1e6:.0f} us"


def online_store(folder: Path) -> list[tuple]:
    "Measure lookups and a publish on SQLite, and on the installed servers."
    os.environ.update(stores.SECRETS)
    ours = lookup(f"sqlite:///{folder}/lookup.db", 20_000)
    joined = lookup(f"sqlite:///{folder}/joined.db", 20_000, joined=True)
    rate = publish_rate(f"sqlite:///{folder}/publish.db", ROWS)
    lookup_name = f"{FEATURES} features of {TABLES} tables"
    rows = [(f"{lookup_name}, SQLite", microseconds(ours), "", "", "100 us"),
            (f"{lookup_name} by one statement", microseconds(joined), microseconds(ours),
             f"{joined[0] / ours[0]:.2f}", ""),
            (f"publish {ROWS:,} rows, SQLite", f"{rate:,.0f} rows/s", "", "", "100,000 rows/s")]
    for kind, count in (("redis", 100_000), ("postgresql", 100_000)):
        try:
            with stores.running(kind) as uri:
                other, other_rate = lookup(uri, 2000), publish_rate(uri, count)
            rows += [(f"{lookup_name}, {kind}", "", microseconds(other), f"{ours[0] / other[0]:.2f}", ""),
                     (f"publish {count:,} rows, {kind}", "", f"{other_rate:,.0f} rows/s",
                      f"{rate / other_rate:.2f}", "")]
        except stores.Missing as missing: rows.append((f"{lookup_name}, {kind}", "", str(missing), "", ""))
    return rows


if __name__ == "__main__": print_comparison(online_store)

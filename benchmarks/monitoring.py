"""Two windows of predictions, with profiles and drift statistics: this project beside Evidently, and larger windows."""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

ROWS, NUMBERS, TEXTS = 100_000, 14, 6


def window(rows: int, seed: int, month: int) -> pd.DataFrame:
    "A window of predictions: numbers of several shapes, texts of two to two hundred values, a few of them missing."
    random = np.random.default_rng(seed)
    frame = {"at": pd.Timestamp(2026, month, 1, tz="UTC") + pd.to_timedelta(random.integers(0, 2_000_000, rows), "s"),
             "version": np.full(rows, "1"), "prediction": random.beta(2, 5, rows)}
    for i in range(NUMBERS - 1):
        values = (random.normal(month / 50, 1, rows), random.lognormal(0, 1, rows),
                  random.integers(0, 500, rows).astype(float))[i % 3]
        values[random.random(rows) < 0.02] = np.nan
        frame[f"number{i}"] = values
    for i in range(TEXTS):
        names = np.array([f"value {k}" for k in range(2 if i == 0 else 40 * i)], dtype=object)
        frame[f"text{i}"] = names[np.minimum(random.geometric(1 / (1 + len(names) / 4), rows) - 1, len(names) - 1)]
    return pd.DataFrame(frame).astype({"at": "datetime64[us, UTC]"})


COLUMNS = ["prediction", *(f"number{i}" for i in range(NUMBERS - 1)), *(f"text{i}" for i in range(TEXTS))]


def measured(folder: str):  # -> a function that measures both windows
    "Return the measurement of this project, from Parquet files of a baseline and a window."
    from dataclasses import replace

    from mlops_nb.data.session import get_spark, return_memory
    from mlops_nb.env import load_env
    from mlops_nb.monitoring.metric_tables import drift_metrics, measure, profile_metrics
    from mlops_nb.monitoring.windows import Monitor
    env = replace(load_env("dev"), lakehouse=f"{folder}/lakehouse")
    return_memory()  # as the job monitor does
    spark, monitor = get_spark(env), Monitor("at", "version", "text0")
    base, rows = (spark.read.parquet(f"{folder}/{name}.parquet") for name in ("base", "rows"))
    def run():
        metrics = measure(spark, env, rows, monitor, "1 month", COLUMNS, base)
        return profile_metrics(metrics, monitor, "1 month"), drift_metrics(metrics, monitor, "1 month")
    return run


def evidently(folder: str):  # -> a function that measures both windows
    "Return the drift and summary presets of Evidently, on the same rows in memory."
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset, DataSummaryPreset
    definition = DataDefinition(numerical_columns=[name for name in COLUMNS if not name.startswith("text")],
                                categorical_columns=[name for name in COLUMNS if name.startswith("text")])
    frames = [pd.read_parquet(f"{folder}/{name}.parquet")[COLUMNS] for name in ("rows", "base")]
    def run():
        current, reference = (Dataset.from_pandas(frame, data_definition=definition) for frame in frames)
        return Report([DataDriftPreset(), DataSummaryPreset()]).run(current, reference).dict()
    return run


def report(name: str, folder: str, rounds: int) -> None:
    "Measure in this process, and print the seconds of the median warm round and the peak of memory."
    process, peak, is_over = psutil.Process(), [0], threading.Event()
    def watch():
        while not is_over.wait(0.01): peak[0] = max(peak[0], process.memory_info().rss)
    threading.Thread(target=watch, daemon=True).start()
    run, seconds = {"ours": measured, "evidently": evidently}[name](folder), []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    is_over.set()
    print(json.dumps({"seconds": float(np.median(seconds[1:] or seconds)), "megabytes": peak[0] / 2**20}))


PEERS = Path(__file__).parents[1] / ".venv-monitoring/bin/python"  # `make bench` installs Evidently there


def in_process(name: str, folder: str, rounds: int = 6) -> dict:
    "Measure in a process of its own."
    python = str(PEERS) if name == "evidently" else sys.executable
    command = [python, __file__, name, folder, str(rounds)]
    environment = dict(os.environ)
    if name == "ours":  # Evidently's environment does not have this project
        from mlops_nb.jobs.warm import IMPORT_ENVIRONMENT
        environment |= IMPORT_ENVIRONMENT
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode: sys.exit(process.stderr[-3000:])
    return json.loads(process.stdout.splitlines()[-1])


def write_windows(folder: Path, rows: int) -> str:
    "Write a baseline and a window."
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, month in (("base", 1, 1), ("rows", 2, 2)):
        window(rows, seed, month).to_parquet(folder / f"{name}.parquet", row_group_size=100_000)
    return str(folder)


def comparisons(folder: Path) -> list[tuple]:  # what, ours, peer, ratio, limit
    "Compare with Evidently, and measure a million and ten million rows."
    small = write_windows(folder / "small", ROWS)
    ours, peer = in_process("ours", small), in_process("evidently", small, 3)
    table = [("two windows of 100,000 rows, 20 columns", f"{ours['seconds']:.2f} s",
              f"Evidently {peer['seconds']:.1f} s", f"{peer['seconds'] / ours['seconds']:.1f}x faster", "12x"),
             ("its peak of memory", f"{ours['megabytes']:.0f} MB", f"Evidently {peer['megabytes']:.0f} MB",
              f"{ours['megabytes'] / peer['megabytes']:.2f}", "1")]
    for rows, limit in ((500_000, ""), (5_000_000, "15 s, 1536 MB")):
        large = in_process("ours", write_windows(folder / str(rows), rows), 2)
        table.append((f"two windows of {rows:,} rows", f"{large['seconds']:.1f} s, {large['megabytes']:.0f} MB", "",
                      f"{large['seconds'] / (2 * rows) * 1e6:.2f} µs per row", limit))
    return table


if __name__ == "__main__":
    if len(sys.argv) > 1: report(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            for line in comparisons(Path(temporary)): print(*line, sep="  ")

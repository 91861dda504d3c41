"""Predictions of consecutive days with their monitor, for the tests of refreshes on each engine."""
import numpy as np
import pandas as pd
import pyarrow as pa

from mlops_nb.monitoring.refreshes import Logged
from mlops_nb.monitoring.windows import CustomMetric, Monitor

ZONE, HASH = "America/New_York", "xxhash64(concat_ws('/', CAST(id AS STRING), row_text))"
DOUBLE = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'
METRICS = tuple(CustomMetric(name, f"CUSTOM_METRIC_TYPE_{kind}", (":table",), definition, DOUBLE)
                for name, kind, definition in (
                    ("late_rows", "AGGREGATE", "sum(CAST({{label_col}} AS DOUBLE))"),
                    ("twice", "DERIVED", "2 * late_rows"),
                    ("growth", "DRIFT", "{{current_df}}.twice - {{base_df}}.twice")))
MONITOR = Monitor("at", "version", "warning", "late", "prediction", slicing_exprs=("carrier", "distance > 1000"),
                  time_zone=ZONE, custom_metrics=METRICS)
GRANULARITIES, FEATURES = ["1 day", "1 week", "1 month"], ["delay", "distance", "carrier"]


def predictions(days: int, seed: int = 0, per_day: int = 30) -> pd.DataFrame:
    "Predictions of consecutive days; one carrier is rare, so that its previous window is often far away."
    random = np.random.default_rng(seed)
    n = days * per_day
    late = random.random(n) < 0.3
    frame = pd.DataFrame({
        "id": np.arange(n), "version": 1, "late": pd.array(late, "boolean"),
        "at": pd.Timestamp("2013-03-20 16:00", tz="UTC") + pd.to_timedelta(np.arange(n) // per_day, "D"),
        "prediction": (0.3 + 0.3 * late + random.random(n) / 5).round(3),
        "delay": random.normal(0, 9, n), "distance": random.integers(100, 3000, n),
        "carrier": np.where(random.random(n) < 0.01, "OO", random.choice(["UA", "B6"], n))})
    return frame.assign(warning=frame.prediction > 0.5)


def logged(spark, frame: pd.DataFrame, baseline: pd.DataFrame, digest: str = "b1") -> Logged:
    text = frame.drop(columns="id").astype(str).agg("/".join, axis=1)
    rows = spark.createDataFrame(pa.Table.from_pandas(frame.assign(row_text=text), preserve_index=False))
    base = spark.createDataFrame(pa.Table.from_pandas(baseline, preserve_index=False))
    return Logged(rows, HASH, 7, None, base, digest)

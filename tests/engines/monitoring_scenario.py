"""Refreshes of a monitor in steps, on one engine: the first days, one more with late labels, and a correction."""
import pandas as pd
from side_by_side import Scenario  # adds the folder of the next module to the path
from side_by_side import rows as rows_of

# isort: split
from monitored_rows import FEATURES, MONITOR, logged, predictions

from mlops_nb.data import tables
from mlops_nb.monitoring.refreshes import refresh

step = scenario = Scenario()
FRAME, BASELINE, GRANULARITIES = predictions(5), predictions(5, seed=9), ["1 day", "1 week"]
DAY = FRAME["at"].dt.date
DAYS = sorted(DAY.unique())


def windows(spark, env, rows: pd.DataFrame) -> dict[str, int]:
    "Refresh, and count the windows of each granularity that were computed."
    result = refresh(spark, env, "watched", logged(spark, rows, BASELINE), MONITOR, GRANULARITIES, FEATURES)
    return {granularity: len(own.windows) for granularity, own in result.items()}


def metrics(spark, env) -> dict[str, list]:
    "The metric tables without the versions of the refresh."
    names = {kind: f"watched_{kind}_metrics" for kind in ("profile", "drift")}
    return {kind: rows_of(tables.read(spark, env, name).drop("logging_table_commit_version", "monitor_version"))
            for kind, name in names.items()}


@step
def first_days(spark, env):
    rows = FRAME[DAY <= DAYS[2]].copy()
    rows.loc[DAY == DAYS[2], "late"] = pd.NA  # labels that come late
    return {"windows": windows(spark, env, rows), "again": windows(spark, env, rows), **metrics(spark, env)}


@step
def next_day_with_late_labels(spark, env):
    return {"windows": windows(spark, env, FRAME[DAY <= DAYS[3]]), **metrics(spark, env)}


@step
def next_day_with_a_correction(spark, env):
    rows = FRAME.copy()
    rows.loc[DAY == DAYS[0], "prediction"] += 0.01
    return {"windows": windows(spark, env, rows), **metrics(spark, env)}


if __name__ == "__main__": scenario.main()

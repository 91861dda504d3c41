"""A replay of days of a small use case in forked processes, each killed at another step; run by test_replay.

    python killed_replay.py FOLDER DAYS WRITES...

DAYS are replayed together. Each process is killed after so many WRITES, before or after one; the last one ends. The
tables are then in FOLDER/tables.pickle."""
import os
import pickle
import signal
import sys
import traceback
from datetime import date, timedelta
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import small_use_cases as small
from mlflow.store.tracking import sqlalchemy_store
from test_small_use_cases import monitoring_conf

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark
from mlops_nb.deployment import aliases
from mlops_nb.models import registry
from mlops_nb.monitoring import retraining_log
from mlops_nb.monitoring.retraining import is_due, read_cause
from mlops_nb.workflow import replay, year_report
from mlops_nb.workflow.retraining import count_unlearnt, outcome_text

IMPORTED = (mlflow.pyfunc, sqlalchemy_store)  # once, before the forks
FIRST, LAST = date(2021, 3, 20), date(2021, 3, 30)
SETTINGS = {"cooldown_days": 2, "min_new_labelled_rows": 10, "max_refused": 3, "causes": ["schedule", "alert"]}
VOLATILE = {"seconds", "decided_at", "train_run", "moved_at", "run_id", "read_versions", "refreshed_at",
            "logging_table_commit_version", "log_version", "table_version"}  # a step of several days has fewer commits
CONTRACTS = {"area_daily": {"columns": {"area": {"type": "string"}, "known_from": {"type": "timestamp"},
                                         "area_minutes": {"type": "double"}}}}


def area_query(cut):
    "Without the last digits of the means, which depend on the order of the rows: hashes of rows are compared, too."
    return small.area_query(cut).replace("<=", "<").replace("avg(minutes)", "round(avg(minutes), 6)")


AREAS = small.replace(small.DELIVERIES.feature_tables[0], query=area_query)


def ingest(spark, env, source, cut):
    "The deliveries that were asked for before a time; of the later ones nothing is known."
    frame = small.deliveries()
    tables.merge(spark, env, "deliveries", spark.createDataFrame(frame[frame.asked_at < cut]), ["delivery_id"])


USE_CASE = small.replace(small.DELIVERIES, feature_tables=(AREAS,), ingest=ingest)


class Steps:
    "Counts the steps of a replay, and kills this process at the step with a number."

    def __init__(self, last: int | None): self.count, self.last = 0, last

    def step(self):
        self.count += 1
        if self.count == self.last: os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        "The function, with a step before and after it."
        def counted(*arguments, **options):
            self.step()
            result = function(*arguments, **options)
            self.step()
            return result
        return counted


def train(spark, env, day):
    "As the job `train`: the same version for the same day. The first two are promoted, later ones are refused."
    name = env.model(USE_CASE.model)
    versions = registry.model_versions(env, name) if registry.version_numbers(env, name) else []
    known = [version for version in versions if version.tags["as_of"] == str(day)]
    tags = {"as_of": str(day), "held_out_from": str(day - timedelta(days=10)), "model_validation_status": "PASSED",
            "held_out_to": str(day - timedelta(days=1)), "trained_through": str(day - timedelta(days=11)),
            "interval_low": "-9.5", "interval_high": "10.25"}
    small.FORMULAS["minutes"] = f"20 + 3 * model_input['distance'] + {len(versions)}"
    version = known[0] if known else small.formula_version(USE_CASE, spark, env, tags, is_champion=False)
    number = int(version.version)
    if number < 3: return aliases.move_alias(spark, env, name, "champion", number, "better")
    registry.client(env).set_model_version_tag(name, str(number), "deployment_decision", "keep: not better")


def retrain_with(spark, env):
    "The job `retrain` in this process."
    name, conf = env.model(USE_CASE.model), small.TRAIN["minutes"]

    def retrain(day, cause):
        def count(champion): return count_unlearnt(USE_CASE, spark, env, day, conf, champion)
        row = retraining_log.decide_once(spark, env, name, day, read_cause(cause), SETTINGS, count)
        due = is_due(row)
        if due: train(spark, env, day)
        row, _ = retraining_log.record_outcome(spark, env, name, row["decision_id"],
                                               "success" if due else "excluded", SETTINGS)
        return outcome_text(row)
    return retrain


def rounded(value):
    "A value as text; sums of numbers depend on their order, in the last digits."
    if isinstance(value, dict): return str({name: rounded(part) for name, part in value.items()})
    if isinstance(value, (list, tuple, np.ndarray)): return str([rounded(part) for part in value])
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def comparable(frame):
    "The rows of a table in order, without what describes a run."
    frame = frame.drop(columns=VOLATILE & {*frame.columns})
    numbers = [name for name in frame if pd.api.types.is_float_dtype(frame[name])]
    texts = [name for name in frame if name not in numbers]
    frame = frame.assign(**{name: frame[name].map(rounded) for name in texts})
    return frame.sort_values([*texts, *numbers], ignore_index=True)


def contents(spark, env):
    "All tables of the target."
    return {name: comparable(tables.read(spark, env, name).toPandas()) for name in tables.table_names(spark, env)}


def replay_all(folder, days_together, last_step):
    "The whole replay, with its report at the end."
    steps = Steps(last_step)
    for module, name in ((tables, "merge"), (tables, "replace"), (aliases, "set_alias")):
        setattr(module, name, steps.around(getattr(module, name)))
    env = small.home_of(folder)
    spark = get_spark(env)
    evaluated = replay.Replay(USE_CASE, spark, env, "", lambda day: [f"late/{day}", f"drift/{day}"],
                              retrain_with(spark, env), step=days_together)
    for record in replay.replay_days(evaluated, FIRST, LAST): print(record.text, flush=True)
    days = year_report.read_replay(spark, env, FIRST, LAST + timedelta(days=1))
    report = year_report.YearReport(USE_CASE, spark, env, FIRST, LAST + timedelta(days=1), days)
    year_report.score_frozen(report)
    report.rows = year_report.load_predictions(report)
    print(year_report.year_text(report), steps.count, flush=True)
    return contents(spark, env) | {"rows of the report": report.rows}


def is_killed(folder, days_together, last_step):
    "Replay in a forked process; whether it was killed. Its tables are written when it ends."
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        if status and not os.WIFSIGNALED(status): raise SystemExit(1)
        return os.WIFSIGNALED(status)
    code = 1
    try:
        rows = replay_all(folder, days_together, last_step)
        (folder / "tables.pickle").write_bytes(pickle.dumps(rows))
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(folder, days_together, step_counts):
    monitoring = monitoring_conf(USE_CASE)
    monitoring["monitor"]["inference_log"]["granularities"] = ["1 day", "1 week"]
    small.conf_files(folder, monitoring=monitoring, train=small.TRAIN["minutes"],
                     features=CONTRACTS)
    kills = [is_killed(folder, days_together, count) for count in [*step_counts, None]]
    assert kills == [True] * len(step_counts) + [False]


if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:]])

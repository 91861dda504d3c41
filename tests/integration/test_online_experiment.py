"""An online experiment with real tables: the inference log, labels as of a day, the log of decisions, the picture."""
import json
from dataclasses import replace
from datetime import date, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from made_up import NAME, home, three_versions

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases
from mlops_nb.deployment.experiment_log import EXPERIMENT_LOG, SplitEndpoint, read_experiments
from mlops_nb.deployment.online_experiment import (
    ANSWER_COLUMNS,
    Control,
    check_experiment_settings,
    complete_blocks,
    experiment_defaults,
)
from mlops_nb.errors import MissingError
from mlops_nb.models.problem_types import BINARY
from mlops_nb.serving.endpoints import ServingConfig
from mlops_nb.serving.inference_log import INFERENCE_LOG
from mlops_nb.serving.payload_table import ENTITIES, ENTITY_SCHEMA
from mlops_nb.workflow import experimenting
from mlops_nb.workflow.experimenting import Experiment
from mlops_nb.workflow.use_case import UseCase

pytestmark = pytest.mark.filterwarnings("ignore:.*IProgress not found")
FIRST, REQUESTS = date(2013, 7, 1), 40
PAYLOADS = "late_arrival_payload"  # the prefix is in databricks.yml
SETTINGS = check_experiment_settings(experiment_defaults(BINARY) | {
    "steps": [50, 100], "alpha": 0.4, "block_days": 1, "label_days": 1, "min_requests": 1, "max_days": 20}, BINARY)


def labels(spark, env, as_of):
    "The label of a flight is known on the day after it."
    return spark.sql(f"SELECT * FROM {env.table('flights')} WHERE known_at < TIMESTAMP'{as_of} 00:00:00'")


USE_CASE = UseCase(model="late_arrival", problem=BINARY, key=("flight", "origin"), label="late", rows=None,
                   labels=labels, source=("flights",), features=("hour",), lookups=None, day="flight_day",
                   prediction_time="asked_at", label_known_at="known_at")


def flights():
    number = 10 * REQUESTS
    day = np.repeat(pd.date_range(FIRST, periods=10), REQUESTS)
    return pd.DataFrame({"flight": np.arange(number), "origin": "JFK", "flight_day": day.date, "hour": 1.0,
                         "asked_at": day + pd.Timedelta("10h"), "known_at": day + pd.Timedelta("30h"),
                         "late": np.tile([True, False, False, True], number // 4)})


def logged(frame):
    "The inference log: version 2 answers half of the requests and is better; some rows are of others."
    is_challenger = frame.flight % 2 == 0
    probability = np.where(frame.late, 0.9, 0.1) * np.where(is_challenger, 1, 0.6)
    row = frame.flight.astype(str) + "/" + frame.origin
    log = pd.DataFrame({
        "model_name": NAME, "model_version": np.where(is_challenger, 2, 1), "as_of": frame.flight_day,
        "prediction": probability, "row_id": row, "databricks_request_id": "id" + row,
        "client_request_id": "",
        "late": ~frame.late})  # not the label that was known: it is not used
    others = [log.head(5).assign(**{column: value, "databricks_request_id": f"other {value}"})
              for column, value in (("model_name", "dev.flights.other"), ("model_version", 3))]
    return pd.concat([log, *others], ignore_index=True)


def payloads(log):
    "The requests of the log, which took 4 ms, and those of 1 July that failed."
    answered = pd.DataFrame({"databricks_request_id": log.databricks_request_id.unique(), "status_code": 200,
                             "served_entity_id": "a"})
    failed = [pd.DataFrame({"databricks_request_id": [f"failed {entity} {i}" for i in range(3)], "status_code": 500,
                            "served_entity_id": entity}) for entity in "bc"]
    of_senders = pd.DataFrame({"databricks_request_id": ["too many", "wrong"], "status_code": [429, 400],
                               "served_entity_id": "b"})  # no version is to blame for them
    return pd.concat([answered, *failed, of_senders]).assign(**{"response": "{}", "execution_duration_ms": 4,
                                                                "request_time": pd.Timestamp("2013-07-01 15:00")})


def entities(spark):
    "The served entities of the payloads, as the writer of payloads keeps them."
    rows = [("a", NAME, "1"), ("b", NAME, "2"), ("c", "dev.flights.other", "2")]
    return spark.createDataFrame([(key, "late", key, *version, datetime(2013, 7, 1)) for key, *version in rows],
                                 ENTITY_SCHEMA)


class Endpoint:
    "What an endpoint serves, in memory."
    versions, traffic = {"champion": 1, "challenger": 2}, {"champion": 100, "challenger": 0}

    def read(self): return ServingConfig("late", NAME, self.versions, self.traffic)

    def set_traffic(self, traffic): self.traffic = {name: traffic.get(name, 0) for name in self.versions}

    def follow(self): self.versions, self.traffic = {"champion": 2}, {"champion": 100}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    env = home(tmp_path_factory.mktemp("experiment"))
    three_versions(env)
    stop()
    spark = get_spark(env)
    log = logged(flights())
    for name, frame in (("flights", flights()), (INFERENCE_LOG, log), (PAYLOADS, payloads(log))):
        tables.overwrite(spark, env, name, spark.createDataFrame(frame))
    tables.overwrite(spark, env, ENTITIES, entities(spark))
    for alias, version in (("champion", 1), ("challenger", 2)):
        aliases.move_alias(spark, env, NAME, alias, version, "to begin with")
    yield env, spark
    stop()


@pytest.mark.slow
def test_the_answers_of_some_days_with_the_labels_known_at_a_day(world):
    env, spark = world
    answers = experimenting.read_answers(USE_CASE, spark, env, FIRST, FIRST + timedelta(3), 1, 2)
    assert tuple(answers.columns) == ANSWER_COLUMNS and set(map(str, answers.day)) == {
        "2013-07-01", "2013-07-02", "2013-07-03"}
    assert len(answers) == 3 * REQUESTS + 3  # other models and versions are not in it
    known = answers[answers.label.notna()]
    assert set(map(str, known.day)) == {"2013-07-01", "2013-07-02"}
    truth = flights().assign(request=lambda rows: rows.flight.astype(str) + "/JFK").set_index("request").late
    assert (known.label == truth[known.request].to_numpy(float)).all() and known.is_challenger.mean() == 0.5


@pytest.mark.slow
def test_failed_requests_are_read_from_the_payloads(world):
    env, spark = world
    answers = experimenting.read_answers(USE_CASE, spark, env, FIRST, FIRST + timedelta(2), 1, 2)
    failed = answers[answers.is_error]
    assert len(failed) == 3 and failed.is_challenger.all() and set(map(str, failed.day)) == {"2013-07-01"}
    assert failed.prediction.isna().all() and (answers.milliseconds == 4).all()
    later = experimenting.read_answers(USE_CASE, spark, env, FIRST + timedelta(1), FIRST + timedelta(2), 1, 2)
    assert not later.is_error.any()


@pytest.mark.slow
def test_an_experiment_with_tables_is_decided_and_recorded_once_a_day(world):
    env, spark = world
    served = Endpoint()
    endpoint = SplitEndpoint("late", served.read, served.set_traffic, served.follow)
    for number in (*range(8), 7):
        experiment = Experiment(USE_CASE, env, FIRST + timedelta(number - 1), endpoint, SETTINGS)
        shown = experimenting.decide_day(experiment).data
        if served.versions == {"champion": 2}: break
    assert aliases.points_to(env, NAME, "champion") == 2 and "endpoint late serves champion v2 (100 %)" in shown
    rows = read_experiments(spark, env, NAME)
    assert [row["decision"] for row in rows] == ["start", *["wait"] * (len(rows) - 2), "promote"]
    assert all(row["decided_by"] and row["decided_at"] and row["state"] == "done" for row in rows)
    assert json.loads(rows[0]["settings"]) == SETTINGS and rows[-1]["better"] >= 2.5
    assert tables.read(spark, env, EXPERIMENT_LOG).count() == len(rows)
    move = aliases.read_log(spark, env, NAME)[-1]
    assert (move["alias"], move["to_version"]) == ("champion", 2) and rows[-1]["reason"] in move["reason"]
    assert experiment.log[-1]["decided_by"] == rows[-1]["decided_by"]  # also before the row is read again
    picture = experimenting.experiment_picture(experiment)
    assert "the experiment is won" in picture.get_suptitle()
    assert list(experimenting.decisions_table(experiment).decision) == ["start", "promote"]


@pytest.mark.slow
def test_without_an_inference_log_the_message_says_how_to_get_one(world):
    env, spark = world
    with pytest.raises(MissingError, match="has no table dev.empty.inference_log"):
        experimenting.read_answers(USE_CASE, spark, replace(env, schema="empty"), FIRST, FIRST, 1, 2)


@pytest.mark.slow
def test_answers_to_the_same_row_are_compared_in_pairs(world, monkeypatch):
    env, spark = world
    split = logged(flights())
    shadow = split[split["model_version"] == 1].assign(**{"model_version": 2, "databricks_request_id": "shadow"})
    tables.overwrite(spark, env, INFERENCE_LOG, spark.createDataFrame(pd.concat([split, shadow])))
    monkeypatch.setattr(experimenting, "payload_table_name", lambda use_case, env: env.table("no_payload"))
    answers = experimenting.read_answers(USE_CASE, spark, env, FIRST, FIRST + timedelta(3), 1, 2)
    assert len(answers) == 4.5 * REQUESTS and answers.milliseconds.isna().all()
    block, = complete_blocks(answers, SETTINGS, BINARY, FIRST, FIRST + timedelta(2), 50, Control())
    assert block.is_paired and block.improvement == 0 and block.challenger_requests == REQUESTS / 2

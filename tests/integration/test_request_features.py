"""Requests with the keys of real flights, at several moments: the features and predictions of a batch."""
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from local_workspace import address_of, endpoint_config, workspace
from mlflow.utils.proto_json_utils import dump_input_data
from states import MODEL, env_of

from mlops_nb.data import session as sessions
from mlops_nb.data import tables
from mlops_nb.features.client import score_batch
from mlops_nb.features.stores.publishing import latest_rows
from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import open_store
from mlops_nb.flights.days import ZONE
from mlops_nb.flights.feature_engineering import FEATURE_TABLES
from mlops_nb.flights.use_case import CATEGORICAL, FEATURES, FLIGHT_KEY, scheduled, with_prediction_time
from mlops_nb.models.scoring import model_input
from mlops_nb.serving.request_features import request_features

MODEL_URI = f"models:/{MODEL}/1"
MOMENTS = [datetime(2013, 3, 16, 10, tzinfo=UTC), datetime(2013, 3, 20, 14, 7, tzinfo=UTC),
           datetime(2013, 3, 24, 18, 59, 59, tzinfo=UTC), datetime(2013, 3, 29, 21, 30, tzinfo=UTC),
           datetime(2013, 4, 1, 0, 15, tzinfo=UTC)]
FLIGHTS_PER_MOMENT = 200


@pytest.fixture(scope="module")
def home(own_trained, tmp_path_factory):
    "The state of the jobs features and train, with an empty online store."
    folder = tmp_path_factory.mktemp("online")
    env = replace(env_of(own_trained), variables={"online_store": f"sqlite:///{folder}/online.db"})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLOPS_ONLINE_STORE", raising=False)
        env.use_mlflow()
        sessions.stop()
        yield env
        sessions.stop()


@pytest.fixture(scope="module")
def spark(home): return sessions.get_spark(home)


def next_flights(spark, env, moment: datetime):
    "The flights that leave next, as they are asked for at a moment: that moment is their prediction time."
    day = moment.astimezone(UTC).date()
    flights = scheduled(spark, env, day - timedelta(days=1), 3).drop("prediction_time", "prediction_day")
    later = flights.where(f"scheduled_departure >= TIMESTAMP'{moment:%Y-%m-%d %H:%M:%S}'")
    chosen = later.orderBy("scheduled_departure", *FLIGHT_KEY).limit(FLIGHTS_PER_MOMENT)
    asked_at = f"TIMESTAMP'{moment:%Y-%m-%d %H:%M:%S}' AS prediction_time"
    return with_prediction_time(chosen.selectExpr("*", asked_at))


@pytest.fixture(scope="module")
def batch(spark, home) -> pd.DataFrame:
    "What `score_batch` returns for the flights of all moments."
    frames = [next_flights(spark, home, moment) for moment in MOMENTS]
    rows = frames[0]
    for frame in frames[1:]: rows = rows.unionByName(frame)
    scored = score_batch(spark, home, MODEL_URI, rows)
    return scored.toArrow().to_pandas().sort_values(["prediction_time", *FLIGHT_KEY], ignore_index=True)


def publish_known(spark, env, moment: datetime, version: int) -> None:
    "Publish the latest rows that were known at a moment; the state has later ones, too."
    with open_store(env.variables["online_store"]) as store:
        for declaration in FEATURE_TABLES:
            rows, time = tables.read(spark, env, declaration.name), declaration.timeseries_column
            if time is None and version > 1: continue
            if time == "ts": rows = rows.where(f"ts <= TIMESTAMP'{moment:%Y-%m-%d %H:%M:%S}'")
            if time == "day": rows = rows.where(f"day <= DATE'{moment.astimezone(ZoneInfo(ZONE)).date()}'")
            latest = latest_rows(rows, declaration.key, time).toArrow()
            layout = layout_of(env.table(declaration.name), latest.schema, declaration.key, time_column=time)
            store.upsert(layout, latest, version)
            store.finish(layout.table, version)


def rows_of_body(body: str) -> list[dict]:  # JSON
    "Return the rows of `dataframe_split`."
    split = json.loads(body)["dataframe_split"]
    return [dict(zip(split["columns"], row, strict=True)) for row in split["data"]]


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory) -> Path:
    "The downloaded model."
    return Path(mlflow.artifacts.download_artifacts(MODEL_URI, dst_path=str(tmp_path_factory.mktemp("model"))))


@dataclass
class Answered:
    "The flights of a moment, as the endpoint sees them."
    rows: list[dict]                    # the inputs of the model
    has_row: dict[tuple, list[bool]]    # whether the store has the row of each flight, by table and lookup key
    alone: list[float]                  # the predictions of an endpoint: a request for each flight
    together: list[float]               # and one request for all of them


def rows_in_store(features, flights: pd.DataFrame) -> dict[tuple, list[bool]]:
    has_row = {}
    for columns in features.spec.lookups().values():
        table, names = columns[0].table_name, list(columns[0].lookup_key)
        keys = [tuple(key) for key in flights[names].itertuples(index=False)]
        known = [key for key in keys if None not in key]
        rows = dict(zip(known, features.store.get(table, known), strict=True))
        has_row[table.split(".")[2], *names] = [rows.get(key) is not None for key in keys]
    return has_row


def predictions_of(client, session: httpx.Client, rows: list[dict]) -> list[float]:
    "What the endpoint predicts; only the first request of a test finds none."
    if not list(client.serving_endpoints.list()):
        client.serving_endpoints.create_and_wait("late", config=endpoint_config())
    response = session.post(address_of(client, "late"), json={"dataframe_records": rows})
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


@pytest.fixture(scope="module")
def predict(home, own_trained):
    "Call an endpoint of `mlops up` that finds features in the store of this file."
    with workspace(own_trained, MLOPS_ONLINE_STORE=home.variables["online_store"]) as client:
        with httpx.Client(headers={"Authorization": f"Bearer {client.config.token}"}, timeout=60) as session:
            yield partial(predictions_of, client, session)


@pytest.fixture(scope="module")
def answers(spark, home, batch, folder, predict) -> list[Answered]:
    "The completed rows and the predictions by moment, while the store holds what was known then."
    answered = []
    for version, moment in enumerate(MOMENTS, start=1):
        publish_known(spark, home, moment, version)
        features = request_features(home, folder)
        flights = batch[batch.prediction_time == moment]
        keys = flights[list(features.required)].astype(object)
        rows = rows_of_body(dump_input_data(keys.where(keys.notna(), None)))
        alone = [predict([row])[0] for row in rows]
        answered.append(Answered([features.complete([row])[0] for row in rows], rows_in_store(features, flights),
                                 alone, predict(rows)))
        assert features.complete(rows) == answered[-1].rows
        features.close()
    return answered


@pytest.mark.slow
def test_requests_need_keys_only(home, answers, folder):
    features = request_features(home, folder)
    assert set(features.required) == {"carrier", "origin", "dest", "tailnum", "sched_dep_time", "flight_day",
                                      "scheduled_departure", "scheduled_arrival"}
    assert set(features.outputs) == set(FEATURES) and features.is_local
    features.close()


@pytest.mark.slow
def test_a_request_gets_the_features_of_a_batch_at_every_moment(batch, answers):
    assert len(batch) == len(MOMENTS) * FLIGHTS_PER_MOMENT == 1000
    for moment, answered in zip(MOMENTS, answers, strict=True):
        ours, theirs = pd.DataFrame(answered.rows), batch[batch.prediction_time == moment]
        for name in FEATURES:
            if name in CATEGORICAL: assert ours[name].fillna("").tolist() == theirs[name].fillna("").tolist(), name
            else: np.testing.assert_allclose(ours[name].astype(float), theirs[name].astype(float), rtol=0, atol=1e-9,
                                             err_msg=name)
    changing = batch.groupby("prediction_time")[["temperature", "origin_due_3h", "route_late_share"]].mean()
    assert (changing.nunique() == len(MOMENTS)).all(), "the moments do not differ"


@pytest.mark.slow
def test_a_request_gets_the_prediction_of_a_batch_at_every_moment(batch, answers, folder):
    model = mlflow.pyfunc.load_model(str(folder))
    rows = pa.Table.from_pylist([row for answered in answers for row in answered.rows])
    predictions = model.predict(model_input(model, rows, FEATURES))
    np.testing.assert_allclose(predictions, batch.prediction, rtol=0, atol=1e-9)
    assert batch.prediction.nunique() > 900
    feature_model = model._model_impl  # what MLflow loads: FeatureModel, around the model that was trained
    assert type(feature_model).__name__ == "FeatureModel"
    raw_model = feature_model.get_raw_model()
    np.testing.assert_allclose(raw_model.predict(model_input(raw_model, rows, FEATURES)), predictions,
                               rtol=0, atol=1e-12)


@pytest.mark.slow
def test_an_endpoint_predicts_as_a_batch_at_every_moment(batch, answers):
    for name in ("alone", "together"):
        predictions = np.concatenate([getattr(answered, name) for answered in answers])
        np.testing.assert_allclose(predictions, batch.prediction, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_at_least_95_percent_of_the_keys_have_a_row(batch, answers):
    """The features of the others are null, as in the batch, and functions of them too: flights without a plane, planes
    that the register does not list, and planes that have not flown yet. A lookup with defaults would give these."""
    has_row = {lookup: np.concatenate([answered.has_row[lookup] for answered in answers])
               for lookup in answers[0].has_row}
    shares = {lookup: rows.mean() for lookup, rows in has_row.items()}
    assert len(shares) == 8 and np.mean(list(shares.values())) >= 0.95, shares
    gaps = {lookup for lookup, share in shares.items() if share < 1}
    assert gaps == {("plane", "tailnum"), ("aircraft_recent", "tailnum")}, shares
    ours = pd.DataFrame([row for answered in answers for row in answered.rows])
    for lookup, features in ((("plane", "tailnum"), ["plane_seats", "plane_maker"]),
                             (("aircraft_recent", "tailnum"), ["aircraft_stage", "aircraft_slack"])):
        without_row = ~has_row[lookup]
        assert ours.loc[without_row, features].isna().all(axis=None), lookup
        assert batch.loc[without_row, features].isna().all(axis=None), lookup
    assert batch.prediction.notna().all()

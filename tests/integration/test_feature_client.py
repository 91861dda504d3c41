"""The feature client on Sail: training sets, models with their spec, scores from keys, and what it refuses."""
import sys
import types
from dataclasses import replace
from datetime import timedelta

import lightgbm
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.features import functions as feature_functions
from mlops_nb.features.client import FeatureEngineeringClient, feature_client, find_spec, spec_of
from mlops_nb.features.spec import FeatureFunction, FeatureLookup
from mlops_nb.models import registry

T = "TIMESTAMP'2013-07-01 {}:00:00'"


def doubled(level: float) -> float:
    "Twice the level."
    return 2 * level


@pytest.fixture(scope="module")
def at_home(env, tmp_path_factory):
    "The target with an MLflow store of its own."
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"): patch.delenv(name, raising=False)
        yield replace(env, state=state, tracking_uri=f"sqlite:///{state}/mlflow.db", registry_uri=f"sqlite:///{state}/mlflow.db")


@pytest.fixture(scope="module")
def client(spark, at_home):
    client = feature_client(spark, at_home)
    assert type(client) is FeatureEngineeringClient
    rows = spark.sql(f"""SELECT * FROM VALUES ('a', {T.format(10)}, 1.0D, 10L), ('a', {T.format(12)}, NULL, 20L),
        ('b', {T.format('09')}, 3.0D, NULL) AS v(place, ts, level, count)""")
    client.create_table(name="hours", primary_keys=["place", "ts"], timeseries_column="ts", df=rows, description="Hour by hour")
    client.create_table(name="places", primary_keys="place", df=spark.sql("SELECT 'a' AS place, 100 AS height"))
    client.create_table(name="empty", primary_keys=["place"], schema="place STRING, mood STRING")
    feature_functions.register_function(spark, at_home, doubled)
    return client


@pytest.fixture(scope="module")
def asks(spark):
    return spark.sql(f"""SELECT * FROM VALUES (1, 'a', {T.format(11)}, true), (2, 'a', {T.format(12)}, false), (3, 'b', {T.format(11)}, true),
        (4, 'c', {T.format(11)}, false), (5, NULL, {T.format(11)}, true), (6, 'a', NULL, true) AS v(id, where, at, late)""")


HOURS = FeatureLookup("dev.flights.hours", "where", timestamp_lookup_key="at")
FEATURES = [HOURS, FeatureLookup("dev.flights.places", "where"), FeatureFunction("dev.flights.doubled", {"level": "level"})]


def loaded(training_set) -> pd.DataFrame: return training_set.load_df().toPandas()
def by_id(frame: pd.DataFrame, column: str) -> list: return frame.sort_values("id")[column].astype(object).where(frame.sort_values("id")[column].notna(), None).tolist()


def test_each_row_gets_what_was_known_at_its_moment(client, asks):
    rows = loaded(client.create_training_set(df=asks, feature_lookups=FEATURES, label="late"))
    assert list(rows) == ["id", "where", "at", "level", "count", "height", "doubled", "late"] and len(rows) == 6
    assert by_id(rows, "level") == [1, None, 3, None, None, None]  # at noon nothing was known of `a`
    assert by_id(rows, "count") == [10, 20, None, None, None, None]
    assert by_id(rows, "height") == [100, 100, None, None, None, 100] and by_id(rows, "doubled") == [2, None, 6, None, None, None]


def test_defaults_names_lookback_and_exclusion(client, asks):
    lookup = replace(HOURS, feature_names="count", rename_outputs={"count": "n"}, default_values={"n": 7}, lookback_window=timedelta(minutes=90))
    rows = loaded(client.create_training_set(df=asks, feature_lookups=[lookup], label="late", exclude_columns=["where", "at"]))
    assert list(rows) == ["id", "n", "late"] and by_id(rows, "n") == [10, 20, 7, 7, 7, 7]
    exact = replace(HOURS, feature_names="count", lookback_window=timedelta(0))
    assert by_id(loaded(client.create_training_set(df=asks, feature_lookups=[exact], label="late")), "count") == [None, 20, None, None, None, None]


def test_two_roles_of_one_table(client, spark):
    pairs = spark.sql("SELECT 'a' AS origin, 'b' AS dest, true AS late")
    roles = [FeatureLookup("dev.flights.places", role, rename_outputs={"height": f"{role}_height"}) for role in ("origin", "dest")]
    row = loaded(client.create_training_set(df=pairs, feature_lookups=roles, label="late")).iloc[0]
    assert row.origin_height == 100 and pd.isna(row.dest_height)


def test_an_empty_table_is_looked_up_in_vain(client, asks):
    rows = loaded(client.create_training_set(df=asks, feature_lookups=[FeatureLookup("dev.flights.empty", "where")], label="late"))
    assert len(rows) == 6 and rows.mood.isna().all()


@pytest.fixture(scope="module")
def model_uri(client, asks, at_home) -> str:
    "A booster that was logged with its spec."
    training_set = client.create_training_set(df=asks, feature_lookups=FEATURES, label="late", exclude_columns=["id", "where", "at"])
    rows = training_set.load_df().toPandas().astype(float)
    booster = lightgbm.train({"min_data_in_leaf": 1, "min_data_in_bin": 1, "verbose": -1, "objective": "binary"},
                             lightgbm.Dataset(rows.drop(columns="late"), rows.late), 3)
    with mlflow.start_run(experiment_id=registry.experiment_id(at_home, "client")):
        info = client.log_model(model=booster, artifact_path="model", flavor=mlflow.lightgbm, training_set=training_set,
                                signature=mlflow.models.infer_signature(rows.drop(columns="late"), np.zeros(1)),
                                input_example=rows.drop(columns="late").head(2),
                                registered_model_name="dev.flights.client_test")
    return f"models:/dev.flights.client_test/{info.registered_model_version}"


def test_a_model_is_stored_in_databricks_layout(model_uri, tmp_path):
    folder = tmp_path / "model"
    mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder))
    stored = folder / "data/feature_store"
    assert (stored / "raw_model/MLmodel").exists() and (stored / "raw_model/model.lgb").exists()
    said = yaml.safe_load((stored / "feature_spec.yaml").read_text())
    assert said["input_tables"] == [{"dev.flights.hours": {}}, {"dev.flights.places": {}}]
    assert [n for e in said["input_columns"] for n, v in e.items() if v.get("include", True)] == ["level", "count", "height", "doubled"]
    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert flavor["loader_module"] == "feature_model" and flavor["data"] == "data/feature_store"
    assert any(line.startswith("lightgbm") for line in (folder / "requirements.txt").read_text().splitlines())


def test_a_score_from_keys_alone_is_that_of_the_model_inside(client, asks, model_uri):
    scored = client.score_batch(model_uri=model_uri, df=asks.drop("late")).toPandas().sort_values("id")
    assert list(scored) == ["id", "where", "at", "level", "count", "height", "doubled", "prediction"]
    inside = mlflow.pyfunc.load_model(model_uri)
    expected = inside.predict(scored[["level", "count", "height", "doubled"]].astype(float))
    assert np.array_equal(scored.prediction, expected) and scored.prediction.nunique() > 1


def test_a_feature_that_the_rows_bring_goes_before_the_table(client, asks, model_uri):
    rows = asks.drop("late").selectExpr("*", "50D AS level")
    scored = client.score_batch(model_uri=model_uri, df=rows).toPandas()
    assert (scored.level == 50).all() and (scored.doubled == 100).all() and by_id(scored, "count") == [10, 20, None, None, None, None]


def test_what_score_batch_refuses(client, asks, model_uri, at_home):
    with pytest.raises(MlopsError, match="the rows have no column 'where', from which 'level' follows"):
        client.score_batch(model_uri=model_uri, df=asks.drop("where", "late"))
    with pytest.raises(MlopsError, match="a column 'prediction' already"):
        client.score_batch(model_uri=model_uri, df=asks.selectExpr("*", "1 AS prediction"))
    with pytest.raises(MlopsError, match="no alias 'champion'"):
        client.score_batch(model_uri="models:/dev.flights.client_test@champion", df=asks)
    with mlflow.start_run(experiment_id=registry.experiment_id(at_home, "client")):
        plain = mlflow.lightgbm.log_model(lightgbm.train({"verbose": -1}, lightgbm.Dataset(np.ones((20, 1)), np.ones(20)), 1), name="plain")
    with pytest.raises(MlopsError, match="was logged without a feature spec"): spec_of(plain.model_uri)


@pytest.mark.parametrize("uri, message", [
    ("models:/dev.flights.client_tset/1", "no model 'dev.flights.client_tset' in the registry\n  did you mean 'dev.flights.client_test'"),
    ("models:/client_test/99", "no version '99' in model dev.flights.client_test\n  there is only 1"),
    ("models:/dev.flights.client_test/latest", "whole number from 1 on, not 'latest'"),
    ("models:/dev.flights.client_test", "names no version\n  write models:/NAME/VERSION .*; the models are: dev.flights.client_test"),
    ("models:/prod.flights.client_test@champion", "no model 'prod.flights.client_test'"),
    (f"models:/m-{'a' * 32}", "there is no model at models:/m-a+: Logged model .* not found.*\n.*the models are: dev.flights.client_test"),
    (f"runs:/{'a' * 32}/model", "there is no model at runs:/.*not found"), ("/no/such/folder", "there is no model at /no/such/folder"), ("", "model_uri is empty")])
def test_an_address_where_no_model_is_gets_an_answer_that_says_what_there_is(client, asks, model_uri, uri, message):
    with pytest.raises(MlopsError, match=message): client.score_batch(model_uri=uri, df=asks.drop("late"))


def test_a_short_name_is_the_targets_own_model(at_home, model_uri):
    registered = registry.version_numbers(at_home, "dev.flights.client_test")
    assert find_spec(at_home, f"models:/client_test/{registered[0]}")[0] == f"models:/dev.flights.client_test/{registered[0]}"


def test_a_registry_that_is_down_is_told_without_its_password(at_home):
    down = replace(at_home, tracking_uri="http://me:hidden@localhost:1", registry_uri="http://me:hidden@localhost:1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(MlopsError, match="the registry at http://localhost:1 does not answer") as error: find_spec(down, "models:/dev.flights.x/1")
    assert "hidden" not in f"{error.value}"
    at_home.use_mlflow()


@pytest.mark.parametrize("change, message", [
    (dict(primary_keys=["place"], schema="place STRING, ts TIMESTAMP_NTZ", timeseries_column="ts"), "'ts' of dev.flights.bad is not among its primary_keys"),
    (dict(primary_keys=["place", "ts"], schema="place STRING, ts TIMESTAMP_NTZ", timeseries_column="ts"), "is timestamp_ntz\n.*with a zone"),
    (dict(primary_keys=["plase"], schema="place STRING, v INT"), "no column 'plase' in feature table"),
    (dict(primary_keys=[], schema="place STRING, v INT"), "has no key"),
    (dict(primary_keys=["place", "place"], schema="place STRING, v INT"), "name a column twice"),
    (dict(primary_keys=["place"]), "got neither df nor schema")])
def test_tables_that_are_refused(client, spark, at_home, change, message):
    with pytest.raises(MlopsError, match=message): client.create_table(name="bad", **change)
    assert not tables.exists(spark, at_home, "bad")


def test_writes_that_are_refused(client, spark):
    before = client.read_table(name="hours").count()
    rows = lambda sql: spark.sql(f"SELECT * FROM VALUES {sql} AS v(place, ts, level, count)")
    for sql, message in [(f"('z', {T.format(10)}, 1D, 1L), ('z', {T.format(10)}, 2D, 1L)", "1 duplicate keys for dev.flights.hours"),
                         (f"('z', {T.format(10)}, 1D, 1L), (NULL, {T.format(11)}, 2D, 1L)", "key 'place' is null in 1 of the rows for dev.flights.hours"),
                         (f"(5, {T.format(10)}, 1D, 1L)", "column 'place' of dev.flights.hours is string, got int")]:
        with pytest.raises(MlopsError, match=message): client.write_table(name="hours", df=rows(sql))
    with pytest.raises(MlopsError, match="no column 'place' in the rows to merge"):
        client.write_table(name="hours", df=rows(f"('z', {T.format(10)}, 1D, 1L)").withColumnRenamed("place", "spot"))
    with pytest.raises(MlopsError, match="mode 'overwrite'"): client.write_table(name="hours", df=rows(f"('z', {T.format(10)}, 1D, 1L)"), mode="overwrite")
    with pytest.raises(MlopsError, match="no table 'dev.flights.horus'\n.*did you mean 'dev.flights.hours'".replace("\n", "[^$]*")):
        client.write_table(name="horus", df=rows(f"('z', {T.format(10)}, 1D, 1L)"))
    assert client.read_table(name="hours").count() == before


def test_on_databricks_it_is_databricks_own_client(spark, env, monkeypatch):
    "A stand-in for their package: it notes what it is given."
    package, asked = types.ModuleType("databricks.feature_engineering"), []
    note = lambda kind: lambda **given: asked.append((kind, given)) or (kind, given)
    package.FeatureLookup, package.FeatureFunction = note("lookup"), note("function")
    package.FeatureEngineeringClient = lambda: types.SimpleNamespace(create_training_set=note("set"), score_batch=note("score"))
    import databricks
    monkeypatch.setitem(sys.modules, "databricks.feature_engineering", package)
    monkeypatch.setattr(databricks, "feature_engineering", package, raising=False)
    client = feature_client(spark, replace(env, engine="databricks"))
    lookup = replace(HOURS, table_name="hours", lookback_window=timedelta(days=1), default_values={"count": 1})
    client.create_training_set(df="rows", feature_lookups=[lookup, FEATURES[2]], label="late")
    client.score_batch(model_uri="models:/m/1", df="rows")
    assert asked[0] == ("lookup", dict(table_name="dev.flights.hours", lookup_key=["where"], feature_names=None, rename_outputs={},
                                       timestamp_lookup_key="at", lookback_window=timedelta(days=1), default_values={"count": 1}))
    assert asked[1] == ("function", dict(udf_name="dev.flights.doubled", input_bindings={"level": "level"}, output_name="doubled"))
    assert asked[2] == ("set", dict(df="rows", label="late", feature_lookups=[asked[0], asked[1]]))
    assert asked[3] == ("score", dict(model_uri="models:/m/1", df="rows"))

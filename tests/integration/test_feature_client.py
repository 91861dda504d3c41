"""The feature client on Sail: training sets, models with their spec, scores from keys, refused arguments."""
import sys
import warnings
from dataclasses import replace
from datetime import timedelta

import lightgbm
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

from mlops_nb.data import tables
from mlops_nb.data.contracts import Contract, check_contract
from mlops_nb.errors import MlopsError
from mlops_nb.features import functions as feature_functions
from mlops_nb.features.client import (
    FeatureEngineeringClient,
    as_parameters,
    download_model,
    feature_client,
    pinned_uri,
    spec_of,
)
from mlops_nb.features.online import OnlineFeatures
from mlops_nb.features.spec import FeatureFunction, FeatureLookup, from_yaml, to_yaml
from mlops_nb.features.stores.store import open_store
from mlops_nb.models import registry, scoring

T = "TIMESTAMP'2013-07-01 {}:00:00'"


def doubled(level: float) -> float:
    "Twice the level."
    return 2 * level


@pytest.fixture(scope="module")
def at_home(env, tmp_path_factory):
    "The target with its own MLflow store."
    state = tmp_path_factory.mktemp("state")
    store = f"sqlite:///{state}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"): patch.delenv(name, raising=False)
        yield replace(env, state=state, tracking_uri=store, registry_uri=store)


@pytest.fixture(scope="module")
def client(spark, at_home):
    client = feature_client(spark, at_home)
    assert type(client) is FeatureEngineeringClient
    rows = spark.sql(f"""SELECT * FROM VALUES ('a', {T.format(10)}, 1.0D, 10L), ('a', {T.format(12)}, NULL, 20L),
        ('b', {T.format('09')}, 3.0D, NULL) AS v(place, ts, level, count)""")
    client.create_table(name="hours", primary_keys=["place", "ts"], timeseries_column="ts", df=rows,
                        description="Hour by hour")
    client.create_table(name="places", primary_keys="place", df=spark.sql("SELECT 'a' AS place, 100 AS height"))
    client.create_table(name="empty", primary_keys=["place"], schema="place STRING, mood STRING")
    feature_functions.register_function(spark, at_home, doubled)
    return client


@pytest.fixture(scope="module")
def input_rows(spark):
    return spark.sql(f"""SELECT * FROM VALUES (1, 'a', {T.format(11)}, true), (2, 'a', {T.format(12)}, false),
        (3, 'b', {T.format(11)}, true), (4, 'c', {T.format(11)}, false), (5, NULL, {T.format(11)}, true),
        (6, 'a', NULL, true) AS v(id, where, at, late)""")


HOURS = FeatureLookup("dev.flights.hours", "where", timestamp_lookup_key="at")
DOUBLED = FeatureFunction("dev.flights.doubled", {"level": "level"})
FEATURES = [HOURS, FeatureLookup("dev.flights.places", "where"), DOUBLED]


def loaded(client, df, feature_lookups, **options) -> pd.DataFrame:
    "Return the rows of a training set with the label `late`."
    training_set = client.create_training_set(df=df, feature_lookups=feature_lookups, label="late", **options)
    return training_set.load_df().toPandas()


def by_id(frame: pd.DataFrame, column: str) -> list:
    "Return the values of a column in the order of the ids; None for missing."
    values = frame.sort_values("id")[column]
    return values.astype(object).where(values.notna(), None).tolist()


def test_each_row_gets_the_values_known_at_its_time(client, input_rows):
    rows = loaded(client, input_rows, FEATURES)
    assert list(rows) == ["id", "where", "at", "level", "count", "height", "doubled", "late"] and len(rows) == 6
    assert by_id(rows, "level") == [1, None, 3, None, None, None]  # at noon the level of `a` is null
    assert by_id(rows, "count") == [10, 20, None, None, None, None]
    assert by_id(rows, "height") == [100, 100, None, None, None, 100]
    assert by_id(rows, "doubled") == [2, None, 6, None, None, None]


def test_defaults_names_lookback_and_exclusion(client, input_rows):
    lookup = replace(HOURS, feature_names="count", rename_outputs={"count": "n"}, default_values={"n": 7},
                     lookback_window=timedelta(minutes=90))
    rows = loaded(client, input_rows, [lookup], exclude_columns=["where", "at"])
    assert list(rows) == ["id", "n", "late"] and by_id(rows, "n") == [10, 20, 7, 7, 7, 7]
    same_time = replace(HOURS, feature_names="count", lookback_window=timedelta(0))
    assert by_id(loaded(client, input_rows, [same_time]), "count") == [None, 20, None, None, None, None]


def test_several_labels_are_returned_and_are_no_inputs(client, input_rows):
    training_set = client.create_training_set(df=input_rows, feature_lookups=[HOURS], label=["late", "id"],
                                              exclude_columns=["where", "at"])
    assert training_set.load_df().columns == ["level", "count", "late", "id"]
    assert training_set.feature_spec.inputs == ["level", "count"]


def test_two_roles_of_one_table(client, spark):
    pairs = spark.sql("SELECT 'a' AS origin, 'b' AS dest, true AS late")
    roles = [FeatureLookup("dev.flights.places", role, rename_outputs={"height": f"{role}_height"})
             for role in ("origin", "dest")]
    row = loaded(client, pairs, roles).iloc[0]
    assert row.origin_height == 100 and pd.isna(row.dest_height)


def test_an_empty_table_gives_nulls(client, input_rows):
    rows = loaded(client, input_rows, [FeatureLookup("dev.flights.empty", "where")])
    assert len(rows) == 6 and rows.mood.isna().all()


@pytest.fixture(scope="module")
def model_info(client, input_rows, at_home):
    "A booster that was logged and registered with its spec."
    training_set = client.create_training_set(df=input_rows, feature_lookups=FEATURES, label="late",
                                              exclude_columns=["id", "where", "at"])
    rows = training_set.load_df().toPandas().astype(float)
    inputs = rows.drop(columns="late")
    parameters = {"min_data_in_leaf": 1, "min_data_in_bin": 1, "verbose": -1, "objective": "binary"}
    booster = lightgbm.train(parameters, lightgbm.Dataset(inputs, rows.late), 3)
    with mlflow.start_run(experiment_id=registry.experiment_id(at_home, "client")):
        return client.log_model(model=booster, artifact_path="model", flavor=mlflow.lightgbm, training_set=training_set,
                                signature=mlflow.models.infer_signature(inputs, np.zeros(1)),
                                input_example=inputs.head(2), registered_model_name="dev.flights.client_test")


@pytest.fixture(scope="module")
def model_uri(model_info) -> str: return f"models:/dev.flights.client_test/{model_info.registered_model_version}"


@pytest.fixture
def plain_uri(at_home) -> str:
    "A model that was logged without a spec."
    booster = lightgbm.train({"verbose": -1}, lightgbm.Dataset(np.ones((20, 1)), np.ones(20)), 1)
    with mlflow.start_run(experiment_id=registry.experiment_id(at_home, "client")):
        return mlflow.lightgbm.log_model(booster, name="plain").model_uri


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    "The paths inside of models that are downloaded from the registry; empty for a whole model."
    paths, download = [], ModelsArtifactRepository.download_artifacts
    def counted(repository, artifact_path, *arguments, **options):
        paths.append(artifact_path)
        return download(repository, artifact_path, *arguments, **options)
    monkeypatch.setattr(ModelsArtifactRepository, "download_artifacts", counted)
    return paths


def test_a_model_is_stored_in_databricks_layout(model_uri, tmp_path):
    folder = tmp_path / "model"
    mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder))
    stored = folder / "data/feature_store"
    assert (stored / "raw_model/MLmodel").exists() and (stored / "raw_model/model.lgb").exists()
    content = yaml.safe_load((stored / "feature_spec.yaml").read_text())
    assert content["input_tables"] == [{"dev.flights.hours": {}}, {"dev.flights.places": {}}]
    columns = {name: values for entry in content["input_columns"] for name, values in entry.items()}
    included = [name for name, values in columns.items() if values.get("include", True)]
    assert included == ["level", "count", "height", "doubled"]
    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert flavor["loader_module"] == "feature_model" and flavor["data"] == "data/feature_store"
    assert any(line.startswith("lightgbm") for line in (folder / "requirements.txt").read_text().splitlines())


def test_a_score_from_keys_equals_the_inner_models(client, input_rows, model_uri):
    scored = client.score_batch(model_uri=model_uri, df=input_rows.drop("late")).toPandas().sort_values("id")
    assert list(scored) == ["id", "where", "at", "level", "count", "height", "doubled", "prediction"]
    inner = mlflow.pyfunc.load_model(model_uri)
    expected = inner.predict(scored[["level", "count", "height", "doubled"]].astype(float))
    assert np.array_equal(scored.prediction, expected) and scored.prediction.nunique() > 1


def test_scoring_downloads_the_model_once(client, input_rows, model_uri, downloads):
    scoring.packed_version.cache_clear()
    for _ in range(2): assert client.score_batch(model_uri=model_uri, df=input_rows.drop("late")).count() == 6
    assert downloads == [""]


def test_a_spec_is_downloaded_without_the_model(model_uri, downloads):
    assert spec_of(model_uri).inputs == ["level", "count", "height", "doubled"]
    assert downloads == ["data/feature_store/feature_spec.yaml"]


def test_the_spec_of_every_kind_of_address(model_info, model_uri, tmp_path):
    folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=str(tmp_path))
    assert spec_of(model_uri).inputs == ["level", "count", "height", "doubled"]
    for uri in (f"models:/{model_info.model_id}", f"runs:/{model_info.run_id}/model", folder):
        assert spec_of(uri) == spec_of(model_uri)


def test_a_feature_among_the_input_columns_replaces_the_looked_up_one(client, input_rows, model_uri):
    rows = input_rows.drop("late").selectExpr("*", "50D AS level")
    scored = client.score_batch(model_uri=model_uri, df=rows).toPandas()
    assert (scored.level == 50).all() and (scored.doubled == 100).all()
    assert by_id(scored, "count") == [10, 20, None, None, None, None]


def test_input_rows_that_score_batch_refuses(client, input_rows, model_uri):
    with pytest.raises(MlopsError, match="the input rows have no column 'where', which feature 'level' needs"):
        client.score_batch(model_uri=model_uri, df=input_rows.drop("where", "late"))
    with pytest.raises(MlopsError, match="a column 'prediction' already"):
        client.score_batch(model_uri=model_uri, df=input_rows.selectExpr("*", "1 AS prediction"))
    with pytest.raises(MlopsError, match="no alias 'champion'"):
        client.score_batch(model_uri="models:/dev.flights.client_test@champion", df=input_rows)


def test_a_model_without_a_spec_is_refused(client, input_rows, plain_uri):
    with pytest.raises(MlopsError, match="was logged without a feature spec"): spec_of(plain_uri)
    with pytest.raises(MlopsError, match="was logged without a feature spec"):
        client.score_batch(model_uri=plain_uri, df=input_rows)


def test_the_spec_of_an_address_without_a_model_is_mlflows_error(at_home, tmp_path):
    for uri, message in ((f"models:/m-{'a' * 32}", "Logged model with ID 'm-a+' not found"),
                         (f"runs:/{'a' * 32}/model", "Run with id=a+ not found"),
                         (str(tmp_path), "No such artifact: 'MLmodel'")):
        with pytest.raises(MlflowException, match=message): spec_of(uri)


KNOWN = "the models are: dev.flights.client_test"


@pytest.mark.parametrize("uri, message", [
    ("models:/dev.flights.client_tset/1",
     "no model 'dev.flights.client_tset' in the registry\n  did you mean 'dev.flights.client_test'"),
    ("models:/client_test/99", "no version '99' in model dev.flights.client_test\n  there is only 1"),
    ("models:/dev.flights.client_test/latest", "a positive integer, not 'latest'"),
    ("models:/dev.flights.client_test", "names no version\n  write models:/NAME/VERSION or models:/NAME@alias; "
     "dev.flights.client_test has the versions 1$"),
    ("models:/prod.flights.client_test@champion", "no model 'prod.flights.client_test'"),
    (f"models:/m-{'a' * 32}", f"there is no model at models:/m-a+: Logged model .* not found.*\n.*{KNOWN}"),
    (f"runs:/{'a' * 32}/model", "there is no model at runs:/.*not found"),
    ("/no/such/folder", "there is no model at /no/such/folder"), ("", "model_uri is empty")])
def test_an_address_without_a_model_is_an_error_with_the_existing_models(client, input_rows, model_uri, uri, message):
    with pytest.raises(MlopsError, match=message): client.score_batch(model_uri=uri, df=input_rows.drop("late"))


def test_a_short_name_is_the_targets_own_model(at_home, model_uri):
    version = registry.version_numbers(at_home, "dev.flights.client_test")[0]
    assert pinned_uri(at_home, f"models:/client_test/{version}") == f"models:/dev.flights.client_test/{version}"


def test_the_error_of_a_registry_that_is_down_hides_its_password(at_home):
    address = "http://me:hidden@localhost:1"
    down = replace(at_home, tracking_uri=address, registry_uri=address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(MlopsError, match="no MLflow server answers at http://localhost:1:") as error:
            download_model(down, "models:/dev.flights.x/1")
    assert "hidden" not in f"{error.value}"
    at_home.use_mlflow()


@pytest.mark.parametrize("change, message", [
    (dict(primary_keys=["place"], schema="place STRING, ts TIMESTAMP_NTZ", timeseries_column="ts"),
     "'ts' of dev.flights.bad is not among its primary_keys"),
    (dict(primary_keys=["place", "ts"], schema="place STRING, ts TIMESTAMP_NTZ", timeseries_column="ts"),
     "is timestamp_ntz\n.*which has a time zone"),
    (dict(primary_keys=["plase"], schema="place STRING, v INT"), "no column 'plase' in feature table"),
    (dict(primary_keys=[], schema="place STRING, v INT"), "has no key"),
    (dict(primary_keys=["place", "place"], schema="place STRING, v INT"), "name a column twice"),
    (dict(primary_keys=["place"]), "got neither df nor schema")])
def test_tables_that_are_refused(client, spark, at_home, change, message):
    with pytest.raises(MlopsError, match=message): client.create_table(name="bad", **change)
    assert not tables.exists(spark, at_home, "bad")


@pytest.mark.parametrize("rows, message", [
    (f"('z', {T.format(10)}, 1D, 1L), ('z', {T.format(10)}, 2D, 1L)", "1 duplicate key for dev.flights.hours"),
    (f"('z', {T.format(10)}, 1D, 1L), (NULL, {T.format(11)}, 2D, 1L)",
     "key 'place' is null in 1 of the rows for dev.flights.hours"),
    (f"(5, {T.format(10)}, 1D, 1L)", "column 'place' of dev.flights.hours is string, got int")])
def test_rows_that_are_refused(client, spark, rows, message):
    before = client.read_table(name="hours").count()
    df = spark.sql(f"SELECT * FROM VALUES {rows} AS v(place, ts, level, count)")
    with pytest.raises(MlopsError, match=message): client.write_table(name="hours", df=df)
    assert client.read_table(name="hours").count() == before


def test_writes_that_are_refused(client, spark):
    before = client.read_table(name="hours").count()
    df = spark.sql(f"SELECT * FROM VALUES ('z', {T.format(10)}, 1D, 1L) AS v(place, ts, level, count)")
    with pytest.raises(MlopsError, match="no column 'place' in the rows to merge"):
        client.write_table(name="hours", df=df.withColumnRenamed("place", "spot"))
    with pytest.raises(MlopsError, match="mode 'overwrite'"):
        client.write_table(name="hours", df=df, mode="overwrite")
    with pytest.raises(MlopsError, match="no table 'dev.flights.horus'[^$]*did you mean 'dev.flights.hours'"):
        client.write_table(name="horus", df=df)
    assert client.read_table(name="hours").count() == before


def on_databricks(env, **variables):
    "The target as a notebook on Databricks has it."
    return replace(env, engine="databricks", variables=env.variables | variables)


def installed(monkeypatch, folder, code: str):
    "Install a package databricks.feature_engineering with this code."
    import databricks
    package = folder / "databricks/feature_engineering"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setattr(databricks, "__path__", [*databricks.__path__, str(package.parent)])
    monkeypatch.delitem(sys.modules, "databricks.feature_engineering", raising=False)


def test_one_variable_chooses_the_client_on_databricks(spark, env):
    assert type(feature_client(spark, on_databricks(env, feature_client="mlops_nb"))) is FeatureEngineeringClient
    with pytest.raises(MlopsError, match="no feature_client 'databrick' in the variables\n  did you mean 'databricks'"):
        feature_client(spark, on_databricks(env, feature_client="databrick"))
    with pytest.raises(MlopsError, match=r"databricks-feature-engineering is not installed\n.*%pip install"):
        feature_client(spark, on_databricks(env))


def test_another_cause_of_a_failed_import_is_shown(spark, env, monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, "import a_package_that_is_missing")
    with pytest.raises(MlopsError, match="cannot be imported: ModuleNotFoundError: No module named 'a_package_that"):
        feature_client(spark, on_databricks(env))


def test_a_missing_online_store_is_a_sentence(spark, env, monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, "class FeatureEngineeringClient: pass")  # of a version without online stores
    with pytest.raises(MlopsError, match="the variable online_store names no online store\n  set it for target 'dev'"):
        feature_client(spark, on_databricks(env, online_store="")).get_online_store()
    with pytest.raises(MlopsError, match="has no online stores\n  install databricks-feature-engineering>=0.13"):
        feature_client(spark, on_databricks(env, online_store="online")).get_online_store()


def later(hour: int) -> float:
    "An hour later."
    return hour + 1.0


def test_input_columns_get_the_types_of_parameters(client, spark, at_home):
    "Databricks compares the type of a column with the type of the parameter exactly."
    function = feature_functions.register_function(spark, at_home, later)
    rows = spark.sql("SELECT 'a' AS where, CAST(3 AS INT) AS hour")
    spec = client.create_training_set(df=rows, feature_lookups=[FeatureFunction(function.name, {"hour": "hour"})],
                                      label=None).feature_spec
    fitted = as_parameters(rows, spec, {function.name: function})
    assert dict(fitted.dtypes) == {"where": "string", "hour": "bigint"} and fitted.collect()[0].hour == 3
    features = [FeatureLookup("dev.flights.places", "where"), FeatureFunction(function.name, {"hour": "height"})]
    spec = client.create_training_set(df=rows, feature_lookups=features, label=None).feature_spec
    with pytest.raises(MlopsError, match="column 'height' is int, and parameter 'hour' .* is BIGINT: "):
        as_parameters(rows, spec, {function.name: function})


NAME_CHARACTERS = st.one_of(st.sampled_from(".`/\\$%?*'\"[]:#&@<>|~^!+-_Aa1é"), st.characters(
    exclude_categories=["Cc", "Cs"], exclude_characters=" ,;{}()="))
NAMES = st.lists(st.text(NAME_CHARACTERS, min_size=1, max_size=12).filter(lambda name: not name.endswith("__")),
                 min_size=10, max_size=10, unique_by=str.lower)
# The first four are columns of a table, in which Delta forbids spaces and some other characters
ODD_NAMES = ["wind.speed", "a`b", "a/b", "$x", "select", "1st {x}", "MiXed Case", "été; null", 'say "50%" = $x_{$',
             "it's a[0].*"]


@pytest.mark.slow
@settings(max_examples=2, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(names=NAMES)
@example(names=ODD_NAMES)
def test_columns_of_any_name(client, spark, at_home, tmp_path_factory, names):
    "A merge, a training set, a contract and an online store, compared with the same values under plain names."
    key, time, first, second, where, at, output, renamed, own, label = names
    table, folder = f"named_{abs(hash(tuple(names)))}", tmp_path_factory.mktemp("named")
    rows = spark.sql(f"SELECT * FROM VALUES ('a', {T.format(10)}, 1D, 5), ('a', {T.format(11)}, 2D, NULL)")
    client.create_table(name=table, primary_keys=[key, time], timeseries_column=time, df=rows.toDF(*names[:4]))
    later = spark.sql(f"SELECT * FROM VALUES ('a', {T.format(11)}, 3D, 7), ('b', {T.format(11)}, 4D, 8)")
    assert client.write_table(name=table, df=later.toDF(*names[:4])) == 2
    lookup = FeatureLookup(f"dev.flights.{table}", where, rename_outputs={second: renamed}, timestamp_lookup_key=at,
                           default_values={renamed: 9}, lookback_window=timedelta(minutes=30))
    function = FeatureFunction("dev.flights.doubled", {"level": first}, output_name=output)
    events = spark.sql(f"SELECT * FROM VALUES ('a', {T.format(10)}, 1, 0), ('b', {T.format(12)}, 2, 1)")
    training_set = client.create_training_set(df=events.toDF(where, at, own, label), feature_lookups=[lookup, function],
                                              label=label, exclude_columns=[where, at])
    frame = training_set.load_df()
    assert frame.columns == [own, first, renamed, output, label]
    assert sorted(map(tuple, frame.collect())) == [(1, 1, 5, 2, 0), (2, None, 9, None, 1)]
    assert from_yaml(to_yaml(training_set.feature_spec), "spec") == training_set.feature_spec
    contract = Contract(table, {key: {"nullable": False}, time: {}, first: {"type": "double", "max": 3.5},
                                second: {"type": "int", "values": [5, 7]}})
    with pytest.raises(MlopsError) as error:
        check_contract(contract, client.read_table(name=table), [key])
    assert str(error.value).splitlines()[1:3] == [f"  - 1 rows where {first} > 3.5: {key}=b, {first}=4.0",
                                                  f"  - 1 rows where {second} is not one of 5, 7: {key}=b, {second}=8"]
    with open_store(f"sqlite:///{folder}/online.db") as store:
        assert client.publish_table(online_store=store, source_table_name=table) == (2, 0)
        assert client.write_table(name=table, df=later.selectExpr("col1", "col2", "col3 + 1", "col4").toDF(*names[:4]))
        assert client.publish_table(online_store=store, source_table_name=table) == (2, 0)
        request = OnlineFeatures(at_home, training_set.feature_spec, store)({where: "a", own: 1})
    assert request == {own: 1, first: 4.0, renamed: 7, output: 8.0}


def test_names_that_are_refused(client, spark, input_rows):
    for name, message in (("Level", "feature 'level' of dev.flights.hours: the input rows have a column of that name"),
                          ("count", "feature 'count' of dev.flights.hours: the input rows have a column of that name")):
        rows = input_rows.withColumnRenamed("late", name)
        for label in (name, None):  # the value of a label must not become the value of a feature
            with pytest.raises(MlopsError, match=message):
                client.create_training_set(df=rows, feature_lookups=[HOURS], label=label)
    training_set = client.create_training_set(df=input_rows.withColumnRenamed("late", "Computed__"),
                                              feature_lookups=[HOURS, DOUBLED], label=None)
    with pytest.raises(MlopsError, match="column 'Computed__' of the input rows is reserved"): training_set.load_df()
    with pytest.raises(MlopsError, match="column name 'wind speed' for dev.flights.bad contains ' '"):
        client.create_table(name="bad", primary_keys="place", df=spark.sql("SELECT 'a' AS place, 1 AS `wind speed`"))


DIGITS = '''
import mlflow
import numpy as np

def digits(row):
    "Encode in one number what arrived of each feature."
    def sum_of(values): return 9 if values is None else np.nansum(np.array(values, float))
    lengths = 9 if row["tags"] is None else sum(map(len, row["tags"]))
    flags = 9 if row["fl`a/g$"] is None else sum(map(bool, row["fl`a/g$"]))
    hours = 9 if row["moments"] is None else sum(moment.hour for moment in map(np.datetime64.item, row["moments"]
                                                                              .astype("datetime64[us]")))
    missing = 9 if row["v.d"] is None else np.isnan(row["v.d"]).sum()
    moment = 9 if row["a t"] != row["a t"] else row["a t"].hour
    return float("".join(str(int(part)) for part in (
        sum_of(row["v.d"]), missing, sum_of(row["select"]), lengths, flags, hours, moment)))

class Digits(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return np.array([digits(row) for row in model_input.to_dict("records")])

mlflow.models.set_model(Digits())
'''
ARRAYS = f"""SELECT * FROM VALUES
    (1, array(1D, NULL, 2D), array(1, 3), array('a', 'bc'), array(true, false), array({T.format(7)}), {T.format(8)}),
    (2, NULL, NULL, NULL, NULL, NULL, NULL),
    (3, array(CAST(NULL AS DOUBLE)), array(1, NULL), array(), array(), array(), {T.format('01')})
    AS v(id, d, ints, tags, flags, moments, at)"""


@pytest.fixture(scope="module")
def arrays(client, spark, at_home, tmp_path_factory):
    "The address of a model with array features, and the names of its columns."
    names = ["id", "v.d", "select", "tags", "fl`a/g$", "moments", "at"]
    client.create_table(name="arrays", primary_keys="id", df=spark.sql(ARRAYS).toDF(*names))
    lookup = FeatureLookup("dev.flights.arrays", "id", rename_outputs={"at": "a t"})
    training_set = client.create_training_set(df=spark.sql("SELECT 1 AS id, true AS late"), label="late",
                                              feature_lookups=[lookup], exclude_columns="id")
    code = tmp_path_factory.mktemp("arrays") / "digits.py"
    code.write_text(DIGITS)
    experiment = registry.experiment_id(at_home, "client")
    with warnings.catch_warnings(action="ignore"), mlflow.start_run(experiment_id=experiment):  # of no input example
        return client.log_model(model=str(code), artifact_path="model", flavor=mlflow.pyfunc, training_set=training_set,
                                pip_requirements=["mlflow"])


@pytest.mark.filterwarnings("ignore:.*type hints")
def test_arrays_and_times_reach_the_model(client, spark, arrays):
    types = {column.name: str(column.type) for column in arrays.signature.inputs}
    assert types == {"v.d": "Array(double)", "select": "Array(double)", "tags": "Array(string)",
                     "fl`a/g$": "Array(boolean)", "moments": "Array(datetime)", "a t": "DataType.datetime"}
    scored = client.score_batch(model_uri=arrays.model_uri, df=spark.sql("SELECT explode(array(1, 2, 3)) AS id"))
    assert {row.id: row.prediction for row in scored.collect()} == {1: 3143178, 2: 9999999, 3: 110001}


def test_a_null_in_an_array_of_strings_is_refused(client, spark, arrays):
    "MLflow would give the model the text 'None'."
    rows = spark.sql("SELECT 1 AS id, array('a', NULL) AS tags")
    with pytest.raises(Exception, match="feature 'tags' has an array with a null among its elements"):
        client.score_batch(model_uri=arrays.model_uri, df=rows).collect()


@pytest.mark.parametrize("value, kind", [
    ("map('a', 1)", "map<string,int>"), ("named_struct('a', 1)", "struct<a:int>"),
    ("array(array(1D))", "array<array<double>>"), ("array(named_struct('a', 1))", "array<struct<a:int>>")])
def test_types_that_log_model_refuses(client, spark, at_home, value, kind):
    rows = spark.sql(f"SELECT {value} AS `my.value`, true AS late")
    training_set = client.create_training_set(df=rows, feature_lookups=[], label="late")
    with pytest.raises(MlopsError, match=f"feature 'my.value' is {kind}, which the signature of a model does not"):
        client.log_model(model="missing.py", artifact_path="model", flavor=mlflow.pyfunc, training_set=training_set)
    assert mlflow.active_run() is None

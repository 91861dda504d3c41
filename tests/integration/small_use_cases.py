"""Two small made-up use cases of 400 rows: customers who cancel (binary, without a time), and how long deliveries take
(regression, with a time). `write_tables` writes their source and feature tables; `conf_files` their configuration."""
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import yaml

from mlops_nb import FeatureLookup, feature_client, tables
from mlops_nb.env import Env, load_env
from mlops_nb.models import registry
from mlops_nb.models.problem_types import BINARY, REGRESSION
from mlops_nb.workflow.calendars import Calendar, sql_moment
from mlops_nb.workflow.use_case import FeatureQuery, UseCase

# Customers: a snapshot without a time. The label of every tenth is unknown.


def customers() -> pd.DataFrame:
    random = np.random.default_rng(7)
    frame = pd.DataFrame({"customer_id": np.arange(400, dtype="int64"), "plan": random.choice(["basic", "full"], 400),
                          "months": random.integers(1, 60, 400).astype("int64"),
                          "calls": random.poisson(2, 400).astype("int64")})
    chance = 1 / (1 + np.exp(1.5 - 0.6 * frame.calls + 0.03 * frame.months))
    frame["cancelled"] = pd.Series(random.random(400) < chance).astype("boolean")
    frame.loc[frame.customer_id % 10 == 9, "cancelled"] = None
    return frame


def customer_rows(spark, env, first, days):
    return tables.read(spark, env, env.source_table("customers")).select("customer_id", "plan", "months")


def customer_labels(spark, env, as_of):
    known = tables.read(spark, env, env.source_table("customers")).where("cancelled IS NOT NULL")
    return known.select("customer_id", "plan", "months", "cancelled")


def calls_query(cut: datetime) -> str: return "SELECT customer_id, calls FROM {customers}"


def customer_lookups(spark, env):
    return [FeatureLookup(env.source_table("customer_calls"), "customer_id", ["calls"])]


CUSTOMERS = UseCase(
    model="cancelled", problem=BINARY, key=("customer_id",), label="cancelled", rows=customer_rows,
    labels=customer_labels, source=("customers",), features=("plan", "months", "calls"), lookups=customer_lookups,
    categorical=("plan",),
    feature_tables=(FeatureQuery("customer_calls", ("customer_id",), calls_query, "Calls to the service line"),),
    slices={"plan": "plan", "term": "CASE WHEN months < 12 THEN 'first year' ELSE 'later' END"})

# Deliveries: 10 a day from 2 March on, for 40 days. A delivery is asked for at noon, and takes some minutes. The last
# one of each day becomes known a day later.

FIRST_DAY, LAST_DAY = date(2021, 3, 2), date(2021, 4, 10)


def deliveries() -> pd.DataFrame:
    random, number = np.random.default_rng(3), np.arange(400, dtype="int64")
    day = pd.Timestamp(FIRST_DAY) + pd.to_timedelta(number // 10, unit="D")
    area, distance = np.where(number % 2, "north", "south"), random.uniform(1, 20, 400)
    minutes = 20 + 3 * distance + np.where(area == "north", 15, 0) + random.normal(0, 5, 400)
    noon = (day + pd.Timedelta(hours=12)).tz_localize("UTC")
    known = noon + pd.to_timedelta(minutes.round(), unit="min") + pd.to_timedelta(number % 10 // 9, unit="D")
    return pd.DataFrame({"delivery_id": number, "delivery_day": day.date, "asked_at": noon, "area": area,
                         "distance": distance, "minutes": minutes, "delivered_at": known})


DELIVERY = ("delivery_id", "delivery_day", "asked_at", "area", "distance")


def delivery_rows(spark, env, first, days):
    frame = tables.read(spark, env, env.source_table("deliveries"))
    end = first + timedelta(days=days)
    return frame.where(f"delivery_day >= DATE'{first}' AND delivery_day < DATE'{end}'").select(*DELIVERY)


def delivery_labels(spark, env, as_of):
    known = tables.read(spark, env, env.source_table("deliveries"))
    known = known.where(f"delivered_at < {sql_moment(Calendar().midnight(as_of))}")
    return known.select(*DELIVERY, "minutes", "delivered_at")


def area_query(cut: datetime) -> str:
    "The mean of all earlier deliveries of an area, from each midnight before the cut."
    return f"""SELECT area, known_from, avg(minutes) AS area_minutes FROM {{deliveries}} JOIN (
    SELECT DISTINCT CAST(date_add(delivery_day, 1) AS TIMESTAMP) AS known_from FROM {{deliveries}})
    ON delivered_at < known_from WHERE known_from <= {sql_moment(cut)} GROUP BY area, known_from"""


def delivery_lookups(spark, env):
    return [FeatureLookup(env.source_table("area_daily"), "area", ["area_minutes"], timestamp_lookup_key="asked_at")]


DELIVERIES = UseCase(
    model="minutes", problem=REGRESSION, key=("delivery_id",), label="minutes", rows=delivery_rows,
    labels=delivery_labels, source=("deliveries",), features=("area", "distance", "area_minutes"),
    lookups=delivery_lookups, categorical=("area",),
    feature_tables=(FeatureQuery("area_daily", ("area",), area_query, "The mean minutes of an area", "known_from"),),
    baseline="area_minutes", slices={"area": "area", "reach": "CASE WHEN distance < 10 THEN 'near' ELSE 'far' END"},
    calendar=Calendar(first_day=FIRST_DAY, last_day=LAST_DAY + timedelta(days=1)), day="delivery_day",
    prediction_time="asked_at", label_known_at="delivered_at")

FRAMES = {"customers": customers, "deliveries": deliveries}  # of the source, by name
LIGHTGBM = {"learning_rate": 0.2, "num_leaves": 7, "min_data_in_leaf": 10, "seed": 1, "deterministic": True,
            "force_row_wise": True, "verbose": -1}
TRAIN = {  # conf/train.yml, by the name of the model
    "cancelled": {"held_out_share": 0.25, "blocks": 3, "min_rows": 20, "costs": {"missed": 3, "false_warning": 2},
                  "rounds": 20, "parameters": {"objective": "binary", **LIGHTGBM}, "min_slice_rows": 10,
                  "custom_metrics": {}},
    "minutes": {"held_out_days": 10, "blocks": 3, "min_rows": 20, "quantiles": [0.1, 0.9], "rounds": 20,
                "parameters": {"objective": "regression", **LIGHTGBM}, "min_slice_rows": 10, "custom_metrics": {}}}


def home_of(folder: Path) -> Env:
    "Target dev on Sail with its state, and its configuration, in this folder."
    uri = f"sqlite:///{folder}/mlflow.db"
    return replace(load_env("dev"), root=folder, state=folder, lakehouse=f"{folder}/lakehouse", engine="sail",
                   home="local", tracking_uri=uri, registry_uri=uri)


def write_tables(use_case: UseCase, spark, env: Env, last_day: date = LAST_DAY) -> None:
    "Write the source tables and the feature tables of a use case, as known at the end of a day."
    cut = Calendar().midnight(last_day + timedelta(days=1))
    for name in use_case.source: tables.merge(spark, env, name, spark.createDataFrame(FRAMES[name]()), use_case.key)
    source, client = {name: tables.read(spark, env, name) for name in use_case.source}, feature_client(spark, env)
    for table in use_case.feature_tables:
        query = table.sql(cut)
        rows = spark.sql(query, **{name: frame for name, frame in source.items() if f"{{{name}}}" in query})
        client.create_table(name=env.table(table.name), primary_keys=table.primary_keys, schema=rows.schema,
                            timeseries_column=table.timeseries_column, description=table.description)
        client.write_table(name=env.table(table.name), df=rows)


FORMULAS = {  # a model as one line of code, by the name of the model
    "cancelled": "1 / (1 + np.exp(1.5 - 0.6 * model_input['calls'] + 0.03 * model_input['months']))",
    "minutes": "20 + 3 * model_input['distance'] + np.where(model_input['area'] == 'north', 15, 0)"}
CODE = """
import mlflow
import numpy as np
class Formula(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None): return {formula}
mlflow.models.set_model(Formula())
"""


def formula_version(use_case: UseCase, spark, env: Env, tags: dict[str, str], first: date = FIRST_DAY,
                    is_champion: bool = True):
    "Register a formula as a version with these tags, and make it the Champion."
    client, name = registry.client(env), env.model(use_case.model)
    code = Path(env.state, f"{use_case.model}.py")
    code.write_text(CODE.format(formula=FORMULAS[use_case.model]))
    types = {feature: "string" if feature in use_case.categorical else "double" for feature in use_case.features}
    columns = [mlflow.types.ColSpec(kind, feature, required=False) for feature, kind in types.items()]
    rows = use_case.rows(spark, env, first, 1)
    others = [column for column in rows.columns if column not in use_case.features]
    inputs = feature_client(spark, env).create_training_set(
        df=rows, feature_lookups=use_case.lookups(spark, env), label=None, exclude_columns=others)
    with mlflow.start_run(experiment_id=registry.experiment_id(env, use_case.model)):
        info = feature_client(spark, env).log_model(
            model=str(code), artifact_path="formula", flavor=mlflow.pyfunc, training_set=inputs,
            pip_requirements=["mlflow"], signature=mlflow.models.ModelSignature(mlflow.types.Schema(columns)))
    version = mlflow.register_model(info.model_uri, name, tags=tags)
    if is_champion: client.set_registered_model_alias(name, "champion", version.version)
    return client.get_model_version(name, version.version)


def conf_files(folder: Path, **files: dict) -> None:
    "Write files of conf/ by name, such as monitoring."
    (folder / "conf").mkdir(exist_ok=True)
    for name, content in files.items(): (folder / "conf" / f"{name}.yml").write_text(yaml.safe_dump(content))

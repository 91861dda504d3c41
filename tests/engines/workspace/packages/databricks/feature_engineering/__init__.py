"""A stand-in for the package databricks-feature-engineering, whose licence allows it on Databricks only.

It has the documented signatures (arguments by name), writes the documented files, and refuses what the documentation
says is refused. It was written from the documentation, without the package."""
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import yaml
from pyspark.sql import SparkSession

if os.environ.get("STAND_IN_WITHOUT") == __name__:
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
__version__ = "0.18.2"
KEPT = Path(os.environ.get("STAND_IN_STATE", "."))  # the folder of the workspace's state
SQL_TYPES = {"BIGINT": "bigint", "DOUBLE": "double", "STRING": "string", "DATE": "date", "TIMESTAMP": "timestamp",
             "BOOLEAN": "boolean"}
SIGNATURE_TYPES = {"date": "datetime", "timestamp": "datetime", "string": "string"}  # others are double
YAML_TYPES = {"bigint": "long", "int": "integer", "smallint": "short", "tinyint": "byte"}


class FeatureLookup:
    def __init__(self, table_name, lookup_key, *, feature_names=None, rename_outputs=None, timestamp_lookup_key=None,
                 lookback_window=None, default_values=None):
        if lookback_window is not None and not isinstance(lookback_window, timedelta): raise ValueError("lookback")
        self.table_name, self.timestamp_lookup_key = table_name, timestamp_lookup_key
        self.lookup_key = [lookup_key] if isinstance(lookup_key, str) else list(lookup_key)
        self.feature_names = [feature_names] if isinstance(feature_names, str) else feature_names
        self.rename_outputs, self.lookback_window = dict(rename_outputs or {}), lookback_window
        self.default_values = dict(default_values or {})


class FeatureFunction:
    def __init__(self, *, udf_name, input_bindings=None, output_name=None):
        if udf_name.count(".") != 2: raise ValueError(f"{udf_name} is not a three-level name")
        self.udf_name, self.input_bindings = udf_name, dict(input_bindings or {})
        self.output_name = output_name or udf_name


class TrainingSet:
    "What `create_training_set` returns; callers may use `load_df` and pass it to `log_model`."

    def __init__(self, spec: dict, source_types: dict): self._spec, self._source_types = spec, source_types

    def load_df(self): raise NotImplementedError("the stand-in computes no features")


class OnlineStore:
    def __init__(self, name): self.name, self.state = name, "AVAILABLE"


def constraint(full: str) -> list:  # [[column, whether it is the time series], ...]
    content = json.loads((KEPT / "unity.json").read_text())
    if full not in content["keys"]: raise ValueError(f"The table {full} has no primary key.")
    return content["keys"][full]


def copy_functions(lakehouse: Path) -> None:
    "Copy the functions of the catalog to where the endpoints of the workspace find them."
    from dataclasses import asdict

    from mlops_nb.features.functions import function_of_body
    for full, function in json.loads((KEPT / "unity.json").read_text())["functions"].items():
        catalog, schema, name = full.split(".")
        file = lakehouse / catalog / schema / "_functions" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(function_of_body(full, function["body"], function["comment"]))))


class FeatureEngineeringClient:
    def __init__(self, *, model_registry_uri=None):
        if not os.environ.get("DATABRICKS_HOST"): raise ValueError("default auth: cannot configure default credentials")

    def create_training_set(self, *, df, feature_lookups=None, feature_spec=None, features=None, label,
                            exclude_columns=None, use_spark_native_join=False, use_timeseries_filtering=False):
        if sum(x is not None for x in (feature_lookups, feature_spec, features)) != 1: raise ValueError("exactly one")
        labels = [label] if isinstance(label, str) else list(label or [])
        types = {name: kind for name, kind in df.dtypes if name not in labels}
        if missing := [name for name in labels if name not in df.columns]: raise ValueError(f"no label {missing}")
        spark, columns, windows = SparkSession.getActiveSession(), [], {}
        known = dict(types)
        for lookup in [f for f in feature_lookups if isinstance(f, FeatureLookup)]:
            columns += self._looked_up(spark, lookup, types, windows)
        known |= {name: entry["sql_type"] for column in columns for name, entry in column.items()}
        functions = {}
        for function in [f for f in feature_lookups if isinstance(f, FeatureFunction)]:
            columns.append(self._computed(function, known, functions))
            known[function.output_name] = columns[-1][function.output_name]["sql_type"]
        source = [{name: {"source": "training_data", "sql_type": kind}} for name, kind in types.items()]
        excluded = set(exclude_columns or [])
        entries = []
        for position, column in enumerate([*source, *columns]):
            (name, entry), = column.items()
            kind = entry.pop("sql_type")
            entry |= {"data_type": YAML_TYPES.get(kind, kind), "topological_ordering": position}
            if name in excluded: entry["include"] = False
            entries.append({name: entry})
        names = [name for entry in entries for name in entry]
        if duplicates := {name for name in names if names.count(name) > 1}: raise ValueError(f"twice: {duplicates}")
        if unknown := excluded - set(names): raise ValueError(f"exclude_columns: {unknown}")
        tables = [{name: {"table_id": name} | ({"lookback_window": window.total_seconds()} if window else {})}
                  for name, window in windows.items()]
        spec = {"input_columns": entries, "input_functions": [{name: {}} for name in functions],
                "input_tables": tables, "workspace_id": "1234567890", "feature_store_client_version": __version__,
                "serialization_version": 11}
        return TrainingSet(spec, types)

    def _looked_up(self, spark, lookup, types, windows):
        keys = constraint(lookup.table_name)
        table = dict(spark.table(lookup.table_name).dtypes)
        for name, is_time in keys:
            if table[name] in ("timestamp", "date") and not is_time:
                raise ValueError(f"Column {name} of {lookup.table_name} must be declared as TIMESERIES.")
        plain, times = [n for n, t in keys if not t], [n for n, t in keys if t]
        if bool(times) != bool(lookup.timestamp_lookup_key): raise ValueError("timestamp_lookup_key")
        pairs = list(zip(lookup.lookup_key, plain, strict=True))
        if times: pairs.append((lookup.timestamp_lookup_key, times[0]))
        for column, key in pairs:
            if types.get(column) != table[key]:
                raise ValueError(f"lookup key {column} is {types.get(column)}, primary key {key} is {table[key]}")
        if windows.setdefault(lookup.table_name, lookup.lookback_window) != lookup.lookback_window:
            raise ValueError("one lookback_window per feature table")
        names = lookup.feature_names or [n for n in table if n not in [key for key, _ in keys]]
        if missing := [n for n in names if n not in table]: raise ValueError(f"{lookup.table_name} has no {missing}")
        return [{lookup.rename_outputs.get(n, n): {
            "source": "feature_store", "table_name": lookup.table_name, "feature_name": n, "sql_type": table[n],
            "lookup_key": lookup.lookup_key,
            "timestamp_lookup_key": [lookup.timestamp_lookup_key] if times else []}} for n in names]

    def _computed(self, function, known, functions):
        registered = json.loads((KEPT / "unity.json").read_text())["functions"].get(function.udf_name.lower())
        if registered is None: raise ValueError(f"The function {function.udf_name} does not exist.")
        parameters = dict(registered["parameters"])
        if parameters.keys() != function.input_bindings.keys(): raise ValueError(f"parameters of {function.udf_name}")
        for parameter, column in function.input_bindings.items():
            if column not in known: raise ValueError(f"no column {column} for {function.udf_name}")
            if SQL_TYPES[parameters[parameter]] != known[column]:
                raise ValueError(f"Parameter {parameter} of {function.udf_name} is {parameters[parameter]}, and column "
                                 f"{column} is {known[column]}")
        functions[function.udf_name] = registered
        return {function.output_name: {"source": "on_demand_feature", "udf_name": function.udf_name,
                                       "sql_type": SQL_TYPES[registered["returns"]],
                                       "input_bindings": function.input_bindings}}

    def log_model(self, *, model, artifact_path, flavor, training_set=None, registered_model_name=None,
                  await_registration_for=300, infer_input_example=False, extra_pip_requirements=None, **kwargs):
        import mlflow
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema
        if type(training_set) is not TrainingSet: raise ValueError("training_set")
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "feature_store")
            store.mkdir()
            if flavor.__name__ == "mlflow.pyfunc":
                flavor.save_model(path=str(store / "raw_model"), python_model=model, **kwargs)
            else: flavor.save_model(model, str(store / "raw_model"), **kwargs)
            (store / "feature_spec.yaml").write_text(yaml.safe_dump(training_set._spec, sort_keys=False))
            raw = mlflow.models.Model.load(str(store / "raw_model"))
            used = {name for entry in training_set._spec["input_columns"] for column in entry.values()
                    for name in (*column.get("lookup_key", ()), *column.get("timestamp_lookup_key", ()),
                                 *column.get("input_bindings", {}).values())}
            inputs = [ColSpec(SIGNATURE_TYPES.get(kind, "double"), name, required=name in used)
                      for name, kind in training_set._source_types.items()]
            signature = ModelSignature(Schema(inputs), raw.signature.outputs if raw.signature else None)
            mlflow.pyfunc.log_model(
                name=artifact_path, loader_module="databricks.feature_store.mlflow_model", data_path=str(store),
                signature=signature, registered_model_name=registered_model_name,
                pip_requirements=[*(store / "raw_model/requirements.txt").read_text().split("\n"),
                                  "databricks-feature-lookup==1.*"])

    def get_online_store(self, *, name):
        return OnlineStore(name) if name == "flights-online" else None

    def publish_table(self, *, online_store, source_table_name, online_table_name, publish_mode="TRIGGERED"):
        spark = SparkSession.getActiveSession()
        constraint(source_table_name)
        catalog, schema, table = source_table_name.split(".")
        properties = {row.key: row.value for row in
                      spark.sql(f"SHOW TBLPROPERTIES `{catalog}`.`{schema}`.`{table}`").collect()}
        if publish_mode != "SNAPSHOT" and properties.get("delta.enableChangeDataFeed") != "true":
            raise ValueError(f"The change data feed of {source_table_name} is off.")
        self._copy(spark, source_table_name)

    def _copy(self, spark, name):
        "Copy the newest rows to where the endpoints of the workspace look them up."
        from mlops_nb.env import load_env
        from mlops_nb.features.stores.publishing import publish
        from mlops_nb.features.stores.store import open_store
        keys = constraint(name)
        times = [column for column, is_time in keys if is_time]
        with open_store(f"sqlite:///{os.environ['STAND_IN_ONLINE_STORE']}") as store:
            publish(spark, load_env(), store, name, [column for column, is_time in keys if not is_time],
                    times[0] if times else None)
        copy_functions(Path(os.environ["STAND_IN_LAKEHOUSE"]))

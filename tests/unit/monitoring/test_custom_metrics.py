"""The checks of custom metrics that need no Spark session, and custom metrics in thresholds."""
from datetime import UTC, datetime

import pandas as pd
import pytest

from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import custom_metrics, thresholds
from mlops_nb.monitoring.metric_tables import Measured, drift_columns, profile_columns
from mlops_nb.monitoring.windows import GROUP, CustomMetric, Monitor, as_monitor, read_custom_metrics

DOUBLE = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'
RATE = {"name": "late_rate", "type": "CUSTOM_METRIC_TYPE_AGGREGATE", "input_columns": [":table"],
        "definition": "avg(CAST({{label_col}} AS DOUBLE))", "output_data_type": DOUBLE}


def metric(kind, definition, name="m", columns=(":table",), output=DOUBLE):
    return CustomMetric(name, f"CUSTOM_METRIC_TYPE_{kind}", columns, definition, output)


def monitor_of(*metrics, label_col="late"):
    return Monitor("at", "version", "warning", label_col, custom_metrics=metrics)


def test_a_bundles_resource_lists_custom_metrics():
    log = {"timestamp_col": "at", "model_id_col": "version", "prediction_col": "warning", "label_col": "late"}
    monitor = as_monitor({"inference_log": log, "custom_metrics": [RATE]})
    assert monitor == monitor_of(metric("AGGREGATE", "avg(CAST({{label_col}} AS DOUBLE))", "late_rate"))
    assert as_monitor({"inference_log": log}).custom_metrics == ()


@pytest.mark.parametrize("change, message", [
    ({"type": "CUSTOM_METRIC_TYPE_AGREGATE"}, "type: 'CUSTOM_METRIC_TYPE_AGREGATE' is not valid\n"
                                              "  it must be one of CUSTOM_METRIC_TYPE_AGGREGATE"),
    ({"inputcolumns": []}, r"custom_metrics\[0\].inputcolumns: no key 'inputcolumns'\n  did you mean 'input_columns'"),
    ({"input_columns": []}, r"input_columns: \[\] is not valid"),
    ({"input_columns": [3]}, r"input_columns: \[3\] is not valid"),
    ({"input_columns": "delay"}, "input_columns: 'delay' is not valid\n  it must be a list of different columns"),
    ({"definition": None}, "definition: null is not valid\n  it must be a text"),
    ({"output_data_type": {"type": "double"}}, "output_data_type: .* is not valid\n  it must be a text"),
    ({"output_data_type": ""}, "output_data_type: '' is not valid"),
    ({"name": "late rate"}, "name: 'late rate' is not valid"),
    ({"name": "rate; DROP TABLE x"}, "it must be the name of a column"),
])
def test_settings_that_are_not_valid_are_named(change, message):
    with pytest.raises(MlopsError, match=message): read_custom_metrics([RATE | change])


@pytest.mark.parametrize("key", RATE)
def test_a_missing_setting_is_named(key):
    with pytest.raises(MlopsError, match=rf"custom_metrics\[0\].{key}: the key is missing"):
        read_custom_metrics([{name: value for name, value in RATE.items() if name != key}])


def test_a_template_has_the_variables_of_its_type():
    named = metric("AGGREGATE", "max(`{{input_column}}`) + {{prediction_col}} + {{label_col}}", columns=("a b",))
    assert custom_metrics.aggregate_sql(named, "a b", monitor_of(named)) == "max(`a b`) + warning + late"
    drift = metric("DRIFT", "{{ current_df }}.x - {{base_df}}.x")
    assert custom_metrics.metric_sql(drift) == "current_df.x - base_df.x"


@pytest.mark.parametrize("wrong, message", [
    (metric("AGGREGATE", "avg({{label_col"), "definition is not a valid template"),
    (metric("AGGREGATE", "avg({{input_column}})"), "'input_column' is undefined"),
    (metric("AGGREGATE", "avg({{current_df}}.x)"), "'current_df' is undefined\n.*label_col, prediction_col"),
    (metric("DERIVED", "{{log_loss}} / 2"), "'log_loss' is undefined\n  template variables: there are none"),
    (metric("DRIFT", "{{current}}.x"), "'current' is undefined\n  template variables: there are: base_df, current_df"),
    (metric("AGGREGATE", "{{ ''.__class__.__mro__ }}"), "definition is not a valid template"),
    (metric("AGGREGATE", "(SELECT max(x) FROM other)"), "the definition has a subquery or a join"),
    *[(metric("AGGREGATE", "count(*)", output=output), "output_data_type is .*\n  give the JSON of a StructField")
      for output in ("double", '"double"', "{}", '{"name": "output", "type": "dubble", "nullable": true}', "[1]")],
])
def test_definitions_that_are_not_valid_are_found_without_spark(wrong, message):
    with pytest.raises(MlopsError, match=f"(?s)^custom metric 'm': .*{message}"):
        custom_metrics.check_definitions(monitor_of(wrong))


def test_a_monitor_without_labels_has_no_label_col():
    with pytest.raises(MlopsError, match="'label_col' is undefined"):
        custom_metrics.check_definitions(monitor_of(metric("AGGREGATE", "count({{label_col}})"), label_col=None))


@pytest.mark.parametrize("kind, other, allowed", [
    ("DERIVED", "AGGREGATE", True), ("DERIVED", "DERIVED", False), ("DERIVED", "DRIFT", False),
    ("DRIFT", "AGGREGATE", True), ("DRIFT", "DERIVED", True), ("DRIFT", "DRIFT", False)])
def test_a_metric_uses_metrics_that_are_computed_before_it(kind, other, allowed):
    base = metric(other, "count(*)" if other == "AGGREGATE" else "1", "other")
    user = metric(kind, "{{current_df}}.Other" if kind == "DRIFT" else "OTHER + 1")
    if allowed: return custom_metrics.check_definitions(monitor_of(user, base))
    with pytest.raises(MlopsError, match="cannot use 'other', which is CUSTOM_METRIC_TYPE_"):
        custom_metrics.check_definitions(monitor_of(user, base))


def test_a_metric_uses_metrics_of_the_same_rows():
    base = metric("AGGREGATE", "avg({{input_column}})", "base", columns=("x", "y"))
    custom_metrics.check_definitions(monitor_of(base, metric("DERIVED", "base", columns=("y",))))
    for columns in (("y", "z"), (":table",)):
        with pytest.raises(MlopsError, match="'base' has no value for the input columns"):
            custom_metrics.check_definitions(monitor_of(base, metric("DERIVED", "base", columns=columns)))


@pytest.mark.parametrize("name", ["log_loss", "COUNT", "version", "ks_test", "window_cmp", "label_mean", "model_id"])
def test_a_name_of_the_metric_tables_is_taken(name):
    taken = metric("AGGREGATE", "count(*)", name)
    with pytest.raises(MlopsError, match=f"{name}' has the name of a column that the metric tables already have"):
        custom_metrics.check_names(monitor_of(taken), [*profile_columns("version"), *drift_columns("version")])


def test_two_metrics_with_one_name_are_refused():
    with pytest.raises(MlopsError, match="two custom metrics are named 'M'"):
        custom_metrics.check_definitions(monitor_of(metric("AGGREGATE", "count(*)", "M"), metric("DERIVED", "count")))


@pytest.mark.parametrize("message, name", [
    ('attribute ObjectName([Identifier("q")]) is missing from the schema: cannot resolve attribute', "q"),
    ('attribute ObjectName([Identifier("base_df"), Identifier("b")]) is missing from the schema', "base_df.b"),
    ("[UNRESOLVED_COLUMN.WITH_SUGGESTION] A column, variable, or function parameter with name `q` cannot be resolved. "
     "Did you mean one of the following?", "q"),
    ("[FIELD_NOT_FOUND] No such struct field `q` in `count`, `log_loss`. SQLSTATE: 42704", "q"),
    ("invalid argument: found end of input", None)])
def test_the_unknown_name_of_an_engines_message(message, name):
    assert custom_metrics.missing_name(message) == name


def measured():
    "Two months and a baseline, with custom metrics as `measure` returns them: objects, None where there is no value."
    starts = [None, *(pd.Timestamp(datetime(2013, month, 1, tzinfo=UTC)) for month in (4, 5))]
    profile = pd.DataFrame([dict(zip(GROUP, ("INPUT" if start else "BASELINE", start, "1", None, None), strict=True))
                            for start in starts]).assign(column_name=":table", count=5000)
    profile["loss_ratio"] = pd.Series([0.8, 0.9, None], dtype=object)
    profile["cost"] = pd.Series([{"total": 4}, {"total": 10}, None], dtype=object)
    drift = profile.iloc[1:].drop(columns=["count", "loss_ratio", "cost"]).assign(drift_type="BASELINE")
    return Measured(profile, drift.assign(loss_growth=pd.Series([0.1, None], dtype=object, index=drift.index)))


@pytest.mark.parametrize("threshold, value, limit", [
    ({"metric": "loss_ratio", "at_most": 0.85}, 0.9, 0.85),
    ({"metric": "loss_ratio", "at_most": 1.1, "times_baseline": True}, 0.9, 0.88),
    ({"metric": "cost.total", "at_most": 2, "times_baseline": True}, 10, 8),
    ({"metric": "loss_growth", "at_most": 0.05}, 0.1, 0.05)])
def test_custom_metrics_have_thresholds_and_a_missing_value_breaks_none(threshold, value, limit):
    checked = thresholds.compare_windows(measured(), thresholds.Threshold(**threshold))
    assert checked.broken.tolist() == [True, False]
    assert (checked.value.iloc[0], checked.high.iloc[0]) == pytest.approx((value, limit))
    assert pd.isna(checked.value.iloc[1])

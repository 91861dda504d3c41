"""What is wrong with the resources of a bundle other than jobs: one small bundle for each mistake.

The comment `# here` marks the line that the problem must name."""
import re
from pathlib import Path

import pytest

from mlops_nb.bundle.checks import check
from mlops_nb.bundle.load import load_bundle
from mlops_nb.errors import MlopsError

SCHEMA = "  schemas: {shop: {catalog_name: prod, name: shop}}\n"
JOB = "tasks: [{task_key: a, condition_task: {left: '1', op: EQUAL_TO, right: '1'}}]"
MONITOR = "table_name: prod.shop.scores, assets_dir: /Shared/a, output_schema_name: prod.shop"
ENTITY = "entity_name: prod.shop.churn, entity_version: '1', workload_size: Small, scale_to_zero_enabled: true"
LOG = "problem_type: PROBLEM_TYPE_REGRESSION, timestamp_col: t, prediction_col: p, model_id_col: m"
ALERT = """  alerts:
    drift:
      display_name: drift
      query_text: SELECT 1 AS n
      warehouse_id: "1"
      evaluation: {source: {name: n}, comparison_operator: GREATER_THAN, threshold: {value: {double_value: 0}}}
      schedule: {quartz_cron_schedule: 0 0 6 * * ?, timezone_id: UTC}
"""
VALID = f"""
resources:
  catalogs: {{c: {{name: prod, grants: [{{principal: all, privileges: [USE_CATALOG, BROWSE]}}]}}}}
  schemas: {{shop: {{catalog_name: prod, name: shop, grants: [{{principal: all, privileges: [USE_SCHEMA, SELECT]}}]}}}}
  registered_models:
    churn: {{catalog_name: prod, schema_name: "${{resources.schemas.shop.name}}", name: churn, comment: x,
             grants: [{{principal: all, privileges: [EXECUTE]}}], lifecycle: {{prevent_destroy: true}}}}
  volumes: {{landing: {{catalog_name: prod, schema_name: shop, name: landing, volume_type: MANAGED}}}}
  experiments: {{late: {{name: /Users/ana/late, tags: [{{key: a, value: b}}],
                 permissions: [{{level: CAN_READ, group_name: all}}]}}}}
  model_serving_endpoints:
    churn_endpoint:
      name: churn
      config:
        served_entities: [{{name: one, {ENTITY}}}]
        traffic_config: {{routes: [{{served_model_name: one, traffic_percentage: 100}}]}}
      permissions: [{{level: CAN_QUERY, group_name: all}}]
  quality_monitors: {{scores: {{{MONITOR}, inference_log: {{{LOG}, granularities: [1 day, 2 weeks]}},
                      schedule: {{quartz_cron_expression: 0 0 6 * * ?, timezone_id: UTC}}}}}}
{ALERT}  dashboards: {{d: {{display_name: d, warehouse_id: "1", file_path: d.lvdash.json,
               permissions: [{{level: CAN_RUN, group_name: all}}]}}}}
permissions: [{{level: CAN_VIEW, group_name: all}}]
"""


def problems_of(tmp_path, text: str) -> list:
    (tmp_path / "databricks.yml").write_text("bundle: {name: small}\n" + text)
    return check(load_bundle(tmp_path))


def marked_line(text: str) -> int: return 2 + text[:text.index("# here")].count("\n")


def test_a_valid_bundle_of_all_kinds_has_no_problem(tmp_path):
    assert problems_of(tmp_path, VALID) == []


def of(kind: str, fields: str) -> str:  # one resource of a kind, on one line
    return f"resources:\n  {kind}:\n    x: {{{fields}}}  # here\n"


def endpoint(entities: str, routes: str = "") -> str:
    traffic = f", traffic_config: {{routes: [{routes}]}}" if routes else ""
    return of("model_serving_endpoints", f"name: a, config: {{served_entities: [{entities}]{traffic}}}")


def grants(privilege: str) -> str: return f"grants: [{{principal: a, privileges: [{privilege}]}}]"


def permissions(level: str) -> str: return f"permissions: [{{level: {level}, group_name: a}}]"


MODEL = "catalog_name: prod, schema_name: shop, name: churn"
VOLUME, SHOP = "catalog_name: prod, schema_name: shop, name: landing", "catalog_name: prod, name: shop"
MISTAKES = {
    # fields
    "missing field": (of("schemas", "catalog_name: prod"), "missing field 'name'"),
    "missing schema": (of("registered_models", "catalog_name: prod, name: churn"), "missing field 'schema_name'"),
    "missing volume": (of("volumes", "name: landing, schema_name: shop"), "missing field 'catalog_name'"),
    "missing path": (of("experiments", "artifact_location: s3://a"), "missing field 'name'"),
    "missing folder": (of("quality_monitors", "table_name: a.b.c, output_schema_name: a.b, snapshot: {}"),
                       "missing field 'assets_dir'"),
    "missing of an alert": (ALERT.replace("  alerts", "resources:\n  alerts", 1).replace("drift:", "drift:  # here", 1)
                            .replace('      warehouse_id: "1"\n', ""), "missing field 'warehouse_id'"),
    "wrong type": (of("schemas", f"{SHOP}, properties: [a]"), 'expected a map, got ["a"]'),
    "enum of a volume": (of("volumes", f"{VOLUME}, volume_type: managed"), "'managed' is not a valid VolumeType"),
    "enum of a monitor": (of("quality_monitors", f"{MONITOR}, inference_log: {{{LOG}, granularities: [1 day]}}".replace(
        "PROBLEM_TYPE_REGRESSION", "REGRESSION")), "'REGRESSION' is not a valid MonitorInferenceLogProblemType"),
    "enum of an alert": ("resources:\n" + ALERT.replace("GREATER_THAN", "BIGGER").replace(
        "0}}}\n", "0}}}  # here\n"), "'BIGGER' is not a valid ComparisonOperator"),
    "location": (of("volumes", f"{VOLUME}, storage_location: s3://a/b"), "its volume_type is EXTERNAL"),
    # grants and permissions
    "no privilege": (of("schemas", f"{SHOP}, {grants('SELEKT')}"), "no privilege 'SELEKT'"),
    "privilege of a catalog": (of("schemas", f"{SHOP}, {grants('USE_CATALOG')}"),
                               "privilege USE_CATALOG cannot be granted on schemas"),
    "privilege of a table": (of("registered_models", f"{MODEL}, {grants('SELECT')}"),
                             "privilege SELECT cannot be granted on registered_models"),
    "privilege of a model": (of("volumes", f"{VOLUME}, {grants('EXECUTE')}"),
                             "privilege EXECUTE cannot be granted on volumes"),
    "model version": (of("registered_models", f"{MODEL}, {grants('CREATE MODEL VERSION')}"),
                      "a bundle cannot grant CREATE MODEL VERSION"),
    "no principal": (of("schemas", f"{SHOP}, grants: [{{privileges: [SELECT]}}]"), "a grant must have a principal"),
    "no privileges": (of("schemas", f"{SHOP}, grants: [{{principal: a}}]"), "a grant must have privileges"),
    "permissions of a schema": (of("schemas", f"{SHOP}, {permissions('CAN_VIEW')}"),
                                "schemas have no permissions"),
    "grants of an experiment": (of("experiments", "name: /Shared/a, grants: [{principal: a, privileges: [SELECT]}]"),
                                "experiments have no grants"),
    "level of an experiment": (of("experiments", "name: /Shared/a, permissions: [{level: CAN_VIEW, group_name: a}]"),
                               "'CAN_VIEW' is not a valid permission level"),
    "level of an endpoint": (of("model_serving_endpoints", "name: a, permissions: [{level: CAN_RUN, group_name: a}]"),
                             "'CAN_RUN' is not a valid permission level"),
    "level of all": ("permissions:\n  - {level: CAN_READ, group_name: a}  # here\n", "'CAN_READ' is not a valid perm"),
    "two principals": (of("experiments", "name: /a/b, permissions: [{level: CAN_EDIT, group_name: a, user_name: b}]"),
                       "a permission must have a level and one principal"),
    "no one": (of("experiments", "name: /Shared/a, permissions: [{level: CAN_READ}]"), "a level and one principal"),
    # names
    "dot in a name": (of("schemas", "catalog_name: prod, name: my.shop"), "name 'my.shop' contains '.'"),
    "long name": (of("registered_models", f"catalog_name: prod, schema_name: shop, name: {'x' * 256}"), "has 256 char"),
    "slash in a name": (of("volumes", "catalog_name: prod, schema_name: a/b, name: v"), "name 'a/b' contains '/'"),
    "space in a catalog": (of("catalogs", "name: my catalog"), "name 'my catalog' contains ' '"),
    "relative experiment": (of("experiments", "name: late_arrival"), "is not an absolute path"),
    "endpoint's name": (of("model_serving_endpoints", "name: my churn"), "'my churn' is not a valid name"),
    "reserved name": (of("model_serving_endpoints", "name: databricks-churn"), "databricks- are reserved"),
    "table of a monitor": (of("quality_monitors", f"{MONITOR}, snapshot: {{}}".replace("prod.shop.scores", "scores")),
                           "'scores' does not have 3 parts"),
    # rules of single kinds
    "no size": (of("model_serving_endpoints", f"name: a, config: {{served_entities: [{{{ENTITY}}}]}}".replace(
        "workload_size: Small, ", "")), "an entity must have one size"),
    "two sizes": (of("model_serving_endpoints", f"name: a, config: {{served_entities: [{{{ENTITY}, "
                     "max_provisioned_concurrency: 4}]}"), "an entity must have one size"),
    "traffic": (of("model_serving_endpoints", f"name: a, config: {{served_entities: [{{name: one, {ENTITY}}}], "
                   "traffic_config: {routes: [{served_model_name: one, traffic_percentage: 90}]}}"), "is 90 %"),
    "route": (of("model_serving_endpoints", f"name: a, config: {{served_entities: [{{name: one, {ENTITY}}}], "
                 "traffic_config: {routes: [{served_entity_name: two, traffic_percentage: 100}]}}"),
              "no served entity 'two'"),
    "share": (endpoint(f"{{name: one, {ENTITY}}}", "{served_model_name: one, traffic_percentage: 120}"),
              "120 % of the traffic"),
    "entity's name": (endpoint(f"{{name: my one, {ENTITY}}}"), "'my one' is not a valid name"),
    "name of two entities": (endpoint(f"{{name: one, {ENTITY}}}, {{name: one, {ENTITY}}}"),
                             "two served entities have the name 'one'"),
    "alias as a version": (endpoint(f"{{{ENTITY}}}".replace("'1'", "champion")), "'champion' is not a version"),
    "model of one part": (endpoint(f"{{{ENTITY}}}".replace("prod.shop.churn", "churn")),
                          "'churn' does not have 3 parts"),
    "legacy capture": (of("model_serving_endpoints", "name: a, config: {auto_capture_config: {enabled: true}}"),
                       "no longer supports auto_capture_config"),
    "two types": (of("quality_monitors", f"{MONITOR}, snapshot: {{}}, time_series: {{timestamp_col: t, "
                     "granularities: [1 day]}"), "a monitor must have one type"),
    "no type": (of("quality_monitors", MONITOR), "a monitor must have one type"),
    "granularity": (of("quality_monitors", f"{MONITOR}, inference_log: {{{LOG}, granularities: [2 days]}}"),
                    "'2 days' is not a granularity"),
    "addresses": (of("quality_monitors", f"{MONITOR}, snapshot: {{}}, notifications: {{on_failure: {{email_addresses: "
                     "[a, b, c, d, e, f]}}"), "6 e-mail addresses"),
    "cron of a monitor": (of("quality_monitors", f"{MONITOR}, snapshot: {{}}, schedule: {{quartz_cron_expression: "
                             "0 0 6 * *, timezone_id: UTC}"), "0 0 6 * *"),
    "cron of an alert": ("resources:\n" + ALERT.replace("0 0 6 * * ?, timezone_id: UTC}",
                                                         "x, timezone_id: UTC}  # here"),
                         "'x'"),
    "zone of an alert": ("resources:\n" + ALERT.replace("timezone_id: UTC}", "timezone_id: Mars}  # here"), "'Mars'"),
    "two sources": (of("dashboards", 'display_name: d, file_path: a.lvdash.json, serialized_dashboard: "{}"'),
                    "one of file_path and serialized_dashboard must be set"),
    "file and fields": (of("alerts", "display_name: a, warehouse_id: '1', file_path: a.json, schedule: "
                           "{quartz_cron_schedule: 0 0 6 * * ?, timezone_id: UTC}"), "the file of the alert defines"),
    # the whole bundle
    "run_as and an endpoint": ("run_as: {service_principal_name: a}  # here\n"
                               "resources: {model_serving_endpoints: {x: {name: a}}}\n",
                               "run_as of a target is not supported together with resources.model_serving_endpoints.x"),
    "run_as and a monitor": ("targets:\n  prod:\n    run_as: {service_principal_name: a}  # here\n"
                             f"resources: {{quality_monitors: {{x: {{{MONITOR}, snapshot: {{}}}}}}}}\n",
                             "run_as of a target is not supported together with resources.quality_monitors.x"),
    "two run_as": ("run_as: {service_principal_name: a, user_name: b}  # here\n", "run_as must name one user"),
    "unpaused in development": ("presets: {trigger_pause_status: UNPAUSED}  # here\n"
                                "targets: {dev: {mode: development}}\n", "does not accept the preset UNPAUSED"),
    "production": ("targets:\n  prod: {mode: production}  # here\n", "has mode production, but no workspace.root_path"),
    # jobs
    "run_as of a job": (of("jobs", f"{JOB}, run_as: {{user_name: a, service_principal_name: b}}"), "must name one"),
    "level of a job": (of("jobs", f"{JOB}, {permissions('CAN_READ')}"), "'CAN_READ' is not a valid"),
    "webhooks": (of("jobs", f"{JOB}, webhook_notifications: {{on_start: [{', '.join(['{id: a}'] * 4)}]}}"),
                 "4 webhooks for one event"),
    "tags": (of("jobs", f"{JOB}, tags: {{{', '.join(f't{i}: x' for i in range(26))}}}"), "the job has 26 tags"),
    "unknown task": (of("jobs", JOB.replace("task_key: a,", "task_key: a, depends_on: [{task_key: b}],")),
                     "no task 'b'"),
    "cron of a job": (of("jobs", f"{JOB}, schedule: {{quartz_cron_expression: 61 0 6 * * ?, timezone_id: UTC}}"), "61"),
}
IGNORED = {  # with a warning, as Databricks' own tool does
    "unknown field": (of("schemas", f"{SHOP}, commment: x"), "no field 'commment'", "did you mean 'comment'"),
    "unknown field below": (of("model_serving_endpoints",
                               f"name: a, config: {{served_entities: [{{{ENTITY}, size: 1}}]}}"),
                            "no field 'size' in ServedEntityInput", ""),
    "unknown field of a grant": (of("schemas", f"{SHOP}, grants: [{{principal: a, privileges: [SELECT], to: b}}]"),
                                 "no field 'to' in a grant", ""),
    "tags of a model": (of("registered_models", f"{MODEL}, tags: {{a: b}}"), "no field 'tags' in registered_models",
                        "set them with MLflow"),
    "output of a model": (of("registered_models", f"{MODEL}, full_name: prod.shop.churn"), "sets 'full_name'", ""),
    "output of a monitor": (of("quality_monitors", f"{MONITOR}, snapshot: {{}}, status: MONITOR_STATUS_ACTIVE"),
                            "sets 'status' itself", ""),
    "missing version": (endpoint(f"{{{ENTITY}}}".replace("entity_version: '1', ", "")),
                        "missing field 'entity_version'", "only a feature spec has none"),
    "output of an endpoint": (of("model_serving_endpoints", "name: a, creator: ana"), "sets 'creator' itself", ""),
    "output of an experiment": (of("experiments", "name: /Shared/a, experiment_id: '7'"), "sets 'experiment_id'", ""),
    "upper case": (of("schemas", "catalog_name: prod, name: Shop"), "stores 'Shop' in lower case", "write shop"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error_with_its_line(tmp_path, name):
    text, message = MISTAKES[name]
    (problem,) = problems_of(tmp_path, text)
    assert message in problem.message and problem.line == marked_line(text) and not problem.is_warning


@pytest.mark.parametrize("name", IGNORED)
def test_what_databricks_ignores_is_one_warning_with_its_line(tmp_path, name):
    text, message, hint = IGNORED[name]
    (problem,) = problems_of(tmp_path, text)
    assert message in problem.message and problem.line == marked_line(text) and problem.is_warning
    assert problem.hint.startswith(hint)


def test_catalogs_need_the_direct_engine(tmp_path):
    catalog = of("catalogs", "name: prod")
    (tmp_path / "databricks.yml").write_text("bundle: {name: small, engine: terraform}\n" + catalog)
    (problem,) = check(load_bundle(tmp_path))
    assert (problem.message, problem.line) == ("catalogs need the engine direct", 4)
    assert problem.hint == "change databricks.yml:1: engine: direct"
    (tmp_path / "databricks.yml").write_text("bundle: {name: small, engine: terafrom}\n")
    (problem,) = check(load_bundle(tmp_path))
    assert problem.message == "no engine 'terafrom'" and problem.line == 1


def test_a_resource_that_does_not_exist_is_an_error_with_its_line(tmp_path):
    text = "resources:\n  volumes:\n    v:\n      name: v\n      schema_name: ${resources.schemas.shop.name}\n"
    with pytest.raises(MlopsError, match=r"no kind of resource 'schemas' in .*schema_name \(databricks.yml:6\)"):
        problems_of(tmp_path, text)
    with pytest.raises(MlopsError, match=r"no schema 'shop' in .*schema_name \(databricks.yml:6\)"):
        problems_of(tmp_path, text + "  schemas: {sop: {catalog_name: prod, name: shop}}\n")


DEVELOPMENT = """
variables: {catalog: {default: dev}, schema: {default: shop}}
targets: {dev: {mode: development}, prod: {}}
resources:
  schemas: {shop: {catalog_name: dev, name: "${var.schema}"}}
"""
RENAMED = {
    "two fields": "  volumes: {v: {catalog_name: dev, schema_name: '${var.schema}', name: v}}  # here\n",
    "a model": "  registered_models: {m: {catalog_name: dev, schema_name: shop, name: m}}  # here\n",
    "one string": "  quality_monitors: {q: {table_name: '${var.catalog}.${var.schema}.t', assets_dir: /Shared, "
                  "output_schema_name: '${resources.schemas.shop.id}', snapshot: {}}}  # here\n",
    "a query": ALERT.replace("SELECT 1 AS n", "SELECT n FROM ${var.catalog}.${var.schema}.t  # here"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_that_development_mode_changes_must_be_a_reference(tmp_path, name):
    text = DEVELOPMENT + RENAMED[name]
    (tmp_path / "databricks.yml").write_text("bundle: {name: small}\n" + text)
    (problem,) = check(load_bundle(tmp_path, "dev", user="ana@example.org"))
    assert problem.message == "development mode renames 'shop' to 'dev_ana_shop'"
    assert problem.hint == "write ${resources.schemas.shop.name}" and problem.line == marked_line(text)
    assert check(load_bundle(tmp_path, "prod")) == []


def test_a_model_that_development_mode_renames_is_named_by_its_resource(tmp_path):
    models = "  registered_models: {m: {catalog_name: dev, schema_name: '${resources.schemas.shop.name}', name: m}}\n"
    endpoint = "  model_serving_endpoints: {e: {name: e, config: {served_entities: [{" + ENTITY + "}]}}}  # here\n"
    text = DEVELOPMENT + models + endpoint.replace("prod.shop.churn", "'dev.${resources.schemas.shop.name}.m'")
    (tmp_path / "databricks.yml").write_text("bundle: {name: small}\n" + text)
    (problem,) = check(load_bundle(tmp_path, "dev", user="ana"))
    assert problem.message == "development mode renames 'm' to 'dev_ana_m'" and problem.line == marked_line(text)
    (tmp_path / "databricks.yml").write_text("bundle: {name: small}\n" + DEVELOPMENT + models + endpoint.replace(
        "prod.shop.churn", "'${resources.registered_models.m.id}'"))
    assert check(load_bundle(tmp_path, "dev", user="ana")) == []


def test_the_settings_of_the_notebooks_name_the_renamed_schema(tmp_path):
    settings = '{"catalog": "${var.catalog}", "schema": "${var.schema}"}'
    text = DEVELOPMENT.replace("{default: shop}}", f"{{default: shop}}, settings: {{default: '{settings}'}}}}  # here")
    (problem,) = problems_of(tmp_path, text.replace("dev: {mode", "dev: {default: true, mode"))
    assert "development mode renames 'shop'" in problem.message and problem.line == marked_line(text)
    right = text.replace('"schema": "${var.schema}"', '"schema": "${resources.schemas.shop.name}"')
    assert problems_of(tmp_path, right.replace("dev: {mode", "dev: {default: true, mode")) == []


def test_the_endpoint_that_the_page_on_serving_declares_is_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    declared = re.search(r"```yaml\n(resources:\n  model_serving_endpoints:.*?)```", page, re.DOTALL)[1]
    text = declared.replace("resources:\n", f"resources:\n{SCHEMA}", 1).replace("schemas.project", "schemas.shop")
    variables = "variables: {catalog: {default: prod}, data_scientists: {default: all}}\n"
    assert problems_of(tmp_path, variables + text) == []
    wrong = problems_of(tmp_path, variables + text.replace("traffic_percentage: 100", "traffic_percentage: 90"))
    assert [problem.message for problem in wrong] == ["the traffic of the routes is 90 %"]

"""docs/declarations.md names every field and every key that can be declared."""
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mlops_nb.deployment.validation_checks import CHECKS
from mlops_nb.models.learners import Learner
from mlops_nb.models.model_card import GOVERNANCE_SETTINGS
from mlops_nb.monitoring.infrastructure import INFRASTRUCTURE_SETTINGS, LIMIT_SETTINGS, TABLE_SETTINGS
from mlops_nb.monitoring.retraining import RETRAINING_SETTINGS
from mlops_nb.monitoring.thresholds import Threshold
from mlops_nb.projects.rendering import render_text
from mlops_nb.projects.table_source import TableSource
from mlops_nb.serving.endpoint_settings import ENDPOINT_SETTINGS, SERVING_SETTINGS
from mlops_nb.workflow.learning import TRAIN_SETTINGS
from mlops_nb.workflow.use_case import FeatureQuery, UseCase

ROOT = Path(__file__).parents[3]


def documented(title: str) -> set[str]:
    "The names in the tables of a section."
    sections = re.split(r"^## ", (ROOT / "docs/declarations.md").read_text(), flags=re.MULTILINE)
    text = next(section for section in sections if section.splitlines()[0] == title)
    return set(re.findall(r"^\| `([a-z_]+)` \| \S", text, re.MULTILINE))


def template_conf(name: str, binary: bool, has_time: bool) -> dict:
    "A file of conf/ as `mlops new` writes it."
    values = {"binary": binary, "regression": not binary, "has_time": has_time, "has_no_time": not has_time,
              "label": "sold", "slices": "[]", "min_slice_rows": 30, "min_rows": 30, "held_out_days": 14,
              "min_data_in_leaf": 5, "floor": 0.5, "max_calibration_error": 0.2, "package": "shop",
              "key": "id", "table": "shop"}
    return yaml.safe_load(render_text((ROOT / f"template/conf/{name}.jinja").read_text(), values))


@pytest.mark.parametrize("declaration", [TableSource, UseCase, FeatureQuery, Learner])
def test_every_field_is_documented(declaration):
    assert documented(declaration.__name__) == {field.name for field in fields(declaration)}


def test_every_rule_of_the_code_is_documented():
    assert TRAIN_SETTINGS.keys() <= documented("conf/train.yml")
    assert CHECKS.keys() <= documented("conf/validation.yml")
    assert {field.name for field in fields(Threshold)} <= documented("conf/monitoring.yml")
    assert set(GOVERNANCE_SETTINGS) == documented("conf/governance.yml")
    assert {*SERVING_SETTINGS, *ENDPOINT_SETTINGS} == documented("conf/serving.yml")
    assert {*RETRAINING_SETTINGS} == documented("conf/retraining.yml")
    infrastructure = {*INFRASTRUCTURE_SETTINGS, *TABLE_SETTINGS, *LIMIT_SETTINGS}
    assert infrastructure == documented("conf/infrastructure.yml")


@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_every_key_of_the_template_is_documented(binary, has_time):
    train, validation, monitoring = (template_conf(f"{name}.yml", binary, has_time)
                                     for name in ("train", "validation", "monitoring"))
    assert train.keys() <= documented("conf/train.yml")
    assert {*validation["checks"], *validation["deployment"]} <= documented("conf/validation.yml")
    monitor = monitoring["monitor"]
    thresholds = {key for threshold in monitoring["thresholds"] for key in threshold}
    assert {*monitoring, *monitor, *monitor["inference_log"], *thresholds} <= documented("conf/monitoring.yml")
    assert template_conf("governance.yml", binary, has_time).keys() == documented("conf/governance.yml")
    assert template_conf("retraining.yml", binary, has_time).keys() == documented("conf/retraining.yml")


def test_the_readme_names_pages_that_exist():
    readme = (ROOT / "README.md").read_text()
    for name in ("your-own-table.md", "declarations.md"):
        assert f"(docs/{name})" in readme and (ROOT / "docs" / name).is_file()

"""One rule for names of endpoints: a bundle, the variable `endpoint`, a derived name and the local workspace agree."""
import pytest

from mlops_nb.bundle.resources import is_endpoint_name
from mlops_nb.serving.endpoint_config import RestError, new_endpoint
from mlops_nb.serving.endpoint_settings import ENDPOINT_SETTINGS, derived_name

CONFIG = {"served_entities": [{"name": "a_", "entity_name": "dev.s.m", "entity_version": "1"}]}


@pytest.mark.parametrize("name", ["late", "_dev-s-m", "late_", "late-", "a" * 63, derived_name("_dev.s.m"),
                                  derived_name("-x.s.m"), derived_name(f"dev.{'s' * 100}.m"),
                                  derived_name("ü-x.s.m")])
def test_a_valid_name_is_accepted_everywhere(name):
    assert is_endpoint_name(name) and ENDPOINT_SETTINGS["name"].is_right(name)
    assert new_endpoint({"name": name, "config": CONFIG}).name == name


@pytest.mark.parametrize("name", ["-late", "a" * 64, "databricks-late", "late.arrival", "../x", "late\n", "lät", 5])
def test_another_name_is_refused_everywhere(name):
    assert not is_endpoint_name(name) and not ENDPOINT_SETTINGS["name"].is_right(name)
    with pytest.raises(RestError, match="endpoint"): new_endpoint({"name": name, "config": CONFIG})

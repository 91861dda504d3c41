"""The Databricks MLOps workflow as literate notebooks. The names that users import, loaded at their first use."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors
    from mlops_nb import task
    from mlops_nb.automl.summary import classify, regress
    from mlops_nb.data import tables
    from mlops_nb.data.session import get_spark
    from mlops_nb.env import load_env
    from mlops_nb.errors import MlopsError
    from mlops_nb.features.client import feature_client
    from mlops_nb.features.spec import FeatureFunction, FeatureLookup

_MODULES = {  # name -> the module that has it
    "FeatureFunction": "features.spec", "FeatureLookup": "features.spec", "MlopsError": "errors",
    "classify": "automl.summary", "feature_client": "features.client", "get_spark": "data.session", "load_env": "env",
    "regress": "automl.summary", "tables": "data.tables", "task": "task"}
__all__ = ["FeatureFunction", "FeatureLookup", "MlopsError", "classify", "feature_client", "get_spark", "load_env",
           "regress", "tables", "task"]


def __getattr__(name: str) -> Any:
    "Import the module of a name at its first use: `import mlops_nb` alone takes milliseconds."
    if name not in _MODULES:
        raise AttributeError(f"module 'mlops_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = import_module(f"mlops_nb.{_MODULES[name]}")
    value = module if _MODULES[name].rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})

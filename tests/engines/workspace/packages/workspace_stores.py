"""MLflow of a workspace: `databricks` and `databricks-uc` are two stores in a file, with what the real ones refuse.

MLflow finds them by `workspace_mlflow`, in every process that can import this folder."""
import os
import re
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore

KEPT = Path(os.environ.get("STAND_IN_STATE", "."))  # the folder of the workspace's state
STORES = {}


class WorkspaceTracking(TrackingStore):
    "An experiment is an object of the workspace: its name is a path, and its folder must exist."

    def create_experiment(self, name, artifact_location=None, tags=None):
        folders = (KEPT / "folders.txt").read_text().split()
        if not name.startswith("/"):
            raise MlflowException(f"Got an invalid experiment name '{name}': an absolute path is needed",
                                  INVALID_PARAMETER_VALUE)
        if name.rpartition("/")[0] not in folders:
            raise MlflowException(f"Workspace directory '{name.rpartition('/')[0]}' does not exist.",
                                  RESOURCE_DOES_NOT_EXIST)
        return super().create_experiment(name, artifact_location, tags)


LONGEST_TAG = 1000  # characters


class SearchedVersion:
    "A version as a search finds it: with everything but tags and aliases, which need a request of their own."

    def __init__(self, version): self.__dict__.update(version.__dict__)

    def __getattr__(self, name): return self.__dict__[f"_{name}"]

    def tags(self): raise NotImplementedError("tags of a version in the result of a search")


def searched(version):
    result = SearchedVersion(as_text(version))
    result.__dict__.pop("_tags")
    return result


def check_tags(tags) -> None:
    for tag in tags or []:
        if len(str(tag.value)) > LONGEST_TAG or str(tag.value) != str(tag.value).strip():
            raise MlflowException(f"the value of tag {tag.key} is too long", INVALID_PARAMETER_VALUE)


def as_text(version):
    "A version as Unity Catalog has it: its number is a string."
    version._version = str(version.version)
    return version


class UnityRegistry(RegistryStore):
    "Models of Unity Catalog: three-level names, signatures with outputs, searches without order and filter."

    def create_registered_model(self, name, tags=None, description=None, deployment_job_id=None):
        if name.count(".") != 2: raise MlflowException(f"'{name}' is not a three-level name", INVALID_PARAMETER_VALUE)
        return super().create_registered_model(name, tags, description, deployment_job_id)

    def search_registered_models(self, filter_string=None, max_results=None, order_by=None, page_token=None):
        if filter_string or order_by: raise MlflowException("filter_string and order_by are not supported",
                                                            INVALID_PARAMETER_VALUE)
        return super().search_registered_models(None, min(max_results or 100, 1), None, page_token)  # small pages

    def search_model_versions(self, filter_string=None, max_results=None, order_by=None, page_token=None):
        if order_by: raise MlflowException("order_by is not supported", INVALID_PARAMETER_VALUE)
        page = super().search_model_versions(filter_string, max_results or 100, None, page_token)
        name = re.fullmatch("name ?= ?'(.*)'", filter_string or "")
        if name and not page: self.get_registered_model(name[1])  # raises if the model does not exist
        return PagedList([searched(version) for version in page], page.token)

    def create_model_version(self, name, source, run_id=None, tags=None, run_link=None, description=None,
                             local_model_path=None, model_id=None):
        from mlflow.models import Model
        check_tags(tags)
        if run_link: raise MlflowException("run_link is not supported", INVALID_PARAMETER_VALUE)
        signature = Model.load(source if not model_id else f"models:/{model_id}").signature
        if signature is None or not signature.outputs:
            raise MlflowException("Model passed for registration did not contain a signature with outputs",
                                  INVALID_PARAMETER_VALUE)
        return as_text(super().create_model_version(name, source, run_id, tags, run_link, description,
                                                    local_model_path, model_id))

    def get_model_version(self, name, version): return as_text(super().get_model_version(name, int(version)))

    def get_model_version_by_alias(self, name, alias): return as_text(super().get_model_version_by_alias(name, alias))

    def set_model_version_tag(self, name, version, tag):
        check_tags([tag])
        super().set_model_version_tag(name, version, tag)

    def get_latest_versions(self, *args, **kwargs): raise MlflowException("stages are not supported by Unity Catalog")

    def transition_model_version_stage(self, *args, **kwargs): self.get_latest_versions()


class Repository(LocalArtifactRepository):
    "The files of a registered version."

    def __init__(self, artifact_uri, registry_uri=None, tracking_uri=None, **_):
        from mlflow import MlflowClient
        from mlflow.store.artifact.utils.models import get_model_name_and_version
        client = MlflowClient(tracking_uri, registry_uri)
        self.model_name, self.model_version = get_model_name_and_version(client, artifact_uri)
        uri = client.get_model_version_download_uri(self.model_name, self.model_version)
        if uri.startswith("models:/"):
            from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
            uri = ModelsArtifactRepository(uri).repo.artifact_dir
        super().__init__(uri)

    def download_artifacts(self, artifact_path, dst_path=None, lineage_header_info=None):
        return super().download_artifacts(artifact_path, dst_path)


def store(kind, file: str):
    "One store per process and file."
    from mlflow.store.artifact import models_artifact_repo
    models_artifact_repo.UnityCatalogModelsArtifactRepository = Repository
    address = f"sqlite:///{KEPT}/{file}"
    if kind not in STORES:
        artifacts = (KEPT / "artifacts").as_uri()
        STORES[kind] = kind(address, artifacts) if kind is WorkspaceTracking else kind(address)
    return STORES[kind]

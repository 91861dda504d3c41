"""The REST calls that `mlops doctor --databricks` makes, with the bodies and errors that Databricks documents.

It is the `endpoints` of a FakeWorkspace. A path in `answers` has this answer; one that begins as one of `refused` is
refused with 403, one that begins as one of `absent` with 501, as a local workspace refuses it."""
import time
from urllib.parse import unquote

from fake_workspace import OPEN, error

USER = "ann@example.com"
NO_GRANTS: dict[str, list[str]] = {}


class Databricks:
    "A workspace with catalogs, folders and the rest that a target needs."

    def __init__(self):
        self.calls: list[tuple[str, str]] = []
        self.catalogs = dict.fromkeys(("dev", "staging", "prod"), "metastore_admins")  # name -> owner
        self.schemas: dict[str, str] = {}  # full name -> owner
        self.grants = {name: {"data_scientists": ["USE_CATALOG", "CREATE_SCHEMA"]} for name in self.catalogs}
        self.objects = {"/Users": "DIRECTORY", f"/Users/{USER}": "DIRECTORY", "/Shared": "DIRECTORY"}
        self.experiments: dict[str, str] = {}
        self.groups = ["users", "data_scientists"]
        self.clusters: dict[str, dict] = {}
        self.warehouses: list[dict] = []
        self.secrets: dict[str, list[str]] = {}
        self.stores: list[str] = []
        self.answers: dict[str, tuple] = {}
        self.refused: tuple[str, ...] = ()
        self.absent: tuple[str, ...] = ()
        self.delay = 0.0

    def answer(self, method: str, path: str, body: dict):  # status, body, headers
        if path in OPEN: return 200, {}, {}
        time.sleep(self.delay)
        self.calls.append((method, path))
        path = unquote(path)
        if path in self.answers: return self.answers[path]
        if path.startswith(self.absent): return error(501, "NOT_IMPLEMENTED", f"a local workspace does not have {path}")
        if path.startswith(self.refused): return error(403, "PERMISSION_DENIED", f"User {USER} may not call {path}.")
        parts = path.strip("/").split("/")[2:]
        name = f"{method.lower()}_{'_'.join(parts[:2])}".replace("-", "_").replace(".", "_")
        handler = getattr(self, name, None) or getattr(self, name.rpartition("_")[0], None)
        if handler is None: return error(404, "ENDPOINT_NOT_FOUND", f"no API for {method} {path}")
        return handler(body, *parts[2:])

    def get_preview_scim(self, body, *_):
        return 200, {"userName": USER, "groups": [{"display": name} for name in self.groups]}, {}

    def get_unity_catalog_catalogs(self, _, name):
        if name not in self.catalogs: return error(404, "CATALOG_DOES_NOT_EXIST", f"Catalog '{name}' does not exist.")
        return 200, {"name": name, "owner": self.catalogs[name]}, {}

    def get_unity_catalog_schemas(self, _, name):
        if name not in self.schemas: return error(404, "SCHEMA_DOES_NOT_EXIST", f"Schema '{name}' does not exist.")
        return 200, {"full_name": name, "owner": self.schemas[name]}, {}

    def post_unity_catalog_schemas(self, body):
        self.schemas[f"{body['catalog_name']}.{body['name']}"] = USER
        return 200, body, {}

    def delete_unity_catalog_schemas(self, _, name):
        del self.schemas[name]
        return 200, {}, {}

    def get_unity_catalog_effective_permissions(self, _, kind, name):
        granted = self.grants.get(name, NO_GRANTS)
        return 200, {"privilege_assignments": [
            {"principal": principal, "privileges": [{"privilege": privilege} for privilege in privileges]}
            for principal, privileges in granted.items()]}, {}

    def get_unity_catalog_models(self, _): return 200, {"registered_models": []}, {}

    def get_workspace_get_status(self, body):
        if body["path"] not in self.objects:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Path ({body['path']}) doesn't exist.")
        return 200, {"path": body["path"], "object_type": self.objects[body["path"]], "object_id": 7}, {}

    def get_permissions_directories(self, *_): return error(403, "PERMISSION_DENIED", "may not view permissions")

    def post_workspace_mkdirs(self, body):
        parts = body["path"].strip("/").split("/")
        for count in range(1, len(parts) + 1): self.objects.setdefault("/" + "/".join(parts[:count]), "DIRECTORY")
        return 200, {}, {}

    def post_workspace_import(self, body):
        self.objects[body["path"]] = "FILE"
        return 200, {}, {}

    def post_workspace_delete(self, body):
        if any(path.startswith(f"{body['path']}/") for path in self.objects):
            return error(400, "DIRECTORY_NOT_EMPTY", f"Folder ({body['path']}) is not empty")
        del self.objects[body["path"]]
        return 200, {}, {}

    def post_mlflow_experiments(self, body, verb):
        if verb == "delete": del self.experiments[body["experiment_id"]]
        elif body["name"].rpartition("/")[0] not in self.objects:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Parent directory of {body['name']} does not exist.")
        else: self.experiments["11"] = body["name"]
        return 200, {"experiment_id": "11"}, {}

    def get_mlflow_unity_catalog(self, *_): return 200, {"registered_models": []}, {}
    def get_serving_endpoints(self, *_): return 200, {"endpoints": []}, {}
    def get_jobs_list(self, _): return 200, {"jobs": [{"job_id": 1}]}, {}
    def get_sql_warehouses(self, *_): return 200, {"warehouses": self.warehouses}, {}

    def get_clusters_get(self, body):
        number = body["cluster_id"]
        if number in self.clusters: return 200, self.clusters[number], {}
        return error(400, "INVALID_PARAMETER_VALUE", f"Cluster {number} does not exist")

    def get_secrets_scopes(self, *_): return 200, {"scopes": [{"name": name} for name in self.secrets]}, {}

    def get_secrets_list(self, body):
        return 200, {"secrets": [{"key": key} for key in self.secrets[body["scope"]]]}, {}

    def get_feature_store_online_stores(self, _, name):
        if name in self.stores: return 200, {"name": name, "capacity": "CU_1", "state": "AVAILABLE"}, {}
        return error(404, "RESOURCE_DOES_NOT_EXIST", f"Online store {name} does not exist")

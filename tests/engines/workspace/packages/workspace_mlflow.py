"""The entry points of MLflow's stores; the stores are imported late, since MLflow asks while it is imported itself."""


def tracking(store_uri=None, artifact_uri=None, **_):
    from workspace_stores import WorkspaceTracking, store
    return store(WorkspaceTracking, "tracking.db")


def registry(store_uri=None, tracking_uri=None, **_):
    from workspace_stores import UnityRegistry, store
    return store(UnityRegistry, "registry.db")

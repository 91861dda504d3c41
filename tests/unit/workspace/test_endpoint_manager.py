"""What happens to an endpoint when an update fails, is repeated, cut off or meets processes that end."""
import asyncio
import time

import pytest
from fake_processes import Worker, config, make_manager

from mlops_nb.errors import MlopsError
from mlops_nb.serving.endpoint_config import RestError
from mlops_nb.workspace.endpoint_store import CUT_OFF
from mlops_nb.workspace.worker_updates import ChildGone


def run(folder, scenario, **options):
    "Run a scenario with a manager, and wait for all that it began."
    async def whole():
        manager = make_manager(folder, **options)
        try: return await asyncio.wait_for(scenario(manager), 30)
        finally: await manager.close()
    return asyncio.run(whole())


async def settled(manager, name="late"):
    "Wait until no update runs and no process is about to end."
    for _ in range(200):
        await asyncio.sleep(0.005)
        if name not in manager.updates and not manager.tasks: return manager.store.endpoint(name)
    raise AssertionError(manager.tasks)


async def created(manager, *versions, name="late"):
    await manager.create({"name": name, "config": config(*versions)}, "ann")
    return await settled(manager, name)


async def begin_update(manager, version):
    "Begin an update whose model is held back until `manager.host.gate` is set."
    manager.host.gate = asyncio.Event()
    await manager.update_config("late", config(version), "ann")


def test_a_failed_creation_is_not_ready_and_an_update_makes_it_ready(tmp_path):
    async def scenario(manager):
        record = await created(manager, "13")
        assert (record.update_state, record.active_version) == ("UPDATE_FAILED", None) and "late" not in manager.active
        assert record.update_message == "v13: the model cannot be loaded; its file is damaged"
        await manager.update_config("late", config("1"), "ann")
        record = await settled(manager)
        assert (record.update_state, record.active_version, record.pending_version) == ("NOT_UPDATING", 2, None)
    run(tmp_path, scenario)


def test_a_failed_update_leaves_the_old_version_and_no_process_of_the_new_one(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        await manager.update_config("late", config("2", "13", v2=50, v13=50), "ann")
        record = await settled(manager)
        assert (record.update_state, record.active_version) == ("UPDATE_FAILED", 1)
        assert list(manager.host.running.values()) == ["1"]
        assert manager.workers[0].serving["late"]["entities"][0]["version"] == "1" and not manager.workers[0].prepared
    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [MlopsError("the online store does not answer"), ChildGone("worker 1 has ended"),
                                   TimeoutError("it took too long")], ids=lambda error: type(error).__name__)
def test_a_worker_that_cannot_prepare_fails_the_update_on_all_workers(tmp_path, error):
    async def scenario(manager):
        await created(manager, "1")
        manager.workers[1].refuse = error
        await manager.update_config("late", config("2"), "ann")
        record = await settled(manager)
        assert (record.update_state, record.update_message) == ("UPDATE_FAILED", str(error))
        for worker in manager.workers: assert worker.serving["late"]["generation"] == 1 and not worker.prepared
    run(tmp_path, scenario, workers=2)


def test_a_second_update_is_refused_while_the_first_one_loads(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        await begin_update(manager, "2")
        with pytest.raises(RestError, match="IN_PROGRESS") as error:
            await manager.update_config("late", config("3"), "bob")
        assert (error.value.status, error.value.error_code) == (409, "RESOURCE_CONFLICT")
        assert manager.workers[0].serving["late"]["entities"][0]["version"] == "1", "the old version serves meanwhile"
        manager.host.gate.set()
        assert (await settled(manager)).active_version == 2
    run(tmp_path, scenario)


def test_a_change_of_the_traffic_loads_no_model(tmp_path):
    async def scenario(manager):
        await manager.create({"name": "late", "config": config("1", "2", v1=90, v2=10)}, "ann")
        await settled(manager)
        before = dict(manager.host.running)
        ids = {entity["id"] for entity in manager.workers[0].serving["late"]["entities"]}
        routes = config(v1=50, v2=50)["traffic_config"]
        await manager.update_config("late", {"traffic_config": routes}, "ann")
        await settled(manager)
        serving = manager.workers[0].serving["late"]
        assert manager.host.running == before and manager.host.started == 2
        assert serving["routes"] == {"v1": 50, "v2": 50}
        assert not ids & {entity["id"] for entity in serving["entities"]}, "a configuration has ids of its own"
    run(tmp_path, scenario)


def test_the_old_processes_end_when_their_requests_are_answered(tmp_path, monkeypatch):
    monkeypatch.setattr("mlops_nb.workspace.endpoint_updates.SWITCH_SECONDS", 0.05)
    async def scenario(manager):
        await created(manager, "1")
        manager.workers[0].drain = asyncio.Event()
        await manager.update_config("late", config("2"), "ann")
        await manager.updates["late"]
        assert manager.store.endpoint("late").update_state == "NOT_UPDATING"
        assert sorted(manager.host.running.values()) == ["1", "2"], "a request to version 1 is not answered yet"
        manager.workers[0].drain.set()
        await settled(manager)
        assert list(manager.host.running.values()) == ["2"]
    run(tmp_path, scenario)


def test_many_updates_leave_one_process_and_a_short_history(tmp_path, monkeypatch):
    monkeypatch.setattr("mlops_nb.workspace.endpoint_store.KEPT_CONFIGS", 5)
    async def scenario(manager):
        await created(manager, "1")
        for number in range(12):
            await manager.update_config("late", config(str(2 + number % 2)), "ann")
            await manager.updates["late"]
        record = await settled(manager)
        assert record.active_version == 13 and list(manager.host.running.values()) == ["3"]
        assert len(manager.store.rows("select * from configs")) == 5
        assert len(manager.store.rows("select * from served_entities")) == 13
    run(tmp_path, scenario)


def test_logs_and_files_of_versions_that_are_no_longer_served_are_removed(tmp_path):
    async def scenario(manager):
        folder, logs = manager.folders.folder, lambda: {path.name for path in tmp_path.glob("m*-*.txt")}
        await created(manager, "1")
        (folder / "part-download").mkdir()  # of another process
        for version in ("2", "13", "3", "4"):
            await manager.update_config("late", config(version), "ann")
            await settled(manager)
        assert len(logs()) == 1 and "process" in manager.logs("late", "v4")
        assert {path.name for path in folder.iterdir()} == {"13", "3", "4", "part-download"}
        assert (tmp_path / "workspace.db").exists()
        await manager.delete("late")
        for _ in range(20): await asyncio.sleep(0.01)
        assert not logs() and {path.name for path in folder.iterdir()} == {"part-download"}
    run(tmp_path, scenario)


def test_after_a_kill_the_active_configuration_serves_and_the_pending_one_has_failed(tmp_path):
    async def killed(manager):
        await created(manager, "1")
        await begin_update(manager, "2")
        await manager.create({"name": "new", "config": config("3")}, "ann")
    run(tmp_path, killed)

    async def restarted(manager):
        await manager.restore()
        late, new = manager.store.endpoint("late"), manager.store.endpoint("new")
        assert (late.active_version, late.update_state, late.update_message) == (1, "UPDATE_FAILED", CUT_OFF)
        assert (new.active_version, new.update_state) == (None, "UPDATE_FAILED")
        assert set(manager.workers[0].serving) == {"late"} and list(manager.host.running.values()) == ["1"]
        await manager.update_config("late", config("2"), "ann")
        assert (await settled(manager)).active_version == 3, "a number is never used again"
    run(tmp_path, restarted)


def test_an_endpoint_that_cannot_be_restored_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mlops_nb.workspace.endpoint_updates.pauses", lambda: iter([0.01] * 100))
    async def before(manager): await created(manager, "1")
    run(tmp_path, before)

    async def restarted(manager):
        manager.host.broken.add("1")
        await manager.restore()
        assert "late" not in manager.active and "cannot be loaded" in manager.store.endpoint("late").update_message
        manager.host.broken.clear()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if "late" in manager.active: break
        assert manager.workers[0].serving["late"]["entities"][0]["version"] == "1"
    run(tmp_path, restarted)


def test_a_model_process_that_ends_is_replaced_at_a_new_socket(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        socket = manager.workers[0].serving["late"]["entities"][0]["socket"]
        manager.host.running.pop(socket)
        for _ in range(3): manager.model_failed(socket, "the process ended with code -9")  # several report it
        await settled(manager)
        new = manager.workers[0].serving["late"]["entities"][0]["socket"]
        assert new != socket and list(manager.host.running) == [new] and manager.host.started == 2
        assert "the process ended with code -9" not in manager.logs("late", "v1")
    run(tmp_path, scenario)


def test_a_worker_that_starts_gets_all_endpoints_with_their_present_tags(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        await created(manager, "2", name="other")
        await manager.patch_tags("late", {"add_tags": [{"key": "sticky_key", "value": "carrier"}]})
        await manager.delete("other")
        worker = Worker(1)
        await manager.bring_up(worker)
        assert set(worker.serving) == {"late"} and worker.serving["late"]["sticky_key"] == "carrier"
    run(tmp_path, scenario)


def test_a_worker_that_becomes_ready_while_others_prepare_serves_the_new_version(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        late = Worker(1)
        await manager.bring_up(late)  # with version 1
        prepare = manager.workers[0].on_prepare
        async def prepare_slowly(endpoint):
            manager.workers.append(late)
            await prepare(endpoint)
        manager.workers[0].on_prepare = prepare_slowly
        await manager.update_config("late", config("2"), "ann")
        await settled(manager)
        assert [worker.serving["late"]["entities"][0]["version"] for worker in manager.workers] == ["2", "2"]
        assert late.generations == manager.workers[0].generations and not late.is_closed
        manager.workers[0].on_prepare = prepare
        async def fail(**_): raise MlopsError("no memory")
        late.on_switch = fail
        await manager.update_config("late", config("3"), "ann")
        await settled(manager)
        assert late.is_closed, "it is started again rather than that it serves an old version"
    run(tmp_path, scenario)


def test_a_worker_that_cannot_prepare_at_its_start_is_given_the_endpoint_later(tmp_path, monkeypatch):
    monkeypatch.setattr("mlops_nb.workspace.worker_updates.pauses", lambda: iter([0.01] * 100))
    async def scenario(manager):
        await created(manager, "1")
        worker = Worker(1)
        worker.refuse = MlopsError("the online store does not answer")
        await manager.bring_up(worker)
        assert not worker.serving and not worker.generations
        worker.refuse = None
        await settled(manager)
        assert set(worker.serving) == {"late"} and worker.generations == manager.workers[0].generations
    run(tmp_path, scenario)


def test_a_deletion_while_requests_are_finished_ends_the_old_processes_too(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        manager.workers[0].drain = asyncio.Event()
        await manager.update_config("late", config("2"), "ann")
        while manager.active["late"].config.version == 1: await asyncio.sleep(0.005)
        deletion = asyncio.create_task(manager.delete("late"))
        await asyncio.sleep(0.01)
        manager.workers[0].drain.set()
        await deletion
        for _ in range(20): await asyncio.sleep(0.01)
        assert not manager.host.running
    run(tmp_path, scenario)


def test_a_deletion_during_an_update_leaves_nothing(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        await begin_update(manager, "2")
        await asyncio.sleep(0.01)
        await manager.delete("late")
        manager.host.gate.set()
        await asyncio.sleep(0.05)
        assert not manager.host.running and not manager.workers[0].serving and not manager.active
        with pytest.raises(RestError) as error: manager.store.endpoint("late")
        assert error.value.status == 404
        assert (await created(manager, "3")).active_version == 1, "the name can be used again"
    run(tmp_path, scenario)


def test_no_update_begins_while_an_endpoint_is_deleted_or_for_one_made_anew(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        registry, check = manager.folders, manager.folders.check
        def check_slowly(configuration, table=""):
            time.sleep(0.1)
            return check(configuration, table)
        registry.check = check_slowly
        update = asyncio.create_task(manager.update_config("late", config("2"), "ann"))
        await asyncio.sleep(0.02)
        registry.check = check
        await manager.delete("late")
        await created(manager, "3")
        with pytest.raises(RestError) as error: await update
        assert error.value.status == 404
        assert (await settled(manager)).active_version == 1
        assert manager.workers[0].serving["late"]["entities"][0]["version"] == "3"
        async with manager.lock("late"):
            deletion = asyncio.create_task(manager.delete("late"))
            await asyncio.sleep(0.01)
            for call in (manager.update_config("late", config("2"), "ann"), manager.put_gateway("late", {}),
                         manager.delete("late")):
                with pytest.raises(RestError, match="is being deleted"): await call
        await deletion
        assert not manager.active
    run(tmp_path, scenario)


def test_settings_of_the_gateway_that_cannot_be_applied_are_refused_and_not_kept(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        manager.workers[0].refuse = TimeoutError()
        table = {"catalog_name": "dev", "schema_name": "flights", "table_name_prefix": "late", "enabled": True}
        with pytest.raises(RestError, match="not applied: it took too long") as error:
            await manager.put_gateway("late", {"inference_table_config": table})
        assert error.value.status == 503
        record = await settled(manager)
        assert not record.ai_gateway and "not applied" in record.update_message
        assert manager.workers[0].serving["late"]["inference_table"] is None
    run(tmp_path, scenario)


def test_the_inference_table_changes_without_a_new_process(tmp_path):
    async def scenario(manager):
        await created(manager, "1")
        table = {"catalog_name": "dev", "schema_name": "flights", "table_name_prefix": "late", "enabled": True}
        await manager.put_gateway("late", {"inference_table_config": table})
        await settled(manager)
        assert manager.workers[0].serving["late"]["inference_table"]["table"] == "dev.flights.late_payload"
        assert manager.host.started == 1
        with pytest.raises(RestError, match="may not write"):
            await manager.put_gateway("late", {"inference_table_config": table | {"catalog_name": "prod"}})
    run(tmp_path, scenario)


def test_shadow_and_sticky_tags_reach_the_workers_and_ids_are_kept_for_the_payloads(tmp_path):
    async def scenario(manager):
        tags = [{"key": "shadow", "value": "v2, gone"}, {"key": "team", "value": "ml"}]
        await manager.create({"name": "late", "config": config("1", "2", v1=100, v2=0), "tags": tags}, "ann")
        await settled(manager)
        serving = manager.workers[0].serving["late"]
        assert serving["shadow"] == ["v2"] and serving["routes"] == {"v1": 100, "v2": 0}
        rows = manager.store.rows("select * from served_entities order by served_entity_name")
        assert [row["served_entity_id"] for row in rows] == [entity["id"] for entity in serving["entities"]]
        assert [(row["entity_name"], row["entity_version"]) for row in rows] == [
            ("dev.flights.late_arrival", "1"), ("dev.flights.late_arrival", "2")]
    run(tmp_path, scenario)

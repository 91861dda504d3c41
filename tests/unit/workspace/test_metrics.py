"""The metrics, read back by Prometheus' own parser."""
from prometheus_client.parser import text_string_to_metric_families

from mlops_nb.workspace.metrics import prometheus_text

COUNTS = {"requests": {"200": 5, "429": 1}, "seconds": {"0.001": 3, "0.01": 2, "+Inf": 1}, "sum": 0.5, "in_flight": 2}
WORKERS = [{"endpoints": {"late": {"late-1": COUNTS, "late-2": COUNTS}}, "spool_lost": 1, "rss": 8e7, "connections": 4},
           {"endpoints": {"late": {"late-1": COUNTS}}, "spool_lost": 2, "rss": 9e7, "connections": 0}]
FACTS = {"started": 1.5e9, "workers": 2, "endpoints": 2, "updating": 1, "restarts": {"worker 0": 1},
         "states": {"late": "READY", 'a "b"\\c': "UPDATE_FAILED"}, "models": {("late", "late-1"): 1e8}}


def samples(text: bytes) -> dict:
    "Value by name and labels."
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text.decode()) for sample in family.samples}


def test_the_counts_of_all_workers_are_added():
    read = samples(prometheus_text(WORKERS, FACTS))
    entity = (("endpoint", "late"), ("served_entity", "late-1"))
    assert read[("mlops_requests_total", *entity, ("status", "200"))] == 10
    assert read[("mlops_requests_total", *entity, ("status", "429"))] == 2
    assert read[("mlops_requests_in_flight", *entity)] == 4
    bounds = {dict(key[1:])["le"]: value for key, value in read.items()
              if key[0] == "mlops_request_seconds_bucket" and ("served_entity", "late-1") in key}
    assert bounds == {"0.001": 6, "0.01": 10, "+Inf": 12}
    assert read[("mlops_request_seconds_count", *entity)] == 12 and read[("mlops_request_seconds_sum", *entity)] == 1
    assert read[("mlops_payloads_lost_total",)] == 3
    assert read[("mlops_worker_resident_memory_bytes", ("worker", "1"))] == 9e7


def test_the_state_of_an_endpoint_is_the_one_with_the_value_1():
    read = samples(prometheus_text(WORKERS, FACTS))
    def state(name):
        return [dict(key[1:])["state"] for key, value in read.items()
                if key[0] == "mlops_endpoint_state" and ("endpoint", name) in key and value == 1]
    assert state("late") == ["READY"] and state('a "b"\\c') == ["UPDATE_FAILED"]
    assert read[("mlops_restarts_total", ("process", "worker 0"))] == 1
    assert read[("mlops_model_resident_memory_bytes", ("endpoint", "late"), ("served_entity", "late-1"))] == 1e8


def test_a_workspace_without_workers_has_metrics():
    read = samples(prometheus_text([], {"workers": 0}))
    assert read[("mlops_workers",)] == 0 and not any(key[0].startswith("mlops_request") for key in read)

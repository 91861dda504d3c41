"""An endpoint that is updated again and again while it answers: no request fails, and no answer is late."""
import json
import shutil
import threading

import pytest
from load import put_load
from local_workspace import address_of, endpoint_config, flight_row, inference_table, workspace
from sizes import by_size

pytestmark = pytest.mark.slow
UPDATES = by_size(100, 5)
LATEST = 20  # milliseconds: the 99th percentile of the answer times, on a machine that does nothing else


@pytest.fixture(scope="module")
def client(own_trained):
    if not shutil.which("wrk"): pytest.skip("the load needs wrk: apt-get install wrk")
    with workspace(own_trained) as client:
        client.serving_endpoints.create_and_wait("late", config=endpoint_config(), ai_gateway=inference_table("late"))
        yield client


def test_updates_in_a_row_at_half_the_saturated_rate_fail_no_request(client):
    "The two configurations serve the same version under two names, so each update loads the model again."
    body = json.dumps({"dataframe_records": [flight_row()]}).encode()
    headers = {"Authorization": f"Bearer {client.config.token}"}

    def load(**options): return put_load(address_of(client, "late"), body, headers, **options)

    saturated = load(seconds=3)
    half = {"connections": 32, "rate": saturated.rate / 2}
    steady, ended, loads = load(seconds=3, **half), threading.Event(), []

    def keep_loading():
        while not ended.is_set(): loads.append(load(seconds=3, **half))

    thread = threading.Thread(target=keep_loading)
    thread.start()
    try:
        for number in range(UPDATES):
            config = endpoint_config(name=f"champion-{number % 2}")
            client.serving_endpoints.update_config_and_wait("late", served_entities=config.served_entities)
    finally:
        ended.set()
        thread.join()
    worst = max(one.p99 for one in loads)
    print(f"{UPDATES} updates; saturated {saturated.rate:,.0f}/s; at half of it p99 {steady.p99:.1f} ms without and "
          f"{worst:.1f} ms with updates; failed: {sum(one.failed for one in loads)}")
    assert saturated.failed == steady.failed == sum(one.failed for one in loads) == 0
    assert worst <= max(LATEST, 3 * steady.p99)

"""Alerts for tests: a definition, rows in place of an engine, and a receiver that records what comes."""
import json
import time
from http.server import BaseHTTPRequestHandler

import yaml
from http_server import HttpServer

from mlops_nb.monitoring.alert_definitions import Alert, alert_from

RESOURCE = {
    "display_name": "Drift", "query_text": "SELECT 0.3 AS psi", "warehouse_id": "1",
    "schedule": {"quartz_cron_schedule": "0 0 7 * * ?", "timezone_id": "America/New_York"},
    "evaluation": {"source": {"name": "psi"}, "comparison_operator": "GREATER_THAN", "empty_result_state": "OK",
                   "threshold": {"value": {"double_value": 0.2}}}}


def resource(receivers=("hook",), **evaluation) -> dict:
    "The fields of an alert; `evaluation` replaces fields of its evaluation."
    subscriptions = [{"destination_id": one} for one in receivers]
    notification = {"subscriptions": subscriptions} | evaluation.pop("notification", {})
    return RESOURCE | {"evaluation": RESOURCE["evaluation"] | {"notification": notification} | evaluation}


def alert(**options) -> Alert: return alert_from("drift", "7", "dev", resource(**options), "ann@example.org")


def rows(*values):
    "What a query of the column psi returns, once for each call."
    waiting = iter(values)
    return lambda query: (["psi"], [{"psi": next(waiting)}])


def write_alerts(project, **alerts) -> None:
    "Add alerts to the bundle of a small project."
    project.path("resources/some.alert.yml").write_text(yaml.safe_dump({"resources": {"alerts": alerts}}))


class Hook(HttpServer):
    "A receiver of webhooks: `received` has headers and body of each request; `answers` the status codes, then 200."

    def __init__(self, *answers: int, seconds: float = 0):
        self.received, self.answers, self.seconds = [], list(answers), seconds
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hook.received.append(({name.lower(): value for name, value in self.headers.items()}, content))
                time.sleep(hook.seconds)
                self.send_response(hook.answers.pop(0) if hook.answers else 200)
                self.end_headers()

            def log_message(self, *_): pass
        super().__init__(Handler)

    @property
    def ids(self) -> list[str]: return [headers["webhook-id"] for headers, _ in self.received]

    @property
    def bodies(self) -> list[dict]: return [json.loads(content) for _, content in self.received]


def write_destinations(state, **destinations) -> None:
    "Write the notification destinations of a state."
    state.mkdir(parents=True, exist_ok=True)
    (state / "destinations.json").write_text(json.dumps(destinations))

"Notifications to real servers on this machine, which answer, refuse, fail, hang, or send one byte at a time."
import datetime
import email
import email.policy
import ipaddress
import json
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from mlops_nb.bundle.graph import ResultState
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import delivery
from mlops_nb.jobs import notices as rules
from mlops_nb.jobs.delivery import MAX_CONCURRENT, Delivery, destinations, mail_server, send
from mlops_nb.jobs.notices import Notice, event_of, notifications, payload

BODY = payload("on_failure", 7, "train", 13, parent_run_id=12, task_key="deploy", workspace_id=5)
PASSWORD = "hunter2-%/@:é"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    proxies = [name for word in ("http", "https", "all") for name in (f"{word}_proxy", f"{word}_proxy".upper())]
    for name in ("MLOPS_SMTP", "MLOPS_DESTINATIONS", "MLOPS_TASK", *proxies):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(delivery, "PAUSE", 0.05)


# --- receivers

def job(**settings) -> dict:
    return {"name": "train", "email_notifications": {event: [f"{event}@example.org"] for event in rules.EVENTS},
            "webhook_notifications": {event: [{"id": f"{event}-hook"}] for event in rules.EVENTS}} | settings


@pytest.mark.parametrize("event", rules.EVENTS)
def test_each_event_has_its_own_receivers(event):
    assert notifications(job(), event) == [Notice(event, "email", f"{event}@example.org"),
                                           Notice(event, "webhook", f"{event}-hook")]
    assert notifications({"name": "train"}, event) == []
    assert notifications(job(email_notifications=None, webhook_notifications={}), event) == []


def test_a_task_has_receivers_and_settings_of_its_own():
    silent = {"no_alert_for_skipped_runs": True, "no_alert_for_canceled_runs": True}
    assert notifications(job(), "on_failure", task={"task_key": "a"}) == []
    task = job(task_key="a")
    assert len(notifications(job(notification_settings=silent), "on_failure", task=task, state="CANCELED")) == 2
    assert notifications(job(), "on_failure", task=task | {"notification_settings": silent}, state="CANCELED") == []
    assert notifications(job(), "on_failure", task=task | {"condition_task": {}}) == []


FAILURES = {"FAILED", "TIMEDOUT", "CANCELED", "UPSTREAM_FAILED", "UPSTREAM_CANCELED", "MAXIMUM_CONCURRENT_RUNS_REACHED"}


@pytest.mark.parametrize("settings, states", [
    ({}, FAILURES),
    ({"no_alert_for_skipped_runs": True}, {"FAILED", "TIMEDOUT", "CANCELED"}),
    ({"no_alert_for_canceled_runs": True},
     {"FAILED", "TIMEDOUT", "UPSTREAM_FAILED", "MAXIMUM_CONCURRENT_RUNS_REACHED"}),
    ({"no_alert_for_skipped_runs": True, "no_alert_for_canceled_runs": True}, {"FAILED", "TIMEDOUT"})])
def test_a_setting_silences_failures_of_its_kind_and_nothing_else(settings, states):
    task = job(task_key="a", notification_settings=settings)
    def is_sent(event, state=None): return len(notifications({}, event, task, state=state)) == 2
    assert {state for state in FAILURES if is_sent("on_failure", state)} == states
    assert is_sent("on_start") and is_sent("on_success", "SUCCESS")
    assert is_sent("on_duration_warning_threshold_exceeded")


def test_with_alert_on_last_attempt_only_the_first_start_and_the_last_failure_are_sent():
    def sent_attempts(last_only):
        task = job(task_key="a", notification_settings={"alert_on_last_attempt": last_only})
        starts = [attempt for attempt in (0, 1, 2) if notifications({}, "on_start", task, attempt=attempt)]
        failures = [attempt for attempt in (0, 1, 2)
                    if notifications({}, "on_failure", task, "FAILED", attempt, last_attempt=attempt == 2)]
        return starts, failures
    assert sent_attempts(last_only=True) == ([0], [2])
    assert sent_attempts(last_only=False) == ([0, 1, 2], [0, 1, 2])


def test_the_deprecated_form_of_a_setting_applies_to_email_only():
    deprecated = job()
    deprecated["email_notifications"]["no_alert_for_skipped_runs"] = True
    def kinds(event, state): return [notice.kind for notice in notifications(deprecated, event, state=state)]
    assert kinds("on_failure", "MAXIMUM_CONCURRENT_RUNS_REACHED") == ["webhook"]
    assert kinds("on_failure", "FAILED") == ["email", "webhook"]
    assert kinds("on_success", "SUCCESS") == ["email", "webhook"]


def test_a_duplicate_receiver_gets_one_notice():
    settings = {"email_notifications": {"on_start": ["a", "b", "a"]},
                "webhook_notifications": {"on_start": [{"id": 1}] * 2}}
    assert [notice.to for notice in notifications(settings, "on_start")] == ["a", "b", "1"]


def test_the_end_of_a_run_is_an_event():
    assert {str(state): event_of(state) for state in ResultState} == {
        "SUCCESS": "on_success", "SUCCESS_WITH_FAILURES": "on_success", "EXCLUDED": None, "DISABLED": None,
        "FAILED": "on_failure", "TIMEDOUT": "on_failure", "CANCELED": "on_failure", "UPSTREAM_FAILED": "on_failure",
        "UPSTREAM_CANCELED": "on_failure", "MAXIMUM_CONCURRENT_RUNS_REACHED": "on_failure", "WAITING": "on_waiting"}
    with pytest.raises(MlopsError, match="no notification event 'jobs.on_start'"): notifications(job(), "jobs.on_start")


def test_a_run_that_waits_for_approval_is_told_to_the_receivers_of_failures_in_other_words():
    settings = {"email_notifications": {"on_failure": ["a"]}, "webhook_notifications": {"on_failure": [{"id": 1}]}}
    assert [(notice.event, notice.to) for notice in notifications(settings, "on_waiting", state="WAITING")] == [
        ("on_waiting", "a"), ("on_waiting", "1")]
    assert rules.email_text(payload("on_waiting", 7, "deploy", 12))[0] == "Job deploy waits for approval"


# --- the body of a webhook

@pytest.mark.parametrize("event", rules.EVENTS)
def test_the_body_is_databricks_own(event):
    assert payload(event, 7, "train", 12) == {
        "event_type": f"jobs.{event}", "workspace_id": "0", "run": {"run_id": "12"},
        "job": {"job_id": "7", "name": "train"}}
    assert payload(event, 7, "train", 13, parent_run_id=12, task_key="deploy", workspace_id=5) == {
        "event_type": f"jobs.{event}", "workspace_id": "5", "run": {"run_id": "13", "parent_run_id": "12"},
        "job": {"job_id": "7", "name": "train"}, "task": {"task_key": "deploy"}}


# --- notification destinations

def test_destinations_are_read_from_the_state_folder_or_from_the_file_of_the_variable(tmp_path, monkeypatch):
    assert destinations(tmp_path) == {}
    (tmp_path / "destinations.json").write_text('{"a": {"url": "http://a"}}')
    assert destinations(tmp_path) == {"a": {"url": "http://a"}}
    other = tmp_path / "other.json"
    monkeypatch.setenv("MLOPS_DESTINATIONS", str(other))
    with pytest.raises(MlopsError, match="other.json cannot be read"): destinations(tmp_path)
    other.write_text('{"b": {"url": "http://b", "username": "u", "password": "p"}}')
    assert list(destinations(tmp_path)) == ["b"]


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read"), ("[]", "is not a map of destinations"), ('{"a": "http://a"}', "is not a map of strings"),
    ('{"a": {"url": 3}}', "is not a map of strings"), ('{"a": {"username": "u"}}', "has no url"),
    ('{"a": {"url": "u", "pasword": "x"}}', "no field 'pasword'.*\n  did you mean 'password'")])
def test_a_file_of_destinations_with_a_mistake(text, message, tmp_path):
    (tmp_path / "destinations.json").write_text(text)
    with pytest.raises(MlopsError, match=message): destinations(tmp_path)


# --- webhooks

class Hook(BaseHTTPRequestHandler):
    "Answers requests with the entries of the server's `script`, the last one repeatedly; keeps the requests."

    def do_POST(self):
        server = self.server
        with server.lock:
            server.open += 1
            server.most = max(server.most, server.open)
            number = len(server.requests)
            server.requests.append(self)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = server.script[min(number, len(server.script) - 1)]
        if callable(answer): answer(self)
        else: self.answer(*answer if isinstance(answer, tuple) else (answer,))
        with server.lock: server.open -= 1

    do_GET = do_POST

    def answer(self, status: int, reason: str | None = None, **headers):
        self.send_response(status, reason)
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_): pass


@pytest.fixture
def hook():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.daemon_threads, server.block_on_close = True, False
    server.script, server.requests, server.lock, server.open, server.most = [200], [], threading.Lock(), 0, 0
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.stop.set(); server.shutdown(); server.server_close(); thread.join()


def notify(url: str, tmp_path, seconds: float = 1.0, **login) -> Delivery:
    known = {"chat": {"url": url, **login}}
    [delivery] = send([Notice("on_failure", "webhook", "chat")], BODY, known, tmp_path, seconds)
    assert (delivery.event, delivery.to) == ("on_failure", "chat")
    return delivery


def url_of(server, path: str = "/") -> str: return f"http://127.0.0.1:{server.server_port}{path}"


def test_a_webhook_gets_the_body(hook, tmp_path):
    delivery = notify(url_of(hook, "/T0/abc?x=1"), tmp_path)
    assert delivery.ok and delivery.detail == "200 OK"
    [request] = hook.requests
    assert (request.command, request.path) == ("POST", "/T0/abc?x=1")
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.body) == BODY and "Authorization" not in request.headers


def test_basic_authentication_and_secrets_by_reference(hook, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_SECRET_HOOKS_CHAT_URL", url_of(hook, "/T0/secret-path"))
    monkeypatch.setenv("MLOPS_SECRET_HOOKS_PASSWORD", PASSWORD)
    delivery = notify("secrets/hooks/chat-url", tmp_path, username="ann", password="secrets/hooks/password")
    assert delivery.ok
    kind, text = hook.requests[0].headers["Authorization"].split()
    assert kind == "Basic" and b64decode(text).decode() == f"ann:{PASSWORD}"
    assert hook.requests[0].path == "/T0/secret-path"


@pytest.mark.parametrize("script, ok, calls, detail", [
    ([204], True, 1, "204 No Content"), ([500, 200], True, 2, "200 OK"), ([503, 500], False, 2, "answered 500"),
    ([429, 200], True, 2, "200 OK"), ([404], False, 1, "answered 404 Not Found"), ([401], False, 1, "answered 401"),
    ([500, 404], False, 2, "answered 404")])
def test_answers(script, ok, calls, detail, hook, tmp_path):
    hook.script = script
    delivery = notify(url_of(hook), tmp_path)
    assert (delivery.ok, len(hook.requests)) == (ok, calls)
    assert detail in delivery.detail


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status, hook, tmp_path):
    hook.script = [lambda request: request.answer(status, Location=url_of(hook, "/elsewhere")), 200]
    delivery = notify(url_of(hook), tmp_path)
    assert not delivery.ok and len(hook.requests) == 1 and "a redirect" in delivery.detail


def test_a_dead_port(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        delivery = notify(f"http://127.0.0.1:{free.getsockname()[1]}/", tmp_path)
    assert not delivery.ok and "refused" in delivery.detail


def test_a_host_that_does_not_exist(tmp_path):
    assert not notify("http://no-such-host.invalid/", tmp_path).ok


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_in_time(hook, tmp_path):
    hook.script = [lambda request: hook.stop.wait(20)]
    delivery = notify(url_of(hook), tmp_path, seconds=0.3)
    assert len(hook.requests) == 2
    assert not delivery.ok and delivery.detail == "no answer in time"


@pytest.mark.slow
@pytest.mark.timeout(30)  # the server would send until the test ends
def test_a_server_that_sends_one_byte_at_a_time_is_given_up_in_time(hook, tmp_path):
    def drip(request):
        while not hook.stop.wait(0.1):
            try: request.wfile.write(b"x")
            except OSError: return
    hook.script = [drip]
    delivery = notify(url_of(hook), tmp_path, seconds=0.3)
    assert not delivery.ok and delivery.detail == "no answer in time"


@pytest.mark.parametrize("answer, calls, detail", [
    (b"", 2, "RemoteDisconnected"), (b"hello\r\n\r\n", 2, "BadStatusLine")])
def test_a_server_that_does_not_answer_in_http(answer, calls, detail, hook, tmp_path):
    hook.script = [lambda request: request.wfile.write(answer)]
    delivery = notify(url_of(hook), tmp_path)
    assert not delivery.ok and detail in delivery.detail and len(hook.requests) == calls


def test_a_server_that_quotes_the_request_in_another_protocol(hook, tmp_path):
    "As SMTP and SSH servers do."
    hook.script = [lambda request: request.wfile.write(f"500 unrecognized: POST {request.path} HTTP/1.1\r\n".encode())]
    delivery = notify(url_of(hook, "/T0/s3cr3t"), tmp_path)
    assert not delivery.ok and delivery.detail == "could not be sent (BadStatusLine)"


def test_no_credentials_are_taken_from_netrc(hook, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login alice password topsecret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert notify(url_of(hook), tmp_path).ok
    assert "Authorization" not in hook.requests[0].headers


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_webhook_trusts_the_authorities_of_python(is_trusted, hook, certificate, tmp_path, monkeypatch):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.public, certificate.private)
    hook.socket = context.wrap_socket(hook.socket, server_side=True)
    if is_trusted: monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    delivery = notify(url_of(hook).replace("http:", "https:"), tmp_path)
    assert delivery.ok is is_trusted and ("CERTIFICATE_VERIFY_FAILED" in delivery.detail) is not is_trusted


@pytest.mark.parametrize("url", [
    "ftp://example.org/T0-secret", "file:///etc/hostname?T0-secret", "example.org/T0-secret", "http:///T0-secret",
    # pragma: allowlist nextline secret
    "http://ann:T0-secret@127.0.0.1/", "http://127.0.0.1:T0-secret/", "http://127.0.0.1/T0-secret x",
    "http://[T0-secret", "T0-secret", "http://127.0.0.1:99999/T0-secret", "http://127.0.0.1:1/T0-secret\r\nX: y",
    "http://é\x00/T0-secret", ""])
def test_a_bad_url_is_recorded_without_being_quoted(url, tmp_path):
    delivery = notify(url, tmp_path)
    assert not delivery.ok and "T0-secret" not in delivery.detail and delivery.detail


@pytest.mark.parametrize("status", [200, 500])
def test_a_receiver_that_sends_the_secrets_back(status, hook, tmp_path):
    def echo(request): request.answer(status, f"got {request.headers['Authorization']} hunter2 {url_of(hook, '/T0')}")
    hook.script = [echo]
    delivery = notify(url_of(hook, "/T0"), tmp_path, username="ann", password="hunter2")
    assert delivery.ok is (status == 200)
    assert "got Basic *** *** ***" in delivery.detail and "hunter2" not in delivery.detail


def test_a_long_answer_is_cut(hook, tmp_path):
    hook.script = [(404, "x" * 5000)]
    assert len(notify(url_of(hook), tmp_path).detail) == 300


def test_an_unknown_destination_and_a_missing_secret(tmp_path):
    notices = [Notice("on_start", "webhook", "caht"), Notice("on_start", "webhook", "key")]
    known = {"chat": {"url": "http://a"}, "key": {"url": "secrets/a/b"}}
    misspelt, no_secret = send(notices, BODY, known, tmp_path)
    assert not misspelt.ok and "no notification destination 'caht' here; did you mean 'chat'" in misspelt.detail
    assert not no_secret.ok and "no secret 'secrets/a/b'" in no_secret.detail


@pytest.mark.slow
def test_failing_receivers_do_not_affect_others_and_order_is_kept(hook, tmp_path):
    hook.script = [200]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0)); silent.listen()
        known = {"good": {"url": url_of(hook)}, "silent": {"url": f"http://127.0.0.1:{silent.getsockname()[1]}"}}
        notices = [Notice("on_start", "webhook", to) for to in ("silent", "good", "none", "silent", "good")]
        deliveries = send(notices, BODY, known, tmp_path, seconds=0.4)
    assert [d.to for d in deliveries] == ["silent", "good", "none", "silent", "good"]
    assert [d.ok for d in deliveries] == [False, True, False, False, True]


@pytest.mark.slow
def test_the_number_of_concurrent_messages_is_limited(hook, tmp_path):
    def slowly(request):
        time.sleep(0.05)
        with hook.lock: hook.open -= 1  # before the answer, with which the next one may come
        request.answer(200)
        with hook.lock: hook.open += 1
    hook.script = [slowly]
    known = {"chat": {"url": url_of(hook)}}
    deliveries = send([Notice("on_start", "webhook", "chat")] * 30, BODY, known, tmp_path)
    assert all(d.ok for d in deliveries) and len(hook.requests) == 30
    assert 1 < hook.most <= MAX_CONCURRENT


@pytest.mark.parametrize("body", [{}, {"run": {}}, BODY | {"x": object()}])
@pytest.mark.parametrize("kind", ["email", "webhook", "fax"])
def test_send_never_raises(kind, body, tmp_path):
    [delivery] = send([Notice("on_start", kind, "a")], body, {"a": {}}, tmp_path)
    assert isinstance(delivery.detail, str)


def test_nothing_to_send(tmp_path):
    assert send([], BODY, {}, tmp_path) == []


# --- e-mail

class MailHandler(socketserver.StreamRequestHandler):
    "A mail server that keeps the commands; the server's `script` has its answers by command, each used once."

    def send_line(self, text: str):
        self.wfile.write(f"{text}\r\n".encode())

    def handle(self):
        with self.server.lock: self.server.calls += 1
        try: self.answer_commands(self.server)
        except OSError: pass
        finally: self.connection.close()

    def answer_commands(self, server):
        if self.next_answer("connect", "220 here"): return
        while line := self.rfile.readline().decode().strip():
            server.lines.append(line)
            command = line.split()[0].upper()
            if command == "EHLO":
                secure = isinstance(self.connection, ssl.SSLSocket)
                extensions = ["here"]
                if secure or server.plain_auth: extensions.append("AUTH PLAIN")
                if server.tls and not secure: extensions.append("STARTTLS")
                self.send_line("\r\n".join(f"250-{word}" for word in extensions) + "\r\n250 8BITMIME")
            elif command == "STARTTLS":
                self.send_line("220 go on")
                self.connection = server.tls.wrap_socket(self.connection, server_side=True)
                self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
            elif command == "AUTH": self.next_answer("AUTH", "235 welcome")
            elif command == "DATA":
                self.send_line("354 go on")
                lines = []
                while (data := self.rfile.readline()) not in (b".\r\n", b""): lines.append(data)
                server.mails.append(email.message_from_bytes(b"".join(lines), policy=email.policy.default))
                self.next_answer("DATA", "250 taken")
            elif command == "QUIT": self.send_line("221 bye"); return
            else: self.next_answer(command, "250 fine")

    def next_answer(self, command: str, usual: str) -> bool:  # whether the connection ends
        answers = self.server.script.get(command, [])
        answer = answers.pop(0) if answers else usual
        if answer is None: self.server.stop.wait(20); return True
        self.send_line(answer)
        return command == "connect" and not answer.startswith("220")


class MailServer(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, block_on_close = True, True, False


@pytest.fixture
def smtp_server(monkeypatch):
    server = MailServer(("127.0.0.1", 0), MailHandler)
    server.lines, server.mails, server.script, server.calls = [], [], {}, 0
    server.tls, server.plain_auth, server.lock, server.stop = None, False, threading.Lock(), threading.Event()
    server.address_text = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("MLOPS_SMTP", server.address_text)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.stop.set(); server.shutdown(); server.server_close(); thread.join()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):  # files of a certificate for 127.0.0.1 that signs itself
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
              .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
              .not_valid_after(now + datetime.timedelta(days=1))
              .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
              .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    folder = tmp_path_factory.mktemp("certificate")
    public, private = folder / "public.pem", folder / "private.pem"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                          serialization.NoEncryption()))
    return SimpleNamespace(public=public, private=private)


def send_emails(*addresses: str, tmp_path, body: dict = BODY, seconds: float = 1.0) -> list[Delivery]:
    return send([Notice("on_failure", "email", to) for to in addresses], body, {}, tmp_path, seconds)


def test_an_email_arrives_once_for_each_address(smtp_server, tmp_path):
    deliveries = send_emails("ann@example.org", "bob@example.org", tmp_path=tmp_path)
    assert [(d.to, d.ok, d.detail) for d in deliveries] == [
        (to, True, f"sent by {smtp_server.address_text}") for to in ("ann@example.org", "bob@example.org")]
    assert sorted(mail["To"] for mail in smtp_server.mails) == ["ann@example.org", "bob@example.org"]
    mail = smtp_server.mails[0]
    assert mail["Subject"] == "Task deploy of job train failed" and mail["From"] == "mlops@127.0.0.1"
    assert mail["Date"] and mail["Message-ID"]
    assert "mlops runs show 12" in mail.get_content()
    assert not (tmp_path / "outbox").exists()


def test_the_subject_names_job_and_event():
    subjects = {event: rules.email_text(payload(event, 7, "train", 12))[0] for event in rules.EVENTS}
    assert subjects == {"on_start": "Job train started", "on_success": "Job train succeeded",
                        "on_failure": "Job train failed",
                        "on_duration_warning_threshold_exceeded": "Job train runs longer than expected"}


def test_a_password_is_sent_encrypted(smtp_server, certificate, tmp_path, monkeypatch):
    smtp_server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    smtp_server.tls.load_cert_chain(certificate.public, certificate.private)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    monkeypatch.setenv("MLOPS_SMTP", f"ann%40example.org:hunter2-%25%2F%40%3A@{smtp_server.address_text}")
    [delivery] = send_emails("bob@example.org", tmp_path=tmp_path)
    assert delivery.ok and "hunter2" not in delivery.detail
    assert smtp_server.lines.index("STARTTLS") < next(i for i, line in enumerate(smtp_server.lines) if "AUTH" in line)
    [login] = [line.split()[-1] for line in smtp_server.lines if line.startswith("AUTH PLAIN")]
    assert b64decode(login).decode() == "\0ann@example.org\0hunter2-%/@:"
    assert smtp_server.mails[0]["From"] == "ann@example.org"


def test_an_untrusted_certificate_is_refused(smtp_server, certificate, tmp_path, monkeypatch):
    smtp_server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    smtp_server.tls.load_cert_chain(certificate.public, certificate.private)
    monkeypatch.setenv("MLOPS_SMTP", f"ann:hunter2@{smtp_server.address_text}")
    [delivery] = send_emails("bob@example.org", tmp_path=tmp_path)
    assert not delivery.ok and "certificate" in delivery.detail.lower()
    assert not smtp_server.mails and not any("AUTH" in line for line in smtp_server.lines)


def test_a_password_is_never_sent_unencrypted(smtp_server, tmp_path, monkeypatch):
    smtp_server.plain_auth = True
    monkeypatch.setenv("MLOPS_SMTP", f"ann:hunter2@{smtp_server.address_text}")
    [delivery] = send_emails("bob@example.org", tmp_path=tmp_path)
    assert not delivery.ok and "no encryption" in delivery.detail
    assert not smtp_server.mails and not any("AUTH" in line for line in smtp_server.lines)


def test_a_refused_login_is_not_tried_again_and_its_answer_is_redacted(smtp_server, certificate, tmp_path, monkeypatch):
    smtp_server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    smtp_server.tls.load_cert_chain(certificate.public, certificate.private)
    smtp_server.script = {"AUTH": ["535 hunter2 is wrong"] * 4}
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    monkeypatch.setenv("MLOPS_SMTP", f"ann:hunter2@{smtp_server.address_text}")
    [delivery] = send_emails("bob@example.org", tmp_path=tmp_path)
    assert not delivery.ok and "535" in delivery.detail and "hunter2" not in delivery.detail
    assert smtp_server.calls == 1


@pytest.mark.parametrize("script, ok, calls", [
    ({"DATA": ["451 later"]}, True, 2), ({"DATA": ["451 later"] * 2}, False, 2), ({"DATA": ["554 spam"] * 2}, False, 1),
    ({"MAIL": ["421 busy"]}, True, 2), ({"RCPT": ["550 nobody"] * 2}, False, 1), ({"connect": ["421 busy"]}, True, 2),
    ({"connect": ["554 go away"] * 2}, False, 1), ({"connect": ["not mail"]}, False, 1)])
def test_answers_of_the_mail_server(script, ok, calls, smtp_server, tmp_path):
    smtp_server.script = {command: list(answers) for command, answers in script.items()}
    [delivery] = send_emails("ann@example.org", tmp_path=tmp_path)
    assert (delivery.ok, smtp_server.calls) == (ok, calls), delivery.detail


@pytest.mark.slow
@pytest.mark.parametrize("where", ["connect", "RCPT", "DATA"])
def test_a_mail_server_that_hangs(where, smtp_server, tmp_path):
    smtp_server.script = {where: [None, None]}
    [delivery] = send_emails("ann@example.org", tmp_path=tmp_path, seconds=0.3)
    assert not delivery.ok and delivery.detail == "no answer in time"


def test_a_dead_mail_server(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLOPS_SMTP", f"127.0.0.1:{free.getsockname()[1]}")
        [delivery] = send_emails("ann@example.org", tmp_path=tmp_path)
    assert not delivery.ok and "refused" in delivery.detail


@pytest.mark.parametrize("text", ["mail.example.org", "ann:hunter2@", "ann:hunter2@mail:port", "ann:hunter2@mail:99999",
                                  # pragma: allowlist nextline secret
                                  "smtp://ann:hunter2@mail:25", "ann:hunter2@mail:25/x", "ann:hun/ter2@mail:25", ":25",
                                  "ann:hunter2@[mail:25"])
def test_a_mail_server_that_cannot_be_read(text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_SMTP", text)
    [delivery] = send_emails("ann@example.org", tmp_path=tmp_path)
    assert not delivery.ok and delivery.detail == "MLOPS_SMTP is not of the form user:password@host:port"


def test_the_password_of_the_mail_server_may_be_a_secret_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLOPS_SECRET_MAIL_TOKEN", "hunter2")
    server = mail_server("ann:secrets%2Fmail%2Ftoken@mail:587")
    assert server.password == "hunter2" and "hunter2" not in repr(server)


def test_without_a_mail_server_every_email_is_kept(tmp_path):
    deliveries = send_emails("ann@example.org", "ann@example.org", tmp_path=tmp_path)
    assert all(d.ok and d.detail.startswith("kept in outbox/") for d in deliveries)
    files = sorted((tmp_path / "outbox").iterdir())
    assert [f"outbox/{file.name}" for file in files] == sorted(d.detail.split()[2].rstrip(",") for d in deliveries)
    mail = email.message_from_bytes(files[0].read_bytes(), policy=email.policy.default)
    assert (mail["To"], mail["Subject"]) == ("ann@example.org", "Task deploy of job train failed")


def test_an_outbox_that_cannot_be_written(tmp_path):
    (tmp_path / "outbox").write_text("in the way")
    [delivery] = send_emails("ann@example.org", tmp_path=tmp_path)
    assert not delivery.ok and "FileExistsError" in delivery.detail


def test_no_header_can_be_injected_into_an_email(smtp_server, tmp_path):
    body = payload("on_failure", 7, "train\r\nBcc: eve@example.org", 12)
    good, bad = send_emails("ann@example.org", "ann@example.org\r\nBcc: eve@example.org", tmp_path=tmp_path, body=body)
    assert good.ok and not bad.ok
    [mail] = smtp_server.mails
    assert mail["Bcc"] is None and mail["Subject"] == "Job train Bcc: eve@example.org failed"
    assert [line for line in smtp_server.lines if line.upper().startswith("RCPT")] == ["rcpt TO:<ann@example.org>"]


def test_letters_beyond_ascii(smtp_server, tmp_path):
    [delivery] = send_emails("ann@example.org", tmp_path=tmp_path, body=payload("on_start", 7, "Zürich 東京", 12))
    assert delivery.ok
    assert smtp_server.mails[0]["Subject"] == "Job Zürich 東京 started"
    assert "Zürich 東京" in smtp_server.mails[0].get_content()


# --- cost

def test_modules_of_the_command_line_import_nothing_heavy():
    heavy = ["smtplib", "ssl", "email.message", "urllib.request", "http.client", "rich", "yaml", "databricks"]
    code = ("import sys; import mlops_nb.bundle.references, mlops_nb.bundle.graph, mlops_nb.jobs.notices; "
            f"print(sorted(m for m in {heavy} if m in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

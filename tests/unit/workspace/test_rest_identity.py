"""Login of databricks-sdk and of a browser: a real client, a real server, and requests as browsers send them."""
import time
from hashlib import sha256

import httpx
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import Unauthenticated
from fastapi import FastAPI, Request
from served import served, with_users

from mlops_nb.workspace.rest_identity import identity_router, sign_in_link, sign_in_router

DIGESTS = {sha256(name.encode()).hexdigest(): name for name in ("ana", "ben@example.org")}  # the token is the name


@pytest.fixture(scope="module")
def host():
    digests, app = dict(DIGESTS), FastAPI()
    app.include_router(identity_router())
    app.include_router(sign_in_router(lambda: digests))

    @app.api_route("/page", methods=["GET", "POST"])
    def page(request: Request): return request.state.user

    with served(with_users(app, digests)) as host: yield host


@pytest.fixture
def browser(host):
    with httpx.Client(base_url=host, headers={"Accept": "text/html"}, trust_env=False) as client: yield client


def test_databricks_sdk_logs_in_and_learns_who_and_where_it_is(host, caplog):
    client = WorkspaceClient(host=host, token="ben@example.org")
    me = client.current_user.me()
    assert (me.user_name, me.active, me.emails[0].value) == ("ben@example.org", True, "ben@example.org")
    assert client.get_workspace_id() == 1 and client.config.workspace_id == "1"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(Unauthenticated): WorkspaceClient(host=host, token="eve").current_user.me()


def test_a_browser_signs_in_with_a_token_and_signs_out(browser):
    answer = browser.get("/page")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/page")
    assert "<form" in browser.get(answer.headers["location"]).text
    for wrong in ("eve", "", "x" * 20_000):
        assert browser.post("/login?next=/page", data={"token": wrong}).status_code == 401
    assert not browser.cookies
    answer = browser.post("/login?next=/page", data={"token": "ana"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/page")
    assert browser.get("/page").text == '"ana"'
    browser.post("/logout", headers={"Sec-Fetch-Site": "same-origin"})
    assert not browser.cookies and browser.get("/page").status_code == 303


@pytest.mark.parametrize("headers, method, status", [
    ({"Sec-Fetch-Site": "same-origin"}, "POST", 200), ({"Sec-Fetch-Site": "none"}, "GET", 200),
    ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "document"}, "GET", 200),  # a link on another port
    ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "document"}, "POST", 303),  # a form on another port
    ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "empty"}, "GET", 401),  # a script on another port
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, "GET", 401),
    ({"Origin": "http://127.0.0.1:1"}, "POST", 303), ({"Origin": "HOST"}, "POST", 200),
    ({"Authorization": "Bearer eve"}, "GET", 303)])
def test_a_session_counts_for_pages_of_this_address_only(host, browser, headers, method, status):
    browser.post("/login", data={"token": "ana"})
    headers = {name: host if value == "HOST" else value for name, value in headers.items()}
    assert browser.request(method, "/page", headers=headers).status_code == status


def test_a_link_signs_in_once_it_is_opened_in_time(host, browser, monkeypatch):
    link = sign_in_link(host, "ben@example.org", "/page")
    answer = browser.get(link)
    assert answer.headers["location"] == "/page" and browser.get("/page").text == '"ben@example.org"'
    browser.cookies.clear()
    now = time.time()
    monkeypatch.setattr("mlops_nb.workspace.rest_identity.time.time", lambda: now + 16 * 60)
    assert browser.get(link).status_code == 401 and not browser.cookies
    forged = link.replace("ticket=", "ticket=9")
    assert browser.get(forged).status_code == 401


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"}])
def test_a_page_of_another_address_signs_nobody_in_or_out(host, browser, headers):
    assert browser.post("/login", data={"token": "ana"}, headers=headers).status_code == 401
    assert browser.get(sign_in_link(host, "ana"), headers=headers).status_code == 401 and not browser.cookies
    browser.post("/login", data={"token": "ana"}, headers={"Origin": host})
    assert browser.post("/logout", headers=headers).status_code == 401 and browser.cookies


def test_no_link_leads_to_another_server(host, browser):
    for place in ("//evil.example/", "https://evil.example", "/\\evil.example"):
        answer = browser.post("/login", params={"next": place}, data={"token": "ana"})
        assert answer.headers["location"] == "/mlflow/#/models"
        assert "evil" not in browser.get("/login", params={"next": place}).text


def test_a_session_ends_with_its_token_and_after_its_time(monkeypatch):
    from mlops_nb.workspace.rest_identity import SESSION_COOKIE, SESSION_SECONDS, signed, user_of_request
    digest = next(iter(DIGESTS))
    cookie = {"cookie": f"{SESSION_COOKIE}={signed('session', digest, int(time.time()) + SESSION_SECONDS)}"}
    assert user_of_request(cookie, DIGESTS) == "ana"
    assert user_of_request(cookie, {name: user for name, user in DIGESTS.items() if user != "ana"}) is None
    later = time.time() + SESSION_SECONDS + 1
    monkeypatch.setattr("mlops_nb.workspace.rest_identity.time.time", lambda: later)
    assert user_of_request(cookie, DIGESTS) is None

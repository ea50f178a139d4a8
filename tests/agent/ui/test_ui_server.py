"""The page's server over real sockets: what it answers, to whom, and that it lets go of its port."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cluster.model import Namespace, NetworkPolicy, Node, Pod
from agent.cluster.store import snapshot_of
from agent.ui.guard import HEADERS
from agent.ui.live import Live
from agent.ui.server import LARGEST_BODY, PageServer
from tests.agent.explain.test_matrix import ONLY_WEB, SHOP, world_of
from tests.ui.told import Told, serving

STATIC = Path(__file__).parents[3] / "agent" / "ui" / "static"
HOSTILE = '<img src=x onerror="alert(1)">'


def told() -> Told:
    objects = (
        Node("node1"),
        Namespace("default"),
        Pod("default", "web", node="node1", phase="Running", ready=True, labels={"app": HOSTILE}),
        NetworkPolicy("default", "deny"),
    )
    return Told(snapshot_of(objects), {"node1": {}}, where=HOSTILE)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with serving(told()) as made:
        yield made


def asked(
    server: PageServer,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    token: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    said = {"Authorization": f"Bearer {server.token if token is None else token}", **(headers or {})}
    try:
        connection.request(method, path, body=body, headers=said)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_it_listens_on_the_loopback_alone(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_every_answer_carries_the_headers_that_protect_it(server: PageServer) -> None:
    for path, method in (
        ("/", "GET"),
        ("/app.js", "GET"),
        ("/api/state", "GET"),
        ("/none", "GET"),
        ("/", "PUT"),
    ):
        answer, _ = asked(server, path, method=method)
        assert {name: answer.headers[name] for name in HEADERS} == dict(HEADERS), (path, method)
        assert answer.headers["Access-Control-Allow-Origin"] is None
        assert "Python" not in (answer.headers["Server"] or "")


def test_each_start_has_another_token(server: PageServer) -> None:
    with serving(told()) as other:
        assert other.token != server.token
        assert len(other.token) >= 43  # 256 bits


def test_without_the_token_it_says_nothing_of_the_cluster(server: PageServer) -> None:
    for path in ("/api/state", "/api/why", "/api/policy", "/api/matrix", "/api/none"):
        answer, content = asked(server, path, token="other")
        assert answer.status == 401
        assert set(json.loads(content)) == {"error"}
    answer, _ = asked(server, "/api/plan", method="POST", body=b"{}", token="other")
    assert answer.status == 401


def test_a_name_that_was_rebound_to_it_is_refused(server: PageServer) -> None:
    for path in ("/", "/api/state"):
        answer, _ = asked(server, path, headers={"Host": f"evil.example:{server.server_port}"})
        assert answer.status == 421


def test_no_path_leads_out_of_the_page(server: PageServer) -> None:
    for path in (
        "/../server.py",
        "/%2e%2e/server.py",
        "//etc/passwd",
        "/vendor/../../server.py",
        "/static/app.js",
    ):
        answer, content = asked(server, path)
        assert (answer.status, content) == (404, b"404 Not Found\n")


def test_errors_repeat_nothing_of_the_request(server: PageServer) -> None:
    answer, content = asked(server, "/<script>alert(1)</script>".replace(">", "%3E"))
    assert answer.status == 404
    assert b"script" not in content
    answer, content = asked(server, "/", method="BREW")
    assert answer.status == 501
    assert b"BREW" not in content


def test_names_go_out_as_json_and_not_as_a_page(server: PageServer) -> None:
    answer, content = asked(server, "/api/state")
    assert answer.headers["Content-Type"] == "application/json"
    state = json.loads(content)
    assert state["where"] == HOSTILE
    assert state["cluster"]["pods"][0]["labels"] == {"app": HOSTILE}


def test_a_state_that_is_known_is_not_said_again(server: PageServer) -> None:
    _, content = asked(server, "/api/state")
    version = json.loads(content)["version"]
    _, content = asked(server, f"/api/state?known={version}")
    assert json.loads(content) == {"version": version}


def test_a_question_without_an_answer_says_why(server: PageServer) -> None:
    cases = {
        "/api/why?source=web&target=": "target: a Pod, workload, Service, node or address is missing",
        "/api/why?source=web&target=nobody": "'nobody' is no Pod",
        "/api/why?source=web&target=192.0.2.1&port=99999": "port 99999 is not from 1 to 65535",
        "/api/why?source=web&target=192.0.2.1&port=80&protocol=icmp": "not icmp",
        "/api/policy?namespace=default&name=none": "there is no NetworkPolicy default/none",
    }
    for path, said in cases.items():
        answer, content = asked(server, path)
        assert answer.status == 422, path
        assert said in json.loads(content)["error"]


def test_a_question_about_a_workload_is_asked_of_each_of_its_pods() -> None:
    cluster = Told(world_of([*SHOP, ONLY_WEB]).snapshot)
    with serving(cluster) as made:
        _, content = asked(made, "/api/why?source=deploy/shop/web&target=shop/tool&port=80")
        answer = json.loads(content)
    assert answer["pairs"]["text"] == "the same for each of the 2 Pods of Deployment shop/web"
    assert (answer["source"], answer["allowed"]) == ("Pod shop/web-5f7-a", True)


def test_a_post_is_json_of_texts_and_not_endless(server: PageServer) -> None:
    as_json = {"Content-Type": "application/json"}
    cases: list[tuple[bytes, dict[str, str], int]] = [
        (b'{"manifest": "x"}', {"Content-Type": "text/plain"}, 415),
        (b"no json", as_json, 400),
        (b"[]", as_json, 400),
        (b'{"manifest": 1}', as_json, 400),
        (b"\xff", as_json, 400),
        (b"{}", {**as_json, "Content-Length": str(LARGEST_BODY + 1)}, 413),
        (b"{}", {**as_json, "Content-Length": "-1"}, 413),
        (b'{"manifest": "kind: ["}', as_json, 422),
    ]
    for body, headers, status in cases:
        answer, _ = asked(server, "/api/plan", method="POST", body=body, headers=headers)
        assert answer.status == status, (body, headers)


def test_what_fails_inside_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    cluster = told()
    cluster.answers["node1"]["flows"] = {"flows": [{}], "total": 1}
    with serving(cluster) as made:
        answer, content = asked(made, "/api/state")
    assert answer.status == 500
    assert json.loads(content) == {"error": "podwall ui failed at this: its log says how"}
    assert "event=ui-failed path='/api/state'" in caplog.text


def test_an_agent_that_is_silent_hides_nothing_else() -> None:
    cluster = told()
    cluster.answers["node2"] = {"flows": "it is not there", "denials": "it is not there"}
    with serving(cluster) as made:
        state = json.loads(asked(made, "/api/state")[1])
    assert state["silent"] == {"node2": "it is not there"}
    assert state["rows"] == []


def test_what_could_not_be_told_of_the_traffic_is_said() -> None:
    cluster = told()
    cluster.answers["node1"] = {
        "flows": {"flows": [], "total": 3},
        "denials": {"denials": [], "total": 0, "lost": 0, "not_logged": 7},
    }
    with serving(cluster) as made:
        assert json.loads(asked(made, "/api/state")[1])["problems"] == [
            "node1 has 3 more flows than it could tell",
            "node1 denied more packets than are shown: more came at once than are logged",
        ]


def test_problems_of_manifests_are_shown() -> None:
    cluster = told()
    cluster.problems = ("a.yaml, document 1: cannot be read",)
    with serving(cluster) as made:
        assert json.loads(asked(made, "/api/state")[1])["problems"] == list(cluster.problems)


def test_the_port_is_free_when_it_has_ended() -> None:
    with serving(told()) as made:
        port = made.server_port
        asked(made, "/api/state")
        with pytest.raises(OSError, match="in use"):
            PageServer(Live(told()), port)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in STATIC.glob("*.js")}


def test_the_page_makes_no_markup_of_texts() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    )
    for name, text in sources().items():
        assert not forbidden.search(text), name
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|<script(?![^>]*\ssrc=)|<style|javascript:", page)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name, text in {**sources(), "index.html": (STATIC / "index.html").read_text()}.items():
        found: Any = [url for url in re.findall(r"https?://[^\"' )]+", text) if "www.w3.org" not in url]
        assert not found, name


def test_what_is_of_others_is_as_it_was_published() -> None:
    import hashlib

    said = (STATIC / "vendor" / "THIRD_PARTY.txt").read_text()
    files = [path for path in (STATIC / "vendor").iterdir() if path.suffix == ".js"]
    assert files
    for path in files:
        assert path.name in said
        assert hashlib.sha256(path.read_bytes()).hexdigest() in said
        assert (STATIC / "vendor" / f"{path.name.split('.')[0]}.LICENSE.txt").is_file()

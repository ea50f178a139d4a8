"""What a node's agent finds out about a real API server: its rights, its clock, whether it answers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli.install import Api
from agent.cli.manifest import INSTALL, objects, packaged
from agent.config import Config
from agent.doctor import Known, facts

TOKENS = "/api/v1/namespaces/kube-system/serviceaccounts/podwall/token"


@pytest.fixture
def installed(cluster: Any) -> Any:
    api = Api(cluster.client())
    for each in objects(packaged(INSTALL)):
        api.apply(each)
    yield api
    for each in objects(packaged(INSTALL)):
        api.delete(each)
    api.client.close()


def look(cluster: Any, token: str, home: Path) -> Any:
    """What an agent with this token says of the API server."""
    ca = base64.b64encode((cluster.directory / "ca.crt").read_bytes()).decode()
    server = {"server": cluster.a.url, "certificate-authority-data": ca}
    kubeconfig = home / "kubeconfig"
    content = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": server}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    kubeconfig.write_text(yaml.safe_dump(content))
    return facts(Known(Config(node_name="node1", kubeconfig=kubeconfig)))["api"]


def token_of(api: Api) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(api.client.write("POST", TOKENS, request)["status"]["token"])


def test_the_agent_may_do_what_it_needs_until_a_right_is_taken(
    cluster: Any, installed: Api, tmp_path: Path
) -> None:
    token = token_of(installed)
    found = look(cluster, token, tmp_path)
    assert (found["error"], found["forbidden"]) == ("", [])
    assert abs(found["skew"]) < 2
    assert 0 < found["seconds"] < 10

    role = next(each for each in objects(packaged(INSTALL)) if each["kind"] == "ClusterRole")
    role["rules"] = [rule for rule in role["rules"] if "endpointslices" not in rule["resources"]]
    installed.apply(role)
    forbidden = [f"{verb} endpointslices.discovery.k8s.io" for verb in ("get", "list", "watch")]
    assert look(cluster, token, tmp_path)["forbidden"] == forbidden


def test_a_token_that_is_none(cluster: Any, tmp_path: Path) -> None:
    found = look(cluster, "nonsense", tmp_path)
    assert "401" in found["error"]

"""The packaged manifests, applied to a real API server by `podwall install`'s own hands."""

from __future__ import annotations

from typing import Any

import pytest

from agent.cli.install import Api, shown
from agent.cli.manifest import INSTALL, UNINSTALL, objects, packaged
from agent.cluster.errors import Refused


@pytest.fixture
def api(cluster: Any) -> Any:
    made = Api(cluster.client())
    yield made
    for each in (*objects(packaged(INSTALL)), *objects(packaged(UNINSTALL))):
        made.delete(each)
    made.client.close()


def test_applied_twice_and_deleted_twice(api: Api) -> None:
    wanted = [*objects(packaged(INSTALL)), *objects(packaged(UNINSTALL))]
    assert {shown(each): api.apply(each) for each in wanted} == {shown(each): "created" for each in wanted}
    assert {api.apply(each) for each in wanted} == {"unchanged"}
    assert {api.delete(each) for each in wanted} == {"deleted"}
    assert {api.delete(each) for each in wanted} == {"was gone"}


def test_what_differs_alone_is_configured(api: Api) -> None:
    wanted = objects(packaged(INSTALL))
    for each in wanted:
        api.apply(each)
    own = next(each for each in wanted if each["kind"] == "ConfigMap")
    own["data"]["config.yaml"] = "mtu: 1400\n"
    assert [shown(each) for each in wanted if api.apply(each) == "configured"] == ["configmap/podwall"]
    assert api.get(own)["data"] == {"config.yaml": "mtu: 1400\n"}


def test_what_another_tool_applied_is_taken_over(api: Api) -> None:
    """As `kubectl apply` leaves it: with other values and fields of another owner."""
    daemon_set = next(each for each in objects(packaged(INSTALL)) if each["kind"] == "DaemonSet")
    older = {**daemon_set, "spec": {**daemon_set["spec"], "minReadySeconds": 7}}
    older["spec"]["updateStrategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}
    api.client.write("POST", "/apis/apps/v1/namespaces/kube-system/daemonsets?fieldManager=kubectl", older)

    assert api.apply(daemon_set) == "configured"

    found = api.get(daemon_set)["spec"]
    assert found["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    assert found["minReadySeconds"] == 7


def test_what_the_server_refuses_is_said(api: Api) -> None:
    daemon_set = next(each for each in objects(packaged(INSTALL)) if each["kind"] == "DaemonSet")
    daemon_set["spec"]["template"]["metadata"]["labels"] = {"other": "labels"}
    with pytest.raises(Refused, match="does not match template `labels`"):
        api.apply(daemon_set)

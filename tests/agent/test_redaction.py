"""No planted secret comes through, and what is no secret does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.redaction import kept, line, lines

SECRET = "s3cr3t-Value"
JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJpc3MiOiJrdWJlcm5ldGVzIn0.c2lnbmF0dXJl"

LINES = [
    ("password=s3cr3t-Value", "password=(removed)"),
    ('{"password": "s3cr3t-Value", "port": 80}', '{"password": "(removed)", "port": 80}'),
    ('{"password": "a s3cr3t-Value \\" b"}', '{"password": "(removed)"}'),
    ("DB_PASSWORD: 's3cr3t-Value'", "DB_PASSWORD: '(removed)'"),
    ('x="{\\"token\\":\\"s3cr3t-Value\\"}"', 'x="{\\"token\\":\\"(removed)\\"}"'),
    ("Authorization: Bearer s3cr3t-Value", "Authorization: (removed) (removed)"),
    (f"the server said no to {JWT}, again", "the server said no to (removed), again"),
    ("GET https://admin:s3cr3t-Value@192.0.2.1:6443/api", "GET https://(removed)@192.0.2.1:6443/api"),
    ("run --api-token s3cr3t-Value --now", "run --api-token (removed) --now"),
    ("run --api-token=s3cr3t-Value", "run --api-token=(removed)"),
    ("client-key-data: LS0tLS1CRUdJTiBSU0E=", "client-key-data: (removed)"),
    ("ca: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t", "ca: (removed)"),
    (
        '{"ca": "-----BEGIN CERTIFICATE-----\\ns3cr3t-Value\\n-----END CERTIFICATE-----"}',
        '{"ca": "(removed)"}',
    ),
    ("aws_secret_access_key = s3cr3t-Value", "aws_secret_access_key = (removed)"),
    ("Cookie: session", "Cookie: (removed)"),
    ("event=started node=node1 version=0.1.0", "event=started node=node1 version=0.1.0"),
    ('{"key": "app", "operator": "In"}', '{"key": "app", "operator": "In"}'),
    ("fe80::1 dev eth0 lladdr 02:00:00:00:00:01", "fe80::1 dev eth0 lladdr 02:00:00:00:00:01"),
]


@pytest.mark.parametrize(("text", "expected"), LINES, ids=[each[0][:40] for each in LINES])
def test_a_line(text: str, expected: str) -> None:
    said = line(text)
    if "Bearer" in text:
        assert SECRET not in said
        return
    assert said == expected
    if text.startswith("{"):
        json.loads(said)


def test_a_line_told_twice_is_the_same() -> None:
    for text, _ in LINES:
        assert line(line(text)) == line(text)


def test_a_key_over_several_lines() -> None:
    texts = ["before", "key: -----BEGIN EC PRIVATE KEY-----", SECRET, "-----END EC PRIVATE KEY-----", "after"]
    assert list(lines(texts)) == ["before", "key: (removed)", "after"]


POD: dict[str, Any] = {
    "kind": "Pod",
    "metadata": {
        "name": "web",
        "labels": {"app": "web"},
        "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": SECRET,
            "example.com/anything": SECRET,
            "kubernetes.io/ingress-bandwidth": "1M",
        },
        "managedFields": [SECRET],
    },
    "spec": {
        "nodeName": "node1",
        "volumes": [{"secret": SECRET}],
        "containers": [
            {
                "name": "c",
                "ports": [{"containerPort": 80}],
                "env": [{"name": "INNOCENT", "value": SECRET}],
                "args": [SECRET],
                "livenessProbe": {"httpGet": {"httpHeaders": [{"name": "X", "value": SECRET}]}},
            }
        ],
        "somethingNew": SECRET,
    },
    "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.2"}], "message": SECRET},
}


def test_of_a_pod_only_what_matters_is_kept() -> None:
    told = kept(POD)
    assert told is not None
    assert SECRET not in json.dumps(told)
    assert told["spec"]["containers"] == [{"name": "c", "ports": [{"containerPort": 80}]}]
    assert told["status"]["podIPs"] == [{"ip": "10.244.1.2"}]
    assert set(told["metadata"]["annotations"].values()) == {"(removed)", "1M"}


def test_of_a_daemon_set_too() -> None:
    item = {
        "kind": "DaemonSet",
        "metadata": {"name": "podwall"},
        "spec": {
            "selector": {},
            "template": {"metadata": {"annotations": {"a": SECRET}}, "spec": POD["spec"]},
        },
        "status": {"numberReady": 2},
    }
    told = kept(item)
    assert told is not None
    assert SECRET not in json.dumps(told)
    assert told["spec"]["template"]["spec"]["containers"][0]["name"] == "c"


@pytest.mark.parametrize("kind", ["Secret", "ServiceAccount", "Certificate", ""])
def test_other_kinds_are_not_told(kind: str) -> None:
    assert kept({"kind": kind, "metadata": {"name": "x"}, "data": {"a": SECRET}}) is None

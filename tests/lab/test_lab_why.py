"""`podwall why` on connections that are broken in the lab: it names the cause that the client meets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests
from lab.world import Lab

BROKEN = Path(__file__).parents[2] / "examples" / "troubleshooting"

CASES = [
    (
        "empty",
        "refused",
        "denied: Service broken/empty has no selector, and no EndpointSlice has an address at its port 80",
    ),
    (
        "misspelt",
        "refused",
        "denied: no Pod of namespace broken has the labels app=wbe that Service broken/misspelt selects; "
        "the nearest is Pod broken/client with app=client",
    ),
    (
        "wrong-name",
        "refused",
        "denied: Service broken/wrong-name sends port 80 to targetPort 'https', "
        "a name that no container of its Pods declares (they declare http 8080)",
    ),
    (
        "wrong-number",
        "refused",
        "doubtful: Service broken/wrong-number sends port 80 to targetPort 8081, which no container of its "
        "Pods declares (they declare http 8080): unless something listens there unsaid, the Pod refuses",
    ),
    (
        "guarded",
        "silent",
        "denied: ingress policy broken/friends-only of Pod broken/guarded does not let Pod broken/client in "
        "on TCP 8080",
    ),
]


@pytest.fixture(scope="module")
def broken() -> Iterator[Lab]:
    with Lab(nodes=2, given=manifests.read([BROKEN])) as made:
        yield made


def asked(*arguments: str) -> Any:
    done = CliRunner().invoke(main, ["why", "--lab", "-n", "broken", "-o", "json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize(("service", "seen", "sentence"), CASES, ids=[case[0] for case in CASES])
def test_the_first_line_names_what_is_wrong(broken: Lab, service: str, seen: str, sentence: str) -> None:
    address = broken.service(f"broken/{service}").address(4)

    assert broken.connect("broken/client", address, 80) == seen
    answer = asked("client", f"svc/{service}:80")
    assert (answer["allowed"], answer["sentence"]) == (False, sentence)


def test_the_change_it_offers_opens_the_way(broken: Lab) -> None:
    address = broken.service("broken/guarded").address(4)
    (change,) = asked("client", "svc/guarded:80")["changes"]
    assert (change["policy"], change["path"]) == ("broken/friends-only", ["spec", "ingress", 0, "from", "-"])

    policy = next(item for item in manifests.read([BROKEN]) if item["kind"] == "NetworkPolicy")
    policy["spec"]["ingress"][0]["from"].append(change["add"])
    broken.apply([policy])

    assert asked("client", "svc/guarded:80")["allowed"]
    assert broken.connect("broken/client", address, 80) == "connected"


def test_a_denial_can_be_the_exit_status(broken: Lab) -> None:
    arguments = ["why", "--lab", "-n", "broken", "client", "svc/empty:80"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert CliRunner().invoke(main, [*arguments, "--exit-code"]).exit_code == 1

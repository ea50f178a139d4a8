"""Files of expectations: what is written holds, what does not is named, and what is no file is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from agent.cluster.model import Pod
from agent.cluster.store import snapshot_of
from agent.explain.ends import takes_part
from agent.explain.expect import Checked, ExpectationError, checked, expectations, written
from agent.explain.groups import grouped
from agent.explain.matrix import columns_of, matrix
from agent.explain.seen import Seen, attempt
from agent.explain.world import World
from lab.services import allocate, slices
from tests.agent.compile.test_policy_property import SEEDS, SETTINGS, Chance
from tests.agent.compile.worlds import decoded, namespace, pod, policy

WEB = pod("shop/web", "10.244.0.2", "fd00::2", ports=[("http", 80)], app="web", tier="a")
API = pod("shop/api", "10.244.0.3", "fd00::3", ports=[("http", 8080), ("dns", 53, "UDP")], app="api")
JOB = pod("data/job", "10.244.0.4", "fd00::4", app="job")
ONLY_WEB = policy(
    "shop/api",
    podSelector={"matchLabels": {"app": "api"}},
    ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}],
)


def world_of(*objects: dict[str, Any]) -> World:
    return World(snapshot_of(decoded(of) for of in objects))


def shop() -> World:
    return world_of(namespace("shop"), namespace("data"), WEB, API, JOB, ONLY_WEB)


def check(text: str, world: World | None = None) -> Checked:
    (one,) = expectations(text)
    return checked(world or shop(), one, "shop")


HOLDS = [
    "{from: web, to: api:8080, allowed: true}",
    "{from: shop/web, to: shop/api:http, allowed: true}",
    "{from: data/job, to: api:8080, allowed: false}",
    "{from: data/job, to: api, allowed: false}",
    "{from: web, to: api:53, protocol: udp, allowed: false}",
    "{from: {selector: 'app in (web)'}, to: {selector: app=api, port: 8080}, allowed: true}",
    "{from: {namespace: '*', selector: '!tier'}, to: {namespace: shop, selector: app=api}, allowed: false}",
    "{from: api, to: 203.0.113.10:443, allowed: true}",
    "{from: api, to: '[2001:db8::1]:443', allowed: true}",
]


@pytest.mark.parametrize("text", HOLDS)
def test_an_expectation_that_holds_does_not_hold_the_other_way(text: str) -> None:
    done = check(f"- {text}")
    assert (done.problem, done.broken({})) == ("", ())

    other = text.replace("allowed: true", "ALLOWED").replace("allowed: false", "allowed: true")
    turned = check(f"- {other.replace('ALLOWED', 'allowed: false')}")
    assert turned.problem == ""
    assert len(turned.broken({})) == sum(len(cell) for _, _, cell in turned.pairs.cells()) > 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{from: wbe, to: api:80, allowed: true}", "'wbe' is no Pod or workload with Pods in namespace shop"),
        ("{from: web, to: api:https, allowed: false}", "'api:https' has no port https"),
        ("{from: {selector: app=wbe}, to: api, allowed: false}", "no Pod of namespace shop has app=wbe"),
        ("{from: {namespace: '*', selector: a}, to: api, allowed: false}", "no Pod of any namespace has a"),
        (
            "{from: web, to: {selector: app=api, port: x}, allowed: false}",
            "none of [app=api]:x has or declares such a port",
        ),
        (
            "{from: web, to: web:80, allowed: false}",
            "they are one Pod, or have no address of a common family",
        ),
    ],
)
def test_an_expectation_about_nobody_does_not_hold(text: str, problem: str) -> None:
    assert check(f"- {text}").problem == problem


def test_what_was_seen_counts_as_well() -> None:
    done = check("- {from: web, to: api:8080, allowed: true}")
    (source, column, cell) = next(done.pairs.cells())
    first, second = cell
    seen = {attempt(source, column, first): Seen("silent"), attempt(source, column, second): Seen("refused")}
    assert done.broken(seen) == ((source, column, first),)


@pytest.mark.parametrize("allowed", ["true", "false"])
def test_a_service_that_sometimes_answers_is_neither(allowed: str) -> None:
    """Of two endpoints one admits the client; see `policy-part` of `why`."""
    ports = [{"port": 80, "targetPort": 80, "name": "http"}]
    one, two = (pod(f"shop/{name}", ip, ports=[("http", 80)], app="web", name=name)
                for name, ip in (("one", "10.244.0.2"), ("two", "10.244.0.5")))  # fmt: skip
    ready = [{**of, "status": {**of["status"], "conditions": [{"type": "Ready", "status": "True"}]}}
             for of in (one, two)]  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "web", "uid": "u"},
        "spec": {"selector": {"app": "web"}, "ports": ports},
    }  # fmt: skip
    services = allocate([service], {})
    only_one = policy("shop/two", podSelector={"matchLabels": {"name": "two"}})
    world = world_of(
        namespace("shop"), *ready, API, only_one, *services, *slices(services, ready, []).values()
    )

    done = check(f"- {{from: api, to: 'svc/web:80', allowed: {allowed}}}", world)
    assert [way.cause for _, _, way in done.broken({})] == ["policy-part"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is no list: each expectation begins with `- from:`"),
        ("from: a", "it is no list: each expectation begins with `- from:`"),
        ("[]", "it expects nothing"),
        ("- {from: a", "while parsing a flow mapping"),
        ("- a", "line 1: it has from, to, allowed and perhaps protocol, and nothing else"),
        ("- {from: a, to: b, allow: true}", "line 1: it has from, to, allowed and perhaps protocol"),
        ("# why\n- {from: a, to: b, allowed: 'yes'}", "line 2: allowed is true or false, not 'yes'"),
        (
            "- {from: a, to: b, allowed: true, protocol: icmp}",
            "line 1: protocol is TCP, UDP, SCTP, not 'icmp'",
        ),
        ("- {from: {}, to: b, allowed: true}", "line 1: from is a name, or has namespace, selector and port"),
        ("- {from: a, to: {labels: b}, allowed: true}", "line 1: to is a name, or has namespace"),
        (
            "- {from: a, to: {port: 0}, allowed: true}",
            "line 1: to.port is a number from 1 to 65535 or a name",
        ),
        ("- {from: {port: 1}, to: b, allowed: true}", "line 1: from has no port"),
        ("- {from: {selector: a b}, to: b, allowed: true}", "line 1: from.selector: 'a b' is no label"),
        ("- {from: !!python/object:os.system x, to: b, allowed: true}", "could not determine a constructor"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_no_file_of_expectations_is_refused(text: str, said: str) -> None:
    with pytest.raises(ExpectationError) as refused:
        expectations(text)
    assert said in str(refused.value)


def states(world: World) -> str:
    pods = [pod for _, pod in sorted(world.snapshot.pods.items()) if takes_part(pod)]
    decided = matrix(world, pods, columns_of(pods))
    return written(world, decided, grouped(decided, ports_apart=True))


def test_what_is_written() -> None:
    assert states(shop()) == (
        "# Who reaches whom; check it with: podwall matrix --expect FILE\n"
        "- from: data/job\n  to: shop/api:53\n  protocol: UDP\n  allowed: false\n"
        "- from: data/job\n  to: shop/api:8080\n  allowed: false\n"
        "- from: data/job\n  to: shop/web:80\n  allowed: true\n"
        "- from: shop/api\n  to: shop/web:80\n  allowed: true\n"
        "- from: shop/web\n  to: shop/api:53\n  protocol: UDP\n  allowed: false\n"
        "- from: shop/web\n  to: shop/api:8080\n  allowed: true\n"
    )


@settings(SETTINGS, max_examples=60)
@given(SEEDS)
def test_what_is_written_holds(seed: int) -> None:
    world = world_of(*Chance(seed).cluster())
    text = states(world)
    for each in expectations(text) if "\n- " in text else ():
        done = checked(world, each, "default")
        assert (done.problem, done.broken({})) == ("", ()), each


def test_hostile_names_come_back_or_are_left_out() -> None:
    """Only manifests can have such names: the API server refuses them."""
    names = ("a: b", "- x", "c\n- from: evil", "d:e", "*", "\x1b[2J", "#", "é", "'")
    pods = [
        Pod("shop", name, ips=decoded(pod("shop/x", f"10.244.0.{at}")).ips, ports=decoded(API).ports)  # type: ignore[union-attr]
        for at, name in enumerate(names, 2)
    ]
    world = World(snapshot_of([decoded(namespace("shop")), *pods]))
    text = states(world)

    assert "\x1b" not in text
    read = expectations(text)
    assert {each.source for each in read} >= {"shop/a: b", "shop/- x", "shop/c\n- from: evil", "shop/é"}
    for each in read:
        done = checked(world, each, "default")
        assert (done.problem, done.broken({})) == ("", ())

"""One question about workloads: whom their names mean, which pairs are asked, what is said of them."""

from __future__ import annotations

from typing import Any

import pytest

from agent.explain.ends import ends_named
from agent.explain.pairs import MOST_PAIRS, Pairs, Questions, each_asked, one_of, taken_in_words
from agent.explain.question import CannotAnswerError, Question
from agent.explain.world import UnknownNameError, World, title
from tests.agent.compile.worlds import namespace, pod, policy
from tests.agent.explain.test_matrix import owned, world_of
from tests.agent.explain.test_why import service

API = service("shop/api")


def web(name: str, address: str, **labels: str) -> dict[str, Any]:
    labels = {"app": "web", "pod-template-hash": "5f7", **labels}
    return owned(f"shop/web-5f7-{name}", address, "ReplicaSet", "web-5f7", **labels)


SHOP = [
    namespace("shop"),
    namespace("other"),
    namespace("deploy"),
    web("a", "10.244.0.2"),
    web("b", "10.244.0.3"),
    web("c", "10.244.0.4", debug="yes"),
    owned("shop/api-0", "10.244.0.5", "StatefulSet", "api", app="api"),
    owned("shop/api-1", "10.244.0.6", "StatefulSet", "api", app="api"),
    owned("shop/one-0", "10.244.0.7", "StatefulSet", "one", app="one"),
    owned("shop/late-x", "", "ReplicaSet", "late"),
    owned("shop/both-1", "10.244.0.8", "DaemonSet", "both"),
    owned("shop/both-2", "10.244.0.9", "Job", "both"),
    owned("other/far-0", "10.244.0.10", "StatefulSet", "far"),
    pod("shop/one", "10.244.0.11", app="lone"),
    pod("deploy/tool", "10.244.0.12"),
    {**API, "spec": {**API["spec"], "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]}},
]
NOT_DEBUG = policy(
    "shop/not-debug",
    podSelector={"matchLabels": {"debug": "yes"}},
    policyTypes=["Egress", "Ingress"],
)


def questions(world: World, source: str, target: str) -> Questions:
    ends = ends_named(world, source, "shop"), ends_named(world, target, "shop")
    return Questions(*ends, Question(source=ends[0].ends[0], target=ends[1].ends[0], port=8080))


def ask(source: str, target: str, *more: dict[str, Any]) -> Pairs:
    world = world_of([*SHOP, *more])
    return each_asked(world, questions(world, source, target))


@pytest.mark.parametrize(
    ("name", "found", "workload"),
    [
        ("web", "web-5f7-a web-5f7-b web-5f7-c", "Deployment shop/web"),
        ("shop/web", "web-5f7-a web-5f7-b web-5f7-c", "Deployment shop/web"),
        ("deploy/web", "web-5f7-a web-5f7-b web-5f7-c", "Deployment shop/web"),
        ("Deployments/shop/web", "web-5f7-a web-5f7-b web-5f7-c", "Deployment shop/web"),
        ("rs/web-5f7", "web-5f7-a web-5f7-b web-5f7-c", "ReplicaSet shop/web-5f7"),
        ("api", "api", "None"),
        ("sts/api", "api-0 api-1", "StatefulSet shop/api"),
        ("one", "one", "None"),
        ("sts/one", "one-0", "StatefulSet shop/one"),
        ("job/both", "both-2", "Job shop/both"),
        ("sts/other/far", "far-0", "StatefulSet other/far"),
        ("web-5f7-a", "web-5f7-a", "None"),
        ("deploy/tool", "tool", "None"),
    ],
)
def test_whom_a_name_means(name: str, found: str, workload: str) -> None:
    """A Pod, a Service, or a namespace called deploy, comes before a workload."""
    meant = ends_named(world_of(SHOP), name, "shop")
    assert " ".join(title(each).rpartition("/")[2] for each in meant.ends) == found
    assert str(meant.workload) == workload


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wbe", "'wbe' is no Pod, Service or node in namespace shop, nor an address"),
        ("deploy/wbe", "'deploy/wbe' is no Deployment with Pods in namespace shop"),
        ("sts/web", "'sts/web' is no StatefulSet with Pods in namespace shop"),
        ("deploy/gone/web", "'deploy/gone/web': there is no namespace gone"),
        ("rs/late", "no Pod of ReplicaSet shop/late can take part: 1 without an address yet"),
        ("late", "no Pod of ReplicaSet shop/late can take part: 1 without an address yet"),
        ("sts/far", "'sts/far' has no Pods in namespace shop, but there is StatefulSet other/far"),
        ("deploy/api", "'deploy/api' is no Pod or workload; for the Service write svc/shop/api"),
        ("both", "'both' may be DaemonSet both, Job both: put deploy/, sts/, ds/, ... before it"),
        ("pod/web", "'pod/web' is no Pod, Service or node; did you mean pod/shop/web-5f7-a?"),
        ("shop/*", "'shop/*' is no Pod, Service or node in namespace shop, nor an address"),
    ],
)
def test_names_that_mean_nobody(name: str, said: str) -> None:
    with pytest.raises(UnknownNameError) as refused:
        ends_named(world_of(SHOP), name, "shop")
    assert str(refused.value) == said


LABELLED_DEBUG = {"matchLabels": {"debug": "yes"}}
ONLY_API_0 = policy(
    "shop/only-api-0",
    podSelector={"matchLabels": {"app": "web"}},
    policyTypes=["Egress"],
    egress=[{"to": [{"ipBlock": {"cidr": "10.244.0.5/32"}}]}],
)
LONE = policy(
    "shop/lone",
    podSelector={"matchLabels": {"app": "lone"}},
    policyTypes=["Egress"],
    egress=[{"to": [{"podSelector": LABELLED_DEBUG}]}],
)
AUDITED = policy("shop/debug", podSelector=LABELLED_DEBUG, policyTypes=["Egress"], egress=[{}])
AUDITED["metadata"]["annotations"] = {"podwall.dev/mode": "audit"}
WEB = "Deployment shop/web"
BETWEEN = f"pairs of Pods of {WEB} and StatefulSet shop/api"
ALONE = "no other Pod of StatefulSet shop/one has an address"


@pytest.mark.parametrize(
    ("source", "target", "more", "told", "said"),
    [
        ("sts/one", "one", [], "one-0 to one", ALONE),
        ("one", "sts/one", [NOT_DEBUG], "one to one-0", ALONE),
        ("one", "web-5f7-a", [], "one to web-5f7-a", ""),
        ("web", "one", [], "web-5f7-a to one", f"the same for each of the 3 Pods of {WEB}"),
        ("one", "web", [], "one to web-5f7-a", f"the same for each of the 3 Pods of {WEB}"),
        ("web", "sts/api", [], "web-5f7-a to api-0", f"the same for each of the 6 {BETWEEN}"),
        (
            "web",
            "one",
            [NOT_DEBUG],
            "web-5f7-c to one",
            f"allowed for 2 of the 3 Pods of {WEB}: web-5f7-a, web-5f7-b",
        ),
        (
            "web",
            "sts/api",
            [ONLY_API_0],
            "web-5f7-a to api-1",
            f"allowed for 3 of the 6 {BETWEEN}: web-5f7-a to api-0, web-5f7-b to api-0, web-5f7-c to api-0; "
            "denied as well: web-5f7-b to api-1, web-5f7-c to api-1",
        ),
        (
            "one",
            "web",
            [NOT_DEBUG, LONE],
            "one to web-5f7-a",
            f"allowed for none of the 3 Pods of {WEB}; denied as well: web-5f7-b; "
            "denied in another way: web-5f7-c",
        ),
        (
            "web",
            "one",
            [AUDITED],
            "web-5f7-a to one",
            f"allowed for each of the 3 Pods of {WEB}; in another way: web-5f7-c",
        ),
    ],
)
def test_what_is_told_of_several(source: str, target: str, more: Any, told: str, said: str) -> None:
    pairs = ask(source, target, *more)
    question = pairs.told.question
    assert " to ".join(title(end).rpartition("/")[2] for end in (question.source, question.target)) == told
    assert pairs.in_words() == said


def test_a_service_of_the_workloads_name_sends_nothing() -> None:
    with pytest.raises(CannotAnswerError, match=r"ask about one of its Pods, or all \(deploy/NAME, \.\.\.\)"):
        ask("api", "one")


def test_a_workload_asks_none_of_its_pods_about_itself() -> None:
    pairs = ask("web", "web")
    assert pairs.in_words() == "the same for each of the 6 pairs of Pods of Deployment shop/web"
    assert len(pairs.asked) == pairs.questions.total == 6
    assert all(pair.question.source is not pair.question.target for pair in pairs.asked)


@pytest.mark.parametrize(
    ("source", "target", "sources", "targets", "left"),
    [
        ("many", "one", 64, 1, 136),
        ("one", "many", 1, 64, 136),
        ("many", "sts/api", 32, 2, 336),
        ("many", "many", 8, 9, 39736),
    ],
)
def test_of_many_pairs_some_are_asked_about_both_ends(
    source: str, target: str, sources: int, targets: int, left: int
) -> None:
    many = [owned(f"shop/many-{n:03}", f"10.245.0.{n}", "StatefulSet", "many") for n in range(200)]
    pairs = ask(source, target, *many)

    ends = [(title(pair.question.source), title(pair.question.target)) for pair in pairs.asked]
    assert len(set(ends)) == MOST_PAIRS
    assert (len({of for of, _ in ends}), len({of for _, of in ends})) == (sources, targets)
    assert f"; {left} more were not asked" in pairs.in_words()
    assert pairs.in_words().startswith("the same for each of 64 ")


@pytest.mark.parametrize(
    ("source", "target", "found", "said"),
    [
        ("web", "one", "web-5f7-b to one", f"taken: web-5f7-b of the 3 Pods of {WEB}"),
        ("one", "web", "one to web-5f7-b", f"taken: web-5f7-b of the 3 Pods of {WEB}"),
        (
            "web",
            "web",
            "web-5f7-b to web-5f7-c",
            f"taken: web-5f7-b of the 3 Pods of {WEB}; web-5f7-c of the 3 Pods of {WEB}",
        ),
        ("web-5f7-a", "sts/one", "web-5f7-a to one-0", "taken: one-0, the only Pod of StatefulSet shop/one"),
        ("web-5f7-a", "one", "web-5f7-a to one", ""),
    ],
)
def test_a_packet_is_sent_between_the_first_that_run(source: str, target: str, found: str, said: str) -> None:
    waits = web("a", "10.244.0.2")
    waits["status"]["phase"] = "Pending"
    world = world_of([*SHOP, waits])
    asked = questions(world, source, target)

    one = one_of(asked, {"node-1"})
    assert " to ".join(title(end).rpartition("/")[2] for end in (one.source, one.target)) == found
    assert taken_in_words(asked, one) == said


def test_without_an_agent_no_pod_of_a_workload_sends() -> None:
    with pytest.raises(CannotAnswerError, match="no Pod of Deployment shop/web runs on a node with an agent"):
        one_of(questions(world_of(SHOP), "web", "one"), {"node-2"})

"""`why` of connections that policies in audit mode would deny, or would allow."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given

from agent.explain.policy import judge
from lab.expectation import Oracle
from tests.agent.compile.test_audit import audited
from tests.agent.compile.test_policy_property import SEEDS, SETTINGS, Chance, probes
from tests.agent.compile.worlds import policy
from tests.agent.explain.test_explain_policy import packet_of, world_of
from tests.agent.explain.test_why import CLIENT, WEB, ask

OF_WEB = {"podSelector": {"matchLabels": {"app": "web"}}}
DENYING = policy("shop/deny", **OF_WEB)
ALLOWING = policy("shop/web", **OF_WEB, ingress=[{"from": [{"podSelector": {}}]}])


def asked(*policies: dict[str, Any]) -> tuple[str, list[str]]:
    answer = ask([CLIENT, WEB, *policies], "client", "pod/web", 8080)
    return answer.sentence, [step.text for step in answer.steps if step.stage == "audit"]


def test_what_would_be_denied_is_said_in_the_sentence() -> None:
    sentence, steps = asked(audited(DENYING))
    assert sentence == (
        "allowed: Pod shop/client may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction); "
        "it would be denied if shop/deny were enforced (audit mode)"
    )
    assert steps == [
        "with shop/deny enforced: denied: Pod shop/web is isolated by shop/deny, which admits nothing"
    ]


def test_what_would_be_allowed_is_a_step() -> None:
    sentence, steps = asked(DENYING, audited(ALLOWING))
    assert sentence.startswith("denied: ingress policy shop/deny")
    assert steps == [
        "with shop/web enforced: allowed: shop/web spec.ingress[0] admits it "
        "(from all Pods of its own namespace on every port)"
    ]


@SETTINGS
@given(SEEDS)
def test_it_says_what_the_documentation_says_of_all_policies_together(seed: int) -> None:
    objects = Chance(seed).cluster()
    world, oracle = world_of(objects), Oracle(objects, audited=True)
    for probe in random.Random(seed).sample(probes(objects, 100), min(20, len(probes(objects, 100)))):
        egress, ingress = (judge(world, of, packet_of(probe)) for of in ("Egress", "Ingress"))
        if not ingress.reason and not egress.reason:
            assert (egress.audit or egress).allowed == oracle.allows_egress(probe)
            assert (ingress.audit or ingress).allowed == oracle.allows_ingress(probe)

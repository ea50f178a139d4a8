"""Which generation of a policy is in force on a node, and since when, whatever becomes of commits."""

from __future__ import annotations

from agent.cluster.model import MODE_ANNOTATION, NetworkPolicy
from agent.cluster.store import Changed
from agent.policy_status import MOST_SHOWN, PolicyMetrics, PolicyState, PolicyStatus

KEY = ("shop", "api")


def changed(generation: int | None, uid: str = "u1", name: str = "api", mode: str = "") -> list[Changed]:
    said = {MODE_ANNOTATION: mode} if mode else {}
    after = (
        NetworkPolicy("shop", name, uid, generation=generation, annotations=said)
        if generation is not None
        else None
    )
    return [Changed("NetworkPolicy", ("shop", name), None, after)]


class Node:
    """A node whose commits the test ends as it likes; its clock stands at `now`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.status = PolicyStatus(lambda: self.now)

    def commit(self, works: bool = True) -> None:
        self.status.begin()
        if works:
            self.status.done()

    def state(self, pods: int = 1) -> tuple[int, int | None, float | None]:
        (found,) = self.status.of({KEY: pods})
        assert (found.namespace, found.name, found.pods) == (*KEY, pods)
        return found.generation, found.in_force, found.since


def test_a_new_policy_is_in_force_when_its_commit_is_done() -> None:
    node = Node()
    node.status.saw(changed(1))
    assert node.state() == (1, None, None)
    node.status.begin()
    assert node.state() == (1, None, None)
    node.now = 101.0
    node.status.done()
    assert node.state(pods=3) == (1, 1, 101.0)


def test_a_change_seen_while_a_commit_is_under_way_waits_for_the_next() -> None:
    node = Node()
    node.status.saw(changed(1))
    node.status.begin()
    node.status.saw(changed(2))
    node.status.done()
    assert node.state() == (2, 1, 100.0)
    node.now = 105.0
    node.commit()
    assert node.state() == (2, 2, 105.0)


def test_a_failed_commit_leaves_the_old_generation_in_force() -> None:
    node = Node()
    node.status.saw(changed(1))
    node.commit()
    node.status.saw(changed(2))
    node.commit(works=False)
    assert node.state() == (2, 1, 100.0)
    node.status.saw(changed(3))
    node.now = 110.0
    node.commit()
    assert node.state() == (3, 3, 110.0)


def test_a_commit_of_something_else_changes_nothing() -> None:
    node = Node()
    node.status.saw(changed(1))
    node.commit()
    node.now = 200.0
    node.commit()
    assert node.state() == (1, 1, 100.0)


def test_what_is_no_new_generation_is_in_force_since_the_old_time() -> None:
    """Labels and annotations of a policy change without a new generation."""
    node = Node()
    node.status.saw(changed(4))
    node.commit()
    node.now = 200.0
    node.status.saw(changed(4))
    node.commit()
    assert node.state() == (4, 4, 100.0)


def test_another_mode_counts_although_no_generation_does() -> None:
    node = Node()
    node.status.saw(changed(4, mode="audit"))
    node.commit()
    node.now = 200.0
    node.status.saw(changed(4))
    (before,) = node.status.of({KEY: 1})
    assert (before.mode, before.mode_in_force, before.waiting) == ("enforce", "audit", True)
    node.commit()
    (after,) = node.status.of({KEY: 1})
    assert (after.mode, after.mode_in_force, after.waiting) == ("enforce", "enforce", False)
    assert node.state() == (4, 4, 200.0)


def test_without_generations_every_change_counts() -> None:
    node = Node()
    node.status.saw(changed(0))
    node.commit()
    node.now = 200.0
    node.status.saw(changed(0))
    node.commit()
    assert node.state() == (0, 0, 200.0)


def test_one_made_anew_is_another() -> None:
    node = Node()
    node.status.saw(changed(1))
    node.commit()
    node.status.saw(changed(None))
    node.commit()
    assert node.status.of({KEY: 1}) == ()
    node.now = 200.0
    node.status.saw(changed(1, uid="u2"))
    node.commit()
    assert node.state() == (1, 1, 200.0)


def test_metrics_are_bounded_and_counts_are_not() -> None:
    shown = PolicyMetrics()
    shown.states = tuple(
        PolicyState("shop", f"p{number}", 2, 2 if number else 1, 50.0, 1, "enforce", "enforce")
        for number in range(MOST_SHOWN + 5)
    )
    families = {family.name: family.samples for family in shown.collect()}
    assert families["podwall_policies"][0].value == MOST_SHOWN + 5
    assert families["podwall_policies_waiting"][0].value == 1
    assert len(families["podwall_policy_generation"]) == MOST_SHOWN
    assert families["podwall_policy_generation"][0].value == 1

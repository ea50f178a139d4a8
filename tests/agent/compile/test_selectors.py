"""Label selectors, and the index that finds those that match without trying all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.model import LabelSelector, Operator, Requirement
from agent.compile.selectors import Selector, SelectorIndex


def selector(*terms: tuple[str, Operator, tuple[str, ...]], **labels: str) -> Selector:
    expressions = tuple(sorted((Requirement(*term) for term in terms), key=lambda of: (of.key, of.operator)))
    return Selector(LabelSelector(tuple(sorted(labels.items())), expressions))


WEB = {"app": "web", "tier": "front", "empty": ""}
CASES: dict[str, tuple[Selector, bool]] = {
    "empty": (selector(), True),
    "label": (selector(app="web"), True),
    "other value": (selector(app="db"), False),
    "missing label": (selector(zone="a"), False),
    "both labels": (selector(app="web", tier="front"), True),
    "one of two labels": (selector(app="web", tier="back"), False),
    "empty value": (selector(empty=""), True),
    "empty value is not a missing label": (selector(zone=""), False),
    "In": (selector(("app", "In", ("db", "web"))), True),
    "not In": (selector(("app", "In", ("api", "db"))), False),
    "In without the label": (selector(("zone", "In", ("a",))), False),
    "NotIn": (selector(("app", "NotIn", ("api", "db"))), True),
    "not NotIn": (selector(("app", "NotIn", ("db", "web"))), False),
    "NotIn without the label": (selector(("zone", "NotIn", ("a",))), True),
    "Exists": (selector(("app", "Exists", ())), True),
    "Exists with an empty value": (selector(("empty", "Exists", ())), True),
    "not Exists": (selector(("zone", "Exists", ())), False),
    "DoesNotExist": (selector(("zone", "DoesNotExist", ())), True),
    "not DoesNotExist": (selector(("app", "DoesNotExist", ())), False),
    "all requirements": (selector(("tier", "Exists", ()), ("zone", "DoesNotExist", ()), app="web"), True),
    "contradiction": (selector(("app", "NotIn", ("web",)), app="web"), False),
    "many values": (selector(("app", "In", ("web", *(f"v{n}" for n in range(1000))))), True),
}


@pytest.mark.parametrize("name", CASES)
def test_matching(name: str) -> None:
    of, expected = CASES[name]
    index = SelectorIndex[str]()
    index.add("it", "scope", of)

    assert of.matches(WEB) is expected
    assert index.matching(("other", "scope"), WEB) == ({"it"} if expected else set())
    assert index.matching(("other",), WEB) == set()


def test_one_form_for_one_meaning() -> None:
    by_label, by_term = selector(app="web"), selector(("app", "In", ("web",)))

    assert by_label == by_term
    assert hash(by_label) == hash(by_term)
    assert selector(app="web") != selector(app="db")


def test_as_kubectl_writes_it() -> None:
    of = selector(
        ("tier", "NotIn", ("a", "b")), ("zone", "Exists", ()), ("old", "DoesNotExist", ()), app="web"
    )

    assert str(of) == "app=web,!old,tier notin (a,b),zone"


LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz"))
TERMS = st.one_of(
    st.builds(
        Requirement,
        st.sampled_from("abc"),
        st.sampled_from(("In", "NotIn")),
        st.lists(st.sampled_from("xyz"), min_size=1, unique=True).map(lambda of: tuple(sorted(of))),
    ),
    st.builds(Requirement, st.sampled_from("abc"), st.sampled_from(("Exists", "DoesNotExist"))),
)
SELECTORS = st.builds(
    lambda labels, terms: Selector(LabelSelector(tuple(sorted(labels.items())), tuple(terms))),
    LABELS,
    st.lists(TERMS, max_size=3),
)
STEPS = st.lists(st.tuples(st.integers(0, 5), st.none() | st.tuples(st.sampled_from("st"), SELECTORS)))


@given(STEPS, st.sets(st.sampled_from("st")), LABELS)
def test_the_index_finds_what_trying_all_finds(
    steps: list[tuple[int, tuple[str, Selector] | None]], scopes: set[str], labels: dict[str, str]
) -> None:
    index, members = SelectorIndex[int](), dict[int, tuple[str, Selector]]()
    for member, entry in steps:
        if entry is None:
            index.discard(member)
            members.pop(member, None)
        else:
            index.add(member, *entry)
            members[member] = entry

    expected = {member for member, (scope, of) in members.items() if scope in scopes and of.matches(labels)}
    assert index.matching(scopes, labels) == expected

"""The store: what changed, what is found by what, and that history leaves no trace."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.cluster.model import (
    KINDS,
    EndpointSlice,
    Event,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    Pod,
    Remove,
    Service,
    Synced,
    Upsert,
    kind_of,
)
from agent.cluster.store import Changed, Snapshot, Store, snapshot_of


def put(item: Object) -> Upsert:
    return Upsert(kind_of(item), item)


def everything(snapshot: Snapshot) -> dict[str, object]:
    """All that a snapshot says, as plain values."""
    copy = snapshot.copy()
    return {name: getattr(copy, name) for name in copy.__struct_fields__}


def test_what_changed() -> None:
    store = Store()
    first, second = Node("a"), Node("a", ready=True)
    assert store.apply(put(first)) == (Changed("Node", "a", None, first),)
    assert store.apply(put(Node("a"))) == ()
    assert store.apply(put(second)) == (Changed("Node", "a", first, second),)
    assert store.snapshot.nodes == {"a": second}
    assert store.apply(Remove("Node", "a")) == (Changed("Node", "a", second, None),)
    assert store.apply(Remove("Node", "a")) == ()
    assert store.snapshot.nodes == {}


def test_synced() -> None:
    store = Store()
    assert store.apply(Synced("Pod")) == ()
    assert store.synced == {"Pod"}


def test_a_pod_is_found_by_namespace_node_and_address() -> None:
    store = Store()
    ip = ip_address("10.0.0.1")
    pod = Pod("n", "p", node="a", ips=(ip,))
    store.apply(put(pod))
    snapshot = store.snapshot
    found = {("n", "p"): pod}
    assert snapshot.pods_in("n") == snapshot.pods_on("a") == snapshot.pods_at(ip) == found
    other = Pod("n", "q", node="b", ips=(ip,))
    store.apply(put(other))
    assert set(snapshot.pods_at(ip)) == {("n", "p"), ("n", "q")}
    store.apply(put(Pod("n", "p", node="a")))
    assert snapshot.pods_at(ip) == {("n", "q"): other}
    store.apply(Remove("Pod", ("n", "q")))
    assert not snapshot.pods_by_ip
    assert not snapshot.pods_on("b")


def test_slices_and_policies_are_found() -> None:
    slices = [EndpointSlice("n", f"s-{number}", service="s") for number in range(2)]
    policy = NetworkPolicy("n", "p")
    snapshot = snapshot_of([*slices, policy, EndpointSlice("n", "nobody's")])
    assert list(snapshot.slices_of(("n", "s")).values()) == slices
    assert snapshot.policies_in("n") == {("n", "p"): policy}
    assert snapshot.slices_of(("n", "other")) == {}


def test_a_copy_stays() -> None:
    store = Store()
    store.apply(put(Pod("n", "p")))
    copy = store.snapshot.copy()
    store.apply(Remove("Pod", ("n", "p")))
    assert copy.pods_in("n")
    assert not store.snapshot.pods_in("n")


names = st.sampled_from(["a", "b", "c"])
ips = st.lists(
    st.sampled_from([ip_address("10.0.0.1"), ip_address("10.0.0.2"), ip_address("fd00::1")]), max_size=2
)
objects: st.SearchStrategy[Object] = st.one_of(
    st.builds(Node, name=names, ready=st.booleans()),
    st.builds(Namespace, name=names, deleting=st.booleans()),
    st.builds(
        Pod,
        namespace=names,
        name=names,
        node=st.sampled_from(["", "a", "b"]),
        ips=ips.map(tuple),
        ready=st.booleans(),
    ),
    st.builds(NetworkPolicy, namespace=names, name=names, generation=st.integers(0, 2)),
    st.builds(Service, namespace=names, name=names, generation=st.integers(0, 2)),
    st.builds(EndpointSlice, namespace=names, name=names, service=st.sampled_from(["", "s", "t"])),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Events as a source tells them: changes, repetitions, removals, and lists after time away."""
    events: list[Event] = []
    truth: dict[tuple[str, object], Object] = {}
    told: set[tuple[str, object]] = set()
    for _ in range(draw(st.integers(0, 25))):
        away = draw(st.booleans())
        for item in draw(st.lists(objects, max_size=4)):
            key = (kind_of(item), item.key)
            if key in truth and draw(st.booleans()):
                del truth[key]
                if not away:
                    events.append(Remove(kind_of(item), item.key))
                    told.discard(key)
            else:
                truth[key] = item
                if not away:
                    events.append(put(item))
                    told.add(key)
        if away:
            events += [put(item) for item in truth.values()]
            events += [Remove(kind, key) for kind, key in told - truth.keys()]  # type: ignore[arg-type]
            told = set(truth)
    return events


def last_said(events: list[Event]) -> list[Object]:
    known: dict[tuple[str, object], Object] = {}
    for event in events:
        if isinstance(event, Upsert):
            known[event.kind, event.object.key] = event.object
        elif isinstance(event, Remove):
            known.pop((event.kind, event.key), None)
    return list(known.values())


@settings(max_examples=300, deadline=None)
@given(histories())
def test_any_history_is_as_a_fresh_list_of_its_end(events: list[Event]) -> None:
    store = Store()
    for event in events:
        store.apply(event)
    assert everything(store.snapshot) == everything(snapshot_of(last_said(events)))


@settings(max_examples=200, deadline=None)
@given(histories())
def test_what_is_said_to_have_changed_is_what_changed(events: list[Event]) -> None:
    store = Store()
    known: dict[tuple[str, object], object] = {}
    for event in events:
        for change in store.apply(event):
            assert change.kind in KINDS
            assert known.get((change.kind, change.key)) == change.before
            assert change.before != change.after
            known[change.kind, change.key] = change.after
    assert {key: item for key, item in known.items() if item} == {
        (kind_of(item), item.key): item for item in last_said(events)
    }

"""Which foreign rules drop Pods' packets, told from rules that nft itself loaded."""

from __future__ import annotations

import subprocess
from ipaddress import ip_network

import pytest

from agent.explain.filters import dropping, left_behind
from agent.nft import foreign

RANGES = (ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48"))

FORWARD = "type filter hook forward priority filter; policy accept;"
CLOSED = "type filter hook forward priority filter; policy drop;"

CASES = [
    ("no rules", "table inet f { }", []),
    ("policy accept", f"table inet f {{ chain c {{ {FORWARD} }} }}", []),
    ("policy drop", f"table inet f {{ chain c {{ {CLOSED} }} }}", ["c policy drop"]),
    ("family ip", f"table ip filter {{ chain FORWARD {{ {CLOSED} }} }}", ["FORWARD policy drop"]),
    (
        "input",
        "table inet f { chain i { type filter hook input priority 0; policy drop; } }",
        ["i policy drop"],
    ),
    ("all accepted", f"table inet f {{ chain c {{ {CLOSED} counter accept; }} }}", []),
    ("Pods' links accepted", f'table inet f {{ chain c {{ {CLOSED} iifname "podwall*" accept; }} }}', []),
    ("a range accepted", f"table inet f {{ chain c {{ {CLOSED} ip saddr 10.244.0.0/16 accept; }} }}", []),
    ("a narrow range", f"table inet f {{ chain c {{ {CLOSED} ip daddr 10.244.3.0/25 accept; }} }}", []),
    ("an IPv6 range", f"table inet f {{ chain c {{ {CLOSED} ip6 saddr fd00:10:244::/48 accept; }} }}", []),
    (
        "another range accepted",
        f"table inet f {{ chain c {{ {CLOSED} ip saddr 10.0.0.0/17 accept; }} }}",
        ["c policy drop"],
    ),
    (
        "established flows accepted",
        f"table inet f {{ chain c {{ {CLOSED} ct state established,related accept; }} }}",
        ["c policy drop"],
    ),
    (
        "a port accepted",
        f"table inet f {{ chain c {{ {CLOSED} tcp dport 22 accept; }} }}",
        ["c policy drop"],
    ),
    ("a rule drops all", f"table inet f {{ chain c {{ {FORWARD} drop; }} }}", ["c a rule"]),
    ("a rule rejects all", f"table inet f {{ chain c {{ {FORWARD} reject; }} }}", ["c a rule"]),
    (
        "a rule drops Pods",
        f"table inet f {{ chain c {{ {FORWARD} ip daddr 10.244.0.0/16 drop; }} }}",
        ["c a rule"],
    ),
    ("a rule drops others", f"table inet f {{ chain c {{ {FORWARD} ip daddr 192.0.2.0/24 drop; }} }}", []),
    ("invalid packets", f"table inet f {{ chain c {{ {FORWARD} ct state invalid drop; }} }}", []),
    ("all but one link", f'table inet f {{ chain c {{ {FORWARD} iifname != "eth0" drop; }} }}', ["c a rule"]),
    ("all but Pods", f'table inet f {{ chain c {{ {FORWARD} iifname != "podwall*" drop; }} }}', []),
    (
        "accepted first",
        f"table inet f {{ chain c {{ {FORWARD} ip saddr 10.244.0.0/16 accept; drop; }} }}",
        [],
    ),
    (
        "in a chain that is jumped to",
        f"table inet f {{ chain d {{ drop; }} chain c {{ {FORWARD} jump d; }} }}",
        ["c a rule of chain d"],
    ),
    (
        "a chain that returns",
        f"table inet f {{ chain d {{ return; drop; }} chain c {{ {FORWARD} jump d; }} }}",
        [],
    ),
    (
        "accepted in a chain that is gone to",
        f"table inet f {{ chain d {{ accept; }} chain c {{ {CLOSED} goto d; }} }}",
        [],
    ),
    (
        "a jump of some packets",
        f"table inet f {{ chain d {{ drop; }} chain c {{ {FORWARD} tcp dport 25 jump d; }} }}",
        [],
    ),
    ("podwall's own", f"table inet podwall {{ chain c {{ {CLOSED} }} }}", []),
]


def load(ruleset: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=ruleset.replace("}", "}\n"), text=True, check=True)


@pytest.mark.parametrize(("ruleset", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_drops_pods(netns: None, ruleset: str, said: list[str]) -> None:
    load(ruleset)

    found = foreign.read({("inet", "podwall")}, RANGES)

    assert [f"{chain.name} {how}" for chain, how in dropping(found)] == said


def test_a_large_table_is_read_by_its_names_alone(netns: None) -> None:
    chains = "".join(f"chain c{number} {{ counter accept; }}\n" for number in range(2000))
    ruleset = f"table inet f {{ {chains} chain base {{ {CLOSED} }} }}"
    load(ruleset)

    found = foreign.read((), RANGES)

    assert len(found.chains) == 2001
    assert len(found.rules) == 1


def test_chains_of_other_plugins(netns: None) -> None:
    ruleset = "table ip filter { chain cali-FORWARD { } chain cali-INPUT { } chain mine { } }"
    load(ruleset)

    assert left_behind(foreign.read((), ())) == {"Calico": ["ip filter"]}

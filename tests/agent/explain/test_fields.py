"""A field's path, and its line in a file."""

from __future__ import annotations

import json

import pytest

from agent.explain.fields import Path, line_of, parsed, written

FILE = """\
# two documents
kind: Namespace
metadata: {name: shop}
---
kind: NetworkPolicy
metadata:
  name: web
spec:
  podSelector: {}
  ingress:
    - from:
        - podSelector: {}
    - ports:
        - port: 80
        - port: "http"
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("spec",), 8),
        (("spec", "ingress"), 10),
        (("spec", "ingress", 0), 11),
        (("spec", "ingress", 1, "ports", 1), 15),
        (("spec", "egress"), 8),
        (("spec", "ingress", 7), 10),
        ((), 5),
    ],
)
def test_the_line_of_a_field_is_that_of_its_key(path: Path, line: int) -> None:
    assert line_of(FILE, 5, path) == line


def test_the_lines_of_an_item_of_a_list_in_json() -> None:
    text = json.dumps({"items": [{"spec": {}}, {"spec": {"ports": [{"port": 80}]}}]}, indent=1)
    wanted = 1 + next(number for number, line in enumerate(text.splitlines()) if '"port":' in line)
    assert line_of(text, 1, ("items", 1, "spec", "ports", 0, "port")) == wanted


def test_a_comment_before_a_document_is_where_it_begins() -> None:
    assert line_of(FILE, 1, ("metadata",)) == 3


@pytest.mark.parametrize("text", ["spec", "spec.ingress[0].from", "status.loadBalancer.ingress[1].ip"])
def test_a_path_is_written_and_read(text: str) -> None:
    assert written(parsed(text)) == text

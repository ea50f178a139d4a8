"""The picture is well-formed, says everything in words too, and nothing in a name becomes markup."""

from __future__ import annotations

from xml.etree import ElementTree

from agent.explain.groups import Group, Grouped
from agent.explain.picture import picture

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ("</text><script>alert(1)</script>", '"><image href="http://x"/>', "&lol;]]>\x00\x1b[2J\ud800")


def drawn(rows: tuple[str, ...], columns: tuple[str, ...], *words: tuple[str, ...]) -> ElementTree.Element:
    shown = Grouped(
        tuple(Group(name, (i,)) for i, name in enumerate(rows)),
        tuple(Group(name, (i,)) for i, name in enumerate(columns)),
        ("TCP 80",) * len(columns),
        words,
    )
    return ElementTree.fromstring(picture(shown, tried=True).encode())  # noqa: S314 - made here


def test_it_tells_everything_in_words() -> None:
    root = drawn(("web", "job"), ("api", "db"), ("yes", "part"), ("no!", "v4"))

    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "Who reaches whom"
    assert root.findtext(f"{SVG}desc") == (
        "web reaches api TCP 80; db TCP 80 (part). job reaches nobody; api TCP 80 (no!), db TCP 80 (v4)."
    )
    assert [cell.findtext(f"{SVG}title") for cell in root.iter(f"{SVG}g")] == [
        "web to api TCP 80: yes",
        "web to db TCP 80: part",
        "job to api TCP 80: no!",
        "job to db TCP 80: v4",
    ]
    signs = [cell.find(f"{SVG}text").text for cell in root.iter(f"{SVG}g")]  # type: ignore[union-attr]
    assert signs == ["\u2713", "\u00bd", "!", "v4"]


def test_names_never_become_markup() -> None:
    root = drawn(HOSTILE, HOSTILE, *[("yes",) * len(HOSTILE)] * len(HOSTILE))

    assert {each.tag.removeprefix(SVG) for each in root.iter()} == {
        "svg", "title", "desc", "style", "text", "tspan", "g", "rect",
    }  # fmt: skip
    keys = {key for each in root.iter() for key in each.attrib}
    assert not [key for key in keys if key.startswith("on") or "href" in key]
    assert "\x1b" not in "".join(root.itertext())


def test_long_names_are_cut_and_stand_whole_in_the_cells() -> None:
    name = "n" * 253
    root = drawn((name,), (name,), ("yes",))
    assert float(root.get("width") or 0) < 1200
    assert f"{name} to {name} TCP 80: yes" in [each.text for each in root.iter(f"{SVG}title")]


def test_it_follows_the_readers_colour_scheme() -> None:
    style = drawn(("a",), ("b",), ("yes",)).findtext(f"{SVG}style")
    assert style
    assert "prefers-color-scheme: dark" in style

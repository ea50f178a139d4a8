"""A matrix as a drawing: SVG that reads in light and in dark, in black and white, and aloud. Pure.

                  api TCP 8080
                 /   db TCP 5432
                /   /
    web        [✓] [·]        each cell has a sign besides its colour, and its words when pointed at
    grafana    [✓] [-]        the whole is told in its description, for screen readers

Names are escaped, and control characters in them are written out: nothing of them becomes markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from agent.explain.groups import NO, NONE, OTHERWISE, PART, SELF, SOME, YES, Grouped
from agent.log import printable

CELL, GAP, MARGIN, LETTER, LINE = 28, 2, 24, 7.2, 22
SLOPE = 0.7  # of the columns' names: how far up and right they go for their length
MOST_LETTERS = 60
LEGEND_WIDTH = 540


class _Kind(NamedTuple):
    """How a word is drawn: its class, its sign, and what the legend says."""

    css: str
    sign: str
    meaning: str


_KINDS = {
    YES: _Kind("yes", "\u2713", "reached"),
    NO: _Kind("no", "\u2013", "not reached"),
    PART: _Kind("part", "\u00bd", "some endpoints, families or Pods only"),
    SELF: _Kind("self", "\u00b7", "itself, or no common address family"),
    OTHERWISE: _Kind("odd", "!", "seen to be otherwise than computed"),
}

_STYLE = """
  svg { color-scheme: light dark; background: #fff; font: 13px system-ui, sans-serif }
  text { fill: #1f2328 } .quiet { fill: #59636e } .head { font-size: 18px; font-weight: 600 }
  .port { fill: #59636e } .sign { text-anchor: middle; font-weight: 600 }
  .yes { fill: #1a7f37 } .no { fill: #e4e8ec } .part { fill: #9a6700 } .odd { fill: #cf222e }
  .self { fill: none; stroke: #d1d9e0 }
  .on-yes, .on-part, .on-odd { fill: #fff } .on-no { fill: #424a53 } .on-self { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117 } text { fill: #e6edf3 } .quiet, .port { fill: #9198a1 }
    .yes { fill: #2ea043 } .no { fill: #2a313c } .part { fill: #bb8009 } .odd { fill: #f85149 }
    .self { stroke: #3d444d }
    .on-yes, .on-part, .on-odd { fill: #0d1117 } .on-no { fill: #d1d7e0 } .on-self { fill: #9198a1 }
  }"""


def picture(shown: Grouped, *, tried: bool = False, title: str = "Who reaches whom") -> str:
    """An SVG document; `tried`: the connections were made as well."""
    left = MARGIN + _length([row.label for row in shown.rows]) + 12
    names = [f"{column.label} {port}" for column, port in zip(shown.columns, shown.ports, strict=True)]
    rise = _length(names) * SLOPE
    top = MARGIN + 2 * LINE + rise + 20
    step = CELL + GAP
    width = max(left + len(names) * step + rise, LEGEND_WIDTH) + MARGIN
    bottom = top + len(shown.rows) * step
    height = bottom + (len(_KINDS) + 1) * LINE + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title description" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">',
        f'<title id="title">{_text(title)}</title>',
        f'<desc id="description">{_text(" ".join(_aloud(shown, names)))}</desc>',
        f"<style>{_STYLE}\n</style>",
        f'<text class="head" x="{MARGIN}" y="{MARGIN + 14}">{_text(title)}</text>',
        f'<text class="quiet" x="{MARGIN}" y="{MARGIN + 14 + LINE}">{_subtitle(tried)}</text>',
        *_heads(shown, left, top),
        *_rows(shown, names, left, top),
        *_legend(bottom + LINE, tried),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _subtitle(tried: bool) -> str:
    how = "computed from the policies" + (", and tried" if tried else "")
    return f"rows: who connects; columns: to whom, on which port; {how}"


def _heads(shown: Grouped, left: float, top: float) -> Iterator[str]:
    for number, (column, port) in enumerate(zip(shown.columns, shown.ports, strict=True)):
        x, y = left + number * (CELL + GAP) + CELL / 2, top - 8
        yield (
            f'<text transform="translate({x:.1f} {y:.1f}) rotate(-45)">{_text(_short(column.label))}'
            f' <tspan class="port">{_text(port)}</tspan></text>'
        )


def _rows(shown: Grouped, names: Sequence[str], left: float, top: float) -> Iterator[str]:
    for number, (row, words) in enumerate(zip(shown.rows, shown.cells, strict=True)):
        y = top + number * (CELL + GAP)
        yield (
            f'<text x="{left - 12:.1f}" y="{y + CELL / 2 + 5:.1f}" text-anchor="end">'
            f"{_text(_short(row.label))}</text>"
        )
        for place, (name, word) in enumerate(zip(names, words, strict=True)):
            yield _cell(left + place * (CELL + GAP), y, word, f"{row.label} to {name}: {word}")


def _cell(x: float, y: float, word: str, words: str) -> str:
    kind = _kind(word)
    sign = word if word.startswith("v") and not word.endswith(OTHERWISE) else kind.sign
    return (
        f"<g><title>{_text(words)}</title>"
        f'<rect class="{kind.css}" x="{x:.1f}" y="{y:.1f}" width="{CELL}" height="{CELL}" rx="4"/>'
        f'<text class="sign on-{kind.css}" x="{x + CELL / 2:.1f}" y="{y + CELL / 2 + 5:.1f}">{sign}</text>'
        "</g>"
    )


def _kind(word: str) -> _Kind:
    if word.endswith(OTHERWISE):
        return _KINDS[OTHERWISE]
    return _KINDS[{NONE: SELF, SOME: PART}.get(word, PART if word.startswith("v") else word)]


def _legend(y: float, tried: bool) -> Iterator[str]:
    for number, kind in enumerate(each for each in _KINDS.values() if tried or each.css != "odd"):
        at = y + number * LINE
        yield f'<rect class="{kind.css}" x="{MARGIN}" y="{at:.1f}" width="18" height="18" rx="3"/>'
        yield f'<text class="sign on-{kind.css}" x="{MARGIN + 9}" y="{at + 14:.1f}">{kind.sign}</text>'
        yield f'<text x="{MARGIN + 28}" y="{at + 14:.1f}">{kind.meaning}</text>'


def _aloud(shown: Grouped, names: Sequence[str]) -> Iterator[str]:
    """Each row as a sentence."""
    for row, words in zip(shown.rows, shown.cells, strict=True):
        reached = [name for name, word in zip(names, words, strict=True) if word.rstrip(OTHERWISE) == YES]
        partly = [
            f"{name} ({word})"
            for name, word in zip(names, words, strict=True)
            if word not in (YES, NO, SELF, NONE)
        ]
        also = f"; {', '.join(partly)}" if partly else ""
        yield f"{row.label} reaches {', '.join(reached) or 'nobody'}{also}."


def _length(names: Sequence[str]) -> float:
    return max((len(_short(name)) for name in names), default=0) * LETTER


def _short(name: str) -> str:
    """Names have up to 253 letters and more; the whole one is in the cell's words."""
    said = printable(name)
    return said if len(said) <= MOST_LETTERS else f"{said[: MOST_LETTERS - 1]}\u2026"


def _text(of: str) -> str:
    return escape(printable(of))

// Who may reach whom on which port, by the policies; a dot where it was seen. One stop of the Tab key, as a grid is:
// the arrow keys go from cell to cell, Enter asks why.

import { AskError, get } from "./api.js";
import { fill, html } from "./dom.js";

const WORDS = {
  yes: ["✓", "allowed"],
  no: ["✕", "denied"],
  part: ["◐", "allowed in part: some endpoints"],
  some: ["◐", "some of them"],
  v4: ["4", "over IPv4 only"],
  v6: ["6", "over IPv6 only"],
  ".": ["", "itself"],
  "-": ["", "no address of a common family"],
};

export class Matrix {
  // onPair({source, target, port, protocol}): what a cell asks.
  constructor({ onPair }) {
    this.onPair = onPair;
    this.at = [0, 0];
    this.asked = 0;
    this.grid = html("div");
    this.key = html(
      "p",
      { class: "quiet foot" },
      ["✓ allowed", "✕ denied", "◐ some of them", "● seen within ten minutes"].map((text) =>
        html("span", {}, text),
      ),
    );
    this.element = html("div", { class: "scroll matrix" }, this.key, this.grid);
    this.grid.addEventListener("keydown", (event) => this.keydown(event));
  }

  async show({ state, filters }) {
    this.filters = filters;
    const turn = (this.asked += 1);
    const wanted = `${state.changes} ${filters.namespace}`;
    try {
      if (this.wanted !== wanted) this.found = await get("/api/matrix", { namespace: filters.namespace });
      if (turn !== this.asked) return;
      const drawn = [wanted, filters.text, ...state.rows.map((row) => row.id)].join("\n");
      if (drawn !== this.drawn) this.draw(this.found, state.rows);
      Object.assign(this, { wanted, drawn });
    } catch (error) {
      this.wanted = this.drawn = null;
      if (!(error instanceof AskError)) throw error;
      fill(this.grid, html("p", { class: "failure" }, error.message));
    }
  }

  draw({ rows, columns, cells }, seen) {
    const words = this.filters.text.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (text) => words.every((word) => text.toLowerCase().includes(word));
    const own = rows
      .map((row, index) => [row, index])
      .filter(([row]) => !words.length || fits(row.label) || columns.some((column) => fits(column.label)));
    const rowsFit = rows.some((row) => fits(row.label));
    const some = columns
      .map((column, index) => [column, index])
      .filter(([column]) => !words.length || fits(column.label) || rowsFit);
    const seenBy = new Set(seen.map((row) => `${row.source} ${row.target} ${row.protocol} ${row.port}`));
    const isSeen = (row, column) =>
      row.pods.some((source) =>
        column.pods.some((target) =>
          column.ports.some(([protocol, port]) => seenBy.has(`${source} ${target} ${protocol} ${port}`)),
        ),
      );
    this.at = [Math.min(this.at[0], own.length - 1), Math.min(this.at[1], some.length - 1)];
    const cell =
      ([row, i], y) =>
      ([column, j], x) => {
        const word = cells[i][j];
        const [mark, spoken] = WORDS[word] ?? [word, word];
        const dot = isSeen(row, column);
        const label = `${row.label} to ${column.label}: ${spoken}${dot ? ", seen" : ""}`;
        return html(
          "td",
          {
            role: "gridcell",
            class: `cell ${word === "." || word === "-" ? "none" : word}${dot ? " seen" : ""}`,
            tabindex: y === this.at[0] && x === this.at[1] ? "0" : "-1",
            "data-key": `${y} ${x}`,
            "aria-label": label,
            title: label,
            onclick: () => this.choose(row, column, word),
            onfocus: () => this.stopAt(y, x),
          },
          mark,
        );
      };
    fill(
      this.grid,
      html(
        "table",
        { role: "grid", "aria-label": "Who may reach whom" },
        html(
          "thead",
          {},
          html(
            "tr",
            { role: "row" },
            html("th", { scope: "col" }, "From"),
            some.map(([column]) => html("th", { scope: "col", class: "to" }, html("span", {}, column.label))),
          ),
        ),
        html(
          "tbody",
          {},
          own.map((row, y) =>
            html("tr", { role: "row" }, html("th", { scope: "row" }, row[0].label), some.map(cell(row, y))),
          ),
        ),
      ),
    );
  }

  choose(row, column, word) {
    if (word === "." || word === "-") return;
    const target = column.pods.find((pod) => pod !== row.pods[0]) ?? column.pods[0];
    const [protocol, port] = column.ports[0];
    this.onPair({ source: row.pods[0], target, port: String(port), protocol });
  }

  cellAt(y, x) {
    return this.grid.querySelector(`[data-key="${y} ${x}"]`);
  }

  stopAt(y, x) {
    this.cellAt(...this.at)?.setAttribute("tabindex", "-1");
    this.at = [y, x];
    this.cellAt(y, x).setAttribute("tabindex", "0");
  }

  keydown(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") event.target.click();
    else if (step) this.cellAt(this.at[0] + step[0], this.at[1] + step[1])?.focus();
    else return;
    event.preventDefault();
  }
}

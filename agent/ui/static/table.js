// The same connections as a table: what the graph shows, for who reads it line by line or by screen reader.

import { fill, html } from "./dom.js";
import { nameOf, portOf } from "./model.js";
import { ago, plural } from "./words.js";

const MOST = 1000;
const ORDER = ["denied", "audit", "allowed"];
const COLUMNS = [
  ["verdict", "Verdict", (row) => ORDER.indexOf(row.verdict)],
  ["source", "From", (row, model) => nameOf(model, row.source)],
  ["target", "To", (row, model) => nameOf(model, row.target)],
  ["port", "Port", (row) => row.port],
  ["by", "Service", (row) => row.services.join(", ")],
  ["policies", "Policy", (row) => policiesOf(row)],
  ["count", "Seen", (row) => row.count],
  ["last", "Last", (row) => row.last],
];

export class Table {
  // onRow(row): what is opened.
  constructor({ onRow }) {
    this.onRow = onRow;
    this.by = { column: "verdict", down: false };
    this.head = html("thead");
    this.rows = html("tbody");
    this.caption = html("caption", { class: "hidden" });
    this.foot = html("p", { class: "quiet foot" });
    this.element = html(
      "div",
      { class: "scroll" },
      html("table", { class: "rows" }, this.caption, this.head, this.rows),
      this.foot,
    );
  }

  show({ model, rows, selected, now }) {
    this.again = () => this.show({ model, rows, selected, now });
    this.caption.textContent = `${rows.length} connections`;
    fill(
      this.head,
      html(
        "tr",
        {},
        COLUMNS.map((column) => this.heading(column)),
      ),
    );
    const value = COLUMNS.find(([name]) => name === this.by.column)[2];
    const sorted = [...rows].sort(
      (one, other) => compare(value(one, model), value(other, model)) || compare(one.id, other.id),
    );
    if (this.by.down) sorted.reverse();
    this.fillRows(model, sorted.slice(0, MOST), selected, now);
    this.foot.textContent =
      rows.length > MOST ? `${rows.length - MOST} more: narrow it with the filters` : "";
    if (!rows.length) this.foot.textContent = "Nothing was seen that the filters leave.";
  }

  // Rows that stand where they stood are changed in place: who reads them is not thrown back to the top.
  fillRows(model, rows, selected, now) {
    const order = rows.map((row) => row.id).join("\n");
    if (order !== this.order)
      fill(
        this.rows,
        rows.map((row) => this.row(model, row)),
      );
    this.order = order;
    rows.forEach((row, index) => {
      const of = this.rows.children[index];
      of.className = `${row.verdict}${selected === row.id ? " selected" : ""}`;
      of.row = row;
      changing(row, now).forEach((text, cell) =>
        setText(of.children[of.children.length - CHANGING + cell], text),
      );
    });
  }

  heading([name, title]) {
    const sorted = this.by.column === name;
    const sort = () => {
      this.by = { column: name, down: sorted && !this.by.down };
      this.again();
    };
    return html(
      "th",
      { scope: "col", "aria-sort": sorted ? (this.by.down ? "descending" : "ascending") : null },
      html(
        "button",
        { type: "button", onclick: sort, "data-key": `sort ${name}` },
        title,
        html("span", { "aria-hidden": "true" }, sorted ? (this.by.down ? " ↓" : " ↑") : ""),
      ),
    );
  }

  row(model, row) {
    const open = html(
      "button",
      { type: "button", class: "link", "data-key": row.id, onclick: () => this.onRow(of.row) },
      verdict(row),
    );
    const of = html(
      "tr",
      {},
      html("td", {}, open),
      html("td", {}, nameOf(model, row.source)),
      html("td", {}, nameOf(model, row.target)),
      html("td", { class: "number" }, portOf(row)),
      html("td"),
      html("td"),
      html("td", { class: "number" }),
      html("td", { class: "number" }),
    );
    return of;
  }
}

// What changes of a row while it is shown: the last cells of it.
const CHANGING = 4;
const changing = (row, now) => [row.services.join(", "), policiesOf(row), seenOf(row), ago(now - row.last)];

function seenOf(row) {
  if (row.verdict !== "allowed") return plural(row.count, "packet");
  if (!row.open) return `${row.count}`;
  return row.open === row.count ? `${row.count} open` : `${row.count}, ${row.open} open`;
}

function setText(of, text) {
  if (of.textContent !== text) of.textContent = text;
}

const policiesOf = (row) => (row.policies ?? []).join(", ");

const SIGNS = { denied: "✕", audit: "!", allowed: "✓" };
const SPOKEN = { denied: "denied", audit: "would be denied", allowed: "allowed" };

export const sign = (of) =>
  html("span", { class: `sign ${of.verdict}`, "aria-hidden": "true" }, SIGNS[of.verdict]);

export const verdict = (of) => [sign(of), SPOKEN[of.verdict]];

const compare = (one, other) => (typeof one === "string" ? one.localeCompare(other) : one - other);

// The graph: a box per namespace, a card per workload, a line per pair that was seen to connect. Denied lines are
// broken and carry a cross, so that no colour is needed to tell them.
//
// One stop of the Tab key: the arrow keys go from card to card, Enter opens one. Its connections are in the panel,
// and all of them in the table.

import { html, svg } from "./dom.js";
import { CARD } from "./layout.js";
import { portOf } from "./model.js";
import { routed } from "./routes.js";
import { Sight } from "./sight.js";

const KINDS = ["allowed", "denied", "audit", "opened", "closed", "active"];
const NEAR = 24;

export class Graph {
  // onCard(key), onLine(line): what a click or Enter opens.
  constructor({ onCard, onLine, onArrange }) {
    this.onCard = onCard;
    this.onLine = onLine;
    this.boxes = svg("g");
    this.lines = svg("g");
    this.labels = svg("g");
    this.cards = svg("g");
    this.marks = svg("g");
    this.scene = svg("g", {}, this.boxes, this.lines, this.labels, this.cards, this.marks);
    this.hint = html("p", { class: "hint", "aria-hidden": "true" });
    this.left = html("p", { class: "left", role: "status" });
    this.picture = svg(
      "svg",
      { class: "picture", role: "group" },
      svg("defs", {}, KINDS.map(arrow)),
      this.scene,
    );
    this.sight = new Sight(this.picture, this.scene);
    this.element = html(
      "div",
      { class: "graph" },
      this.picture,
      this.left,
      this.hint,
      this.legend(),
      this.tools(onArrange),
    );
    this.picture.addEventListener("keydown", (event) => this.key(event));
    this.current = null;
    this.known = new Map();
  }

  // lines as of linesOf; placed as of layout.placed; lit: keys of cards that are not faded, or null for all.
  show({ model, left, lines, placed, perPod, lit, selected, badges, rehearsed }) {
    this.left.textContent = left
      ? `${left} workloads are not drawn${lit ? "" : ": choose a namespace, or search"}`
      : "";
    this.element.classList.toggle("rehearsed", rehearsed);
    Object.assign(this, { model, placed, perPod, shown: lines });
    this.picture.setAttribute(
      "aria-label",
      `${model.cards.size} workloads and ${lines.length} lines; arrow keys move`,
    );
    this.join(
      this.boxes,
      [...placed.boxes],
      ([key]) => `box ${key}`,
      newBox,
      ([, at], of) => setBox(of, at),
    );
    this.join(
      this.labels,
      [...placed.boxes],
      ([key]) => `label ${key}`,
      newLabel,
      ([key, at], of) => this.setLabel(of, key, at),
    );
    this.join(
      this.cards,
      [...placed.cards],
      ([key]) => `card ${key}`,
      (item) => this.newCard(item),
      ([key, at], of) => {
        of.classList.toggle("faded", lit !== null && !lit.has(key));
        of.classList.toggle("selected", selected === key);
        this.setCard(of, key, at, badges.get(key));
      },
    );
    const routes = routed(lines, (end) => this.at(end), [...placed.cards.values()]);
    const routable = lines.filter((line) => routes.has(line.id));
    this.join(
      this.lines,
      routable,
      (line) => `line ${line.id}`,
      () => this.newLine(),
      (line, of) => this.setLine(of, line, routes.get(line.id), selected),
    );
    const marked = routable.filter((line) => line.verdict !== "allowed");
    this.join(
      this.marks,
      marked,
      (line) => `mark ${line.id}`,
      newMark,
      (line, of) => setMark(of, line, routes.get(line.id)),
    );
    if (!this.current || !placed.cards.has(this.current)) this.stopAt([...placed.cards.keys()][0]);
    this.sight.size(placed.width, placed.height);
  }

  // Keeps elements by key: what stays is changed in place, so that focus, hovering and transitions live on.
  join(parent, items, keyOf, make, set) {
    const keys = new Set(items.map(keyOf));
    for (const child of [...parent.children])
      if (!keys.has(child.dataset.key)) {
        this.known.delete(child.dataset.key);
        child.remove();
      }
    for (const item of items) {
      const key = keyOf(item);
      let of = this.known.get(key);
      if (!of) {
        of = make(item);
        of.dataset.key = key;
        this.known.set(key, of);
        parent.append(of);
      }
      set(item, of);
    }
  }

  at(end) {
    const card = this.placed.cards.get(this.perPod ? this.model.entities.get(end)?.card : end);
    if (!card || !this.perPod) return card;
    const index = this.model.cards.get(this.model.entities.get(end).card).members.indexOf(end);
    return { ...card, y: card.y + CARD.head + index * CARD.row, height: CARD.row };
  }

  setLabel(of, key, at) {
    move(of, at);
    setText(of.firstChild, this.model.boxes.get(key).label, at.width - 28, 12);
  }

  newCard([key]) {
    const of = svg(
      "g",
      { class: "card", role: "button", tabindex: "-1" },
      svg("rect", { class: "face", rx: 7 }),
      svg("text", { class: "name", x: 12, y: 22 }),
      svg("g", { class: "signs" }),
      svg("g", { class: "members" }),
    );
    of.addEventListener("click", () => this.open(key));
    of.addEventListener("focus", () => this.stopAt(key));
    of.addEventListener("pointerenter", () => this.light(key));
    of.addEventListener("pointerleave", () => this.light(null));
    return of;
  }

  setCard(of, key, at, badge = {}) {
    const card = this.model.cards.get(key);
    move(of, at);
    size(of.children[0], at);
    const count = card.members.length;
    setText(
      of.children[1],
      card.label,
      at.width - 24 - (count > 1 ? 24 : 0) - (badge.guarded ? 18 : 0),
      12.5,
    );
    const spoken = [
      `${card.kind} ${card.label}`.trim(),
      card.namespace && `in ${card.namespace}`,
      count > 1 && `${count} Pods`,
    ];
    of.setAttribute(
      "aria-label",
      [...spoken, badge.guarded && "isolated by a policy", badge.denied && `${badge.denied} denied`]
        .filter(Boolean)
        .join(", "),
    );
    of.classList.toggle("denying", Boolean(badge.denied));
    const signs = [];
    let right = at.width - 11;
    if (count > 1) {
      signs.push(svg("text", { class: "count", x: right, y: 22, "text-anchor": "end" }, `×${count}`));
      right -= 24;
    }
    if (badge.guarded) signs.push(svg("path", { class: "guard", d: `M${right - 6} 11${SHIELD}` }));
    of.children[2].replaceChildren(...signs);
    of.children[3].replaceChildren(
      ...(this.perPod ? card.members.map((id, index) => this.member(card, id, index, at)) : []),
    );
  }

  member(card, id, index, at) {
    const { label } = this.model.entities.get(id);
    const short = label.startsWith(`${card.label}-`) ? `…${label.slice(card.label.length)}` : label;
    const text = svg("text", { class: "member", x: 14, y: CARD.head + index * CARD.row + 14 });
    setText(text, short, at.width - 28, 11.5);
    return svg(
      "g",
      {},
      svg("line", {
        class: "rule",
        x1: 0,
        x2: at.width,
        y1: CARD.head + index * CARD.row,
        y2: CARD.head + index * CARD.row,
      }),
      text,
    );
  }

  newLine() {
    const of = svg(
      "g",
      { class: "line" },
      svg("path", { class: "hit" }),
      svg("path", { class: "stroke" }),
      svg("title"),
    );
    of.addEventListener("click", () => of.line.rows.length && this.onLine(of.line));
    of.addEventListener("pointerenter", () => this.tell(of.line, of));
    of.addEventListener("pointerleave", () => this.tell(null, of));
    return of;
  }

  setLine(of, line, route, selected) {
    of.line = line;
    of.setAttribute("class", `line ${line.verdict}${selected === line.id ? " selected" : ""}`);
    of.children[0].setAttribute("d", route.d);
    of.children[1].setAttribute("d", route.d);
    of.children[1].setAttribute("marker-end", `url(#arrow-${line.verdict})`);
    of.children[1].style.strokeWidth = `${line.verdict === "allowed" ? 1.1 + Math.log2(1 + line.count) * 0.22 : 2}px`;
    of.children[2].textContent = this.said(line);
  }

  said(line) {
    const ports = line.ports?.join(", ") ?? [...new Set(line.rows.map(portOf))].slice(0, 4).join(", ");
    const name = (end) =>
      (this.perPod ? this.model.entities.get(end)?.label : this.model.cards.get(end)?.label) ?? end;
    return `${name(line.source)} → ${name(line.target)}  ${ports}  ${line.ports ? `would be ${line.verdict}` : `${line.verdict}, ${line.count} seen`}`;
  }

  tell(line, of) {
    this.hint.textContent = line ? this.said(line) : "";
    of.classList.toggle("active", Boolean(line));
  }

  // Lights a card's own lines and fades all others.
  light(key) {
    for (const group of [this.lines, this.marks]) group.classList.toggle("dimmed", key !== null);
    for (const of of [...this.lines.children, ...this.marks.children]) {
      const ends = [of.line.source, of.line.target].map((end) =>
        this.perPod ? this.model.entities.get(end)?.card : end,
      );
      of.classList.toggle("active", key !== null && ends.includes(key));
    }
  }

  open(key) {
    this.stopAt(key);
    this.onCard(key);
  }

  stopAt(key) {
    this.known.get(`card ${this.current}`)?.setAttribute("tabindex", "-1");
    this.current = key;
    this.known.get(`card ${key}`)?.setAttribute("tabindex", "0");
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Enter" || event.key === " ") this.open(this.current);
    else if (event.key === "+" || event.key === "-") this.sight.scaleBy(event.key === "+" ? 1.25 : 0.8);
    else if (event.key === "0") this.sight.fit();
    else if (steps[event.key]) this.step(...steps[event.key]);
    else return;
    event.preventDefault();
  }

  // The nearest card in a direction; what is straight ahead counts as nearer.
  step(dx, dy) {
    const here = this.placed.cards.get(this.current);
    let best = null;
    for (const [key, at] of this.placed.cards) {
      const [x, y] = [at.x - here.x, at.y - here.y];
      const ahead = x * dx + y * dy;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (ahead > NEAR / 2 && (!best || ahead + 2 * aside < best.far)) best = { key, far: ahead + 2 * aside };
    }
    if (!best) return;
    this.stopAt(best.key);
    this.known.get(`card ${best.key}`).focus();
    this.sight.reveal(this.placed.cards.get(best.key));
  }

  tools(onArrange) {
    const tool = (label, text, run) =>
      html("button", { type: "button", "aria-label": label, title: label, onclick: run }, text);
    return html(
      "div",
      { class: "tools", role: "group", "aria-label": "Picture" },
      tool("Zoom in", "+", () => this.sight.scaleBy(1.25)),
      tool("Zoom out", "−", () => this.sight.scaleBy(0.8)),
      tool("Show all", "⤢", () => this.sight.fit()),
      tool("Arrange again by what is seen now", "⟲", onArrange),
    );
  }

  legend() {
    const sample = (kind, text) =>
      html(
        "li",
        { class: `of-${kind}` },
        svg(
          "svg",
          { class: `line ${kind}`, width: 34, height: 12, "aria-hidden": "true" },
          svg("path", { class: "stroke", d: "M1 6H30", "marker-end": `url(#arrow-${kind})` }),
          (kind === "denied" || kind === "closed") &&
            svg("path", { class: "cross", d: "M12 2l8 8M20 2l-8 8" }),
        ),
        text,
      );
    return html(
      "ul",
      { class: "legend", "aria-label": "Lines" },
      sample("allowed", "allowed"),
      sample("denied", "denied"),
      sample("opened", "would open"),
      sample("closed", "would close"),
      html("li", {}, shield(), "isolated by a policy"),
    );
  }
}

function arrow(kind) {
  const triangle = svg("path", { d: "M0 1L7 4.5L0 8z", class: `tip ${kind}` });
  const box = {
    viewBox: "0 0 8 9",
    refX: 6.5,
    refY: 4.5,
    markerWidth: 8,
    markerHeight: 9,
    markerUnits: "userSpaceOnUse",
  };
  return svg("marker", { id: `arrow-${kind}`, orient: "auto", ...box }, triangle);
}

const SHIELD = "l6 2.4v4.2q0 4.6-6 6.8q-6-2.2-6-6.8v-4.2z";

const shield = () =>
  svg(
    "svg",
    { width: 14, height: 16, "aria-hidden": "true" },
    svg("path", { class: "guard", d: `M7 1${SHIELD}` }),
  );

const newBox = () => svg("g", { class: "box" }, svg("rect", { rx: 12 }));

function setBox(of, at) {
  move(of, at);
  size(of.firstChild, at);
}

const newLabel = () => svg("g", { class: "label" }, svg("text", { x: 15, y: 23 }));

const SIGNS = { denied: "M-3 -3L3 3M3 -3L-3 3", opened: "M-3.5 0H3.5M0 -3.5V3.5", audit: "M0 -4V1M0 3V4" };

const newMark = () =>
  svg("g", { class: "mark", "aria-hidden": "true" }, svg("circle", { r: 7 }), svg("path"));

function setMark(of, line, { x, y }) {
  of.line = line;
  of.setAttribute("class", `mark ${line.verdict}`);
  of.setAttribute("transform", `translate(${x} ${y})`);
  of.lastChild.setAttribute("d", SIGNS[line.verdict] ?? SIGNS.denied);
}

const move = (of, at) => of.style.setProperty("transform", `translate(${at.x}px, ${at.y}px)`);

function size(rect, at) {
  rect.setAttribute("width", at.width);
  rect.setAttribute("height", at.height);
}

const ruler = document.createElement("canvas").getContext("2d");

// Puts a text that may be long where only so much has room; all of it is in the title.
function setText(of, text, width, px) {
  ruler.font = `600 ${px}px ${getComputedStyle(document.body).fontFamily}`;
  let shown = text;
  while (shown.length > 3 && ruler.measureText(`${shown}…`).width > width) shown = shown.slice(0, -1);
  const whole = ruler.measureText(text).width <= width;
  of.replaceChildren(whole ? text : `${shown}…`);
  if (!whole) of.append(svg("title", {}, text));
}

// Starts the page, asks for the state, and shows it in whichever view is chosen.
//
//   /api/state, every two seconds while the page is seen --> arranged, filtered --> graph, table or policies
//   a click there --> panel

import { AskError, get } from "./api.js";
import { byId, fill, html } from "./dom.js";
import { Graph } from "./graph.js";
import { Matrix } from "./matrix.js";
import { WAYS, placed } from "./layout.js";
import { arranged, kept, linesOf, nameOf, plannedLines, portOf, reduced } from "./model.js";
import { Panel } from "./panel.js";
import { Policies } from "./policies.js";
import { Table } from "./table.js";
import { plural } from "./words.js";

const EVERY_MS = 2000;
const SPOKEN = 3;
const MOST_CARDS = 150; // more than that nobody can read in one picture

class App {
  constructor() {
    this.filters = { text: "", namespace: "", denied: false };
    this.perPod = false;
    this.selected = null;
    this.pairs = this.way = null;
    this.seenDenied = null;
    this.panel = new Panel({
      say: (text) => this.say(text),
      onPlan: (plan) => this.setPlan(plan),
      onClose: () => this.closed(),
    });
    const opened = { onRow: (row) => this.openRow(row) };
    this.graph = new Graph({
      onCard: (key) => this.openCard(key),
      onLine: (line) => this.openLine(line),
      onArrange: () => this.arrange(),
    });
    this.views = new Map([
      ["graph", { title: "Graph", of: this.graph, show: () => this.showGraph() }],
      [
        "table",
        {
          title: "Table",
          of: new Table(opened),
          show: (of) =>
            of.show({ model: this.model, rows: this.rows, selected: this.selected, now: this.state.time }),
        },
      ],
      [
        "matrix",
        {
          title: "Matrix",
          of: new Matrix({ onPair: (pair) => this.panel.ask(this.model, pair, true) }),
          show: (of) => of.show({ state: this.state, filters: this.filters }),
        },
      ],
      [
        "policies",
        {
          title: "Policies",
          of: new Policies({
            onPod: (id) => this.openCard(this.model.entities.get(id)?.card),
            onTry: (text) => this.panel.rehearse(this.model, text),
          }),
          show: (of) =>
            of.show({
              policies: this.state.cluster.policies,
              filters: this.filters,
              changes: this.state.changes,
            }),
        },
      ],
    ]);
    this.makeTabs();
    this.makeFilters();
    byId("ask").addEventListener("click", () => this.model && this.panel.ask(this.model));
    byId("plan").addEventListener(
      "click",
      () =>
        this.model &&
        this.panel.rehearse(this.model, template(this.filters.namespace || this.state.namespace)),
    );
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
  }

  // Asking

  async look() {
    clearTimeout(this.timer);
    try {
      const state = await get("/api/state", { known: this.state?.version ?? "" });
      if (state.cluster) this.take(state);
      byId("pulse").className = "pulse good";
      byId("pulse").textContent = this.state.live ? "live" : "manifests, no traffic";
    } catch (error) {
      if (!(error instanceof AskError)) throw error;
      byId("pulse").className = "pulse bad";
      byId("pulse").textContent = error.message;
    }
    if (!document.hidden) this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  take(state) {
    const first = !this.state;
    this.state = state;
    if (first && !state.live) this.choose("matrix");
    this.model = arranged(state);
    this.panel.model = this.model;
    this.panel.policies = state.cluster.policies;
    this.panel.services = state.cluster.services.map((service) => service.id);
    byId("where").textContent = state.where;
    this.offerNamespaces();
    this.announce();
    this.notices();
    this.show();
  }

  // Showing

  show() {
    if (!this.state) return;
    this.rows = kept(this.model, this.state.rows, this.filters);
    const view = this.views.get(this.view);
    view.show(view.of);
    const denied = this.state.rows.filter((row) => row.verdict === "denied").length;
    fill(
      byId("summary"),
      html("span", {}, plural(this.state.cluster.pods.length, "Pod")),
      html("span", {}, plural(this.connections(), "connection")),
      html(
        "span",
        { class: denied ? "some" : "" },
        denied > 0 && html("span", { class: "sign denied", "aria-hidden": "true" }, "✕"),
        `${denied} denied`,
      ),
    );
  }

  connections() {
    return this.state.rows.reduce((sum, row) => sum + (row.verdict === "allowed" ? row.count : 0), 0);
  }

  showGraph() {
    const all = linesOf(this.model, this.state.rows, false);
    this.pairs ??= all.map((line) => [line.source, line.target]);
    const lit = this.lit();
    const model = reduced(this.model, lit ?? new Set(), MOST_CARDS);
    const known = this.pairs.filter((pair) => pair.every((key) => model.cards.has(key)));
    this.graph.show({
      model,
      left: this.model.cards.size - model.cards.size,
      lines: [
        ...linesOf(model, this.rows, this.perPod),
        ...(this.plan ? plannedLines(model, this.plan, this.perPod) : []),
      ],
      rehearsed: Boolean(this.plan),
      placed: this.placed(model, known),
      perPod: this.perPod,
      lit,
      selected: this.selected,
      badges: this.badges(),
    });
  }

  // As it was arranged, or the way that is seen larger.
  placed(model, pairs) {
    const tried = (this.way ? [this.way] : WAYS).map((way) => ({
      way,
      at: placed(model, pairs, this.perPod, way),
    }));
    const best = tried.sort(
      (one, other) => this.graph.sight.scaleOf(other.at) - this.graph.sight.scaleOf(one.at),
    )[0];
    this.way = best.way;
    return best.at;
  }

  // The cards that are not faded: those the filtered lines touch, and those of the chosen namespace.
  lit() {
    const { text, namespace, denied } = this.filters;
    if (!text && !namespace && !denied) return null;
    const touched = this.rows.flatMap((row) =>
      [row.source, row.target].map((id) => this.model.entities.get(id).card),
    );
    const named = [...this.model.cards.values()].filter((card) => {
      if (namespace && card.namespace !== namespace) return false;
      return (
        (namespace || text) &&
        !denied &&
        `${card.namespace}/${card.label}`.toLowerCase().includes(text.toLowerCase())
      );
    });
    return new Set([...touched, ...named.map((card) => card.key)]);
  }

  badges() {
    const badges = new Map([...this.model.cards.keys()].map((key) => [key, { denied: 0, guarded: false }]));
    for (const row of this.state.rows)
      if (row.verdict === "denied") badges.get(this.model.entities.get(row.target).card).denied += 1;
    for (const { pod, card } of this.model.entities.values())
      if (pod && (pod.isolated.ingress.length || pod.isolated.egress.length)) badges.get(card).guarded = true;
    return badges;
  }

  setPlan(plan) {
    this.plan = plan;
    this.show();
  }

  arrange() {
    this.pairs = this.way = null;
    this.graph.sight.moved = false;
    this.show();
    this.graph.sight.fit();
  }

  // Opening

  select(id) {
    this.selected = id;
    this.show();
  }

  closed() {
    this.plan = null;
    this.select(null);
  }

  openCard(key) {
    if (!key || !this.model.cards.has(key)) return;
    this.select(key);
    this.panel.card(this.model, key, this.state.rows, this.state.time);
  }

  openLine(line) {
    this.select(line.id);
    this.panel.line(this.model, line, this.state.time);
  }

  openRow(row) {
    this.select(row.id);
    this.panel.row(this.model, row, this.state.time);
  }

  // Saying

  say(text) {
    byId("said").textContent = text;
  }

  // Speaks of denials that were not there before; not of those that the page began with.
  announce() {
    const denied = new Map(
      this.state.rows.filter((row) => row.verdict === "denied").map((row) => [row.id, row]),
    );
    if (this.seenDenied) {
      const fresh = [...denied.values()].filter((row) => !this.seenDenied.has(row.id));
      const said = fresh
        .slice(0, SPOKEN)
        .map(
          (row) => `${nameOf(this.model, row.source)} to ${nameOf(this.model, row.target)} on ${portOf(row)}`,
        );
      if (fresh.length)
        this.say(
          `Denied: ${said.join("; ")}${fresh.length > SPOKEN ? ` and ${fresh.length - SPOKEN} more` : ""}`,
        );
    }
    this.seenDenied = denied;
  }

  notices() {
    const silent = Object.entries(this.state.silent).map(
      ([node, why]) => `The agent of ${node} is silent: ${why}`,
    );
    const said = [...silent, ...this.state.problems];
    if (said.join("\n") === this.noticed) return;
    this.noticed = said.join("\n");
    const [first, ...rest] = said;
    const more = html(
      "details",
      {},
      html("summary", {}, `${first} (and ${rest.length} more)`),
      html(
        "ul",
        {},
        rest.map((text) => html("li", {}, text)),
      ),
    );
    fill(byId("notices"), first && (rest.length ? more : html("p", {}, first)));
  }

  // Views and filters

  makeTabs() {
    const tabs = [...this.views].map(([name, { title }]) =>
      html(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${name}`,
          "aria-controls": "view",
          onclick: () => this.choose(name),
        },
        title,
      ),
    );
    const bar = byId("tabs");
    bar.append(...tabs);
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
      next.click();
      next.focus();
    });
    this.choose("graph");
  }

  choose(name) {
    this.view = name;
    for (const other of this.views.keys()) {
      byId(`tab-${other}`).setAttribute("aria-selected", String(other === name));
      byId(`tab-${other}`).tabIndex = other === name ? 0 : -1;
    }
    byId("view").replaceChildren(this.views.get(name).of.element);
    document.body.dataset.view = name;
    this.show();
  }

  makeFilters() {
    const form = byId("filters");
    const lines = html(
      "div",
      { class: "switch", role: "group", "aria-label": "Lines between" },
      [
        [false, "Workloads"],
        [true, "Pods"],
      ].map(([perPod, text]) =>
        html(
          "button",
          {
            type: "button",
            "aria-pressed": String(perPod === this.perPod),
            onclick: (event) => this.setPerPod(perPod, event.target),
          },
          text,
        ),
      ),
    );
    form.append(lines);
    const changed = () => {
      this.filters = {
        text: byId("text").value,
        namespace: byId("namespace").value,
        denied: byId("denied").checked,
      };
      this.show();
    };
    form.addEventListener("input", changed);
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  setPerPod(perPod, button) {
    this.perPod = perPod;
    for (const each of button.parentElement.children)
      each.setAttribute("aria-pressed", String(each === button));
    this.graph.sight.moved = false;
    this.way = null;
    this.show();
  }

  offerNamespaces() {
    const select = byId("namespace");
    const names = this.state.cluster.namespaces;
    if (
      [...select.options]
        .slice(1)
        .map((option) => option.value)
        .join("\n") === names.join("\n")
    )
      return;
    const chosen = select.value;
    select.replaceChildren(
      html("option", { value: "" }, "All namespaces"),
      ...names.map((name) => html("option", { value: name }, name)),
    );
    select.value = names.includes(chosen) ? chosen : "";
  }
}

// What a rehearsal begins with when it is about a policy that is not there yet.
const template = (namespace) => `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  namespace: ${namespace}
  name: default-deny
spec:
  podSelector: {}
  policyTypes:
  - Ingress
`;

new App().look();

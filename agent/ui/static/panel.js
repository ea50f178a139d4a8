// The panel beside the view: a workload, a connection with its `why`, a question, a rehearsal.

import { AskError, get, post } from "./api.js";
import { drawing } from "./drawing.js";
import { byId, fill, html } from "./dom.js";
import { sentence, steps } from "./explained.js";
import { nameOf, portOf } from "./model.js";
import { sign, verdict } from "./table.js";
import { planned, section, spoken } from "./planned.js";
import { ago, plural } from "./words.js";

const MOST_ROWS = 40;

export class Panel {
  // say(text): speaks; onPlan(plan or null): what a rehearsal shows in the graph; onClose().
  constructor({ say, onPlan, onClose }) {
    Object.assign(this, { say, onPlan, onClose });
    this.element = byId("panel");
    this.element.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
    this.turn = 0;
  }

  open(title, ...content) {
    this.onPlan(null);
    const heading = html("h2", { tabindex: "-1" }, title);
    if (this.element.hidden) this.opener = document.activeElement;
    this.element.hidden = false;
    document.body.classList.add("with-panel");
    this.element.replaceChildren(
      html(
        "div",
        { class: "title" },
        heading,
        html(
          "button",
          { type: "button", class: "plain", "aria-label": "Close", onclick: () => this.close() },
          "✕",
        ),
      ),
      ...content.flat().filter(Boolean),
    );
    this.element.scrollTop = 0;
    heading.focus({ preventScroll: true });
  }

  close() {
    this.element.hidden = true;
    document.body.classList.remove("with-panel");
    this.turn += 1;
    this.onClose();
    if (this.opener?.isConnected) this.opener.focus({ preventScroll: true });
  }

  // A workload: its Pods, what isolates it, its connections.
  card(model, key, rows, now) {
    const card = model.cards.get(key);
    const pods = card.members.map((id) => model.entities.get(id)).filter((entity) => entity.pod);
    const own = rows.filter((row) =>
      [row.source, row.target].some((id) => model.entities.get(id)?.card === key),
    );
    const policies = [
      ...new Set(pods.flatMap(({ pod }) => [...pod.isolated.ingress, ...pod.isolated.egress])),
    ];
    this.open(
      card.label,
      html(
        "p",
        { class: "quiet" },
        [card.kind, card.namespace && `in ${card.namespace}`].filter(Boolean).join(" "),
      ),
      policies.length > 0 &&
        section(
          "Isolated by",
          html(
            "ul",
            { class: "chips" },
            policies.map((policy) =>
              html("li", {}, html("button", { type: "button", onclick: () => this.policy(policy) }, policy)),
            ),
          ),
        ),
      pods.length > 0 &&
        policies.length === 0 &&
        html(
          "p",
          { class: "quiet" },
          "No policy isolates it: everybody may reach it, and it may reach everybody.",
        ),
      this.connections(model, own, now),
      pods.length > 0 &&
        section(
          "Pods",
          html(
            "ul",
            { class: "plainlist" },
            pods.map(({ pod }) =>
              html(
                "li",
                {},
                html("span", {}, pod.name),
                html(
                  "span",
                  { class: "quiet mono" },
                  `${pod.addresses.join(" ")} on ${pod.node || "no node"}`,
                ),
              ),
            ),
          ),
        ),
      pods.length > 0 &&
        html(
          "div",
          { class: "row" },
          html(
            "button",
            { type: "button", onclick: () => this.ask(model, { target: pods[0].id }) },
            "Ask why somebody cannot reach it",
          ),
        ),
    );
  }

  // A line of the graph: with one connection behind it that one, else all of them to choose from.
  line(model, line, now) {
    const rows = [...line.rows].sort((one, other) => other.count - one.count);
    return this.row(model, rows[0], now, rows);
  }

  row(model, row, now, alike = []) {
    const answer = html(
      "div",
      { class: "answer", "aria-busy": "true" },
      html("p", { class: "quiet" }, "Asking why…"),
    );
    const seen = `${plural(row.count, row.verdict === "allowed" ? "connection" : "packet")}, the last ${ago(now - row.last)}`;
    this.open(
      "Connection",
      html(
        "dl",
        { class: "ends" },
        html("dt", {}, "From"),
        html("dd", {}, nameOf(model, row.source)),
        html("dt", {}, "To"),
        html("dd", {}, nameOf(model, row.target)),
        html("dt", {}, "On"),
        html("dd", {}, portOf(row)),
        html("dt", {}, "Seen"),
        html("dd", {}, verdict(row), ` · ${seen}`),
        row.services.length > 0 && [html("dt", {}, "Service"), html("dd", {}, row.services.join(", "))],
      ),
      answer,
      alike.length > 1 && this.connections(model, alike, now, "All connections of this line"),
    );
    this.answer(
      answer,
      model,
      { source: row.source, target: row.target, port: row.port || "", protocol: row.protocol },
      row,
    );
  }

  connections(model, rows, now, title = "Connections") {
    if (!rows.length) return section(title, html("p", { class: "quiet" }, "None was seen yet."));
    const sorted = [...rows].sort((one, other) =>
      one.verdict === other.verdict ? other.last - one.last : other.verdict.localeCompare(one.verdict),
    );
    const item = (row) =>
      html(
        "li",
        { class: row.verdict },
        html(
          "button",
          { type: "button", class: "connection", onclick: () => this.row(model, row, now) },
          sign(row),
          html("span", { class: "hidden" }, `${row.verdict}: `),
          html(
            "span",
            { class: "pair" },
            html("span", {}, nameOf(model, row.source)),
            html(
              "span",
              { class: "to" },
              html("span", { "aria-hidden": "true" }, "→ "),
              html("span", { class: "hidden" }, "to "),
              nameOf(model, row.target),
            ),
          ),
          html("span", { class: "mono quiet" }, portOf(row)),
        ),
      );
    return section(
      `${title} (${rows.length})`,
      html("ul", { class: "connections" }, sorted.slice(0, MOST_ROWS).map(item)),
      rows.length > MOST_ROWS &&
        html("p", { class: "quiet" }, `and ${rows.length - MOST_ROWS} more in the table`),
    );
  }

  // A question typed by hand.
  ask(model, { source = "", target = "", port = "", protocol = "TCP" } = {}, atOnce = false) {
    const names = [...model.entities.keys(), ...(this.services ?? [])];
    const input = (name, label, value, more = {}) =>
      html(
        "label",
        { class: "labelled" },
        label,
        html("input", { name, value, autocomplete: "off", spellcheck: "false", ...more }),
      );
    const answer = html("div", { class: "answer" });
    const form = html(
      "form",
      { class: "ask" },
      html(
        "datalist",
        { id: "names" },
        names.map((name) => html("option", { value: name })),
      ),
      input("source", "From", source, {
        list: "names",
        required: true,
        placeholder: "deploy/shop/web, an address",
      }),
      input("target", "To", target, {
        list: "names",
        required: true,
        placeholder: "svc/shop/api, pod/shop/db-0",
      }),
      html(
        "div",
        { class: "pairs" },
        input("port", "Port", port, { placeholder: "80 or http" }),
        html(
          "label",
          { class: "labelled" },
          "Protocol",
          html(
            "select",
            { name: "protocol" },
            ["TCP", "UDP", "SCTP"].map((name) => html("option", { selected: name === protocol }, name)),
          ),
        ),
      ),
      html("button", { type: "submit", class: "primary" }, "Why?"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.answer(answer, model, Object.fromEntries(new FormData(form)));
    });
    this.open(
      "Ask why",
      html("p", { class: "quiet" }, "Pods, workloads, Services, nodes, names or addresses, as for podwall why."),
      form,
      answer,
    );
    if (atOnce) form.requestSubmit();
    else form.querySelector("input").focus();
  }

  // Puts the answer of `why` into an element; row: what was seen of it, if anything.
  async answer(into, model, question, row = null) {
    const turn = (this.turn += 1);
    const found = await asked(() => get("/api/why", question));
    if (turn !== this.turn) return;
    into.removeAttribute("aria-busy");
    if (found.failure) {
      fill(into, html("p", { class: "failure" }, found.failure));
      this.say(found.failure);
      return;
    }
    this.say(found.sentence);
    fill(
      into,
      sentence(found, row),
      steps(found),
      found.patches.map((patch) => this.patch(model, patch)),
      found.policies.map((policy) =>
        section(
          `Policy ${policy.key}`,
          drawing(policy, (id) => this.ask(model, { target: id })),
          html(
            "div",
            { class: "row" },
            html(
              "button",
              { type: "button", onclick: () => this.rehearse(model, policy.manifest) },
              "What if it were different?",
            ),
          ),
        ),
      ),
    );
  }

  // What if: a manifest, edited, and what it would do.
  rehearse(model, manifest, atOnce = false) {
    const text = html(
      "textarea",
      { name: "manifest", rows: "18", spellcheck: "false", autocapitalize: "off" },
      manifest,
    );
    const answer = html("div", { class: "answer" });
    const form = html(
      "form",
      { class: "ask" },
      html("label", { class: "labelled" }, "Manifest: a NetworkPolicy, or others", text),
      html(
        "div",
        { class: "row" },
        html("button", { type: "submit", class: "primary" }, "Rehearse"),
        html("button", { type: "button", onclick: () => this.ended(answer) }, "Clear the graph"),
      ),
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const turn = (this.turn += 1);
      const found = await asked(() => post("/api/plan", { manifest: text.value }));
      if (turn !== this.turn) return;
      this.onPlan(found.failure ? null : found);
      fill(answer, found.failure ? html("p", { class: "failure" }, found.failure) : planned(found));
      this.say(found.failure ?? spoken(found));
    });
    this.open(
      "What if",
      html("p", { class: "quiet" }, "Nothing is changed: the answer is computed from the cluster as it is."),
      form,
      answer,
    );
    if (atOnce) form.requestSubmit();
    else text.focus();
  }

  ended(answer) {
    fill(answer);
    this.onPlan(null);
  }

  patch(model, { text, manifest }) {
    const rehearse = html(
      "button",
      { type: "button", onclick: () => this.rehearse(model, manifest, true) },
      "What else would that open?",
    );
    return section(
      "It would be allowed with",
      html("pre", { tabindex: "0" }, text),
      manifest && html("div", { class: "row" }, rehearse),
    );
  }

  async policy(key) {
    const { namespace, name } = this.policies.find((policy) => policy.key === key);
    const policy = await asked(() => get("/api/policy", { namespace, name }));
    if (policy.failure) return this.open("Policy", html("p", { class: "failure" }, policy.failure));
    this.open(
      policy.key,
      html("p", { class: "quiet" }, "NetworkPolicy"),
      drawing(policy, (id) => this.ask(this.model, { target: id })),
      html(
        "div",
        { class: "row" },
        html(
          "button",
          { type: "button", onclick: () => this.rehearse(this.model, policy.manifest) },
          "What if it were different?",
        ),
      ),
      html(
        "details",
        { class: "manifest" },
        html("summary", {}, "As YAML"),
        html("pre", { tabindex: "0" }, policy.manifest),
      ),
    );
  }
}

async function asked(question) {
  try {
    return await question();
  } catch (error) {
    if (!(error instanceof AskError)) throw error;
    return { failure: error.message };
  }
}

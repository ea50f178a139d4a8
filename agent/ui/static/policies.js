// All policies, each as a drawing.

import { AskError, get } from "./api.js";
import { drawing } from "./drawing.js";
import { fill, html } from "./dom.js";
import { plural } from "./words.js";

export class Policies {
  // onPod(id), onTry(manifest): what a Pod's name and "What if" open.
  constructor({ onPod, onTry }) {
    this.onPod = onPod;
    this.onTry = onTry;
    this.list = html("ul", { class: "list" });
    this.detail = html("div", { class: "detail", tabindex: "-1" });
    this.element = html(
      "div",
      { class: "policies" },
      html("nav", { "aria-label": "Policies" }, this.list),
      this.detail,
    );
  }

  show({ policies, filters, changes }) {
    const words = filters.text.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = policies.filter(
      (policy) =>
        (!filters.namespace || policy.namespace === filters.namespace) &&
        words.every((word) => policy.key.toLowerCase().includes(word)),
    );
    fill(
      this.list,
      shown.map((policy) => this.item(policy)),
    );
    if (!policies.length)
      fill(
        this.list,
        html("li", { class: "quiet" }, "There is no NetworkPolicy: everybody may reach everybody."),
      );
    const chosen = policies.find((policy) => policy.key === this.chosen) ?? shown[0];
    if (!chosen) fill(this.detail);
    else if (chosen.key !== this.chosen || changes !== this.changes) this.choose(chosen);
    this.changes = changes;
  }

  item(policy) {
    return html(
      "li",
      {},
      html(
        "button",
        {
          type: "button",
          "data-key": policy.key,
          "aria-current": policy.key === this.chosen ? "true" : null,
          onclick: () => this.choose(policy, true),
        },
        html("strong", {}, policy.name),
        html(
          "span",
          { class: "quiet" },
          `${policy.namespace} · ${policy.types.join(", ").toLowerCase()} · ${plural(policy.pods, "Pod")}`,
        ),
        policy.problems.length > 0 && html("span", { class: "sign denied" }, "cannot be used in part"),
      ),
    );
  }

  async choose({ key, namespace, name }, focus = false) {
    this.chosen = key;
    for (const button of this.list.querySelectorAll("button"))
      if (button.dataset.key === key) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    try {
      const policy = await get("/api/policy", { namespace, name });
      fill(
        this.detail,
        html("h2", {}, policy.key),
        drawing(policy, this.onPod),
        html(
          "div",
          { class: "row" },
          html(
            "button",
            { type: "button", onclick: () => this.onTry(policy.manifest) },
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
    } catch (error) {
      if (!(error instanceof AskError)) throw error;
      fill(this.detail, html("p", { class: "failure" }, error.message));
    }
    if (focus) this.detail.focus();
  }
}

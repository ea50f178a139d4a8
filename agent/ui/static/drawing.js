// A policy as a drawing: who may reach the Pods it selects, these Pods, and whom they may reach.
//
//   from --ports--> [ selected ] --ports--> to

import { html } from "./dom.js";
import { plural } from "./words.js";

const MOST = 6;

// drawing: as /api/policy says it; onPod(id): what a Pod's name opens.
export function drawing(policy, onPod) {
  return html(
    "figure",
    { class: "policy", "aria-label": `NetworkPolicy ${policy.key}` },
    html(
      "div",
      { class: "flow" },
      side("in", "May reach them", policy.ingress, onPod),
      html(
        "div",
        { class: "selected" },
        html("p", { class: "head" }, policy.selects),
        members(policy.selected, onPod, "selects no Pod"),
      ),
      side("out", "They may reach", policy.egress, onPod),
    ),
    policy.problems.length > 0 &&
      html(
        "ul",
        { class: "problems" },
        policy.problems.map((problem) => html("li", {}, `Cannot be used: ${problem}`)),
      ),
  );
}

function side(way, title, { isolates, rules }, onPod) {
  const content = !isolates
    ? html("p", { class: "free" }, "Everybody: this policy does not say")
    : rules.length === 0
      ? html(
          "p",
          { class: "none" },
          html("span", { class: "sign denied", "aria-hidden": "true" }, "✕"),
          "nobody",
        )
      : html(
          "ol",
          {},
          rules.map((rule) => ruleOf(way, rule, onPod)),
        );
  return html(
    "div",
    { role: "group", "aria-label": title, class: `side ${way}${isolates ? "" : " open"}` },
    html("p", { class: "head" }, title),
    content,
  );
}

function ruleOf(way, rule, onPod) {
  const ports = html(
    "p",
    { class: "ports" },
    rule.ports.map((port) => html("span", {}, port)),
  );
  const peers = html(
    "ul",
    { class: "peers" },
    rule.peers.map((peer) => peerOf(peer, onPod)),
  );
  return html("li", { class: "rule", title: rule.field }, peers, ports);
}

function peerOf(peer, onPod) {
  return html(
    "li",
    { class: `peer ${peer.kind}` },
    html("span", { class: "words" }, peer.words),
    peer.kind === "pods" && members(peer.pods, onPod, "matches no Pod"),
  );
}

function members({ total, ids }, onPod, none) {
  if (!total) return html("p", { class: "none" }, none);
  const pod = (id) =>
    html(
      "li",
      {},
      html("button", { type: "button", class: "link", onclick: () => onPod(id) }, id.replace(/^pod\//, "")),
    );
  const rest = total - Math.min(MOST, ids.length);
  if (total <= MOST) return html("ul", { class: "pods" }, ids.map(pod));
  return html(
    "details",
    { class: "pods" },
    html("summary", {}, plural(total, "Pod")),
    html("ul", { class: "pods" }, ids.map(pod), total > ids.length && html("li", {}, `and ${rest} more`)),
  );
}

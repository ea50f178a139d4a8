// An answer of `podwall why`: its sentence, and the way step by step.

import { html } from "./dom.js";
import { section } from "./planned.js";

const MARKS = new Map([
  [true, ["✓", "passes"]],
  [false, ["✕", "stops here"]],
  [null, ["·", ""]],
]);

// row: what was seen of the connection, if anything.
export function sentence(found, row) {
  const kind = found.allowed ? "allowed" : "denied";
  const [word, what = "", ...details] = found.sentence.split(": ");
  const differs = row && (row.verdict === "denied") === found.allowed;
  return html(
    "div",
    { class: `sentence ${kind}` },
    html(
      "p",
      {},
      html(
        "strong",
        {},
        html("span", { class: `sign ${kind}`, "aria-hidden": "true" }, found.allowed ? "✓" : "✕"),
        word,
      ),
      what && `: ${what}`,
    ),
    details.length > 0 && html("p", { class: "quiet" }, details.join(": ")),
    found.pairs.text && html("p", {}, found.pairs.text),
    differs &&
      html(
        "p",
        { class: "quiet" },
        `It was seen ${row.verdict}, and is ${kind} by the objects as they are now: they have changed since, or something else decides.`,
      ),
  );
}

export function steps(found) {
  const all = [...found.steps, ...found.nodes.map(rulesStep)];
  if (!all.length) return null;
  return section(
    "The way, step by step",
    html(
      "ol",
      { class: "steps" },
      all.map((step) => {
        const [mark, spoken] = MARKS.get(step.ok);
        const kind = step.ok === null ? "" : step.ok ? "allowed" : "denied";
        const places = step.fields.map((field) =>
          html(
            "span",
            { class: "place mono quiet" },
            field.file ? `${field.file}:${field.line}` : `${field.object} ${field.field}`,
          ),
        );
        return html(
          "li",
          {},
          html(
            "span",
            { class: `sign ${kind}` },
            html("span", { "aria-hidden": "true" }, mark),
            spoken && html("span", { class: "hidden" }, `${spoken}: `),
          ),
          html("span", { class: "stage" }, step.stage),
          html("span", {}, step.text, places),
        );
      }),
    ),
  );
}

// What a node's rules, read from its kernel, have to do with it.
function rulesStep({ node, agrees, differs, silent }) {
  const text = silent
    ? `those on ${node} were not compared: ${silent}`
    : agrees
      ? `those in the kernel of ${node} do just this`
      : `on ${node}: ${differs.join("; ")}`;
  return { stage: "rules", ok: agrees, text, fields: [] };
}

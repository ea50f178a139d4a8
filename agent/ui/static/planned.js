// What a rehearsal found, in words; the graph draws the same.

import { html } from "./dom.js";
import { plural } from "./words.js";

const MOST_NAMES = 4;
const MOST_CUTS = 40;

export const section = (title, ...content) => html("section", {}, html("h3", {}, title), content);

function summary(found) {
  const count = (change) => found.rows.filter((row) => row.change === change).length;
  if (!found.changed.length && found.notes.length) return "It changes nothing that is looked at.";
  if (!found.changed.length) return "It changes nothing: the cluster is so already.";
  const said = [
    count("opens") && `opens ${plural(count("opens"), "way")}`,
    count("closes") && `closes ${plural(count("closes"), "way")}`,
    found.cuts_total && `cuts ${plural(found.cuts_total, "live connection")}`,
  ].filter(Boolean);
  return said.length ? `It ${said.join(", ")}.` : "No way between anybody changes.";
}

// The summary as it is spoken: that there are notes must not be for eyes alone.
export const spoken = (found) =>
  [summary(found), found.notes.length && `${plural(found.notes.length, "note")}.`].filter(Boolean).join(" ");

export function planned(found) {
  return [
    html(
      "div",
      { class: `sentence ${found.closes ? "denied" : "allowed"}` },
      html("p", {}, html("strong", {}, summary(found))),
    ),
    found.unusable.length > 0 &&
      html(
        "ul",
        { class: "problems" },
        found.unusable.map((text) => html("li", {}, text)),
      ),
    found.sentences.length > 0 &&
      html(
        "ul",
        { class: "plainlist" },
        found.sentences.map((text) => html("li", {}, text)),
      ),
    found.notes.length > 0 &&
      section(
        "Notes",
        html(
          "ul",
          { class: "plainlist notes" },
          found.notes.map((text) => html("li", {}, text)),
        ),
      ),
    ways(found, "closes", "Closes"),
    ways(found, "opens", "Opens"),
    cuts(found),
    services(found),
  ];
}

function ways(found, change, title) {
  const rows = found.rows.filter((row) => row.change === change);
  return rows.length > 0 && section(title, html("ul", { class: "ways" }, rows.map(way)));
}

function way(row) {
  const opens = row.change === "opens";
  const declared =
    row.declared.length > 0 && row.declared.join(", ") !== row.ports
      ? ` (declared: ${row.declared.join(", ")})`
      : "";
  return html(
    "li",
    {},
    html("span", { class: `sign ${opens ? "allowed" : "denied"}`, "aria-hidden": "true" }, opens ? "+" : "✕"),
    html(
      "span",
      {},
      few(row.sources),
      html("span", { class: "quiet" }, " → "),
      few(row.targets),
      html("span", { class: "mono quiet" }, ` ${row.ports}${declared}`),
    ),
  );
}

function few(groups) {
  const names = groups.flatMap((group) => group.ids).map((id) => id.replace(/^pod\//, ""));
  const more = names.length - MOST_NAMES;
  return more > 0 ? `${names.slice(0, MOST_NAMES).join(", ")} and ${more} more` : names.join(", ");
}

function cuts(found) {
  if (!found.cuts_total) return null;
  const cut = ({ source, target, protocol, port, reason }) =>
    html(
      "li",
      {},
      html("span", { class: "sign denied", "aria-hidden": "true" }, "✕"),
      html(
        "span",
        {},
        `${source} → ${target} `,
        html("span", { class: "mono quiet" }, `${protocol} ${port}`),
        html("span", { class: "quiet" }, ` ${reason}`),
      ),
    );
  const more = found.cuts_total - MOST_CUTS;
  return section(
    `Cuts (${found.cuts_total})`,
    html("ul", { class: "ways" }, found.cuts.slice(0, MOST_CUTS).map(cut)),
    more > 0 && html("p", { class: "quiet" }, `and ${more} more`),
  );
}

function services(found) {
  if (!found.services.length) return null;
  const said = (each) =>
    `${each.service}:${each.port}: ${plural(each.before.length, "endpoint")} before, ${each.after.length} after`;
  return section(
    "Services",
    html(
      "ul",
      { class: "plainlist" },
      found.services.map((each) => html("li", {}, said(each))),
    ),
  );
}

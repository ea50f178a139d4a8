// What the server says, arranged for drawing. Nothing here touches the page.
//
//   state.cluster.pods --> cards: one per workload, in one box per namespace; nodes and outside addresses likewise
//   state.rows         --> lines: rows between the same two cards (or Pods) and of the same verdict

export const OUTSIDE = "outside";
export const NODES = "nodes";

// entities: id -> {id, label, card, box}; cards: key -> {key, box, label, kind, members}; boxes: key -> {key, label}
export function arranged(state) {
  const found = { entities: new Map(), cards: new Map(), boxes: new Map() };
  for (const pod of state.cluster.pods) {
    const { kind, name } = pod.workload;
    addMember(found, {
      id: pod.id,
      label: pod.name,
      pod,
      box: { key: `ns/${pod.namespace}`, label: pod.namespace },
      card: { key: `${pod.namespace}/${kind}/${name}`, label: name, kind, namespace: pod.namespace },
    });
  }
  for (const id of endsOf(state.rows)) if (!found.entities.has(id)) addMember(found, stranger(id));
  return found;
}

function endsOf(rows) {
  return [...new Set(rows.flatMap((row) => [row.source, row.target]))].sort();
}

function stranger(id) {
  if (id.startsWith("pod/")) {
    const [, namespace, name] = id.split("/"); // agents remember its name, though it is gone
    return {
      id,
      label: name,
      box: { key: `ns/${namespace}`, label: namespace },
      card: { key: `${namespace}//gone`, label: "Pods that are gone", kind: "", namespace },
    };
  }
  if (id.startsWith("node/"))
    return {
      id,
      label: id.slice(5),
      box: { key: NODES, label: "Nodes" },
      card: { key: id, label: id.slice(5), kind: "Node", namespace: "" },
    };
  return {
    id,
    label: id,
    box: { key: OUTSIDE, label: "Outside the cluster" },
    card: { key: OUTSIDE, label: "Outside", kind: "Addresses", namespace: "" },
  };
}

function addMember({ entities, cards, boxes }, { id, label, pod, box, card }) {
  if (!boxes.has(box.key)) boxes.set(box.key, { ...box, cards: [] });
  if (!cards.has(card.key)) {
    cards.set(card.key, { ...card, box: box.key, members: [] });
    boxes.get(box.key).cards.push(card.key);
  }
  cards.get(card.key).members.push(id);
  entities.set(id, { id, label, pod, card: card.key, box: box.key });
}

export const placeOf = (entity) => (entity.pod ? entity.pod.namespace : "");

export const nameOf = (model, id) => {
  const entity = model.entities.get(id);
  if (entity?.pod) return `${entity.pod.namespace}/${entity.pod.name}`;
  return id.startsWith("pod/") ? `${id.slice(4)} (gone)` : (entity?.label ?? id);
};

export const portOf = (row) => (row.port ? `${row.protocol} ${row.port}` : row.protocol);

// Which rows the filters leave.
export function kept(model, rows, { text, namespace, denied }) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter((row) => {
    if (denied && row.verdict !== "denied") return false;
    const ends = [row.source, row.target].map((id) => model.entities.get(id));
    if (namespace && !ends.some((end) => end?.pod?.namespace === namespace)) return false;
    return words.every((word) => searched(row, ends).includes(word));
  });
}

function searched(row, ends) {
  const said = ends.flatMap((end) =>
    end?.pod
      ? [
          end.id,
          end.card,
          ...end.pod.addresses,
          ...Object.entries(end.pod.labels).map(([key, value]) => `${key}=${value}`),
        ]
      : [end?.id ?? ""],
  );
  return [...said, portOf(row), row.port, row.verdict, ...(row.policies ?? [])].join(" ").toLowerCase();
}

// The same with so many cards at most, the wanted ones before all others.
export function reduced(model, wanted, most) {
  if (model.cards.size <= most) return model;
  const keys = [...model.cards.keys()];
  const kept = new Set(
    [...keys.filter((key) => wanted.has(key)), ...(wanted.size ? [] : keys)].slice(0, most),
  );
  const boxes = [...model.boxes].map(([key, box]) => [
    key,
    { ...box, cards: box.cards.filter((card) => kept.has(card)) },
  ]);
  return {
    cards: new Map([...model.cards].filter(([key]) => kept.has(key))),
    boxes: new Map(boxes.filter(([, box]) => box.cards.length)),
    entities: new Map([...model.entities].filter(([, entity]) => kept.has(entity.card))),
  };
}

// What a rehearsal opens and closes, as lines of the graph.
export function plannedLines(model, plan, perPod) {
  const lines = new Map();
  const endOf = (id) => {
    if (model.entities.has(id)) return perPod ? id : model.entities.get(id).card;
    return /^(pod|node)\//.test(id) || perPod || !model.cards.has(OUTSIDE) ? null : OUTSIDE;
  };
  const endsOfRow = (groups) => new Set(groups.flatMap((group) => group.ids).map(endOf));
  for (const row of plan.rows)
    for (const source of endsOfRow(row.sources))
      for (const target of endsOfRow(row.targets)) {
        if (!source || !target || source === target) continue;
        const verdict = row.change === "opens" ? "opened" : "closed";
        const id = `${verdict} ${source} ${target}`;
        if (!lines.has(id)) lines.set(id, { id, source, target, verdict, rows: [], count: 0, ports: [] });
        lines.get(id).ports.push(row.ports);
      }
  return [...lines.values()];
}

// Lines between cards, or between single Pods: {id, source, target, verdict, rows, count}.
export function linesOf(model, rows, perPod) {
  const lines = new Map();
  for (const row of rows) {
    const ends = [row.source, row.target].map((id) => model.entities.get(id));
    if (!ends.every(Boolean)) continue;
    const [source, target] = ends.map((end) => (perPod ? end.id : end.card));
    const id = `${row.verdict} ${source} ${target}`;
    if (!lines.has(id)) lines.set(id, { id, source, target, verdict: row.verdict, rows: [], count: 0 });
    const line = lines.get(id);
    line.rows.push(row);
    line.count += row.count;
  }
  return [...lines.values()];
}

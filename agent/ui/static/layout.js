// Where everything stands: workloads in their namespace, namespaces in the picture, from left (who connects) to right
// (who is connected to). The same cards and lines give the same picture, and a picture that stands is kept: new
// lines move nothing, new Pods only what is below and beside them.

import { Graph, layout } from "./vendor/dagre.esm.js";

export const CARD = { width: 184, head: 34, row: 21, foot: 7 };
// The ways of placing that are tried; of those seen equally large the first counts.
export const WAYS = [false, true].flatMap((stacked) => [36, 22, 12].map((gap) => ({ stacked, gap })));

const BOX = { side: 14, head: 34, foot: 14 };

export function heightOf(card, perPod) {
  return perPod ? CARD.head + card.members.length * CARD.row + CARD.foot : CARD.head;
}

// pairs: [card key, card key] of every line. stacked: workloads of a namespace below each other, whoever connects to
// whom; gap: between those below each other. Gives {cards, boxes: key -> {x, y, width, height}, width, height}.
export function placed(model, pairs, perPod, { stacked, gap }) {
  const inside = new Map(
    [...model.boxes.values()].map((box) => [box.key, insideOf(model, box, pairs, perPod, stacked, gap)]),
  );
  const graph = made({ nodesep: gap + 12, ranksep: 76 });
  for (const [key, { width, height }] of inside) graph.setNode(key, { width, height });
  for (const [from, to] of pairs) connect(graph, model.cards.get(from).box, model.cards.get(to).box);
  layout(graph);

  const result = { cards: new Map(), boxes: new Map(), width: 0, height: 0 };
  for (const [key, { width, height, cards }] of inside) {
    const { x, y } = corner(graph.node(key));
    result.boxes.set(key, { x, y, width, height });
    for (const [card, at] of cards) result.cards.set(card, { ...at, x: x + at.x, y: y + at.y });
    result.width = Math.max(result.width, x + width);
    result.height = Math.max(result.height, y + height);
  }
  return result;
}

function insideOf(model, box, pairs, perPod, stacked, gap) {
  const graph = made({ nodesep: gap, ranksep: 58 });
  for (const key of box.cards)
    graph.setNode(key, { width: CARD.width, height: heightOf(model.cards.get(key), perPod) });
  for (const [from, to] of pairs) if (graph.hasNode(from) && graph.hasNode(to)) connect(graph, from, to);
  layout(graph);
  const cards = new Map(
    box.cards.map((key) => {
      const { width, height } = graph.node(key);
      const { x, y } = corner(graph.node(key));
      return [key, { x: x + BOX.side, y: y + BOX.head, width, height }];
    }),
  );
  if (stacked) stack(cards, gap);
  const ends = [...cards.values()];
  return {
    cards,
    width: Math.max(...ends.map((at) => at.x + at.width)) + BOX.side,
    height: Math.max(...ends.map((at) => at.y + at.height)) + BOX.foot,
  };
}

// Those that connect above those that are connected to.
function stack(cards, gap) {
  let y = BOX.head;
  for (const at of [...cards.values()].sort((one, other) => one.x - other.x || one.y - other.y)) {
    Object.assign(at, { x: BOX.side, y });
    y += at.height + gap;
  }
}

function made(options) {
  const graph = new Graph();
  graph.setGraph({ rankdir: "LR", marginx: 0, marginy: 0, ...options });
  return graph;
}

function connect(graph, from, to) {
  if (from !== to) graph.setEdge(from, to, { weight: (graph.edge(from, to)?.weight ?? 0) + 1 });
}

const corner = ({ x, y, width, height }) => ({ x: x - width / 2, y: y - height / 2 });

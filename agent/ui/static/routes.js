// How lines run between cards, as curves that leave and arrive sideways.
//
//   card --right side ~~~ left side--> card        to the left of it: the other way round
//   card --right side -+                           below or above it: out and back at the right
//   card <-right side -+

// Where each line runs, by its id: {d, x, y}, x and y where its mark stands. Lines at one side of a card are spread
// along it; marks keep off cards and off each other.
export function routed(lines, at, cards) {
  const routes = new Map();
  const sides = new Map();
  const stop = (line, end, side, other) => {
    const key = `${side} ${end}`;
    if (!sides.has(key)) sides.set(key, []);
    sides.get(key).push({ line, y: other.y + other.height / 2 });
  };
  const ways = [];
  for (const line of lines) {
    const [from, to] = [at(line.source), at(line.target)];
    if (!from || !to) continue;
    const way =
      to.x >= from.x + from.width
        ? ["right", "left"]
        : to.x + to.width <= from.x
          ? ["left", "right"]
          : ["right", "right"];
    ways.push({ line, from, to, way });
    stop(line, `from ${line.source}`, way[0], to);
    stop(line, `to ${line.target}`, way[1], from);
  }
  for (const stops of sides.values()) stops.sort((one, other) => one.y - other.y);
  const y = (line, end, side, box) => {
    const stops = sides.get(`${side} ${end}`);
    const index = stops.findIndex((each) => each.line === line);
    return box.y + (box.height * (index + 1)) / (stops.length + 1);
  };
  const marks = [];
  for (const { line, from, to, way } of ways) {
    const start = {
      x: way[0] === "right" ? from.x + from.width : from.x,
      y: y(line, `from ${line.source}`, way[0], from),
    };
    const end = {
      x: way[1] === "right" ? to.x + to.width : to.x,
      y: y(line, `to ${line.target}`, way[1], to),
    };
    if (line.source === line.target)
      [start.y, end.y] = [from.y + from.height * 0.25, from.y + from.height * 0.75];
    const route = curve(start, end, way);
    const free = (point) =>
      !cards.some((card) => within(point, card)) &&
      !marks.some((mark) => Math.hypot(mark.x - point.x, mark.y - point.y) < MARK);
    const mark = route.points.find(free) ?? route.points[0];
    if (line.verdict !== "allowed") marks.push(mark);
    routes.set(line.id, { d: route.d, ...mark });
  }
  return routes;
}

const MARK = 17;
const MARKED = [0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.9, 0.1]; // along a line, where a mark may stand

const within = (point, { x, y, width, height }) =>
  point.x > x - 9 && point.x < x + width + 9 && point.y > y - 9 && point.y < y + height + 9;

function curve(start, end, [from, to]) {
  const bend =
    from === to ? 46 + Math.abs(end.y - start.y) * 0.12 : Math.max(36, Math.abs(end.x - start.x) * 0.46);
  const first = start.x + (from === "right" ? bend : -bend);
  const second = end.x + (to === "right" ? bend : -bend);
  const point = (t) => {
    const s = 1 - t;
    const mix = (a, b, c, d) => s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
    return { x: mix(start.x, first, second, end.x), y: mix(start.y, start.y, end.y, end.y) };
  };
  return {
    d: `M${start.x} ${start.y}C${first} ${start.y} ${second} ${end.y} ${end.x} ${end.y}`,
    points: MARKED.map(point),
  };
}

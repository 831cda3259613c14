"use strict";
// Places the nodes of a graph, away from the thread that draws the page.
//
// A network is long and thin. It is cut where everything passes through one node, the parts are laid out one by one
// (by dagre: ranks, crossings, coordinates) and put below each other, so that time grows with the number of parts.
// What reaches over many nodes (skip connections of a U-Net, masks, dense blocks) does not take part in that; it is
// drawn as a curve over the result.

const WIDTH = 168, HEIGHT = 40, GAP = 30, ASIDE = 18;
const REACHES = [64, 24, 10, 4]; // edges over more nodes than this are long; less where a part is still too large
const MOST = 90; // nodes of a part, if there is a choice

/** Parts [first, last] of nodes lo…hi: consecutive ones share a node, through which everything passes. */
function parts(edges, lo, hi, level, found) {
  const far = new Int32Array(hi - lo + 1); // how far edges from each node, or from before it, reach
  for (const [a, b] of edges) {
    if (a >= lo && b <= hi && b - a <= REACHES[level]) far[a - lo] = Math.max(far[a - lo], b);
  }
  let first = lo, reach = lo;
  for (let i = lo; i < hi; i++) {
    if (i > first && reach <= i) { // no edge from before i goes beyond i
      push(first, i);
      first = i;
    }
    reach = Math.max(reach, far[i - lo]);
  }
  push(first, hi);

  function push(from, to) {
    if (to - from > MOST && level + 1 < REACHES.length) parts(edges, from, to, level + 1, found);
    else found.push([from, to, REACHES[level]]);
  }
}

/** Nodes that depend on no input and serve one other node alone (weights on their way): beside it, at these steps. */
function satellites(count, inputs, into, from) {
  const constant = new Uint8Array(count), owner = new Int32Array(count).fill(-1), steps = new Int32Array(count);
  for (let i = inputs; i < count; i++) constant[i] = into[i].length < 2 && into[i].every((a) => constant[a]) ? 1 : 0;
  for (let i = count - 1; i >= inputs; i--) {
    if (!constant[i] || from[i].length !== 1) continue;
    const [next] = from[i], end = owner[next] < 0 ? next : owner[next];
    if (owner[next] < 0 && constant[next]) continue;
    owner[i] = end;
    steps[i] = steps[next] + 1;
  }
  return { owner, steps };
}

/** Coordinates of one part as if it were alone; parts of the same form are laid out once. */
function arrange(size, widths, edges, known) {
  const key = `${widths.join()}|${edges.map(([a, b]) => `${a}>${b}`).join()}`;
  if (known.has(key)) return known.get(key);
  const graph = new dagre.graphlib.Graph({ multigraph: true });
  graph.setGraph({ rankdir: "TB", nodesep: ASIDE, ranksep: GAP, edgesep: 10 });
  for (let i = 0; i < size; i++) graph.setNode(String(i), { width: widths[i], height: HEIGHT });
  edges.forEach(([a, b], i) => graph.setEdge(String(a), String(b), {}, String(i)));
  dagre.layout(graph);
  const nodes = Array.from({ length: size }, (_, i) => graph.node(String(i)));
  const routes = edges.map(([a, b], i) => graph.edge(String(a), String(b), String(i)).points);
  known.set(key, { nodes, routes });
  return known.get(key);
}

/**
 * Where everything goes.
 * @param count of nodes, in topological order, the first *inputs* of which are inputs of the model
 * @param edges pairs of indices, none of them twice
 * @returns x and y of the centres, and for each edge the points of a polyline, or null for a curve
 */
function place(count, inputs, edges) {
  const x = new Float64Array(count), y = new Float64Array(count), routes = new Array(edges.length).fill(null);
  const into = Array.from({ length: count }, () => []), from = Array.from({ length: count }, () => []);
  for (const [a, b] of edges) {
    from[a].push(b);
    into[b].push(a);
  }
  const { owner, steps } = satellites(count, inputs, into, from);
  const taken = Array.from({ length: count }, () => [0, 0]); // steps on the left and on the right
  const side = new Int8Array(count);
  for (let i = count - 1; i >= 0; i--) {
    if (owner[i] < 0) continue;
    const next = from[i][0], sides = taken[owner[i]];
    side[i] = steps[i] > 1 ? side[next] : sides[0] <= sides[1] ? -1 : 1;
    const place = side[i] < 0 ? 0 : 1;
    steps[i] = steps[i] > 1 ? steps[next] + 1 : sides[place] + 1;
    sides[place] = Math.max(sides[place], steps[i]);
  }
  const core = [], number = new Int32Array(count).fill(-1);
  for (let i = 0; i < count; i++) if (owner[i] < 0) number[i] = core.push(i) - 1;
  const links = [];
  edges.forEach(([a, b], i) => number[a] >= 0 && number[b] >= 0 && links.push([number[a], number[b], i]));
  stack(core, links, (i) => WIDTH + 2 * Math.max(...taken[i]) * (WIDTH + ASIDE), { x, y, routes });
  for (let i = 0; i < count; i++) {
    if (owner[i] < 0) continue;
    x[i] = x[owner[i]] + side[i] * steps[i] * (WIDTH + ASIDE);
    y[i] = y[owner[i]];
  }
  edges.forEach(([a, b], i) => { // the ends of an edge lie on the boxes, and not on the room for what is beside them
    if (!routes[i]) return;
    const ends = [[routes[i][0], a, HEIGHT / 2], [routes[i].at(-1), b, -HEIGHT / 2]];
    for (const [point, node, border] of ends) {
      point[0] = Math.min(x[node] + WIDTH / 2 - 14, Math.max(x[node] - WIDTH / 2 + 14, point[0]));
      point[1] = y[node] + border;
    }
  });
  edges.forEach(([a, b], i) => {
    if (owner[a] >= 0) routes[i] = [[x[a] - (side[a] * WIDTH) / 2, y[a]], [x[b] + (side[a] * WIDTH) / 2, y[b]]];
  });
  let left = Infinity, right = -Infinity, bottom = -Infinity, top = Infinity;
  for (let i = 0; i < count; i++) {
    left = Math.min(left, x[i] - WIDTH / 2);
    right = Math.max(right, x[i] + WIDTH / 2);
    top = Math.min(top, y[i] - HEIGHT / 2);
    bottom = Math.max(bottom, y[i] + HEIGHT / 2);
  }
  return { x, y, routes, left, right, top, bottom };
}

/** Lay out the parts of *core* (nodes) and *links* (pairs of positions in it, and the edge) below each other. */
function stack(core, links, width, { x, y, routes }) {
  if (!core.length) return;
  const found = [], known = new Map(), from = Array.from({ length: core.length }, () => []);
  links.forEach((link) => from[link[0]].push(link));
  parts(links, 0, core.length - 1, 0, found);
  let bottom = 0;
  found.forEach(([first, last, reach], k) => {
    const inside = [];
    for (let a = first; a <= last; a++) inside.push(...from[a].filter(([, b]) => b <= last && b - a <= reach));
    const widths = core.slice(first, last + 1).map(width);
    const { nodes, routes: lines } = arrange(widths.length, widths, inside.map(([a, b]) => [a - first, b - first]), known);
    const joined = k > 0, anchor = nodes[0], start = core[first];
    const dx = joined ? x[start] - anchor.x : -anchor.x;
    let top = Infinity; // of what is new; the part begins with the last node of the one before
    for (let i = 1; i < nodes.length; i++) top = Math.min(top, nodes[i].y);
    const aside = joined && top < anchor.y + HEIGHT;
    const dy = !joined ? 0 : aside ? bottom + GAP + HEIGHT / 2 - top : y[start] - anchor.y;
    for (let i = joined ? 1 : 0; i < nodes.length; i++) {
      x[core[first + i]] = nodes[i].x + dx;
      y[core[first + i]] = nodes[i].y + dy;
      bottom = Math.max(bottom, nodes[i].y + dy + HEIGHT / 2);
    }
    inside.forEach(([a, , i], at) => {
      if (!(aside && a === first)) routes[i] = lines[at].map((p) => [p.x + dx, p.y + dy]);
    });
  });
}

if (typeof self !== "undefined" && typeof document === "undefined") {
  self.onmessage = (event) => {
    const { id, count, inputs, edges } = event.data;
    try {
      self.postMessage({ id, ...place(count, inputs, edges) });
    } catch (error) {
      self.postMessage({ id, error: String(error) });
    }
  };
}

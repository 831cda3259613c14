"use strict";
// One graph on a canvas: drawn, moved, zoomed, searched, walked through by keys.

const BOX = { width: 168, height: 40 };
const RULER = 14; // pixels at the right: an overview of the whole height

class GraphView {
  /** @param canvas; @param on {select(id), open(id)} */
  constructor(canvas, on) {
    this.canvas = canvas;
    this.on = on;
    this.graph = null;
    this.placed = null;
    this.marks = new Map();
    this.hits = new Set();
    this.selected = null;
    this.companion = null; // what stands for the selected node, where this graph has another in its place
    this.camera = { x: 0, y: 0, scale: 1 };
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  show(graph, placed, marks) {
    const first = !this.placed;
    const kept = this.anchor();
    this.graph = graph;
    this.placed = placed;
    this.marks = marks;
    if (!placed) return this.draw();
    if (first) this.fit();
    else if (kept && graph.byId.has(kept.id)) this.keep(kept);
    else this.fit();
    this.draw();
  }

  /** The node nearest to the middle of the view, so that the view can stay there when the graph changes. */
  anchor() {
    if (!this.placed || !this.graph) return null;
    const { width, height } = this.size();
    const middle = this.toGraph(width / 2, height / 2);
    let best = null, distance = Infinity;
    for (const node of this.graph.nodes) {
      const d = Math.hypot(this.placed.x[node.index] - middle.x, this.placed.y[node.index] - middle.y);
      if (d < distance) [best, distance] = [node, d];
    }
    return best && { id: best.id, dx: this.placed.x[best.index] - this.camera.x, dy: this.placed.y[best.index] - this.camera.y };
  }

  keep({ id, dx, dy }) {
    const i = this.graph.byId.get(id);
    this.camera.x = this.placed.x[i] - dx;
    this.camera.y = this.placed.y[i] - dy;
  }

  size() {
    return { width: this.canvas.clientWidth - RULER, height: this.canvas.clientHeight };
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
      if (this.placed && !this.moved) this.fit();
    }
    this.draw();
  }

  toGraph(px, py) {
    const { width, height } = this.size(), { x, y, scale } = this.camera;
    return { x: x + (px - width / 2) / scale, y: y + (py - height / 2) / scale };
  }

  /** As wide as the pane, from the top: networks are long. */
  fit() {
    if (!this.placed || !this.graph?.nodes.length) return;
    const { width, height } = this.size(), { left, right, top, bottom } = this.placed;
    const scale = Math.min(1, Math.max(0.62, (width - 24) / (right - left)));
    const whole = (bottom - top) * scale < height - 24;
    const x = this.placed.x[0]; // the input, where not all fits
    this.camera.x = (right - left) * scale < width ? (left + right) / 2 : x;
    this.camera.y = whole ? (top + bottom) / 2 : top + (height / 2 - 12) / scale;
    this.camera.scale = scale;
    this.draw();
  }

  /** The whole graph, however small. */
  all() {
    if (!this.placed) return;
    const { width, height } = this.size(), { left, right, top, bottom } = this.placed;
    this.camera = { x: (left + right) / 2, y: (top + bottom) / 2,
      scale: Math.min(1, (width - 16) / (right - left), (height - 16) / (bottom - top)) };
    this.moved = true;
    this.draw();
  }

  zoom(factor, px, py) {
    const { width, height } = this.size();
    const [cx, cy] = [px ?? width / 2, py ?? height / 2], before = this.toGraph(cx, cy);
    this.camera.scale = Math.min(2.5, Math.max(0.005, this.camera.scale * factor));
    const after = this.toGraph(cx, cy);
    this.camera.x += before.x - after.x;
    this.camera.y += before.y - after.y;
    this.moved = true;
    this.draw();
  }

  pan(dx, dy) {
    this.camera.x -= dx / this.camera.scale;
    this.camera.y -= dy / this.camera.scale;
    this.moved = true;
    this.draw();
  }

  /** Select node *id* and bring it to the middle; false where this graph has no such node. */
  select(id, { center = true, companion = null } = {}) {
    this.selected = id;
    this.companion = companion;
    const i = this.graph?.byId.get(companion ?? id);
    if (i !== undefined && this.placed && center) {
      this.camera.scale = Math.max(this.camera.scale, 0.6);
      this.camera.x = this.placed.x[i];
      this.camera.y = this.placed.y[i];
      this.moved = true;
    }
    this.draw();
    return i !== undefined;
  }

  nodeAt(px, py) {
    if (!this.placed) return null;
    const at = this.toGraph(px, py);
    const found = this.graph.nodes.find((node) => Math.abs(this.placed.x[node.index] - at.x) <= BOX.width / 2
      && Math.abs(this.placed.y[node.index] - at.y) <= BOX.height / 2);
    return found ?? null;
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
      this.travelled = 0;
      this.ruling = event.offsetX > this.size().width;
      if (this.ruling) this.rule(event.offsetY);
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = this.pointers.get(event.pointerId);
      if (!last) {
        canvas.style.cursor = event.offsetX <= this.size().width && this.nodeAt(event.offsetX, event.offsetY) ? "pointer" : "grab";
        return;
      }
      const now = { x: event.offsetX, y: event.offsetY };
      this.travelled += Math.hypot(now.x - last.x, now.y - last.y);
      if (this.ruling) this.rule(now.y);
      else if (this.pointers.size === 1) this.pan(now.x - last.x, now.y - last.y);
      else {
        const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
        const before = Math.hypot(last.x - other.x, last.y - other.y), after = Math.hypot(now.x - other.x, now.y - other.y);
        if (before > 0) this.zoom(after / before, (now.x + other.x) / 2, (now.y + other.y) / 2);
      }
      this.pointers.set(event.pointerId, now);
    });
    const end = (event) => {
      const known = this.pointers.delete(event.pointerId);
      if (event.type !== "pointerup" || !known || this.ruling || this.travelled > 5) return;
      const node = this.nodeAt(event.offsetX, event.offsetY);
      this.on.select(node ? node.id : null, this);
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("dblclick", (event) => this.zoom(1.8, event.offsetX, event.offsetY));
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return; // the page scrolls
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const type of ["focus", "blur"]) canvas.addEventListener(type, () => this.draw());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.placed) return;
    const move = { ArrowDown: [0, -60], ArrowUp: [0, 60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] }[event.key];
    if (move && event.shiftKey) this.pan(...move);
    else if (move) this.step(event.key);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit();
    else if (event.key === "Home") this.on.select(this.graph.nodes[0]?.id ?? null, this);
    else if (event.key === "End") this.on.select(this.graph.nodes.at(-1)?.id ?? null, this);
    else if (event.key === "Enter" && this.selected) this.on.open(this.selected);
    else return;
    event.preventDefault();
  }

  /** Along an edge (up, down), or to the neighbour in the text (left, right). */
  step(key) {
    const { nodes, byId } = this.graph, i = byId.get(this.selected);
    let next = 0;
    if (i !== undefined) {
      const { inputs, users } = nodes[i];
      if (key === "ArrowDown") next = users[0] ?? i;
      else if (key === "ArrowUp") next = inputs[0] ?? i;
      else next = Math.min(nodes.length - 1, Math.max(0, i + (key === "ArrowRight" ? 1 : -1)));
    }
    if (nodes[next]) this.on.select(nodes[next].id, this);
  }

  rule(py) {
    const { top, bottom } = this.placed ?? {};
    if (top === undefined) return;
    this.camera.y = top + (py / this.size().height) * (bottom - top);
    this.moved = true;
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.paint();
    });
  }

  paint() {
    const ratio = window.devicePixelRatio || 1, c = this.canvas.getContext("2d"), colors = palette();
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    if (!this.placed || !this.graph) return;
    const { width, height } = this.size(), { x, y, scale } = this.camera;
    c.save();
    c.beginPath();
    c.rect(0, 0, width, height);
    c.clip();
    c.translate(width / 2 - x * scale, height / 2 - y * scale);
    c.scale(scale, scale);
    const from = this.toGraph(0, 0), to = this.toGraph(width, height);
    this.paintEdges(c, colors, from, to);
    for (const node of this.graph.nodes) {
      const nx = this.placed.x[node.index], ny = this.placed.y[node.index];
      if (nx + BOX.width < from.x || nx - BOX.width > to.x || ny + BOX.height < from.y || ny - BOX.height > to.y) continue;
      this.paintNode(c, colors, node, nx, ny);
    }
    c.restore();
    this.paintRuler(c, colors, width, height);
  }

  paintEdges(c, colors, from, to) {
    const { scale } = this.camera, { routes, x, y } = this.placed, pairs = this.placed.pairs;
    const chosen = this.graph.byId.get(this.selected);
    const bold = [];
    c.lineWidth = Math.max(1, 0.7 / scale);
    for (const pass of [0, 1]) { // long curves below, short edges over them
      c.strokeStyle = pass ? colors.edge : colors.faint;
      c.beginPath();
      pairs.forEach(([a, b], i) => {
        if (!routes[i] === Boolean(pass)) return;
        if (Math.max(y[a], y[b]) < from.y - 50 || Math.min(y[a], y[b]) > to.y + 50) return;
        if (a === chosen || b === chosen) bold.push(i);
        else this.trace(c, i, a, b);
      });
      c.stroke();
    }
    c.strokeStyle = colors.accent;
    c.lineWidth = Math.max(1.6, 1.2 / scale);
    c.beginPath();
    for (const i of bold) this.trace(c, i, ...pairs[i]);
    c.stroke();
    if (scale < 0.3) return;
    c.fillStyle = colors.edge;
    pairs.forEach(([, b], i) => {
      const points = routes[i];
      if (!points || y[b] < from.y - 50 || y[b] > to.y + 50) return;
      const [ex, ey] = points.at(-1), [px, py] = points.at(-2), angle = Math.atan2(ey - py, ex - px);
      c.beginPath();
      c.moveTo(ex, ey);
      c.lineTo(ex - 7 * Math.cos(angle - 0.4), ey - 7 * Math.sin(angle - 0.4));
      c.lineTo(ex - 7 * Math.cos(angle + 0.4), ey - 7 * Math.sin(angle + 0.4));
      c.fill();
    });
  }

  trace(c, i, a, b) {
    const points = this.placed.routes[i], { x, y } = this.placed;
    if (!points) { // a curve out to the side
      const span = Math.min(420, 90 + Math.abs(y[b] - y[a]) * 0.08), y0 = y[a] + BOX.height / 2, y1 = y[b] - BOX.height / 2;
      const side = Math.max(x[a], x[b]) + BOX.width / 2 + span;
      c.moveTo(x[a], y0);
      c.bezierCurveTo(side, y0 + 40, side, y1 - 40, x[b], y1);
      return;
    }
    c.moveTo(...points[0]);
    for (let k = 1; k < points.length - 1; k++) {
      const [px, py] = points[k], [qx, qy] = points[k + 1];
      c.quadraticCurveTo(px, py, (px + qx) / 2, (py + qy) / 2);
    }
    c.lineTo(...points.at(-1));
  }

  paintNode(c, colors, node, nx, ny) {
    const { scale } = this.camera, mark = this.marks.get(node.id), chosen = node.id === this.selected;
    const left = nx - BOX.width / 2, top = ny - BOX.height / 2;
    c.fillStyle = mark ? colors[`${mark}Fill`] : colors.node;
    if (scale < 0.22) {
      c.fillStyle = chosen ? colors.accent : this.hits.has(node.id) ? colors.hit : mark ? colors[mark] : colors[node.kind];
      c.fillRect(left, top, BOX.width, BOX.height);
      return;
    }
    c.beginPath();
    c.roundRect(left, top, BOX.width, BOX.height, node.kind === "io" ? BOX.height / 2 : 6);
    c.fill();
    c.lineWidth = chosen ? 2.5 : this.hits.has(node.id) ? 2 : 1;
    c.strokeStyle = chosen ? colors.accent : this.hits.has(node.id) ? colors.hit : mark ? colors[mark] : colors.line;
    if (node.id === this.companion) {
      c.setLineDash([5, 4]);
      c.lineWidth = 2;
      c.strokeStyle = colors.accent;
    }
    c.stroke();
    c.setLineDash([]);
    if (node.kind !== "io") {
      c.fillStyle = colors[node.kind];
      c.beginPath();
      c.roundRect(left + 5, top + 8, 3, BOX.height - 16, 1.5);
      c.fill();
    }
    if (scale < 0.32) return;
    c.textAlign = node.kind === "io" ? "center" : "left";
    const at = node.kind === "io" ? nx : left + 15, room = BOX.width - 24;
    c.fillStyle = colors.text;
    c.font = `600 12px ${colors.font}`;
    c.fillText(clipped(c, node.kind === "io" ? node.name : title(node.op), room), at, ny - (node.type ? 3 : -4));
    c.fillStyle = colors.muted;
    c.font = `11px ${colors.font}`;
    if (node.type) c.fillText(clipped(c, shape(node.type), room), at, ny + 12);
  }

  paintRuler(c, colors, width, height) {
    const { top, bottom, y } = this.placed, scale = height / Math.max(1, bottom - top);
    c.fillStyle = colors.ruler;
    c.fillRect(width, 0, RULER, height);
    const mark = (node, color, inset) => {
      c.fillStyle = color;
      c.fillRect(width + inset, (y[node.index] - top) * scale - 1, RULER - 2 * inset, 2);
    };
    for (const node of this.graph.nodes) {
      const what = this.marks.get(node.id);
      if (what) mark(node, colors[what], 4);
    }
    for (const node of this.graph.nodes) if (this.hits.has(node.id)) mark(node, colors.hit, 2);
    const chosen = this.graph.byId.get(this.companion ?? this.selected);
    if (chosen !== undefined) mark(this.graph.nodes[chosen], colors.accent, 0);
    const from = this.toGraph(0, 0).y, to = this.toGraph(0, height).y;
    const begin = Math.max(0, (from - top) * scale), end = Math.min(height, (to - top) * scale);
    c.strokeStyle = colors.muted;
    c.lineWidth = 1;
    c.strokeRect(width + 1.5, begin + 0.5, RULER - 3, Math.max(8, end - begin - 1));
  }
}

/** An operator in few words: "dequantize" for quantized_decomposed.dequantize_per_channel. */
function title(op) {
  return op.replace(/^(quantized_decomposed|fxopt)\./, "").replace(/^(quantize|dequantize)_per_\w+$/, "$1");
}

const widths = new Map();

/** *text*, with an ellipsis where it is wider than *room*. */
function clipped(c, text, room) {
  const key = `${c.font}|${text}`;
  if (widths.has(key)) return widths.get(key);
  let short = text;
  if (c.measureText(text).width > room) {
    let length = Math.floor((text.length * room) / c.measureText(text).width);
    while (length > 1 && c.measureText(`${text.slice(0, length)}…`).width > room) length--;
    short = `${text.slice(0, length)}…`;
  }
  widths.set(key, short);
  return short;
}

let known = null;

/** The colours of the theme as the canvas needs them; the style sheet is where they are written. */
function palette() {
  if (known) return known;
  const probe = h("span", { hidden: false });
  document.body.append(probe);
  const color = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  known = {
    text: color("text"), muted: color("muted"), line: color("line-strong"), node: color("surface"), edge: color("edge"),
    faint: color("edge-faint"), accent: color("accent"), hit: color("hit"), ruler: color("ruler"),
    added: color("added"), removed: color("removed"), changed: color("changed"),
    addedFill: color("added-fill"), removedFill: color("removed-fill"), changedFill: color("changed-fill"),
    conv: color("kind-conv"), linear: color("kind-linear"), norm: color("kind-norm"), quant: color("kind-quant"),
    other: color("kind-other"), io: color("kind-io"), font: getComputedStyle(document.body).fontFamily,
  };
  probe.remove();
  return known;
}

function forgetPalette() {
  known = null;
}

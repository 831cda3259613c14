"use strict";
// Small pictures in SVG: histograms, bars, points, maps of zeros.

/** Counts of a spread as an area; ends of the range of the integers as two lines. */
function histogram(spread, label, { width = 220, height = 64 } = {}) {
  const most = Math.max(1, ...spread.counts), n = spread.counts.length, step = width / n, base = height - 14;
  const span = spread.high - spread.low || 1, at = (value) => ((value - spread.low) / span) * width;
  let path = `M0 ${base}`;
  spread.counts.forEach((count, i) => { // the square root keeps tails visible
    const y = base - Math.sqrt(count / most) * (base - 4);
    path += `L${(i * step).toFixed(1)} ${y.toFixed(1)}L${((i + 1) * step).toFixed(1)} ${y.toFixed(1)}`;
  });
  const ends = (spread.range || []).map((end) => Math.min(width - 0.5, Math.max(0.5, at(end))));
  const said = `${label}: from ${format.number(spread.low)} to ${format.number(spread.high)}`
    + (spread.range ? `, integers stand for ${format.number(spread.range[0])} to ${format.number(spread.range[1])}` : "");
  return h("svg", { viewBox: `0 0 ${width} ${height}`, class: "histogram", role: "img", "aria-label": said },
    h("title", {}, said),
    spread.range && h("rect", { x: ends[0], y: 0, width: Math.max(0, ends[1] - ends[0]), height: base, class: "covered" }),
    h("path", { d: `${path}L${width} ${base}Z`, class: "area" }),
    ends.map((x) => h("line", { x1: x, x2: x, y1: 0, y2: base, class: "end" })),
    h("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" }),
    h("text", { x: 0, y: height - 2, class: "tick" }, format.number(spread.low)),
    h("text", { x: width, y: height - 2, class: "tick", "text-anchor": "end" }, format.number(spread.high)));
}

/** Horizontal bars: rows of {name, value, text, strong}. */
function bars(rows, label) {
  const most = Math.max(...rows.map((row) => row.value)) || 1;
  return h("div", { class: "bars", role: "list", "aria-label": label }, rows.map((row) =>
    h("div", { class: `bar${row.strong ? " strong" : ""}`, role: "listitem" },
      h("span", { class: "bar-name" }, row.name),
      h("span", { class: "bar-track" }, h("span", { class: "bar-fill", style: { width: `${(100 * row.value) / most}%` } })),
      h("span", { class: "bar-value" }, row.text))));
}

/** Parts of a whole in one line: rows of {name, value, text}. */
function shares(rows, label) {
  const whole = rows.reduce((sum, row) => sum + row.value, 0) || 1;
  return h("div", { class: "shares", "aria-label": label, role: "group" },
    h("div", { class: "shares-line", "aria-hidden": "true" }, rows.map((row, i) =>
      h("span", { class: `share share-${i % 5}`, style: { width: `${(100 * row.value) / whole}%` } }))),
    h("ul", { class: "legend" }, rows.map((row, i) =>
      h("li", {}, h("span", { class: `dot share-${i % 5}`, "aria-hidden": "true" }), `${row.name} `, h("b", {}, row.text)))));
}

/** Round steps for an axis from low to high. */
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || Math.abs(high) || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Runs as points: x and y are {name, value(run), text(value)}. */
function scatter(runs, x, y) {
  const width = 760, height = 360, pad = { left: 64, right: 150, top: 16, bottom: 44 };
  const points = runs.map((run) => ({ run, x: x.value(run), y: y.value(run) })).filter((p) => p.x !== null && p.y !== null);
  if (!points.length) return h("p", { class: "quiet" }, "No run has both of these numbers.");
  const span = (values, zero) => {
    const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.12;
    return [zero ? 0 : low - room, high + room];
  };
  const [x0, x1] = span(points.map((p) => p.x), true), [y0, y1] = span(points.map((p) => p.y), false);
  const px = (v) => pad.left + ((v - x0) / (x1 - x0)) * (width - pad.left - pad.right);
  const py = (v) => height - pad.bottom - ((v - y0) / (y1 - y0)) * (height - pad.top - pad.bottom);
  const taken = [];
  const place = (p) => { // labels that would lie over each other move down
    let at = py(p.y) + 4;
    while (taken.some(([tx, ty]) => Math.abs(tx - px(p.x)) < 120 && Math.abs(ty - at) < 13)) at += 13;
    taken.push([px(p.x), at]);
    return at;
  };
  const said = `${y.name} over ${x.name} of ${points.length} runs`;
  return h("svg", { viewBox: `0 0 ${width} ${height}`, class: "scatter", role: "img", "aria-label": said },
    ticks(x0, x1).map((v) => [h("line", { x1: px(v), x2: px(v), y1: pad.top, y2: height - pad.bottom, class: "grid" }),
      h("text", { x: px(v), y: height - pad.bottom + 16, class: "tick", "text-anchor": "middle" }, x.text(v))]),
    ticks(y0, y1).map((v) => [h("line", { x1: pad.left, x2: width - pad.right, y1: py(v), y2: py(v), class: "grid" }),
      h("text", { x: pad.left - 8, y: py(v) + 4, class: "tick", "text-anchor": "end" }, y.text(v))]),
    h("text", { x: (pad.left + width - pad.right) / 2, y: height - 6, class: "axis-name", "text-anchor": "middle" }, x.name),
    h("text", { x: 12, y: 12, class: "axis-name" }, y.name),
    points.map((p, i) => h("g", { class: `point${i === 0 ? " first" : ""}` },
      h("title", {}, `${p.run.label}: ${x.text(p.x)}, ${y.text(p.y)}`),
      h("circle", { cx: px(p.x), cy: py(p.y), r: 5.5 }),
      h("text", { x: px(p.x) + 10, y: place(p), class: "point-name" }, p.run.label))));
}

/** Shares of zeros in the parts of a weight, outputs down, inputs across. */
function zeroMap(rows, label) {
  const height = rows.length, width = rows[0].length;
  return h("svg", { viewBox: `0 0 ${width} ${height}`, class: "zero-map", role: "img", "aria-label": label, preserveAspectRatio: "none" },
    h("title", {}, label),
    rows.map((row, y) => row.map((share, x) =>
      h("rect", { x, y, width: 1.02, height: 1.02, "fill-opacity": (0.04 + 0.96 * share).toFixed(3) }))));
}

"use strict";
// The data behind the page: recorded graphs are unpacked and parsed here, and compared with each other.

/** An element with properties, attributes ("aria-…", "data-…", role) and children; text never becomes markup. */
function h(tag, props, ...children) {
  const svg = /^(svg|g|path|rect|line|circle|text|title|polyline)$/.test(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && !svg && typeof value !== "string") element[name] = value;
    else element.setAttribute(name === "className" ? "class" : name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const format = {
  si(value) {
    for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (value >= scale) return `${(value / scale).toPrecision(3)} ${unit}`;
    }
    return String(Math.round(value));
  },
  bytes(value) {
    for (const [unit, scale] of [["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
      if (value >= scale) return `${(value / scale).toFixed(value >= 100 * scale ? 0 : 1)} ${unit}`;
    }
    return `${value} B`;
  },
  ms: (value) => (value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(2) : value.toFixed(3)),
  percent: (value) => (value === 0 ? "0" : value < 0.001 ? "<0.1 %" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`),
  number: (value) => (value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(1)
    : String(Number(value.toPrecision(3)))),
  ratio(before, after, better, worse) {
    if (!before || !after) return "";
    if (Math.abs(before / after - 1) < 0.005) return "the same";
    return before > after ? `${(before / after).toFixed(2)} × ${better}` : `${(after / before).toFixed(2)} × ${worse}`;
  },
  place(source) { // the end of a path says the most
    return source.split(/[/\\]/).slice(-2).join("/");
  },
};

/** The JSON behind zlib and base64. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const CALL = /^ {2}%(\d+): (.+?) = (\S+?)\((.*)$/;

/** Splits "a: T[1,2], b: U" at commas outside of brackets. */
function split(text) {
  const found = [];
  let depth = 0, start = 0;
  for (let i = 0; i <= text.length; i++) {
    const c = text[i];
    if ("([{".includes(c ?? " ")) depth++;
    else if (")]}".includes(c ?? " ")) depth--;
    else if (i === text.length || (c === "," && depth === 0)) {
      if (text.slice(start, i).trim()) found.push(text.slice(start, i).trim());
      start = i + 1;
    }
  }
  return found;
}

/**
 * A recorded graph: nodes in order, each {id, op, type, text, inputs, users, macs, source, kind}, and its text with
 * the names that calls keep from pass to pass in place of running numbers.
 */
function parse({ text, names, macs, lines: sources, sources: where }) {
  const lines = text.split("\n"), nodes = [], byId = new Map(), alias = new Map();
  const add = (node) => {
    byId.set(node.id, nodes.length);
    nodes.push({ index: nodes.length, inputs: [], users: [], macs: 0, source: "", ...node });
  };
  const rename = (line) => line.replace(/%(\w+)/g, (all, name) => alias.get(name) ?? all);
  const heading = lines.findIndex((line) => line.startsWith("graph("));
  const inputs = split(lines[heading].slice("graph(".length, lines[heading].lastIndexOf("):")));
  for (const input of inputs) {
    const colon = input.indexOf(":"), name = input.slice(1, colon);
    add({ id: `%${name}`, op: "input", kind: "io", name, type: input.slice(colon + 1).trim(), text: input, words: `${name} input`.toLowerCase() });
    alias.set(name, `%${name}`);
  }
  const shown = [{ id: "graph", text: lines[heading] }];
  let k = 0;
  for (const line of lines.slice(heading + 1)) {
    const found = CALL.exec(line);
    if (found) alias.set(found[1], `%${names[k]}`);
    const renamed = rename(line).trimEnd();
    if (found) {
      const id = `%${names[k]}`;
      add({ id, name: names[k], op: found[3], type: found[2], text: renamed.trim(), macs: macs[k], source: sources[where[k]],
        kind: kindOf(found[3]), words: wordsOf(names[k], found[3], found[2], sources[where[k]], line) });
      link(found[4], byId.get(id));
      shown.push({ id, text: renamed });
      k++;
    } else if (line.startsWith("  return ")) {
      add({ id: "return", name: "return", op: "output", kind: "io", type: "", text: renamed.trim(), words: "output return" });
      link(line, byId.get("return"));
      shown.push({ id: "return", text: renamed });
    } else if (line.trim()) shown.push({ id: `comment ${line}`, text: renamed });
  }
  function link(rest, to) {
    const seen = new Set();
    for (const [, name] of rest.matchAll(/%(\w+)/g)) {
      const from = byId.get(alias.get(name));
      if (from === undefined || from === to || seen.has(from)) continue;
      seen.add(from);
      nodes[to].inputs.push(from);
      nodes[from].users.push(to);
    }
  }
  return { nodes, byId, lines: shown, inputs: inputs.length };
}

/** What a search looks at: the node itself and its constants, not the names of what it reads. */
function wordsOf(name, op, type, source, line) {
  return `${name} ${op} ${type} ${source} ${[...line.matchAll(/@[\w.]+/g)].join(" ")}`.toLowerCase();
}

function kindOf(op) {
  const name = op.replace(/^fxopt\./, "");
  if (/quantize|choose_qparams/.test(op)) return "quant";
  if (/conv/.test(name)) return "conv";
  if (/linear|matmul|\bmm|bmm|addmm|attention|einsum|embedding/.test(name)) return "linear";
  if (/norm/.test(name)) return "norm";
  return "other";
}

/** Short type: "64×112×112 f32" for "f32[1,64,112,112]". */
function shape(type) {
  const found = /^(\w+)\[(.*)\]$/.exec(type);
  return found ? `${found[2].replaceAll(",", "×")} ${found[1]}` : type;
}

/** What became of each node: maps of id to "added", "removed", "changed" for the two graphs. */
function difference(before, after) {
  const left = new Map(), right = new Map();
  for (const node of before.nodes) {
    const other = after.byId.get(node.id);
    if (other === undefined) left.set(node.id, "removed");
    else if (after.nodes[other].text !== node.text) {
      left.set(node.id, "changed");
      right.set(node.id, "changed");
    }
  }
  for (const node of after.nodes) if (!before.byId.has(node.id)) right.set(node.id, "added");
  return { left, right };
}

/** The module that a call takes a constant from: "layer1.0.conv1" of @layer1.0.conv1.folded_bias. */
function moduleOf(node) {
  const found = /@([\w.]+)\.\w+/.exec(node.text);
  return found ? found[1].replace(/(\.(folded_)?weight(_\w+)?)+$/, "") : "";
}

/** The node of *to* that stands where node *id* of *from* does: of the same module, else next to what both have. */
function counterpart(id, from, to) {
  if (to.byId.has(id) || !from.byId.has(id)) return null;
  const node = from.nodes[from.byId.get(id)], module = moduleOf(node);
  if (module) {
    const same = to.nodes.filter((one) => moduleOf(one) === module);
    const best = same.find((one) => one.kind === node.kind) ?? same[0];
    if (best) return best.id;
  }
  const pending = [node.index], seen = new Set(pending);
  for (let k = 0; k < pending.length && k < 400; k++) {
    const one = from.nodes[pending[k]];
    if (k && to.byId.has(one.id)) return one.id;
    if (k && moduleOf(one)) return counterpart(one.id, from, to) ?? one.id;
    for (const next of [...one.inputs, ...one.users]) if (!seen.has(next)) seen.add(next) && pending.push(next);
  }
  return null;
}

/** The lines of both texts merged: {sign: " ", "-", "+", text, id}. Each id stands at most once in a text. */
function mergedLines(before, after) {
  const place = new Map(after.lines.map((line, i) => [line.id, i]));
  const common = before.lines.map((line, i) => [i, place.get(line.id)]).filter(([, j]) => j !== undefined);
  const tails = [], back = []; // the longest run of lines in the same order: patience sorting
  common.forEach(([, j], k) => {
    let low = 0, high = tails.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (common[tails[middle]][1] < j) low = middle + 1;
      else high = middle;
    }
    back[k] = low ? tails[low - 1] : -1;
    tails[low] = k;
  });
  const kept = [];
  for (let k = tails.at(-1) ?? -1; k >= 0; k = back[k]) kept.unshift(common[k]);
  const merged = [];
  let i = 0, j = 0;
  for (const [a, b] of [...kept, [before.lines.length, after.lines.length]]) {
    while (i < a) merged.push({ sign: "-", ...before.lines[i++] });
    while (j < b) merged.push({ sign: "+", ...after.lines[j++] });
    if (a === before.lines.length) break;
    if (before.lines[i].text === after.lines[j].text) merged.push({ sign: " ", ...after.lines[j] });
    else merged.push({ sign: "-", ...before.lines[i] }, { sign: "+", ...after.lines[j] });
    i++;
    j++;
  }
  return merged;
}

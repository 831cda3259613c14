"use strict";
// The section of the graphs: before and after side by side, the slider over the passes, search, details, text.

/** Runs layout.js in a thread of its own. */
class Layouts {
  constructor() {
    const source = document.getElementById("worker").textContent;
    this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    this.waiting = new Map();
    this.worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(data);
    };
    this.next = 0;
  }

  of(graph) {
    const pairs = graph.nodes.flatMap((node) => node.inputs.map((from) => [from, node.index]));
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve: (placed) => resolve({ ...placed, pairs }), reject });
      this.worker.postMessage({ id, count: graph.nodes.length, inputs: graph.inputs, edges: pairs });
    });
  }
}

class Graphs {
  constructor(data, rows) {
    this.data = data;
    this.steps = data.snapshots.map((snapshot) => ({ ...snapshot, ready: null, placed: null }));
    this.layouts = new Layouts();
    this.at = this.steps.length - 1;
    this.whole = true; // compare with the captured model, else with the step before
    this.selected = null;
    this.rows = new Map(rows.map((row) => [row.id, row]));
    this.build(rows);
  }

  build(rows) {
    const last = this.steps.length - 1;
    this.slider = h("input", { type: "range", min: "0", max: String(last), value: String(last), step: "1", id: "step",
      disabled: last < 1, oninput: () => this.go(Number(this.slider.value)) });
    this.stepName = h("output", { class: "step-name", for: "step" });
    this.compare = h("fieldset", { class: "switch" }, h("legend", { class: "hidden" }, "Compare with"),
      this.choice("compare", "model", "captured model", true, () => this.compareWith(true)),
      this.choice("compare", "before", "step before", false, () => this.compareWith(false)));
    this.search = h("input", { type: "search", id: "search", placeholder: "Search nodes", "aria-label": "Search nodes by operator, name or source",
      "aria-keyshortcuts": "/", oninput: () => this.find(), onkeydown: (event) => this.searchKey(event) });
    this.found = h("span", { class: "quiet found", role: "status" });
    this.changes = h("span", { class: "quiet", role: "status" });
    const button = (text, label, act, key) => h("button", { class: "small", "aria-label": label, title: label + (key ? ` (${key})` : ""), onclick: act }, text);
    this.left = this.pane("Before", button);
    this.right = this.pane("After", button);
    this.detail = h("div", { class: "detail", role: "region", "aria-label": "Selected node", "aria-live": "polite" });
    this.table = new LayerTable(rows, columns(rows, this.data), { select: (id) => this.select(id) });
    this.text = h("div", { class: "fxir", tabindex: "0", role: "region", "aria-label": "Difference of the two graphs as text" });
    this.element = h("section", { id: "graphs", "aria-labelledby": "graphs-title" },
      h("div", { class: "head" }, h("h2", { id: "graphs-title" }, "Graphs and layers"),
        h("div", { class: "seek" }, this.search, h("kbd", { "aria-hidden": "true" }, "/"), this.found)),
      h("div", { class: "steps" },
        h("label", { for: "step" }, "After pass"), this.slider, this.stepName, this.compare,
        h("div", { class: "hop" }, button("‹", "Previous change", () => this.hop(-1), "p"), this.changes, button("›", "Next change", () => this.hop(1), "n"))),
      h("div", { class: "panes" }, this.left.element, this.right.element),
      h("p", { class: "hint quiet" }, "Drag to move. In a clicked graph the wheel zooms, arrow keys follow edges, + − 0 zoom. ",
        ["added", "removed", "changed"].map((what) => h("span", { class: `mark ${what}` }, what)),
        h("span", { class: "kinds" }, [["conv", "convolution"], ["linear", "product"], ["norm", "norm"], ["quant", "quantization"]]
          .map(([kind, name]) => h("span", {}, h("i", { class: `stripe ${kind}`, "aria-hidden": "true" }), name)))),
      this.detail,
      tabs("below", [["Layers", this.table.element], ["Text", this.text]], () => this.drawText()));
  }

  choice(name, value, text, checked, act) {
    return h("label", {}, h("input", { type: "radio", name, value, checked, onchange: act }), h("span", {}, text));
  }

  pane(side, button) {
    const canvas = h("canvas", { tabindex: "0", role: "application", "aria-roledescription": "graph" });
    const title = h("figcaption", {});
    const view = new GraphView(canvas, { select: (id, from) => this.select(id, from), open: () => this.detail.querySelector("button")?.focus() });
    const wait = h("p", { class: "wait quiet" }, "laying out …");
    const tools = h("div", { class: "pane-tools" }, button("−", `${side}: zoom out`, () => view.zoom(0.7), "-"), button("+", `${side}: zoom in`, () => view.zoom(1.4), "+"),
      button("⤢", `${side}: fit to width`, () => view.fit(), "0"), button("▣", `${side}: whole graph`, () => view.all()));
    return { side, view, canvas, title, wait, element: h("figure", { class: "pane" }, title, tools, canvas, wait) };
  }

  /** The parsed graph of step *i*. */
  graph(i) {
    this.steps[i].ready ??= unpack(this.steps[i].data).then(parse);
    return this.steps[i].ready;
  }

  placed(i) {
    this.steps[i].placed ??= this.graph(i).then((graph) => this.layouts.of(graph));
    return this.steps[i].placed;
  }

  compareWith(model) {
    this.whole = model;
    this.go(this.at);
  }

  async go(i) {
    this.at = i;
    const other = this.whole ? 0 : Math.max(0, i - 1), turn = (this.turn = (this.turn ?? 0) + 1);
    const name = (k) => (k === 0 ? "captured model" : `${k}. ${this.steps[k].step}`);
    this.slider.value = String(i);
    this.slider.setAttribute("aria-valuetext", name(i));
    this.stepName.textContent = name(i);
    for (const [pane, k] of [[this.left, other], [this.right, i]]) pane.wait.hidden = Boolean(this.steps[k].done);
    const [before, after] = await Promise.all([this.graph(other), this.graph(i)]);
    if (turn !== this.turn) return;
    this.pair = { before, after, marks: difference(before, after) };
    this.describe(other, i, name);
    this.textStale = true;
    this.drawText();
    const places = await Promise.all([this.placed(other), this.placed(i)]);
    this.steps[other].done = this.steps[i].done = true;
    if (turn !== this.turn) return;
    this.left.view.show(before, places[0], this.pair.marks.left);
    this.right.view.show(after, places[1], this.pair.marks.right);
    this.left.wait.hidden = this.right.wait.hidden = true;
    this.find(false);
    if (this.selected) this.showDetail();
    document.documentElement.dataset.ready = "true";
  }

  describe(other, i, name) {
    const { before, after, marks } = this.pair;
    const calls = (graph) => graph.nodes.filter((node) => node.kind !== "io").length;
    const tell = (pane, graph, k) => {
      pane.title.replaceChildren(h("b", {}, pane.side), ` ${name(k)} `, h("span", { class: "quiet" }, `${calls(graph)} operators`));
      pane.canvas.setAttribute("aria-label", `${pane.side}: ${name(k)}, ${calls(graph)} operators. Arrow keys follow the edges.`);
    };
    tell(this.left, before, other);
    tell(this.right, after, i);
    const count = (map, what) => [...map.values()].filter((value) => value === what).length;
    const parts = [["added", count(marks.right, "added")], ["removed", count(marks.left, "removed")], ["changed", count(marks.right, "changed")]];
    this.changes.textContent = parts.filter(([, n]) => n).map(([what, n]) => `${n} ${what}`).join(", ") || "no change";
    this.order = [...before.nodes.filter((node) => marks.left.get(node.id) === "removed"), ...after.nodes.filter((node) => marks.right.has(node.id))].map((node) => node.id);
  }

  /** Select the next (or previous) node that was added, removed or changed. */
  hop(step) {
    if (!this.order?.length) return;
    const i = this.order.indexOf(this.selected);
    this.select(this.order[(i < 0 ? (step > 0 ? 0 : this.order.length - 1) : i + step + this.order.length) % this.order.length]);
  }

  find(jump = true) {
    const words = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    this.results = [];
    for (const [pane, graph] of [[this.right, this.pair?.after], [this.left, this.pair?.before]]) {
      if (!graph) continue;
      const hits = words.length ? graph.nodes.filter((node) => words.every((word) => node.words.includes(word))) : [];
      pane.view.hits = new Set(hits.map((node) => node.id));
      pane.view.draw();
      this.results.push(...hits.map((node) => node.id));
    }
    this.results = [...new Set(this.results)];
    this.found.textContent = !words.length ? "" : this.results.length ? `${this.results.length} found` : "nothing found";
    if (jump && this.results.length) this.select(this.results[0]);
  }

  searchKey(event) {
    if (event.key === "Enter" && this.results?.length) {
      const i = this.results.indexOf(this.selected) + (event.shiftKey ? -1 : 1);
      this.select(this.results[(i + this.results.length) % this.results.length]);
    } else if (event.key === "Escape") {
      this.search.value = "";
      this.find(false);
      this.search.blur();
      this.right.canvas.focus({ preventScroll: true });
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Show node *id* everywhere; *from* is the pane it was clicked in, which stays where it is. */
  select(id, from = null) {
    this.selected = id;
    const { before, after } = this.pair ?? {};
    for (const [pane, here, there] of [[this.left, before, after], [this.right, after, before]]) {
      const companion = id && here ? counterpart(id, there, here) : null;
      pane.view.select(id, { companion, center: from !== pane.view || !this.visible(pane.view, id) });
    }
    this.table.select(id);
    this.showDetail();
    if (!this.text.hidden) this.markText();
  }

  /** Select node *id*, at a step at which there is one. */
  async reveal(id) {
    if (!this.pair?.after.byId.has(id) && !this.pair?.before.byId.has(id)) {
      for (let k = this.steps.length - 1; k >= 0; k--) {
        if (!(await this.graph(k)).byId.has(id)) continue;
        await this.go(k);
        break;
      }
    }
    this.select(id);
  }

  visible(view, id) {
    const i = view.graph?.byId.get(id);
    if (i === undefined || !view.placed) return true;
    const { width, height } = view.size(), a = view.toGraph(20, 20), b = view.toGraph(width - 20, height - 20);
    return view.placed.x[i] > a.x && view.placed.x[i] < b.x && view.placed.y[i] > a.y && view.placed.y[i] < b.y;
  }

  showDetail() {
    const { before, after, marks } = this.pair ?? {};
    const node = (graph) => graph?.nodes[graph.byId.get(this.selected) ?? -1];
    const old = node(before), now = node(after), one = now ?? old;
    if (!one) {
      this.detail.replaceChildren(h("span", { class: "quiet" }, this.selected ? `${this.selected} is in neither of the two graphs.` : "Select a node or a layer to see it here."));
      return;
    }
    const what = now ? marks.right.get(one.id) : "removed", row = this.rows.get(one.id);
    const facts = [one.type, one.macs ? `${format.si(one.macs)} MACs` : "", row?.ms ? `${format.ms(row.ms)} ms` : "", one.source ? format.place(one.source) : ""];
    const line = (graph, text, sign) => h("code", { class: `line ${sign === "-" ? "gone" : sign === "+" ? "new" : ""}` }, `${sign} ${text}`);
    this.detail.replaceChildren(h("div", { class: "detail-main" },
      h("div", { class: "detail-head" }, h("b", {}, one.op), h("span", { class: "mono" }, one.name), what && h("span", { class: `mark ${what}` }, what),
        h("span", { class: "quiet", title: one.source }, facts.filter(Boolean).join(" · "))),
      what === "changed" ? [line(before, old.text, "-"), line(after, now.text, "+")] : line(one, one.text, what === "added" ? "+" : what === "removed" ? "-" : " ")),
      row?.spreads?.length ? h("div", { class: "detail-spreads" }, row.spreads.map(([title, spread]) => h("div", {}, h("span", { class: "quiet" }, title), histogram(spread, title)))) : "");
  }

  drawText() {
    if (!this.pair || !this.textStale || this.text.closest("[hidden]")) return;
    this.textStale = false;
    const merged = mergedLines(this.pair.before, this.pair.after), near = new Uint8Array(merged.length);
    const differs = merged.some((line) => line.sign !== " ");
    merged.forEach((line, i) => {
      if (line.sign === " " && differs) return;
      if (differs) for (let k = Math.max(0, i - 3); k <= Math.min(merged.length - 1, i + 3); k++) near[k] = 1;
    });
    const lines = [];
    for (let i = 0; i < merged.length; i++) {
      if (!near[i] && differs) {
        let end = i;
        while (end < merged.length && !near[end]) end++;
        if (end - i < 4) { // a fold would hide no more than it takes
          for (; i < end; i++) lines.push(this.textLine(merged[i]));
          i--;
          continue;
        }
        const hidden = merged.slice(i, end);
        lines.push(h("button", { class: "fold", onclick: (event) => event.currentTarget.replaceWith(...hidden.map((one) => this.textLine(one))) }, `${end - i} lines alike`));
        i = end - 1;
      } else lines.push(this.textLine(merged[i]));
      if (lines.length > 4000) {
        lines.push(h("p", { class: "quiet" }, `${merged.length - i} more lines; pass by pass there are fewer.`));
        break;
      }
    }
    this.text.replaceChildren(differs ? "" : h("p", { class: "quiet" }, "The two graphs are the same:"), ...lines);
    this.markText();
  }

  textLine({ sign, text, id }) {
    return h("div", { class: `line ${sign === "-" ? "gone" : sign === "+" ? "new" : ""}`, "data-id": id, onclick: () => this.select(id) },
      h("span", { class: "sign" }, sign), text);
  }

  markText() {
    for (const line of this.text.querySelectorAll(".chosen")) line.classList.remove("chosen");
    const found = [...this.text.children].filter((line) => line.dataset?.id === this.selected && this.selected);
    for (const line of found) line.classList.add("chosen");
    if (found[0]) this.text.scrollTop = Math.max(0, found[0].offsetTop - this.text.clientHeight / 2);
  }

  redraw() {
    this.left.view.draw();
    this.right.view.draw();
  }
}

/** Panels of which one is shown: pairs of a title and an element. */
function tabs(id, pairs, on) {
  const buttons = pairs.map(([title], i) => h("button", { role: "tab", id: `${id}-${i}`, "aria-controls": `${id}-panel-${i}`, onclick: () => show(i) }, title));
  const panels = pairs.map(([, element], i) => h("div", { role: "tabpanel", id: `${id}-panel-${i}`, "aria-labelledby": `${id}-${i}` }, element));
  const list = h("div", { role: "tablist", class: "tablist", onkeydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
    show(next);
    buttons[next].focus();
    event.preventDefault();
  } }, buttons);
  function show(i) {
    buttons.forEach((button, k) => {
      button.setAttribute("aria-selected", String(k === i));
      button.tabIndex = k === i ? 0 : -1;
      panels[k].hidden = k !== i;
    });
    on(i);
  }
  const element = h("div", { class: "tabs" }, list, panels);
  queueMicrotask(() => show(0));
  return element;
}

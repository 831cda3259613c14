"use strict";
// The sections around the graphs: what came out, what each pass did, how values are spread, what was left alone.

function section(id, title, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), children);
}

function tile(name, value, note, strong) {
  return h("div", { class: `tile${strong ? " strong" : ""}` }, h("dt", {}, name), h("dd", {}, h("span", { class: "value" }, value), note && h("span", { class: "note" }, note)));
}

function summaryPanel({ report, passes, outputs, profile }) {
  const { latency, bytes, packed } = report, eager = latency.eager, ours = latency.fxopt;
  const error = report.error === null ? null : report.error.toExponential(1);
  const arrow = (a, b, text) => (a === b ? text(b) : `${text(a)} → ${text(b)}`);
  const tiles = h("dl", { class: "tiles" },
    ours ? tile("Latency", `${format.ms(ours)} ms`, eager ? `${format.ratio(eager, ours, "faster", "slower")} (eager ${format.ms(eager)} ms)` : "", true)
      : tile("Latency", "not measured", "compiled for another machine"),
    tile("Weights", format.bytes(bytes[1]), `${format.ratio(bytes[0], bytes[1], "smaller", "larger")} (${format.bytes(bytes[0])})`
      + (packed && packed < 0.99 * bytes[1] ? `; ${format.bytes(packed)} in a .fxopt file` : "")),
    tile("MACs", format.si(report.macs[1]), report.macs[0] === report.macs[1] ? "as captured" : `of ${format.si(report.macs[0])}`),
    tile("Parameters", format.si(report.parameters[1]), report.parameters[0] === report.parameters[1] ? "as captured" : `of ${format.si(report.parameters[0])}`),
    tile("Error", error ?? "–", error === null ? "not compared" : "of the output's range, against eager"),
    outputs.length > 0 && tile("Outputs, quantized", outputs[0].cosine === null ? "–" : outputs[0].cosine.toFixed(5),
      `cosine to float${outputs[0].top1 === null ? "" : `, top-1 equal on ${format.percent(outputs[0].top1)}`}`));
  return h("section", { id: "summary", "aria-label": "Summary" }, tiles,
    h("div", { class: "two" }, report.waterfall.length
      ? [h("div", { class: "stack" }, latencyPanel(report, profile), timePanel(report, passes)), waterfallPanel(report.waterfall)]
      : [latencyPanel(report, profile), timePanel(report, passes)]),
    report.notes.length > 0 && h("ul", { class: "notes" }, report.notes.map((note) => h("li", {}, `${report.backend}: ${note}`))));
}

/** What was measured, in milliseconds: eager, the engines that were tried, the result. Nothing else is known. */
function latencyPanel(report, profile) {
  const { eager, fxopt } = report.latency, rows = [];
  if (eager !== undefined) rows.push({ name: "eager", value: eager, text: `${format.ms(eager)} ms` });
  const tried = Object.entries(report.measured).filter(([name]) => name !== report.backend).sort((a, b) => b[1] - a[1]);
  for (const [name, ms] of tried) rows.push({ name: `fxopt on ${name}`, value: ms, text: `${format.ms(ms)} ms` });
  if (fxopt !== undefined) {
    const gain = eager ? `  ${format.ratio(eager, fxopt, "faster", "slower")}` : "";
    rows.push({ name: `fxopt on ${report.backend}`, value: fxopt, text: `${format.ms(fxopt)} ms${gain}`, strong: true });
  }
  if (!rows.length) return null;
  const declined = Object.entries(report.declined);
  return h("div", { class: "card" }, h("h3", {}, "Latency"), bars(rows, "Latency"),
    h("p", { class: "quiet" }, "Measured while compiling, on the example inputs: the model as it was, and the result of all passes."),
    profile && h("p", { class: "quiet" }, `Profiled: ${format.ms(profile.total)} ms a run, median of ${profile.runs}; the time of each node is in the table.`),
    declined.map(([name, why]) => h("p", { class: "quiet" }, h("b", {}, name), ` was not taken: ${why}`)));
}

/** What each step added or took away, each bar from where the one before it ended; the first and the last are whole. */
function waterfallPanel(steps) {
  const most = Math.max(...steps.map(([, ms]) => ms)) || 1, percent = (ms) => `${(100 * ms) / most}%`;
  return h("div", { class: "card" }, h("h3", {}, "Pass by pass"), h("div", { class: "bars", role: "list", "aria-label": "Latency from eager through every pass" }, steps.map(([name, ms], i) => {
    const before = i ? steps[i - 1][1] : 0, whole = i === 0 || i === steps.length - 1;
    const change = i ? `  ${ms <= before ? "−" : "+"}${format.ms(Math.abs(ms - before))}` : "";
    return h("div", { class: `bar${i === steps.length - 1 ? " strong" : ""}`, role: "listitem" }, h("span", { class: "bar-name", title: name }, name),
      h("span", { class: "bar-track" },
        whole && h("span", { class: "bar-fill", style: { width: percent(ms) } }),
        i > 0 && h("span", { class: `bar-step ${ms <= before ? "less" : "more"}`, style: { left: percent(Math.min(ms, before)), width: percent(Math.abs(ms - before)) } })),
      h("span", { class: "bar-value" }, `${format.ms(ms)} ms${change}`));
  })), h("p", { class: "quiet" }, "Each step lowered and measured by itself; green is time saved, red time added."));
}

function timePanel(report, passes) {
  const rows = Object.entries(report.seconds).filter(([, s]) => s !== null).map(([name, s]) => ({ name, value: s, text: `${s.toFixed(2)} s` }));
  const whole = rows.reduce((sum, row) => sum + row.value, 0);
  if (!rows.length) return null;
  return h("div", { class: "card" }, h("h3", {}, `Compiled in ${whole.toFixed(1)} s`), shares(rows, "Time of compiling by stage"),
    h("p", { class: "quiet" }, `${passes.filter((one) => one.edits).length} of ${passes.length} passes found something to do.`));
}

function passesPanel({ passes, snapshots }, go) {
  const step = new Map(snapshots.map((snapshot, i) => [snapshot.pass, i]));
  const change = ([a, b], text) => (a === b ? text(b) : `${text(a)} → ${text(b)}`);
  const rows = passes.map((one, i) => h("tr", { class: one.edits ? null : "idle" },
    h("th", { scope: "row" }, step.has(i) ? h("button", { class: "link", title: "Show this step in the graphs", onclick: () => go(step.get(i)) }, one.spec) : one.spec,
      !one.exact && one.edits > 0 && h("span", { class: "mark lossy" }, "lossy"), one.notes.map((note) => h("div", { class: "quiet note" }, note))),
    h("td", { class: "number" }, one.edits ? String(one.edits) : "–"), h("td", { class: "number" }, change(one.nodes, String)),
    h("td", { class: "number" }, change(one.bytes, format.bytes)), h("td", { class: "number" }, one.seconds === null ? "–" : one.seconds.toFixed(2)),
    h("td", {}, one.difference === null ? "" : one.exact ? "same outputs" : one.difference)));
  return section("passes", "Passes", h("div", { class: "scroller wide", tabindex: "0", role: "region", "aria-label": "Passes" },
    h("table", { class: "data passes" }, h("thead", {}, h("tr", {},
      ["Pass", "Edits", "Operators", "Weights", "Seconds", "Outputs against before"].map((title, i) => h("th", { scope: "col", class: i > 0 && i < 5 ? "number" : null }, title)))),
    h("tbody", {}, rows))));
}

/** Rows of the table: the layers with what is known of them, then all other operators of the last graph. */
function layerRows(data, graph) {
  const known = new Map(data.layers.map((layer) => [`%${layer.node}`, layer])), times = data.profile?.nodes ?? {};
  const rows = [];
  const add = (id, node, layer) => {
    const path = layer?.weight ? layer.weight.replace(/(\.(folded_)?weight(_\w+)?)+$/, "").replace(/\.(low_rank_\w+)$/, " $1") : node.name;
    const source = layer?.source || node.source;
    rows.push({ id, layer: Boolean(layer), name: path, title: `${id} ${layer?.weight ?? ""}`, op: node.op.replace(/^(fxopt|quantized_decomposed)\./, ""), source,
      place: source ? format.place(source).replace(/^.*\//, "") : "", macs: node.macs || null, bytes: layer?.bytes || null, ms: times[node.name] ?? null,
      bits: layer?.bits ?? null, zeros: layer?.zeros ?? null, rank: layer?.rank ?? null, snr: layer?.snr_db ?? null, mode: layer?.mode ?? "",
      words: `${path} ${node.op} ${node.name} ${source} ${layer?.mode ?? ""}`.toLowerCase(),
      spreads: layer ? [["weights", layer.weights], ["inputs", layer.inputs]].filter(([, spread]) => spread) : [], given: layer });
  };
  if (graph) for (const node of graph.nodes) node.kind !== "io" && add(node.id, node, known.get(node.id));
  else for (const layer of data.layers) add(`%${layer.node}`, { name: layer.node, op: layer.op, macs: layer.macs, source: layer.source }, layer);
  return rows;
}

function columns(rows, data) {
  const any = (key) => rows.some((row) => row[key] !== null && row[key] !== "");
  return [
    { key: "name", title: "Layer" }, { key: "op", title: "Operator" },
    { key: "macs", title: "MACs", text: format.si, bar: true, help: "multiply-accumulates on the example inputs" },
    { key: "bytes", title: "Bytes", text: format.bytes, bar: true, help: "weight, bias and scales" },
    data.profile && { key: "ms", title: "ms", text: format.ms, bar: true, help: `median of ${data.profile.runs} runs` },
    { key: "bits", title: "Bits", text: String, help: "of a number of the weight" },
    { key: "zeros", title: "Zeros", text: format.percent, help: "share of the weight" },
    any("rank") && { key: "rank", title: "Rank", text: String, help: "inner size of a factorised weight" },
    any("snr") && { key: "snr", title: "SNR, dB", text: (value) => value.toFixed(1), help: "of the result as quantized, against float" },
    any("mode") && { key: "mode", title: "Mode" },
    { key: "place", title: "Source" },
  ].filter(Boolean);
}

/** A grid of what *make* makes of the first of *rows*, and a button for more of them. */
function cards(rows, make, step) {
  const grid = h("div", { class: "spreads" }, rows.slice(0, step).map(make));
  let shown = step;
  const more = h("button", { class: "plain", hidden: rows.length <= step, onclick: () => {
    grid.append(...rows.slice(shown, shown + 4 * step).map(make));
    shown += 4 * step;
    more.hidden = shown >= rows.length;
    more.textContent = `Show more of ${rows.length} layers`;
  } }, `Show more of ${rows.length} layers`);
  return [grid, more];
}

function weightsPanel(rows, select) {
  const shown = rows.filter((row) => row.spreads.length);
  if (!shown.length) return null;
  const some = shown.some((row) => row.given.inputs);
  const card = (row) => h("article", { class: "spread" },
    h("h3", {}, h("button", { class: "link", onclick: () => select(row.id), title: "Show in the graph" }, row.name)),
    h("p", { class: "quiet" }, [row.given.shape.join("×"), row.bits && `${row.bits} bit`, row.snr !== null && `${row.snr.toFixed(1)} dB`].filter(Boolean).join(" · ")),
    row.spreads.map(([title, spread]) => h("div", { class: "labelled" }, h("span", { class: "quiet" }, title), histogram(spread, `${row.name}, ${title}`))));
  return section("spreads", some ? "Weights and activations" : "Weights",
    h("p", { class: "lead" }, "How the numbers of each weight are spread, on a scale of square roots",
      some ? ", and what the layer reads, on data kept back from calibration. The shaded span is what the integers stand for; what lies outside is clipped." : "."), cards(shown, card, 24));
}

function zerosPanel(rows, select) {
  const known = rows.filter((row) => row.zeros !== null);
  if (!known.length) return null;
  const sparse = known.filter((row) => row.zeros >= 0.02);
  if (!sparse.length) {
    return section("zeros", "Zeros", h("p", { class: "lead" }, `No weight is sparse: at most ${format.percent(Math.max(...known.map((row) => row.zeros)))} of the numbers of a layer are zero.`));
  }
  const strip = h("div", { class: `heat${known.length > 150 ? " many" : ""}`, role: "list", "aria-label": "Share of zeros by layer" }, known.map((row) => {
    const said = `${row.name}: ${format.percent(row.zeros)} zeros`;
    return h("span", { role: "listitem" }, h("button", { class: "cell", title: said, "aria-label": said, onclick: () => select(row.id) },
      h("span", { class: "ink", style: { opacity: String(0.06 + 0.94 * row.zeros) } })));
  }));
  const map = (row) => h("article", { class: "spread" },
    h("h3", {}, h("button", { class: "link", onclick: () => select(row.id) }, row.name)),
    h("p", { class: "quiet" }, `${format.percent(row.zeros)} zeros · ${row.given.shape.join("×")}`),
    zeroMap(row.given.map, `Zeros in the weight of ${row.name}, outputs down, inputs across`));
  return section("zeros", "Zeros", h("p", { class: "lead" }, "Share of zeros of each layer, in the order of the graph: the darker, the more. Below, where in the weight they are: outputs down, inputs across."),
    strip, cards(sparse.filter((row) => row.given.map.length), map, 18));
}

function runsPanel(runs) {
  if (!runs.length) return null;
  const any = (key) => runs.some((run) => run[key] !== null && run[key] !== undefined);
  const axes = {
    bytes: { name: "weights, MiB", value: (run) => run.bytes / 2 ** 20, text: format.number },
    latency: { name: "latency, ms", value: (run) => run.latency, text: format.number },
    macs: { name: "GMACs", value: (run) => run.macs / 1e9, text: format.number },
  };
  const marks = {
    accuracy: { name: "accuracy", value: (run) => run.accuracy, text: (value) => String(Number(value.toPrecision(4))) },
    cosine: { name: "cosine of the outputs to float, kept-back data", value: (run) => run.cosine, text: (value) => String(Number(value.toPrecision(5))) },
    error: { name: "−log₁₀ of the error against eager, example inputs", value: (run) => (run.error > 0 ? -Math.log10(run.error) : null), text: format.number },
  };
  const picture = h("div", {}), choose = (label, options, at) => h("label", { class: "check" }, label, h("select", { onchange: draw },
    Object.entries(options).filter(([key]) => any(key)).map(([key, axis]) => h("option", { value: key, selected: key === at }, axis.name))));
  const x = choose("across", axes, "bytes"), y = choose("up", marks, any("accuracy") ? "accuracy" : "error");
  function draw() {
    const [a, b] = [x, y].map((label) => label.querySelector("select").value);
    picture.replaceChildren(axes[a] && marks[b] ? scatter(runs, axes[a], marks[b]) : h("p", { class: "quiet" }, "Nothing was measured to compare by."));
  }
  draw();
  const cell = (value, text) => h("td", { class: "number" }, value === null || value === undefined ? "–" : text(value));
  return section("runs", "Runs", h("div", { class: "tools" }, x, y), picture,
    h("div", { class: "scroller wide", tabindex: "0", role: "region", "aria-label": "Runs" }, h("table", { class: "data" },
      h("thead", {}, h("tr", {}, ["Run", "Model", "Engine"].map((title) => h("th", { scope: "col" }, title)), ["Weights", "MACs", "Latency, ms", "Accuracy", "Error"].map((title) => h("th", { scope: "col", class: "number" }, title)))),
      h("tbody", {}, runs.map((run) => h("tr", {}, h("th", { scope: "row" }, run.label), h("td", {}, run.model), h("td", {}, run.backend), cell(run.bytes, format.bytes), cell(run.macs, format.si),
        cell(run.latency, format.ms), cell(run.accuracy, (value) => String(Number(value.toPrecision(4)))), cell(run.error, (value) => value.toExponential(1))))))));
}

function skipsPanel(passes, select) {
  const groups = [];
  for (const one of passes) {
    const reasons = new Map();
    for (const [node, reason, source] of one.skips) reasons.set(reason, [...(reasons.get(reason) ?? []), [node, source]]);
    for (const [reason, nodes] of reasons) groups.push({ pass: one.name, reason, nodes });
  }
  if (!groups.length) return section("skips", "Left alone", h("p", { class: "lead" }, "No pass left a candidate alone."));
  return section("skips", "Left alone", h("p", { class: "lead" }, "What a pass looked at and did not change, and why."),
    groups.map(({ pass, reason, nodes }) => h("details", { class: "reason" },
      h("summary", {}, h("span", { class: "mono" }, pass), h("span", { class: "why" }, reason), h("span", { class: "quiet" }, nodes.length === 1 ? "1 node" : `${nodes.length} nodes`)),
      h("ul", {}, nodes.slice(0, 200).map(([node, source]) => h("li", {}, h("button", { class: "link mono", onclick: () => select(`%${node}`) }, node), source && h("span", { class: "quiet" }, ` ${source}`))),
        nodes.length > 200 && h("li", { class: "quiet" }, `and ${nodes.length - 200} more`)))));
}

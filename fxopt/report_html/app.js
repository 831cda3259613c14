"use strict";
// Puts the page together.

async function start() {
  const data = JSON.parse(document.getElementById("data").textContent), main = document.getElementById("main");
  theme();
  if (!data.report) {
    heading("Runs", `${data.runs.length} compiled models`);
    main.append(runsPanel(data.runs));
    document.documentElement.dataset.ready = "true";
    return;
  }
  const { report } = data;
  heading(report.model, `for ${report.target} on ${report.backend}`, h("span", { class: `mark ${report.exact ? "exact" : "lossy"}` }, report.exact ? "exact" : "lossy"));
  document.getElementById("made").textContent = `fxopt ${report.version}`;
  const last = data.snapshots.at(-1), graph = last ? parse(await unpack(last.data)) : null;
  const rows = layerRows(data, graph);
  const graphs = data.snapshots.length ? new Graphs(data, rows) : null;
  const show = (id) => {
    graphs?.reveal(id);
    document.getElementById("graphs")?.scrollIntoView({ block: "start" });
  };
  const go = (step) => {
    const box = graphs.compare.querySelector("[value=before]");
    box.checked = true;
    graphs.whole = false;
    graphs.go(step);
    graphs.element.scrollIntoView({ block: "start" });
  };
  const sections = [summaryPanel(data), graphs?.element, passesPanel(data, go), weightsPanel(rows, show), zerosPanel(rows, show), runsPanel(data.runs), skipsPanel(data.passes, show)].filter(Boolean);
  if (!graphs && rows.length) sections.splice(1, 0, section("graphs", "Layers", new LayerTable(rows, columns(rows, data), { select() {} }).element));
  main.append(...sections);
  document.getElementById("nav").append(...sections.map((one) => {
    const title = one.querySelector("h2");
    return title && h("a", { href: `#${one.id}` }, title.textContent);
  }).filter(Boolean));
  window.addEventListener("keydown", (event) => shortcut(event, graphs));
  if (graphs) {
    window.addEventListener("fxopt-theme", () => graphs.redraw());
    graphs.showDetail();
    await graphs.go(graphs.at);
  } else document.documentElement.dataset.ready = "true";
}

function heading(title, note, mark) {
  document.getElementById("title").textContent = title;
  document.getElementById("note").replaceChildren(note, " ", mark ?? "");
}

function shortcut(event, graphs) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (graphs?.selected) graphs.select(null);
    return;
  }
  if (event.target.closest?.("input, select, textarea") || !graphs) return;
  if (event.key === "/") {
    graphs.search.focus();
    graphs.search.select();
    event.preventDefault();
  } else if (event.key === "n") graphs.hop(1);
  else if (event.key === "p") graphs.hop(-1);
}

/** Dark or light: as the system says, until the switch is used. */
function theme() {
  const root = document.documentElement, button = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try {
      return value === undefined ? localStorage.getItem("fxopt-theme") : localStorage.setItem("fxopt-theme", value);
    } catch {
      return null; // pages from disk may have no storage
    }
  };
  const current = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
  const apply = () => {
    const other = current() === "dark" ? "light" : "dark";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
    button.title = `Switch to ${other} colours`;
    button.textContent = current() === "dark" ? "☾" : "☀";
    forgetPalette();
    window.dispatchEvent(new Event("fxopt-theme"));
  };
  if (["dark", "light"].includes(stored())) root.dataset.theme = stored();
  button.addEventListener("click", () => {
    root.dataset.theme = current() === "dark" ? "light" : "dark";
    stored(root.dataset.theme);
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

start().catch((error) => {
  document.getElementById("main").append(h("p", { class: "failed", role: "alert" }, `This report cannot be shown: ${error.message}`));
  throw error;
});

"use strict";
// The layers as a table: sorted by any column, filtered, walked through by keys, and tied to the graph.

const STEP = 250; // rows that are drawn at once

class LayerTable {
  /** @param rows of {id, name, op, source, …}; @param columns {key, title, unit, text(value), bar}; @param on {select(id)} */
  constructor(rows, columns, on) {
    Object.assign(this, { rows, columns, on, sort: null, down: true, words: "", all: false, shown: STEP, selected: null });
    this.body = h("tbody", {});
    this.more = h("button", { class: "plain", onclick: () => this.grow(this.shown + 4 * STEP) });
    this.count = h("span", { class: "quiet", role: "status" });
    this.heads = columns.map((column) => h("th", { scope: "col", class: column.text ? "number" : null },
      h("button", { class: "sorter", title: column.help ?? null, onclick: () => this.sortBy(column) }, column.title)));
    this.most = Object.fromEntries(columns.filter((c) => c.bar).map((c) => [c.key, Math.max(...rows.map((r) => r[c.key] ?? 0), 0)]));
    const filter = h("input", { type: "search", placeholder: "Filter layers", "aria-label": "Filter layers by name, operator or source",
      oninput: (event) => { this.words = event.target.value.toLowerCase(); this.draw(); } });
    const box = h("input", { type: "checkbox", onchange: (event) => { this.all = event.target.checked; this.draw(); } });
    this.element = h("div", { class: "layers" },
      h("div", { class: "tools" }, filter, h("label", { class: "check" }, box, "all operators"), this.count),
      h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Layers" },
        h("table", { class: "data", onkeydown: (event) => this.key(event) },
          h("thead", {}, h("tr", {}, this.heads)), this.body), this.more));
    this.draw();
  }

  sortBy(column) {
    this.down = this.sort === column ? !this.down : Boolean(column.text);
    this.sort = column;
    this.draw();
  }

  visible() {
    const words = this.words.split(/\s+/).filter(Boolean);
    const rows = this.rows.filter((row) => (this.all || row.layer || row.ms !== null && row.ms !== undefined && this.all)
      && words.every((word) => row.words.includes(word)));
    if (!this.sort) return rows;
    const { key } = this.sort, sign = this.down ? -1 : 1;
    const empty = (value) => value === null || value === undefined || value === "";
    return rows.sort((a, b) => {
      if (empty(a[key]) || empty(b[key])) return empty(a[key]) - empty(b[key]); // what is not known comes last
      return sign * (typeof a[key] === "string" ? a[key].localeCompare(b[key], "en", { numeric: true }) : a[key] - b[key]);
    });
  }

  draw() {
    this.current = this.visible();
    this.heads.forEach((head, i) => {
      const sorted = this.sort === this.columns[i];
      head.setAttribute("aria-sort", !sorted ? "none" : this.down ? "descending" : "ascending");
    });
    this.body.replaceChildren();
    this.drawn = 0;
    this.grow(STEP);
    const whole = this.rows.filter((row) => this.all || row.layer).length;
    this.count.textContent = this.current.length === whole ? `${whole} rows` : `${this.current.length} of ${whole} rows`;
  }

  grow(to) {
    this.shown = Math.min(this.current.length, to);
    for (; this.drawn < this.shown; this.drawn++) this.body.append(this.row(this.current[this.drawn], this.drawn));
    this.more.hidden = this.shown >= this.current.length;
    this.more.textContent = `Show ${Math.min(4 * STEP, this.current.length - this.shown)} more`;
  }

  row(row, i) {
    const cells = this.columns.map((column, at) => {
      const value = row[column.key];
      if (!column.text) {
        const inner = at ? value : h("span", { class: "name", title: row.title }, value);
        return h(at ? "td" : "th", { scope: at ? null : "row", title: column.key === "place" ? row.source : null }, inner);
      }
      const known = value !== null && value !== undefined && value !== "";
      const share = column.bar && known && this.most[column.key] ? (100 * value) / this.most[column.key] : 0;
      return h("td", { class: "number" }, share > 0 && h("span", { class: "under", style: { width: `${share}%` } }),
        h("span", { class: known ? null : "none" }, known ? column.text(value) : "–"));
    });
    return h("tr", { "data-id": row.id, tabindex: row.id === this.selected || (i === 0 && !this.selected) ? "0" : "-1",
      "aria-selected": row.id === this.selected ? "true" : "false", onclick: () => this.on.select(row.id) }, cells);
  }

  key(event) {
    const row = event.target.closest?.("tbody tr");
    if (!row) return;
    const next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling,
      Home: this.body.firstElementChild, End: this.body.lastElementChild }[event.key];
    if (next) next.focus();
    else if (event.key === "Enter" || event.key === " ") this.on.select(row.dataset.id);
    else return;
    event.preventDefault();
  }

  /** Mark the row of node *id* and bring it into view; nothing where the table does not show it. */
  select(id) {
    this.selected = id;
    for (const row of this.body.querySelectorAll("tr[aria-selected=true]")) {
      row.setAttribute("aria-selected", "false");
      row.tabIndex = -1;
    }
    const at = this.current.findIndex((row) => row.id === id);
    if (at < 0) return;
    if (at >= this.shown) this.grow(at + STEP);
    const row = this.body.children[at], scroller = this.body.closest(".scroller");
    row.setAttribute("aria-selected", "true");
    row.tabIndex = 0;
    const top = row.offsetTop - 40, bottom = row.offsetTop + row.offsetHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (bottom > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = bottom - scroller.clientHeight + 8;
  }
}

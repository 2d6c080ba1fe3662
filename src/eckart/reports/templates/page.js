/* The page's own script: draws the figures, folds their panels to the screen, sorts and saves tables. */
(() => {
  "use strict";
  const stored = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const make = (name, attributes = {}, text = "") => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== "") element.textContent = text;
    return element;
  };
  const say = (text) => { document.getElementById("said").textContent = text; };
  const copy = (value) => JSON.parse(JSON.stringify(value));

  /* Light and dark. */
  const wantsDark = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("eckart-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("eckart-theme", theme); } catch { /* not allowed: forget it */ } };
  const theme = () => root.dataset.theme;
  const button = document.getElementById("theme");
  function showTheme(name) {
    root.dataset.theme = name;
    button.setAttribute("aria-pressed", String(name === "dark"));
    button.textContent = name === "dark" ? "Light page" : "Dark page";
    button.setAttribute("aria-label", "Dark page");
  }
  showTheme(remembered() ?? (wantsDark.matches ? "dark" : "light"));

  /* Every colour of a figure is written in its light tone. */
  function paint(value, dark) {
    if (typeof value === "string") return dark ? stored.dark[value] ?? value : value;
    if (Array.isArray(value)) return value.map((inner) => paint(inner, dark));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, paint(inner, dark)]));
    }
    return value;
  }

  /* Panels side by side as far as they fit, with the same room between them at every width. */
  const axisName = (letter, panel) => `${letter}axis${panel ? panel + 1 : ""}`;
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const unescaped = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const widthOf = (text) => pen.measureText(text).width;
  const rowLabels = (data) => [...new Set(data.filter((trace) => Array.isArray(trace.y)).flatMap((trace) => trace.y).filter((y) => typeof y === "string"))];
  /* A label in one line or two, cut where it does not fit. */
  function wrap(label, room) {
    if (widthOf(label) <= room) return [label];
    const cut = (text) => {
      if (widthOf(text) <= room) return text;
      let end = text.length;
      while (end > 1 && widthOf(`${text.slice(0, end)}…`) > room) end--;
      return `${text.slice(0, end)}…`;
    };
    const words = label.split(" ");
    let first = words.shift();
    while (words.length && widthOf(`${first} ${words[0]}`) <= room) first += ` ${words.shift()}`;
    return words.length ? [cut(first), cut(words.join(" "))] : [cut(first)];
  }
  function fold(data, layout, width, extraTop = 0) {
    const { panels, row, least, sharedRows } = layout.meta;
    const titled = (layout.annotations ?? []).some((annotation) => annotation.text.trim());
    const labels = rowLabels(data);
    const room = Math.min(Math.max(0, ...labels.map((label) => widthOf(unescaped(label)))), Math.max(width * 0.16, 120));
    const left = labels.length ? Math.ceil(room) + 14 : layout.yaxis.title?.text ? 66 : 48;
    const wrapped = labels.map((label) => wrap(unescaped(label), room + 1).map(escaped).join("<br>"));
    const hasAxisTitle = Boolean(layout.xaxis?.title?.text);
    const right = data.some((trace) => trace.colorbar || trace.marker?.colorbar) ? 66 : 14;
    const gapX = sharedRows ? 30 : layout.yaxis.title?.text ? 72 : 50;
    const inner = width - left - right;
    const columns = Math.max(1, Math.min(panels, 4, Math.floor((inner + gapX) / (least + gapX))));
    const rows = Math.ceil(panels / columns);
    const top = (titled ? 30 : 8) + extraTop, bottom = hasAxisTitle ? 52 : 34;
    const gapY = (titled ? 36 : 10) + (hasAxisTitle ? 46 : 28);
    const height = rows * row + (rows - 1) * gapY;
    const panelWidth = (inner - (columns - 1) * gapX) / columns;
    for (const trace of data) { // numbers on cells that are too narrow for them
      if (trace.mode === "text" && panelWidth / new Set(trace.x).size < 40) trace.visible = false;
    }
    layout.margin = { l: left, r: right, t: top, b: bottom, autoexpand: false };
    layout.width = width;
    layout.height = top + height + bottom;
    for (let panel = 0; panel < panels; panel++) {
      const column = panel % columns, line = Math.floor(panel / columns);
      const x = column * (panelWidth + gapX) / inner;
      const y = 1 - line * (row + gapY) / height;
      const xaxis = layout[axisName("x", panel)], yaxis = layout[axisName("y", panel)];
      xaxis.domain = [x, Math.min(1, x + panelWidth / inner)];
      yaxis.domain = [Math.max(0, y - row / height), y];
      xaxis.automargin = yaxis.automargin = false;
      if (labels.length) Object.assign(yaxis, { tickmode: "array", tickvals: labels, ticktext: wrapped });
      if (sharedRows) yaxis.showticklabels = column === 0;
      if (!sharedRows && column > 0 && yaxis.title) yaxis.title.text = "";
      if (titled) Object.assign(layout.annotations[panel], { x, y, xanchor: "left", yanchor: "bottom", yshift: 6, xshift: sharedRows && columns === 1 ? 6 - left : 0 });
    }
    return layout;
  }

  /* Figures. */
  const symbols = {
    circle: "M0-4.2a4.2 4.2 0 1 0 .01 0z", square: "M-3.8-3.8h7.6v7.6h-7.6z", diamond: "M0-5.2 5.2 0 0 5.2-5.2 0z",
    "triangle-up": "M0-5 4.8 3.8h-9.6z", "triangle-down": "M0 5 4.8-3.8h-9.6z", star: "M0-6 1.5-2 5.7-1.9 2.4.8 3.5 4.9 0 2.5-3.5 4.9-2.4.8-5.7-1.9-1.5-2z",
    x: "M-4-2.2-2.2-4 0-1.8 2.2-4 4-2.2 1.8 0 4 2.2 2.2 4 0 1.8-2.2 4-4 2.2-1.8 0z", cross: "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
  };
  const dashes = { dash: "5 3", dot: "2 3", dashdot: "6 2 2 2" };
  function swatch(trace, dark) {
    const color = paint(trace.line?.color ?? trace.marker?.color, dark);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", "26"); svg.setAttribute("height", "12"); svg.setAttribute("viewBox", "-13 -6 26 12");
    svg.setAttribute("aria-hidden", "true");
    const add = (name, attributes) => {
      const part = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
      svg.append(part);
    };
    if (trace.type === "bar") { add("rect", { x: -7, y: -5, width: 14, height: 10, rx: 2, fill: color }); return svg; }
    if (trace.line?.color) add("path", { d: "M-13 0H13", stroke: color, "stroke-width": 2, "stroke-dasharray": dashes[trace.line.dash] ?? "none" });
    const outline = trace.marker?.line?.color;
    add("path", { d: symbols[trace.marker?.symbol] ?? symbols.circle, fill: color, stroke: outline ? paint(outline, dark) : "none", "stroke-width": outline ? 1.5 : 0 });
    return svg;
  }
  /* plotly.js comes packed; a script that is put into the page runs at once. */
  async function unpackPlotly() {
    const packed = document.getElementById("plotly");
    if (!packed) return;
    if (typeof DecompressionStream === "undefined") {
      document.getElementById("old-browser").hidden = false;
      return;
    }
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const script = make("script");
    script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    packed.replaceWith(script);
  }
  const config = { displayModeBar: false, responsive: false, showTips: false, doubleClick: "reset" };
  const touch = matchMedia("(pointer: coarse)");

  /* 1, 2, 5, 10 over a few decades, 1, 10, 100 over many. */
  function logTicks(data, panel) {
    const name = panel ? `y${panel + 1}` : "y";
    const values = data.filter((trace) => (trace.yaxis ?? "y") === name).flatMap((trace) => trace.y).filter((y) => y > 0);
    const decades = values.length ? Math.log10(Math.max(...values) / Math.min(...values)) : 0;
    return decades < 0.8 ? {} : decades < 4.5 ? { dtick: "D2" } : { dtick: 1 };
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.slug = figure.dataset.chart;
      this.data = stored.charts[this.slug];
      this.plot = figure.querySelector(".plot");
      this.view = this.data.views[this.data.start];
      this.hidden = new Set();
      this.log = null;
      this.buildSelectors();
      figure.querySelector("button.log")?.addEventListener("click", () => this.toggleLog());
      for (const save of figure.querySelectorAll("button.save")) save.addEventListener("click", () => this.save(save.dataset.format));
      const details = figure.querySelector("details.numbers");
      details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(...buildTable(this.data.table)); });
    }
    buildSelectors() {
      const box = this.figure.querySelector(".choices");
      this.selects = this.data.selectors.map(({ name, options }, place) => {
        const select = make("select", { "aria-label": name });
        options.forEach((option) => select.append(make("option", { value: option }, option)));
        select.addEventListener("change", () => this.choose(place, select.value));
        if (options.length > 1) {
          const label = make("label", {}, name);
          label.append(select);
          box.append(label);
        }
        return select;
      });
    }
    /* The view that has the new choice and as many of the others as there is one for. */
    choose(place, value) {
      const fits = (view) => view.choices.filter((choice, at) => choice === this.view.choices[at]).length;
      const candidates = this.data.views.filter((view) => view.choices[place] === value);
      this.view = candidates.reduce((best, view) => (fits(view) > fits(best) ? view : best));
      this.log = null;
      this.draw();
      say(`${this.data.title}: ${this.view.choices.filter(Boolean).join(", ")}`);
    }
    isLog() { return this.log ?? this.view.layout.yaxis.type === "log"; }
    toggleLog() { this.log = !this.isLog(); this.draw(); }
    spec(width, dark, forFile = false) {
      const layout = copy(this.view.layout), data = copy(this.view.data);
      fold(data, layout, width, forFile ? this.fileTop(data) : 0);
      if (this.data.views.length && this.figure.querySelector("button.log")) {
        for (let panel = 0; panel < layout.meta.panels; panel++) {
          const axis = layout[axisName("y", panel)];
          axis.type = this.isLog() ? "log" : "linear";
          if (this.isLog()) Object.assign(axis, { tickformat: "~g", rangemode: "normal", ...logTicks(data, panel) });
        }
      }
      layout.dragmode = touch.matches ? false : "zoom";
      for (const trace of data) if (trace.legendgroup && this.hidden.has(trace.legendgroup)) trace.visible = false;
      return { data: paint(data, dark), layout: paint(layout, dark) };
    }
    fileTop(data) { return 40 + (data.some((trace) => trace.legendgroup) ? 34 : 0); }
    async draw() {
      if (!window.Plotly) return;
      this.started = true;
      const dark = theme() === "dark" && !printing;
      const width = Math.floor(this.plot.clientWidth);
      if (width < 60) return; // not laid out yet: the observer below comes back when it is
      this.width = width;
      this.view.choices.forEach((choice, place) => { this.selects[place].value = choice; });
      this.figure.querySelector("button.log")?.setAttribute("aria-pressed", String(this.isLog()));
      const { data, layout } = this.spec(printing ? 960 : width, dark);
      this.plot.style.height = `${layout.height}px`;
      this.drawLegend(dark);
      this.figure.querySelector(".view-notes").replaceChildren(...this.view.notes.map((note) => make("p", {}, note)));
      await Plotly.react(this.plot, data, layout, config);
      if (charts.every((chart) => chart.width)) root.dataset.ready = "true";
    }
    drawLegend(dark) {
      const first = new Map();
      for (const trace of this.view.data) if (trace.legendgroup && !first.has(trace.legendgroup)) first.set(trace.legendgroup, trace);
      const box = this.figure.querySelector(".legend");
      const focused = [...box.children].indexOf(document.activeElement);
      box.replaceChildren(...[...first].map(([group, trace]) => {
        const item = make("button", { type: "button", "aria-pressed": String(!this.hidden.has(group)) });
        item.append(swatch(trace, dark), make("span", {}, unescaped(trace.name)));
        item.addEventListener("click", () => {
          if (!this.hidden.delete(group)) this.hidden.add(group);
          this.draw();
        });
        return item;
      }));
      if (focused >= 0) box.children[focused]?.focus();
    }
    /* A file stands alone: it is light, on white, with its title and its legend. */
    async save(format) {
      const width = 1100, { data, layout } = this.spec(width, false, true);
      const choices = this.view.choices.filter(Boolean);
      layout.paper_bgcolor = layout.plot_bgcolor = "#ffffff";
      layout.title = { text: escaped([this.data.title, ...choices].join(" · ")), x: 0, xref: "paper", y: 1, yref: "container", yanchor: "top", pad: { t: 14 }, font: { size: 16, color: "#262a33" } };
      if (data.some((trace) => trace.legendgroup)) {
        layout.showlegend = true;
        layout.legend = { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top", tracegroupgap: 0, bgcolor: "rgba(0,0,0,0)" };
        layout.legend.yref = "paper";
        layout.legend.y = 1 + 28 / (layout.height - layout.margin.t - layout.margin.b);
        layout.legend.yanchor = "bottom";
      }
      const url = await Plotly.toImage({ data, layout, config }, { format, width, height: layout.height, scale: format === "png" ? 2 : 1 });
      const name = [this.slug, ...choices].join("-").replace(/[^A-Za-z0-9.-]+/g, "-").slice(0, 120);
      if (format === "svg") download(new Blob([decodeURIComponent(url.slice(url.indexOf(",") + 1))], { type: "image/svg+xml" }), `${name}.svg`);
      else download(bytesOf(url), `${name}.png`);
    }
  }
  const bytesOf = (url) => new Blob([Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (c) => c.charCodeAt(0))], { type: "image/png" });
  function download(blob, name) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved ${name}`);
  }

  /* Tables. One that is larger than its box fades where it goes on, and says so below. */
  function watchScroll(box, tools) {
    const note = tools.querySelector(".more");
    const look = () => {
      const wide = box.scrollWidth - box.clientWidth, high = box.scrollHeight - box.clientHeight;
      box.classList.toggle("more-right", wide - box.scrollLeft > 1);
      box.classList.toggle("more-down", high - box.scrollTop > 1);
      const ways = [...(wide > 1 ? ["sideways"] : []), ...(high > 1 ? ["down"] : [])];
      note.hidden = !ways.length;
      note.textContent = `This table is larger than its frame: scroll ${ways.join(" and ")}.`;
    };
    box.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(box);
    look();
  }
  for (const box of document.querySelectorAll(".table-box")) watchScroll(box, box.nextElementSibling);
  function buildTable({ slug, title, groups, columns, rows }) {
    const box = make("div", { class: "table-box", tabindex: "0", role: "region", "aria-label": title });
    const table = make("table", { id: `${slug}-table`, "data-name": slug });
    table.append(make("caption", { class: "unseen" }, title));
    const head = make("thead"), labels = make("tr"), body = make("tbody");
    if (groups.length) {
      const above = make("tr", { class: "groups" });
      for (const [name, span] of groups) above.append(make(name ? "th" : "td", name ? { colspan: span, scope: "colgroup" } : { colspan: span }, name));
      head.append(above);
    }
    for (const [label, numeric, group] of columns) {
      const cell = make("th", { scope: "col", class: numeric ? "number" : "text", "data-group": group, "data-label": label });
      cell.append(make("button", { type: "button", class: "sort" }, label));
      labels.append(cell);
    }
    head.append(labels);
    for (const row of rows) {
      const line = make("tr");
      row.forEach(([text, value], at) => line.append(make("td", { class: columns[at][1] ? "number" : "text", ...(value === undefined ? {} : { "data-v": value }) }, text)));
      body.append(line);
    }
    table.append(head, body);
    box.append(table);
    const tools = make("div", { class: "tools" });
    tools.append(make("button", { type: "button", class: "quiet csv", "data-table": table.id }, "Save as CSV"));
    tools.append(make("span", { class: "more", hidden: "" }));
    watchScroll(box, tools);
    return [box, tools];
  }
  const MISSING = "–";
  const valueOf = (cell) => cell.dataset.v ?? (cell.textContent === MISSING ? "" : cell.textContent);
  function sort(header) {
    const table = header.closest("table"), body = table.tBodies[0], at = header.cellIndex;
    const numeric = header.classList.contains("number");
    const was = header.getAttribute("aria-sort");
    const down = was ? was === "ascending" : numeric;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...body.rows].map((row) => ({ row, key: valueOf(row.cells[at]) }));
    const number = (key) => (key === "" ? NaN : Number(key));
    keyed.sort((a, b) => {
      const [x, y] = [number(a.key), number(b.key)];
      if (numeric) {
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return x === y ? 0 : (x < y ? -1 : 1) * (down ? -1 : 1);
      }
      return a.key.localeCompare(b.key, undefined, { numeric: true }) * (down ? -1 : 1);
    });
    body.append(...keyed.map(({ row }) => row));
    say(`Sorted by ${header.dataset.label}, ${down ? "descending" : "ascending"}`);
  }
  /* A cell of text that a spreadsheet would take for a formula gets an apostrophe. */
  const quoted = (text, numeric) => {
    const safe = !numeric && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  function csv(table) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const numeric = heads.map((cell) => cell.classList.contains("number"));
    const lines = [heads.map((cell) => quoted([cell.dataset.group, cell.dataset.label].filter(Boolean).join(" "), false))];
    for (const row of table.tBodies[0].rows) {
      lines.push([...row.cells].map((cell, at) => quoted(valueOf(cell), numeric[at] && !Number.isNaN(Number(valueOf(cell))))));
    }
    return `${lines.map((line) => line.join(",")).join("\r\n")}\r\n`;
  }
  document.addEventListener("click", (event) => {
    const sorter = event.target.closest("button.sort");
    if (sorter) sort(sorter.closest("th"));
    const saver = event.target.closest("button.csv");
    if (saver) {
      const table = document.getElementById(saver.dataset.table);
      download(new Blob(["\ufeff", csv(table)], { type: "text/csv;charset=utf-8" }), `${table.dataset.name}.csv`);
    }
  });

  /* Everything together. The figures are drawn one after the other, so that the page stays alive. */
  let printing = false;
  const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => new Chart(figure));
  const rest = () => new Promise((done) => setTimeout(done));
  async function drawAll() {
    for (const chart of charts) {
      await chart.draw();
      await rest();
    }
  }
  if (!charts.length) root.dataset.ready = "true";
  unpackPlotly().then(drawAll);
  button.addEventListener("click", () => {
    showTheme(theme() === "dark" ? "light" : "dark");
    remember(theme());
    drawAll();
  });
  wantsDark.addEventListener("change", () => {
    if (remembered() === null) { showTheme(wantsDark.matches ? "dark" : "light"); drawAll(); }
  });
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = charts.find((found) => found.plot === target);
      if (!printing && chart.started && Math.abs((chart.width ?? 0) - Math.floor(target.clientWidth)) > 1) chart.draw();
    }
  });
  for (const chart of charts) resized.observe(chart.plot);
  addEventListener("beforeprint", () => { printing = true; root.dataset.theme = "light"; charts.forEach((chart) => chart.draw()); });
  addEventListener("afterprint", () => { printing = false; showTheme(remembered() ?? (wantsDark.matches ? "dark" : "light")); drawAll(); });

  /* On a narrow page the sections are a menu that closes behind the reader. */
  const menu = document.getElementById("menu"), wide = matchMedia("(min-width: 70rem)");
  const settle = () => { menu.open = wide.matches; };
  settle();
  wide.addEventListener("change", settle);
  menu.addEventListener("click", (event) => { if (event.target.closest("a")) settle(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && menu.open && !wide.matches) { settle(); menu.querySelector("summary").focus(); }
  });

  /* Where the reader is. */
  const links = new Map([...document.querySelectorAll("aside a")].map((link) => [link.hash.slice(1), link]));
  const inView = new Set();
  new Set([...links.keys()]).forEach((id) => {
    new IntersectionObserver(([entry]) => {
      if (entry.isIntersecting) inView.add(id); else inView.delete(id);
      const current = [...links.keys()].find((key) => inView.has(key));
      if (current) for (const [key, link] of links) {
        if (key === current) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-15% 0px -60% 0px" }).observe(document.getElementById(id));
  });
})();

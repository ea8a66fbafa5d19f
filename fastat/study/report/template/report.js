"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(element(id).textContent);
  // plotly takes names for markup
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const runs = read("data-runs");
  const whole = (n) => n.toLocaleString("en");
  const MISSING = "\u2013";
  const PRINT = { width: 660, height: 310 }; // pixels that fit on a page of A4 and of Letter

  // ---------------------------------------------------------------- charts
  const PALETTE = ["#1f6aa5", "#c8591a", "#2f8a57", "#9b3f86", "#9a7412", "#5a57b5", "#5d666d", "#b8383d"];
  const INK = "#1c1e20";
  const SOFT = "#5d6368";
  const RULE = "#dcdcd6";
  const colour = (series) => PALETTE[series % PALETTE.length];
  const drawn = []; // a function for each chart, called again for print
  let printing = false;

  function axis(title, more) {
    return {
      title: { text: title, font: { size: 12, color: SOFT }, standoff: 8 },
      color: SOFT, gridcolor: RULE, linecolor: RULE, zeroline: false,
      tickfont: { size: 11 }, ...more,
    };
  }

  function plot(id, traces, x, y) {
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: INK },
      margin: { l: 58, r: 14, t: 12, b: 44 },
      xaxis: x, yaxis: y, hovermode: "closest", dragmode: false,
      hoverlabel: { bgcolor: "white", bordercolor: RULE, font: { color: INK }, namelength: 60 },
      showlegend: true,
      legend: {
        orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11, color: SOFT },
        maxheight: printing ? 0.6 : 0.25, tracegroupgap: 0, // a longer one scrolls
      },
      ...(printing ? PRINT : { autosize: true }),
    };
    return Plotly.react(element(id), traces, layout, { displayModeBar: false, responsive: true });
  }

  function drawChart(chart) {
    const traces = chart.traces.map((t) => {
      const mark = t.text.length ? "%{text}<br>" : "";
      return {
        x: t.x, y: t.y, name: plain(t.name), text: t.text.map(plain),
        legendgroup: t.series, showlegend: t.legend,
        type: "scatter", mode: "lines+markers",
        line: { color: colour(t.series), width: t.style === "dot" ? 1.3 : 2, dash: t.style === "dot" ? "dot" : t.series < PALETTE.length ? "solid" : "dashdot" },
        marker: { color: colour(t.series), size: t.style === "dot" ? 3 : 5 },
        hovertemplate: `${mark}${chart.x} %{x:.3~g}<br>${chart.y} %{y:.4~g}`,
      };
    });
    const few = chart.x === "epoch" && Math.max(...chart.traces.flatMap((t) => t.x)) <= 10;
    const whole = few ? { dtick: 1 } : {}; // plotly would also write halves
    return plot(`chart-${chart.id}`, traces, axis(chart.x, whole), axis(chart.y));
  }

  for (const chart of read("data-charts")) drawn.push(() => drawChart(chart));

  // ---------------------------------------------------------------- tables
  const rowsOf = (table) => [...table.tBodies[0].rows];

  function valueOf(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    const text = cell.textContent.trim();
    return text === MISSING || text === "" ? null : text;
  }

  function sort(table, column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const rows = rowsOf(table).map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a).localeCompare(String(b), "en", { numeric: true });
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("th");
      if (!head || !event.target.closest("button")) return;
      const now = head.getAttribute("aria-sort");
      const first = head.classList.contains("text") ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      sort(table, head.cellIndex, now === first ? other : first);
    });
  }

  // ---------------------------------------------------------------- classes
  const parsed = new Map(); // a run's scores, read when they are first asked for
  function scores(run) {
    if (!parsed.has(run)) {
      const data = read(`data-classes-${run}`);
      data.place = new Map(data.ids.map((id, k) => [id, k]));
      parsed.set(run, data);
    }
    return parsed.get(run);
  }

  const browser = element("class-table");
  const chosen = { a: null, b: null, id: null };

  function filter() {
    const words = element("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = rowsOf(browser);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => row.dataset.find.includes(word));
      shown += !row.hidden;
    }
    element("found").textContent = `${shown} of ${rows.length} classes`;
  }

  function cellOf(value, digits, share) {
    const cell = document.createElement("td");
    if (value === null || value === undefined) {
      cell.textContent = MISSING;
      return cell;
    }
    cell.textContent = value.toFixed(digits).replace("-", "\u2212");
    cell.dataset.sort = value;
    if (share) {
      cell.className = "share";
      cell.style.setProperty("--share", value);
    }
    return cell;
  }

  function headOf(titles) {
    const row = document.createElement("tr");
    titles.forEach((title, i) => {
      const head = document.createElement("th");
      head.scope = "col";
      if (i === 0) head.className = "text";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      head.append(button);
      row.append(head);
    });
    return row;
  }

  function listClasses() {
    const a = scores(chosen.a);
    const b = chosen.b === null ? null : scores(chosen.b);
    const titles = b
      ? ["class", "positives", "AP", "AP beside", "difference"]
      : ["class", "positives", "AP", "AUC"];
    browser.tHead.replaceChildren(headOf(titles));
    const rows = a.ids.map((id, k) => {
      const row = document.createElement("tr");
      row.dataset.id = id;
      row.dataset.find = `${a.names[k]} ${id}`.toLowerCase();
      const head = document.createElement("th");
      head.scope = "row";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = a.names[k];
      head.append(button);
      const positives = cellOf(a.positives[k], 0);
      positives.textContent = whole(a.positives[k]);
      row.append(head, positives, cellOf(a.ap[k], 3, true));
      if (b) {
        const other = b.place.has(id) ? b.ap[b.place.get(id)] : null;
        const both = other !== null && a.ap[k] !== null;
        row.append(cellOf(other, 3, true), cellOf(both ? a.ap[k] - other : null, 3));
      } else {
        row.append(cellOf(a.auc[k], 3));
      }
      return row;
    });
    browser.tBodies[0].replaceChildren(...rows);
    sort(browser, 2, "descending");
    filter();
    const order = a.ids.map((id, k) => [a.names[k], id]).sort((p, q) => p[0].localeCompare(q[0], "en"));
    element("class").replaceChildren(...order.map(([name, id]) => new Option(name, id)));
    const known = a.place.has(chosen.id);
    choose(known ? chosen.id : browser.tBodies[0].rows[0].dataset.id);
  }

  function choose(id) {
    chosen.id = id;
    element("class").value = id;
    for (const row of rowsOf(browser)) {
      if (row.dataset.id === id) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    drawClass();
  }

  function drawClass() {
    const traces = [];
    const words = [];
    for (const run of [chosen.a, chosen.b]) {
      if (run === null) continue;
      const data = scores(run);
      const k = data.place.get(chosen.id);
      if (k === undefined) {
        words.push(`${runs[run]} does not know this class`);
        continue;
      }
      const positives = data.positives[k];
      if (data.ap[k] === null) {
        words.push(`${runs[run]}: no positive in ${whole(data.clips)} clips`);
        continue;
      }
      words.push(`${runs[run]}: AP ${data.ap[k].toFixed(3)}, ${whole(positives)} positives in ${whole(data.clips)} clips`);
      const [hits, picked, thresholds] = data.curves[k];
      const precision = hits.map((h, i) => h / picked[i]);
      traces.push({
        type: "scatter", mode: hits.length > 40 ? "lines" : "lines+markers", name: plain(runs[run]),
        x: [0, ...hits.map((h) => h / positives)], y: [precision[0], ...precision],
        text: ["", ...hits.map((h, i) => `threshold ${thresholds[i]}: ${h} found, ${picked[i] - h} wrong`)],
        line: { shape: "vh", width: 2, color: colour(data.series) },
        marker: { size: [0, ...hits.map(() => 5)], color: colour(data.series) },
        hovertemplate: "recall %{x:.3f}<br>precision %{y:.3f}<br>%{text}",
      });
      if (run === chosen.a) {
        const chance = positives / data.clips;
        traces.push({
          type: "scatter", mode: "lines", name: "chance", x: [0, 1], y: [chance, chance],
          line: { dash: "dot", width: 1.3, color: SOFT }, hoverinfo: "skip",
        });
      }
    }
    element("class-note").textContent = `${words.join("; ")}.`;
    const range = { range: [0, 1.02], constrain: "domain" };
    return plot("precision-recall", traces, axis("recall", range), axis("precision", range));
  }

  if (browser) {
    const number = (field) => (field.value === "" ? null : Number(field.value));
    for (const [key, id] of [["a", "run-a"], ["b", "run-b"]]) {
      element(id).addEventListener("change", (event) => {
        chosen[key] = number(event.target);
        listClasses();
      });
    }
    element("find").addEventListener("input", filter);
    element("class").addEventListener("change", (event) => choose(event.target.value));
    browser.tBodies[0].addEventListener("click", (event) => {
      if (event.target.closest("button")) choose(event.target.closest("tr").dataset.id);
    });
    chosen.a = number(element("run-a"));
    listClasses();
    drawn.push(drawClass);
  }

  // ---------------------------------------------------------------- swatches and print
  for (const swatch of document.querySelectorAll(".swatch")) {
    const series = Number(swatch.dataset.series);
    const again = series >= PALETTE.length; // a ring, as its line is dashed
    swatch.style.background = again ? "none" : colour(series);
    swatch.style.border = again ? `2px solid ${colour(series)}` : "none";
  }
  function redraw() {
    for (const draw of drawn) draw();
  }
  function print(on) {
    if (printing === on) return;
    printing = on;
    redraw();
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  redraw();
})();

/* ---- the table of every method, that of inference, and the CSV ---- */
/* A row unrounded, under the names that tables/results.csv has for it. */
function record(row) {
  const hundredfold = (value) => (known(value) ? 100 * value : null);
  const judged = group().qualities.flatMap(({ key }) => [key, `${key}_low`, `${key}_high`]).map((key) => [key, row[key]]);
  return {
    method: row.name, tpme_rank: row.rank, tpme_percent: hundredfold(row.tpme), tpme_low_percent: hundredfold(row.low), tpme_high_percent: hundredfold(row.high),
    tpme_lower_bound_percent: hundredfold(row.bound), ...Object.fromEntries(judged), epoch_time_s: row.epoch_time_s, epoch_time_s_sd: row.epoch_time_s_sd, trainable_millions: row.trainable_millions,
    memory_bytes: row.memory_bytes, memory_bytes_sd: row.memory_bytes_sd, memory_seen_bytes: row.memory_seen_bytes, memory_source: row.source, peak_bytes: row.peak_bytes, peak_phase: row.peak_phase, cost_ratio: row.cost_ratio, energy_epoch_j: row.energy_epoch_j,
    seeds_finished: row.seeds, status: row.status, footnotes: footnotes(row).join("; "),
  };
}

/* A column that is the same for all rows says so under the table instead. */
const allColumns = () => [
  { key: "name", title: "Method", help: "Open a method to see its cell" },
  { key: "rank", title: "Rank", num: true, help: "Place by TPME, 1 is the cheapest", text: rankText, hint: (row) => (row.tied.length ? `${tiedText()} with ${row.tied.join(", ")}` : null) },
  { key: "tpme", title: "TPME (%)\u00a0↓", num: true, better: -1, help: "Time, parameters and memory as one number", text: percent, value: (row) => (known(row.tpme) ? 100 * row.tpme : null) },
  { key: "low", title: "95\u00a0%", num: true, help: `Interval of TPME over resamplings of seeds and ${group().parts}`, text: (row) => interval(row, 1), needs: (row) => known(row.tpme_low) || row.tpme_end },
  { key: "cost_ratio", title: "Cost ratio\u00a0↓", num: true, better: -1, help: () => `T, P and M over those of ${group().reference}, weighted geometric mean`, text: (row) => number(row.cost_ratio), needs: () => group().reference },
  ...group().qualities.map(({ key, title, help, better }) => ({ key, title: `${title}\u00a0${better === 1 ? "↑" : "↓"}`, num: true, better, quality: true, help, text: (row) => ranged(row, key) })),
  { key: "t", title: `${group().time_title}\u00a0(s)\u00a0↓`, num: true, better: -1, help: `Training time of ${group().time_of}`, value: (row) => row.epoch_time_s, text: (row) => spread(row.epoch_time_s, row.epoch_time_s_sd) },
  { key: "p", title: "Trained P\u00a0(M)\u00a0↓", num: true, better: -1, help: "Trainable parameters, millions", value: (row) => row.trainable_millions, text: ({ trainable_millions: p }) => (known(p) ? (p >= 1e-3 ? p.toFixed(3) : number(p, 2)) : "–") },
  { key: "m", title: `${group().memory_title.replace(" M", "\u00a0M")}\u00a0↓`, num: true, better: -1, help: group().memory_help, value: (row) => row.memory_bytes, text: (row) => usedMemory(row) },
  { key: "peak_bytes", title: "Whole-run peak\u00a0↓", num: true, better: -1, help: "Highest memory from loading to export, and the phase where it lies", text: (row) => peak(row), hint: (row) => (row.peak_phase ? `in the phase "${row.peak_phase}": ${DOES[row.peak_phase]}` : null), needs: (row) => known(row.peak_bytes) },
  { key: "e", title: "Energy E\u00a0↓", num: true, better: -1, help: `Energy of training ${group().time_of}`, value: (row) => row.energy_epoch_j, text: (row) => energy(row), needs: (row) => known(row.energy_epoch_j) },
  { key: "seeds", title: "Seeds", num: true, help: "Finished seeds", varies: true, text: (row) => String(row.seeds) },
  { key: "status", title: "Outcome", help: "How the runs ended", varies: true },
];
const constant = (key) => new Set(group().rows.map((row) => row[key])).size === 1;
const columns = () => allColumns().filter(({ key, needs, varies }) => (!needs || group().rows.some(needs)) && !(varies && constant(key)));
const valueOf = (column, row) => (column.value ? column.value(row) : row[column.key]);

/* ---- the table ---- */
function visible(rows) {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const column = allColumns().find((candidate) => candidate.key === state.sort);
  const sign = state.down ? -1 : 1;
  return rows
    .filter((row) => words.every((word) => row.name.toLowerCase().includes(word)) && (!state.status || row.status === state.status))
    .sort((a, b) => {
      const [x, y] = [valueOf(column, a), valueOf(column, b)];
      if (known(x) !== known(y)) return known(x) ? -1 : 1; // missing values come last in either order
      const order = !known(x) ? 0 : typeof x === "string" ? x.localeCompare(y, "en") : x - y;
      return sign * order || a.index - b.index;
    });
}

function drawTable(rows) {
  const head = byId("head");
  head.replaceChildren(make("th", { scope: "col", class: "choose" }, "Compare"), ...columns().map((column) => {
    const active = state.sort === column.key;
    const arrow = active ? (state.down ? "\u00a0▼" : "\u00a0▲") : "";
    const sort = make("button", { type: "button", "data-sort": column.key, title: typeof column.help === "function" ? column.help() : column.help, onclick: () => change({ sort: column.key, down: active ? !state.down : column.better === 1 }, `[data-sort="${column.key}"]`) }, column.title + arrow);
    return make("th", { scope: "col", class: column.num ? "num" : null, "aria-sort": active ? (state.down ? "descending" : "ascending") : "none" }, sort);
  }));
  const best = Object.fromEntries(allColumns().filter((column) => column.better).map((column) => {
    const pool = rows.filter((row) => column.quality || row.inside).map((row) => valueOf(column, row)).filter(known);
    return [column.key, new Set(pool).size > 1 ? (column.better === 1 ? Math.max(...pool) : Math.min(...pool)) : null];
  }));
  const shown = visible(rows);
  const none = make("tr", {}, make("td", { colspan: columns().length + 1 }, "No method has this name and outcome."));
  byId("body").replaceChildren(...(shown.length ? shown.flatMap((row) => tableRow(row, best)) : [none]));
  byId("constant").textContent = underTable(rows);
  say("count", `${shown.length} of ${rows.length} rows shown`);
}

/* What all rows share, and why none has a TPME. */
function underTable(rows) {
  const [first] = rows;
  const same = [constant("seeds") && `${first.seeds} finished seed${first.seeds === 1 ? "" : "s"}`, constant("status") && `outcome ${first.status}`].filter(Boolean);
  const ranked = rows.filter((row) => known(row.rank));
  return [same.length ? `Every row: ${same.join(", ")}.` : "", ranked.length ? "" : rankingText(rows.filter((row) => row.inside).length, ranked)].join(" ").trim();
}

function tableRow(row, best) {
  const opened = state.open === row.name;
  const place = row.index;
  const choose = make("input", { type: "checkbox", "aria-label": `compare ${row.name} in TPME`, "data-choose": place, disabled: !row.usable, onchange: (event) => {
    const rest = state.rows.filter((name) => name !== row.name);
    const rows = event.target.checked ? group().rows.map((other) => other.name).filter((name) => rest.includes(name) || name === row.name) : rest;
    change({ rows }, `[data-choose="${place}"]`);
  } });
  choose.checked = row.inside;
  const hint = () => opened || tip(open, row); // an open row shows the same text
  const open = make("button", { type: "button", class: "open", "data-open": place, "aria-expanded": String(opened), "aria-controls": opened ? `cell-${place}` : null, onmouseenter: hint, onfocus: hint, onmouseleave: hideTip, onblur: hideTip, onclick: () => change({ open: opened ? "" : row.name }, `[data-open="${place}"]`) }, row.name);
  const unseen = (text) => make("span", { class: "unseen" }, text);
  const marks = row.notes.length ? make("sup", { class: "mark" }, unseen(", footnote "), row.notes.join(",")) : null;
  const front = row.front ? make("span", { class: "mark" }, make("span", { "aria-hidden": "true" }, " ◆"), unseen(", on the Pareto front")) : null;
  const line = make("tr", { "data-row": row.name }, make("td", { class: "choose" }, choose), ...columns().map((column) => {
    if (column.key === "name") return make("th", { scope: "row" }, open, marks, front);
    const value = valueOf(column, row);
    return make("td", { class: [column.num ? "num" : "", known(value) && value === best[column.key] ? "best" : ""].join(" ").trim() || null, "data-key": column.key, "data-value": known(value) ? String(value) : "", title: column.hint?.(row) }, column.text ? column.text(row) : String(value));
  }));
  return opened ? [line, make("tr", { class: "detail", id: `cell-${place}` }, make("td", { colspan: columns().length + 1 }, detail(row)))] : [line];
}

/* What serving costs; nothing of it depends on the choices of the reader. */
function drawInference(table) {
  byId("inference").hidden = !table;
  if (!table) return;
  byId("inference-head").replaceChildren(...table.columns.map((title, i) => make("th", { scope: "col", class: i ? "num" : null }, title)));
  byId("inference-body").replaceChildren(...table.rows.map((texts, place) => make("tr", {}, ...texts.map((text, i) => (i ? make("td", { class: table.best[place][i] ? "num best" : "num" }, text) : make("th", { scope: "row" }, text))))));
  byId("inference-notes").replaceChildren(...table.notes.map((text) => make("p", {}, text)));
}

function toCsv() {
  const quote = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  // A spreadsheet would run text that starts like a formula.
  const safe = (value) => (!known(value) ? "" : typeof value === "string" ? quote(/^[=+\-@\t\r]/.test(value) ? `'${value}` : value) : String(value));
  const rows = visible(compute()).map(record);
  return [Object.keys(record(group().rows[0])), ...rows.map((row) => Object.values(row).map(safe))].map((line) => `${line.join(",")}\n`).join("");
}

function download() {
  const link = make("a", { href: URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" })), download: "tpme.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}


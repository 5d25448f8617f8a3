"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const AXES = ["t", "p", "m"];
const NARROW = matchMedia("screen and (max-width: 760px)");
const byId = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;

/* Text only ever enters the page through textContent and setAttribute: names come from configurations and plug-ins. */
function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && known(value)) node.setAttribute(key, value);
  }
  node.append(...children.filter(known));
  return node;
}

/* ---- state, shared through the URL fragment ---- */
const state = {};
const group = () => DATA.groups[state.group];
const initial = (index) => ({
  group: index, weights: [...DATA.weights], rows: DATA.groups[index].rows.filter((row) => row.compared && row.usable).map((row) => row.name),
  frame: DATA.groups[index].frozen ? "report" : "own", quality: "recall_10", sort: "rank", down: false, filter: "", status: "", open: "",
});

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const index = Number(given.get("group") ?? 0);
  Object.assign(state, initial(Number.isInteger(index) && DATA.groups[index] ? index : 0));
  const weights = (given.get("weights") ?? "").split(",").map(Number);
  if (weights.length === 3 && weights.every((w) => w >= 0 && w <= 1) && Math.abs(weights[0] + weights[1] + weights[2] - 1) < 1e-6) state.weights = weights;
  if (["own", "report"].includes(given.get("frame"))) state.frame = given.get("frame");
  if (["recall_10", "ndcg_10"].includes(given.get("quality"))) state.quality = given.get("quality");
  if (COLUMNS.some((column) => column.key === given.get("sort"))) state.sort = given.get("sort");
  state.down = given.get("down") === "1";
  for (const key of ["filter", "status", "open"]) state[key] = given.get(key) ?? "";
  if (given.has("rows")) state.rows = group().rows.filter((row) => row.usable && given.getAll("rows").includes(row.name)).map((row) => row.name);
}

const differs = (key) => JSON.stringify(state[key]) !== JSON.stringify(initial(state.group)[key]);
/* The report knows intervals of TPME for its own weights, rows and frame alone. */
const ownChoices = () => !differs("weights") && !differs("rows") && !(group().frozen && differs("frame"));

function keepState() {
  const kept = new URLSearchParams();
  if (state.group) kept.set("group", state.group);
  if (differs("weights")) kept.set("weights", state.weights.join(","));
  if (differs("rows")) (state.rows.length ? state.rows : [""]).forEach((name) => kept.append("rows", name));
  for (const key of ["frame", "quality", "sort", "filter", "status", "open"]) if (differs(key)) kept.set(key, state[key]);
  if (state.down) kept.set("down", "1");
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
}

/* ---- TPME, as reports/data/tpme.py computes it ---- */
function frameOf(rows) {
  if (state.frame === "report") return group().frame;
  if (!rows.length) return null;
  return Object.fromEntries(AXES.map((axis) => [axis, [Math.min(...rows.map((row) => row[axis])), Math.max(...rows.map((row) => row[axis]))]]));
}

function tpme(values, frame) {
  let total = 0;
  AXES.forEach((axis, i) => {
    const [low, high] = frame[axis];
    if (high > low) total += (state.weights[i] * (values[axis] - low)) / (high - low);
  });
  return total;
}

function compute() {
  const chosen = group().rows.filter((row) => state.rows.includes(row.name));
  const frame = frameOf(chosen);
  const rows = group().rows.map((row) => ({ ...row, inside: chosen.includes(row), tpme: null, low: null, high: null, bound: null, rank: null, front: false }));
  if (!frame) return rows;
  for (const row of rows) {
    if (row.inside) row.tpme = tpme(row, frame);
    if (row.inside && ownChoices()) [row.low, row.high] = [row.tpme_low, row.tpme_high];
    if (!row.inside && row.status === "oom" && row.compared) row.bound = tpme({ t: row.t ?? frame.t[0], p: row.p ?? frame.p[0], m: row.seen ?? frame.m[0] }, frame);
  }
  const ranked = rows.filter((row) => row.inside);
  const near = (value) => Math.round(value * 1e12);
  for (const row of ranked) row.rank = 1 + ranked.filter((other) => near(other.tpme) < near(row.tpme)).length;
  const judged = ranked.filter((row) => known(row[state.quality]));
  for (const row of judged) {
    row.front = !judged.some((other) => other.tpme <= row.tpme && other[state.quality] >= row[state.quality] && (other.tpme < row.tpme || other[state.quality] > row[state.quality]));
  }
  return rows;
}

/* ---- numbers ---- */
function number(value, digits = 3) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  return size < -4 || size > 8 ? value.toExponential(digits - 1) : value.toFixed(Math.max(0, digits - 1 - size));
}
const spread = (value, sd, digits = 3) => (known(sd) ? `${number(value, digits)} ± ${number(sd, 2)}` : number(value, digits));
function scaled(value, units, sd, digits) {
  if (!known(value)) return "–";
  const [unit, scale] = units.find(([, size]) => value >= size) ?? units[units.length - 1];
  return `${spread(value / scale, known(sd) ? sd / scale : null, digits)} ${unit}`;
}
const bytes = (value, sd, digits) => scaled(value, [["GB", 1e9], ["MB", 1e6]], sd, digits);
const energy = (row, digits) => scaled(row.e, [["kJ", 1e3], ["J", 1]], null, digits);
const usedMemory = (row, digits) => (row.status === "oom" && known(row.seen) ? `≥ ${bytes(row.seen, null, digits)}` : bytes(row.m, row.m_sd, digits));
const quality = (row, key) => (known(row[key]) ? row[key].toFixed(4) : "–");
const percent = (row) => (known(row.tpme) ? (100 * row.tpme).toFixed(2) : known(row.bound) ? `≥ ${(100 * row.bound).toFixed(2)}` : "–");
const interval = (row, digits) => (known(row.low) ? `${(100 * row.low).toFixed(digits)}–${(100 * row.high).toFixed(digits)}` : "");
const ranged = (row, key) => (known(row[key]) && known(row[`${key}_low`]) ? `${quality(row, key)} ± ${((row[`${key}_high`] - row[`${key}_low`]) / 2).toFixed(4)}` : quality(row, key));
const footnotes = (row) => row.notes.map((mark) => group().footnotes[mark - 1]);

/* A row unrounded, under the names that tables/results.csv has for it. */
function record(row) {
  const hundredfold = (value) => (known(value) ? 100 * value : null);
  const judged = ["recall_10", "ndcg_10"].flatMap((key) => [key, `${key}_low`, `${key}_high`]).map((key) => [key, row[key]]);
  return {
    method: row.name, tpme_rank: row.rank, tpme_percent: hundredfold(row.tpme), tpme_low_percent: hundredfold(row.low), tpme_high_percent: hundredfold(row.high),
    tpme_lower_bound_percent: hundredfold(row.bound), ...Object.fromEntries(judged), epoch_time_s: row.t, epoch_time_s_sd: row.t_sd, trainable_millions: row.p,
    memory_bytes: row.m, memory_bytes_sd: row.m_sd, memory_seen_bytes: row.seen, memory_source: row.source, energy_epoch_j: row.e,
    seeds_finished: row.seeds, status: row.status, footnotes: footnotes(row).join("; "),
  };
}

const COLUMNS = [
  { key: "name", title: "Method" },
  { key: "rank", title: "Rank", num: true, text: (row) => (known(row.rank) ? String(row.rank) : "–") },
  { key: "tpme", title: "TPME (%)\u00a0↓", num: true, better: -1, text: percent, value: (row) => (known(row.tpme) ? 100 * row.tpme : null) },
  { key: "low", title: "95\u00a0%", num: true, text: (row) => interval(row, 1), needs: "tpme_low" },
  { key: "recall_10", title: "Recall@10 ↑", num: true, better: 1, text: (row) => ranged(row, "recall_10") },
  { key: "ndcg_10", title: "NDCG@10 ↑", num: true, better: 1, text: (row) => ranged(row, "ndcg_10") },
  { key: "t", title: "T\u00a0(s)\u00a0↓", num: true, better: -1, text: (row) => spread(row.t, row.t_sd) },
  { key: "p", title: "P\u00a0(M)\u00a0↓", num: true, better: -1, text: (row) => (known(row.p) ? (row.p >= 1e-3 ? row.p.toFixed(3) : number(row.p, 2)) : "–") },
  { key: "m", title: "M ↓", num: true, better: -1, text: (row) => usedMemory(row) },
  { key: "e", title: "E ↓", num: true, better: -1, text: (row) => energy(row), needs: "e" },
  { key: "seeds", title: "Seeds", num: true, text: (row) => String(row.seeds) },
  { key: "status", title: "End" },
];
const columns = () => COLUMNS.filter((column) => !column.needs || group().rows.some((row) => known(row[column.needs])));
const valueOf = (column, row) => (column.value ? column.value(row) : row[column.key]);

/* ---- the table ---- */
function visible(rows) {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const column = COLUMNS.find((candidate) => candidate.key === state.sort);
  const sign = state.down ? -1 : 1;
  return rows
    .filter((row) => words.every((word) => row.name.toLowerCase().includes(word)) && (!state.status || row.status === state.status))
    .sort((a, b) => {
      const [x, y] = [valueOf(column, a), valueOf(column, b)];
      if (known(x) !== known(y)) return known(x) ? -1 : 1; // missing values come last in either order
      const order = !known(x) ? 0 : typeof x === "string" ? x.localeCompare(y, "en") : x - y;
      return sign * order || a.name.localeCompare(b.name, "en");
    });
}

function drawTable(rows) {
  const head = byId("head");
  head.replaceChildren(make("th", { scope: "col", class: "choose" }, make("abbr", { title: "compared in TPME" }, "K")), ...columns().map((column) => {
    const active = state.sort === column.key;
    const arrow = active ? (state.down ? "\u00a0▼" : "\u00a0▲") : "";
    const sort = make("button", { type: "button", "data-sort": column.key, onclick: () => change({ sort: column.key, down: active ? !state.down : column.better === 1 }, `[data-sort="${column.key}"]`) }, column.title + arrow);
    return make("th", { scope: "col", class: column.num ? "num" : null, "aria-sort": active ? (state.down ? "descending" : "ascending") : "none" }, sort);
  }));
  const best = Object.fromEntries(COLUMNS.filter((column) => column.better).map((column) => {
    const pool = rows.filter((row) => column.better === 1 || row.inside).map((row) => valueOf(column, row)).filter(known);
    return [column.key, new Set(pool).size > 1 ? (column.better === 1 ? Math.max(...pool) : Math.min(...pool)) : null];
  }));
  const shown = visible(rows);
  byId("body").replaceChildren(...shown.flatMap((row) => tableRow(row, best)));
  say("count", `${shown.length} of ${rows.length} rows shown`);
}

function tableRow(row, best) {
  const opened = state.open === row.name;
  const place = row.index;
  const choose = make("input", { type: "checkbox", "aria-label": `${row.name} is one of the K rows`, "data-choose": place, disabled: !row.usable, onchange: (event) => {
    const rest = state.rows.filter((name) => name !== row.name);
    const rows = event.target.checked ? group().rows.map((other) => other.name).filter((name) => rest.includes(name) || name === row.name) : rest;
    change({ rows }, `[data-choose="${place}"]`);
  } });
  choose.checked = row.inside;
  const hint = () => opened || tip(open, summary(row)); // an open row shows the same text
  const open = make("button", { type: "button", class: "open", "data-open": place, "aria-expanded": String(opened), "aria-controls": opened ? `cell-${place}` : null, onmouseenter: hint, onfocus: hint, onmouseleave: hideTip, onblur: hideTip, onkeydown: (event) => event.key === "Escape" && hideTip(), onclick: () => change({ open: opened ? "" : row.name }, `[data-open="${place}"]`) }, row.name);
  const unseen = (text) => make("span", { class: "unseen" }, text);
  const marks = row.notes.length ? make("sup", { class: "mark" }, unseen(", footnote "), row.notes.join(",")) : null;
  const front = row.front ? make("span", { class: "mark" }, make("span", { "aria-hidden": "true" }, " ◆"), unseen(", on the Pareto front")) : null;
  const line = make("tr", { "data-row": row.name }, make("td", { class: "choose" }, choose), ...columns().map((column) => {
    if (column.key === "name") return make("th", { scope: "row" }, open, marks, front);
    const value = valueOf(column, row);
    return make("td", { class: [column.num ? "num" : "", known(value) && value === best[column.key] ? "best" : ""].join(" ").trim() || null, "data-key": column.key, "data-value": known(value) ? String(value) : "" }, column.text ? column.text(row) : String(value));
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

/* ---- one cell, opened ---- */
function detail(row) {
  const cell = row.cell;
  const part = (title, ...content) => make("div", {}, make("h3", {}, title), ...content);
  const code = (what, text) => make("pre", { tabindex: 0, role: "region", "aria-label": what }, text);
  const pairs = (what, entries) => part(what, make("table", { class: "pairs", "aria-label": what }, make("tbody", {}, ...entries.map(([key, value]) => make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, String(value)))))));
  const { method, footnotes: notes, ...numbers } = record(row);
  const plain = Object.entries(numbers).filter(([, value]) => known(value)).map(([key, value]) => [key, typeof value === "number" ? Number(value.toPrecision(10)) : value]);
  const parts = [];
  if (cell.failure) parts.push(part(`Ended as ${row.status}`, make("p", {}, cell.failure)));
  if (notes) parts.push(part("Notes", ...footnotes(row).map((text, i) => make("p", { class: "notes" }, `${row.notes[i]} ${text}`))));
  if (Object.keys(cell.phases).length) parts.push(part("Phases and memory over time", timeline(cell)));
  parts.push(pairs("Numbers of the row", plain), part("Configuration", code("Configuration", cell.configuration)));
  parts.push(part("To repeat it", make("p", { class: "soft" }, `Save the configuration as cell.toml${cell.configuration.includes("\n# fill in") ? ", fill in what its first lines name" : ""}, then:`), code("Command", cell.command),
    make("p", { class: "soft" }, "With the same measured code that is the same cell. A method from a folder of your own needs ", make("code", {}, "--methods-path FOLDER"), ", too.")));
  parts.push(pairs("Measured on", Object.entries(cell.environment)));
  return make("div", { class: "cell" }, make("p", { class: "soft" }, `Cell ${cell.id}, seed ${cell.seed}, attempt ${cell.attempt}, measured code ${cell.code}`), ...parts);
}

/* Kinds of phases in the order of their colours; every lane has a name, so colour is never the only cue. */
const KINDS = ["train", "validate", "rank", "load", "cache", "adapt", "warmup", "export", "inference", "estimate", "search", "round", "prepare", "count", "probe"];

/* A lane with the name of each phase and, on the same time axis above them, the memory curve in bands of their colours. */
function timeline({ phases, curve }) {
  const [left, right, top] = [62, 258, curve.length > 1 ? 124 : 0];
  const kinds = Object.keys(phases);
  const height = top + 17 * kinds.length;
  const last = Math.max(...Object.values(phases).flat(2), ...curve.map(([time]) => time)) || 1;
  const most = Math.max(1, ...curve.map(([, used]) => used));
  const x = (time) => left + (time / last) * (right - left);
  const bands = (kind, y, tall) => phases[kind].map(([from, to]) => make("svg:rect", { class: `kind-${KINDS.indexOf(kind) % 7}`, x: x(from), y, width: Math.max(0.8, x(to) - x(from)), height: tall }, make("svg:title", {}, `${kind}, ${number(from)} to ${number(to)} s`)));
  const spent = (kind) => number(phases[kind].reduce((sum, [from, to]) => sum + to - from, 0));
  const summed = kinds.map((kind) => `${kind} ${spent(kind)} s`).join(", ");
  const drawn = make("svg:svg", { viewBox: `0 0 320 ${height + 16}`, class: "timeline", role: "img", "aria-label": top ? `Memory rises to ${bytes(most)} within ${number(last)} seconds. Phases: ${summed}` : `Phases: ${summed}` });
  if (top) {
    const points = curve.map(([time, used]) => `${x(time).toFixed(1)},${(top - 6 - (used / most) * (top - 24)).toFixed(1)}`);
    const under = make("svg:polygon", { points: [`${x(curve[0][0])},${top - 6}`, ...points, `${x(curve[curve.length - 1][0])},${top - 6}`].join(" ") });
    drawn.append(make("svg:clipPath", { id: "under" }, under), make("svg:g", { class: "bands", "clip-path": "url(#under)" }, ...kinds.flatMap((kind) => bands(kind, 0, top))),
      make("svg:polyline", { class: "curve", points: points.join(" ") }), make("svg:text", { class: "tick", x: left, y: 11 }, `memory, peak ${bytes(most)}`));
  }
  kinds.forEach((kind, i) => {
    const y = top + 17 * i;
    drawn.append(make("svg:line", { class: "grid", x1: left, x2: right, y1: y + 8, y2: y + 8 }), make("svg:text", { x: 0, y: y + 12 }, kind), ...bands(kind, y + 2, 12), make("svg:text", { class: "tick", x: right + 6, y: y + 12 }, `${spent(kind)} s`));
  });
  drawn.append(make("svg:text", { class: "tick", x: left, y: height + 12 }, "0"), make("svg:text", { class: "tick", x: right, y: height + 12, "text-anchor": "end" }, `${number(last)} s`));
  return drawn;
}

/* ---- quality against TPME ---- */
function ticks(low, high, wanted = 8) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

function drawChart(rows) {
  const narrow = NARROW.matches;
  const [width, height, left, right, top, bottom] = narrow ? [560, 560, 74, 20, 18, 56] : [760, 420, 62, 24, 14, 44];
  const chart = byId("chart");
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren();
  const key = state.quality;
  const shown = rows.filter((row) => known(row.tpme) && known(row[key])).sort((a, b) => a.tpme - b.tpme || b[key] - a[key]);
  byId("empty").hidden = shown.length > 0;
  if (!shown.length) return;
  const padded = (values) => { const [a, b] = [Math.min(...values), Math.max(...values)]; const pad = 0.08 * (b - a) || 0.01; return [a - pad, b + pad]; };
  const [x0, x1] = padded(shown.map((row) => 100 * row.tpme));
  const [y0, y1] = padded(shown.flatMap((row) => [row[`${key}_low`] ?? row[key], row[`${key}_high`] ?? row[key]]));
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  for (const value of ticks(x0, x1)) chart.append(make("svg:line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }), make("svg:text", { class: "tick", x: x(value), y: height - bottom + (narrow ? 20 : 16), "text-anchor": "middle" }, String(Number(value.toPrecision(6)))));
  for (const value of ticks(y0, y1)) chart.append(make("svg:line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), make("svg:text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(Number(value.toPrecision(6)))));
  chart.append(make("svg:text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "TPME (%), lower is better"));
  chart.append(make("svg:text", { x: 14, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }, `${key === "recall_10" ? "Recall@10" : "NDCG@10"}, higher is better`));
  const front = shown.filter((row) => row.front);
  chart.append(make("svg:path", { class: "step", d: front.map((row, i) => (i ? `H${x(100 * row.tpme)}V${y(row[key])}` : `M${x(100 * row.tpme)},${y(row[key])}`)).join("") }));
  const spots = shown.map((row) => ({ row, x: x(100 * row.tpme), y: y(row[key]) }));
  for (const { row, x: at } of spots) if (known(row[`${key}_low`])) chart.append(make("svg:line", { class: "reach", x1: at, x2: at, y1: y(row[`${key}_low`]), y2: y(row[`${key}_high`]) }));
  spots.forEach((spot, i) => chart.append(drawPoint(spot, i === 0)));
  placeNames(chart, spots, [left, top, width - right, height - bottom], frontBoxes(spots.filter((spot) => spot.row.front)));
}

/* The numbers of a row and its flags. */
function summary(row) {
  const place = known(row.rank) ? `Rank ${row.rank}, TPME ${percent(row)} %` : known(row.bound) ? `TPME ${percent(row)} %` : row.status === "ok" ? "no TPME" : `ended as ${row.status}`;
  return [
    row.name, place + (known(row.low) ? ` (95 %: ${interval(row, 2)})` : "") + (row.front ? ", on the Pareto front" : ""), `Recall@10 ${ranged(row, "recall_10")}, NDCG@10 ${ranged(row, "ndcg_10")}`,
    `T ${spread(row.t, row.t_sd, 4)} s, P ${number(row.p, 4)} M, M ${usedMemory(row, 4)} (${row.source})${known(row.e) ? `, E ${energy(row, 4)}` : ""}`, ...footnotes(row).map((text, i) => `${row.notes[i]} ${text}`),
  ].join("\n");
}

/* The points are a single tab stop; arrow keys move between them. */
function drawPoint({ row, x, y }, first) {
  const text = summary(row);
  const shape = row.front ? make("svg:rect", { class: "dot", x: x - 5, y: y - 5, width: 10, height: 10, transform: `rotate(45 ${x} ${y})` }) : make("svg:circle", { class: "dot", cx: x, cy: y, r: 5 });
  const select = () => change({ open: row.name, filter: "", status: "" }, `[data-open="${row.index}"]`);
  const node = make("svg:g", { class: row.front ? "point front" : "point", tabindex: first ? 0 : -1, role: "button", "aria-label": text, "data-point": row.name, onclick: select, onfocus: () => tip(node, text), onmouseenter: () => tip(node, text), onblur: hideTip, onmouseleave: hideTip,
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hideTip();
      if (step || event.key === "Enter" || event.key === " ") event.preventDefault();
      if (event.key === "Enter" || event.key === " ") select();
      if (step) {
        const points = [...byId("chart").querySelectorAll(".point")];
        points[(points.indexOf(node) + step + points.length) % points.length].focus();
      }
    } }, shape);
  return node;
}

/* The line of the front, as boxes: from each point to the right, then up to the next. */
function frontBoxes(front) {
  return front.slice(1).flatMap((next, i) => [[front[i].x, front[i].y - 2, next.x, front[i].y + 2], [next.x - 2, next.y, next.x + 2, front[i].y]]);
}

/* Greedy, as in figures/labels.py: each name takes the nearest free place on rings around its point; a name without one is in the tooltip only. */
function placeNames(chart, spots, [left, top, right, bottom], lines) {
  const taken = [...lines, ...spots.map((spot) => [spot.x - 6, spot.y - 6, spot.x + 6, spot.y + 6])];
  const free = (box) => box[0] >= left && box[1] >= top && box[2] <= right && box[3] <= bottom && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
  for (const spot of spots) {
    const name = spot.row.name.length > 26 ? `${spot.row.name.slice(0, 25)}…` : spot.row.name;
    const label = make("svg:text", { "pointer-events": "none" }, name);
    chart.append(label);
    const size = label.getBBox();
    let place = null;
    for (let ring = 0; ring < 14 && !place; ring += 1) {
      for (let turn = 0; turn < 16 && !place; turn += 1) {
        const angle = (Math.PI * 2 * (turn % 2 ? turn + 1 : -turn)) / 32;
        const [dx, dy] = [Math.cos(angle), Math.sin(angle)];
        const cx = spot.x + dx * (9 + 9 * ring) + (Math.abs(dx) < 0.2 ? 0 : (Math.sign(dx) * size.width) / 2);
        const cy = spot.y + dy * (9 + 9 * ring) + (Math.abs(dy) < 0.2 ? 0 : (Math.sign(dy) * size.height) / 2);
        const box = [cx - size.width / 2, cy - size.height / 2, cx + size.width / 2, cy + size.height / 2];
        if (free(box)) place = { box, far: ring > 1 };
      }
    }
    if (!place) { label.remove(); continue; }
    taken.push(place.box);
    label.setAttribute("x", place.box[0]);
    label.setAttribute("y", place.box[3] - 0.24 * size.height);
    if (place.far) chart.append(make("svg:line", { class: "lead", x1: spot.x, y1: spot.y, x2: Math.min(Math.max(spot.x, place.box[0]), place.box[2]), y2: Math.min(Math.max(spot.y, place.box[1]), place.box[3]) }));
  }
}

function tip(node, text) {
  const box = node.getBoundingClientRect();
  const drawn = byId("tip");
  drawn.textContent = text;
  drawn.hidden = false;
  const wide = document.documentElement.clientWidth;
  drawn.style.left = `${scrollX + Math.max(4, Math.min(box.right + 8, wide - drawn.offsetWidth - 4))}px`;
  const [above, below] = [box.top - drawn.offsetHeight - 6, box.bottom + 6];
  drawn.style.top = `${scrollY + (below + drawn.offsetHeight > innerHeight ? Math.max(4, above) : below)}px`;
}
/* A live region that is not touched stays silent. */
function say(id, text) { if (byId(id).textContent !== text) byId(id).textContent = text; }
function hideTip() { byId("tip").hidden = true; }

/* ---- controls ---- */
function setWeight(index, value) {
  const weights = [...state.weights];
  const [a, b] = [0, 1, 2].filter((other) => other !== index);
  const rest = weights[a] + weights[b];
  weights[index] = value;
  weights[a] = rest > 0 ? ((1 - value) * weights[a]) / rest : (1 - value) / 2;
  weights[b] = Math.max(0, 1 - value - weights[a]); // the sum stays 1 after any number of moves
  change({ weights });
}

function change(changes, focus) {
  Object.assign(state, changes);
  keepState();
  draw();
  if (focus) document.querySelector(focus)?.focus();
}

function draw() {
  hideTip();
  const rows = compute();
  const current = group();
  byId("group-name").textContent = current.name;
  byId("group").value = String(state.group);
  state.weights.forEach((weight, i) => {
    const slider = byId(`weight-${AXES[i]}`);
    if (Number(slider.value) !== weight) slider.value = String(weight);
    slider.setAttribute("aria-valuetext", `${(100 * weight).toFixed(0)} percent`);
    const output = byId(`output-${AXES[i]}`);
    output.textContent = weight.toFixed(2);
    output.dataset.value = String(weight);
  });
  document.querySelectorAll("input[name=frame]").forEach((input) => { input.checked = input.value === state.frame; input.disabled = input.value === "report" && !current.frame; });
  byId("frame-name").textContent = current.frozen ? `frozen in ${current.frozen}` : "of the rows this report compares";
  byId("quality").value = state.quality;
  if (byId("filter").value !== state.filter) byId("filter").value = state.filter;
  byId("status").value = state.status;
  drawChart(rows);
  drawTable(rows);
  drawInference(current.inference);
  const ranked = rows.filter((row) => row.inside).sort((a, b) => a.rank - b.rank);
  say("said", ranked.length ? `K = ${ranked.length} rows; lowest TPME: ${ranked.filter((row) => row.rank === 1).map((row) => row.name).join(", ")}.` : "No row is chosen, so there is no TPME.");
  byId("no-intervals").hidden = ownChoices() || !current.rows.some((row) => known(row.tpme_low));
  byId("shared").replaceChildren(...current.shared.map((text) => make("p", {}, text)));
  byId("footnotes").replaceChildren(...current.footnotes.map((text, i) => make("p", {}, `${i + 1} ${text}`)));
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

byId("group").append(...DATA.groups.map(({ name }, i) => make("option", { value: i }, name)));
byId("group-choice").hidden = DATA.groups.length < 2;
byId("group").addEventListener("change", (event) => change({ ...initial(Number(event.target.value)), weights: state.weights }));
AXES.forEach((axis, i) => byId(`weight-${axis}`).addEventListener("input", (event) => setWeight(i, Number(event.target.value))));
document.querySelectorAll("input[name=frame]").forEach((input) => input.addEventListener("change", () => change({ frame: input.value })));
byId("quality").addEventListener("change", (event) => change({ quality: event.target.value }));
byId("filter").addEventListener("input", (event) => change({ filter: event.target.value }));
byId("status").append(...[...new Set(DATA.groups.flatMap(({ rows }) => rows.map((row) => row.status)))].sort().map((status) => make("option", { value: status }, status)));
byId("status").addEventListener("change", (event) => change({ status: event.target.value }));
byId("reset").addEventListener("click", () => change(initial(state.group)));
byId("csv").addEventListener("click", download);
addEventListener("hashchange", () => { readState(); draw(); });
NARROW.addEventListener("change", draw);
readState();
draw();

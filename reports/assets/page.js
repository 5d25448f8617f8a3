"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COSTS = { t: "epoch_time_s", p: "trainable_millions", m: "memory_bytes" };
const AXES = Object.keys(COSTS);
const NARROW = matchMedia("screen and (max-width: 760px)");
const MARKS = 7; // colours of curves; the data of more marked rows are drawn dashed
const byId = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;

/* Each value and its bounds become fields of the row: recall_10, recall_10_low, recall_10_high. */
for (const row of DATA.groups.flatMap((one) => one.rows)) {
  for (const [key, value] of Object.entries(row.values)) [row[key], row[`${key}_low`], row[`${key}_high`]] = [value].flat();
}

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
const comparable = (index) => DATA.groups[index].rows.filter((row) => row.compared && row.usable).map((row) => row.name);
function initial(index) {
  const { axes, rows, frozen } = DATA.groups[index];
  const alone = comparable(index).length < 2 && !frozen; // neither TPME nor a ratio says anything of one row
  const first = axes.x.find(({ key }) => !(alone && ["tpme_percent", "cost_ratio"].includes(key)));
  return {
    group: index, weights: [...DATA.weights], rows: comparable(index), frame: frozen ? "report" : "own",
    x: first?.key ?? "", y: axes.y[0]?.key ?? "", log: "",
    sort: "rank", down: false, filter: "", status: "", open: "", along: "epochs", curves: rows.filter((row) => row.learning).slice(0, MARKS).map((row) => row.name),
  };
}

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const index = Number(given.get("group") ?? 0);
  Object.assign(state, initial(Number.isInteger(index) && DATA.groups[index] ? index : 0));
  const weights = (given.get("weights") ?? "").split(",").map(Number);
  if (weights.length === 3 && weights.every((w) => w >= 0 && w <= 1) && Math.abs(weights[0] + weights[1] + weights[2] - 1) < 1e-6) state.weights = weights;
  const allowed = { frame: ["own", "report"], log: ["0", "1"], along: ["epochs", "time"], sort: allColumns().map(({ key }) => key), x: group().axes.x.map(({ key }) => key), y: group().axes.y.map(({ key }) => key) };
  for (const [key, values] of Object.entries(allowed)) if (values.includes(given.get(key))) state[key] = given.get(key);
  state.down = given.get("down") === "1";
  for (const key of ["filter", "status", "open"]) state[key] = given.get(key) ?? "";
  const named = (key, test) => group().rows.filter((row) => test(row) && given.getAll(key).includes(row.name)).map((row) => row.name);
  if (given.has("rows")) state.rows = named("rows", (row) => row.usable);
  if (given.has("curves")) state.curves = named("curves", (row) => row.learning);
}

const differs = (key) => JSON.stringify(state[key]) !== JSON.stringify(initial(state.group)[key]);
/* The report knows intervals of TPME for its own weights, rows and frame alone. */
const ownChoices = () => !differs("weights") && !differs("rows") && !(group().frozen && differs("frame"));

function keepState() {
  const kept = new URLSearchParams();
  if (state.group) kept.set("group", state.group);
  if (differs("weights")) kept.set("weights", state.weights.join(","));
  for (const key of ["rows", "curves"]) if (differs(key)) (state[key].length ? state[key] : [""]).forEach((name) => kept.append(key, name));
  for (const key of ["frame", "x", "y", "log", "along", "sort", "filter", "status", "open"]) if (differs(key)) kept.set(key, state[key]);
  if (state.down) kept.set("down", "1");
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
}

/* ---- TPME, as reports/data/tpme.py computes it ---- */
function frameOf(rows) {
  if (state.frame === "report") return group().frozen || comparable(state.group).length > 1 ? group().frame : null;
  if (rows.length < 2) return null;
  return Object.fromEntries(Object.values(COSTS).map((key) => [key, [Math.min(...rows.map((row) => row[key])), Math.max(...rows.map((row) => row[key]))]]));
}

function tpme(values, frame) {
  let total = 0;
  Object.values(COSTS).forEach((key, i) => {
    const [low, high] = frame[key];
    if (high > low) total += (state.weights[i] * (values[key] - low)) / (high - low);
  });
  return total;
}

function compute() {
  const chosen = group().rows.filter((row) => state.rows.includes(row.name));
  const frame = frameOf(chosen);
  const rows = group().rows.map((row) => ({ ...row, inside: chosen.includes(row), tpme: null, low: null, high: null, bound: null, rank: null, tied: [], cost_ratio: costRatio(row), front: false }));
  if (frame) rows.forEach((row) => addTpme(row, frame));
  if (frame) addRanks(rows.filter((row) => known(row.tpme)), frame);
  addFront(rows.filter((row) => row.inside));
  return rows;
}

function addTpme(row, frame) {
  if (row.inside) row.tpme = tpme(row, frame);
  if (row.inside && ownChoices()) [row.low, row.high] = [row.tpme_low, row.tpme_high];
  if (row.inside) row.tpme_percent = 100 * row.tpme;
  if (known(row.low)) [row.tpme_percent_low, row.tpme_percent_high] = [100 * row.low, 100 * row.high];
  if (row.inside || row.status !== "oom" || !row.compared) return;
  const least = Object.fromEntries(Object.values(COSTS).map((key) => [key, row[key] ?? frame[key][0]]));
  row.bound = tpme({ ...least, memory_bytes: row.memory_seen_bytes ?? frame.memory_bytes[0] }, frame);
}

/* Ranks; a row nearer to the best row of a rank than noise may move them apart shares that rank (reports/data/ties.py). */
function addRanks(ranked, frame) {
  const near = (row) => Math.round(row.tpme * 1e12) / 1e12;
  const noise = [group().noise.time, 0, group().noise.memory];
  const reach = (a, b) => Object.values(COSTS).reduce((sum, key, i) => {
    const [low, high] = frame[key];
    return high > low ? sum + (state.weights[i] * noise[i] * Math.max(a[key], b[key])) / (high - low) : sum;
  }, 0);
  let best = null;
  [...ranked].sort((a, b) => near(a) - near(b)).forEach((row, i) => {
    if (!best || near(row) - near(best) > reach(best, row)) [best, row.rank] = [row, i + 1];
    else row.rank = best.rank;
  });
  for (const row of ranked) row.tied = ranked.filter((other) => other !== row && other.rank === row.rank).map((other) => other.name);
}

/* The weighted geometric mean of T, P and M over those of the reference row (reports/data/ratios.py). */
function costRatio(row) {
  const base = group().rows.find(({ name }) => name === group().reference);
  if (!base || !Object.values(COSTS).every((key) => known(row[key]))) return null;
  return Math.exp(Object.values(COSTS).reduce((sum, key, i) => (state.weights[i] ? sum + state.weights[i] * Math.log(row[key] / base[key]) : sum), 0));
}

/* The Pareto front of the chart: rows that no other beats in both. */
const axisOf = (which) => group().axes[which].find(({ key }) => key === state[which]);
function addFront(rows) {
  const [across, up] = [axisOf("x"), axisOf("y")];
  if (!across || !up) return;
  const judged = rows.filter((row) => known(row[across.key]) && known(row[up.key])).map((row) => ({ row, cost: -across.better * row[across.key], gain: up.better * row[up.key] }));
  if (judged.length < 2) return;
  for (const one of judged) one.row.front = !judged.some((other) => other.cost <= one.cost && other.gain >= one.gain && (other.cost < one.cost || other.gain > one.gain));
}

/* ---- numbers ---- */
function number(value, digits = 3) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
  return size < -4 || size > 8 ? value.toExponential(digits - 1) : value.toFixed(Math.max(0, digits - 1 - size));
}
const spread = (value, sd, digits = 3) => (known(sd) ? `${number(value, digits)} ± ${number(sd, 2)}` : number(value, digits));
function scaled(value, units, sd, digits) {
  if (!known(value)) return "–";
  const [unit, scale] = units.find(([, size]) => value >= size) ?? units[units.length - 1];
  return `${spread(value / scale, known(sd) ? sd / scale : null, digits)} ${unit}`;
}
const bytes = (value, sd, digits) => scaled(value, [["GB", 1e9], ["MB", 1e6]], sd, digits);
const energy = (row, digits) => scaled(row.energy_epoch_j, [["kJ", 1e3], ["J", 1]], null, digits);
const usedMemory = (row, digits) => (row.status === "oom" && known(row.memory_seen_bytes) ? `≥ ${bytes(row.memory_seen_bytes, null, digits)}` : bytes(row.memory_bytes, row.memory_bytes_sd, digits));
const quality = (row, key) => (known(row[key]) ? row[key].toFixed(4) : "–");
const percent = (row) => (known(row.tpme) ? (100 * row.tpme).toFixed(2) : known(row.bound) ? `≥ ${(100 * row.bound).toFixed(2)}` : "–");
const tiedText = () => (group().noise.source ? "tied within noise" : "equal");
const rankText = (row) => (known(row.rank) ? `${row.rank}${row.tied.length ? "=" : ""}` : "–");
const peak = (row, digits) => (known(row.peak_bytes) ? `${bytes(row.peak_bytes, null, digits)} (${row.peak_phase})` : "–");
const interval = (row, digits) => (row.tpme_end && row.inside && ownChoices() ? "end of scale" : known(row.low) ? `${(100 * row.low).toFixed(digits)}–${(100 * row.high).toFixed(digits)}` : "");
const ranged = (row, key) => (known(row[key]) && known(row[`${key}_low`]) ? `${quality(row, key)} ± ${((row[`${key}_high`] - row[`${key}_low`]) / 2).toFixed(4)}` : quality(row, key));
const footnotes = (row) => row.notes.map((mark) => group().footnotes[mark - 1]);

const grouped = (value) => (value >= 1e4 ? Number(value.toPrecision(4)).toLocaleString("en-US") : number(value, 4));
/* A value with its unit and, where known, its bounds: "0.2290 (0.2067–0.2513)", "56.3 ± 2.30 MB". */
function amountOf(axis, row) {
  const [value, low, high] = [row[axis.key], row[`${axis.key}_low`], row[`${axis.key}_high`]];
  const bounded = known(low) && low !== high;
  const deviation = bounded && axis.bars.startsWith("standard") ? (high - low) / 2 : null;
  if (axis.key === "peak_bytes") return peak(row, 4);
  if (["GB", "MB"].includes(axis.unit)) return bytes(value, deviation, 4);
  const text = (one) => (group().axes.y.includes(axis) ? one.toFixed(4) : axis.key === "tpme_percent" ? one.toFixed(2) : grouped(one / axis.scale));
  const around = deviation !== null ? ` ± ${number(deviation / axis.scale, 2)}` : bounded ? ` (${text(low)}–${text(high)})` : "";
  return `${text(value)}${around}${axis.unit && ` ${axis.unit}`}`;
}

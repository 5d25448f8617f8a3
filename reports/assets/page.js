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
  const alone = comparable(index).length < 2 && !frozen; // TPME of one row says nothing
  return {
    group: index, weights: [...DATA.weights], rows: comparable(index), frame: frozen ? "report" : "own",
    x: (axes.x.find(({ key }) => !(alone && key === "tpme_percent")) ?? { key: "" }).key, y: (axes.y[0] ?? { key: "" }).key, log: "",
    sort: "rank", down: false, filter: "", status: "", open: "", along: "epochs", curves: rows.filter((row) => row.learning).slice(0, MARKS).map((row) => row.name),
  };
}

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const index = Number(given.get("group") ?? 0);
  Object.assign(state, initial(Number.isInteger(index) && DATA.groups[index] ? index : 0));
  const weights = (given.get("weights") ?? "").split(",").map(Number);
  if (weights.length === 3 && weights.every((w) => w >= 0 && w <= 1) && Math.abs(weights[0] + weights[1] + weights[2] - 1) < 1e-6) state.weights = weights;
  const allowed = { frame: ["own", "report"], log: ["0", "1"], along: ["epochs", "time"], sort: COLUMNS.map(({ key }) => key), x: group().axes.x.map(({ key }) => key), y: group().axes.y.map(({ key }) => key) };
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
  const rows = group().rows.map((row) => ({ ...row, inside: chosen.includes(row), tpme: null, low: null, high: null, bound: null, rank: null, front: false }));
  if (frame) rows.forEach((row) => addTpme(row, frame));
  const ranked = rows.filter((row) => known(row.tpme));
  const near = (value) => Math.round(value * 1e12);
  for (const row of ranked) row.rank = 1 + ranked.filter((other) => near(other.tpme) < near(row.tpme)).length;
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

/* The Pareto front of the chart: rows that no other beats in both. */
const axisOf = (which) => group().axes[which].find(({ key }) => key === state[which]);
function addFront(rows) {
  const [across, up] = [axisOf("x"), axisOf("y")];
  if (!across || !up) return;
  const judged = rows.filter((row) => known(row[across.key]) && known(row[up.key])).map((row) => ({ row, cost: -across.better * row[across.key], gain: up.better * row[up.key] }));
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
const interval = (row, digits) => (known(row.low) ? `${(100 * row.low).toFixed(digits)}–${(100 * row.high).toFixed(digits)}` : "");
const ranged = (row, key) => (known(row[key]) && known(row[`${key}_low`]) ? `${quality(row, key)} ± ${((row[`${key}_high`] - row[`${key}_low`]) / 2).toFixed(4)}` : quality(row, key));
const footnotes = (row) => row.notes.map((mark) => group().footnotes[mark - 1]);

/* A value with its unit and its bounds, as an axis names them. */
function amount(axis, value) {
  if (["GB", "MB"].includes(axis.unit)) return bytes(value, null, 4);
  const text = group().axes.y.includes(axis) ? value.toFixed(4) : axis.key === "tpme_percent" ? value.toFixed(2) : number(value / axis.scale, 4);
  return axis.unit ? `${text} ${axis.unit}` : text;
}
function amountOf(axis, row) {
  const [value, low, high] = [row[axis.key], row[`${axis.key}_low`], row[`${axis.key}_high`]];
  if (!known(low) || low === high) return amount(axis, value);
  return `${amount(axis, value)}, ${axis.bars.startsWith("standard") ? `± ${amount(axis, (high - low) / 2)}` : `${amount(axis, low)} to ${amount(axis, high)}`}`;
}

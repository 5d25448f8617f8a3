/* ---- learning curves: loss and validation quality after every epoch, or after every part of another run ---- */
const curvesOf = () => [{ key: "loss", title: "Training loss" }, ...(group().validation ? [{ key: "valid", title: group().validation }] : [])];
const markOf = (name) => { const place = state.curves.indexOf(name); return place < 0 ? "" : `mark-${place % MARKS}${place >= MARKS ? " dashed" : ""}`; };
let drawnCurves = "";

function drawCurves(rows) {
  const trained = rows.filter((row) => row.learning);
  byId("curves").hidden = !trained.length;
  byId("along").value = state.along;
  const wanted = JSON.stringify([state.group, state.along, state.curves, NARROW.matches]); // all that a drawing depends on: sliders do not draw it anew
  if (wanted === drawnCurves || !trained.length) return;
  drawnCurves = wanted;
  const size = NARROW.matches ? [560, 400, 17] : [620, 320, 12];
  byId("panels").replaceChildren(...curvesOf().map((curve) => panel(trained, curve, size)));
  byId("chips").replaceChildren(...trained.map((row) => chip(row)));
}

function chip(row) {
  const marked = state.curves.includes(row.name);
  const show = () => tip(node, row, learned(row));
  const swatch = make("svg:svg", { viewBox: "0 0 18 10", class: `swatch ${markOf(row.name)}`, "aria-hidden": "true" }, make("svg:path", { d: "M0,5H18" }));
  const select = () => change({ curves: marked ? state.curves.filter((name) => name !== row.name) : [...state.curves, row.name] }, `[data-chip="${row.index}"]`);
  const node = make("button", { type: "button", class: "chip", "aria-pressed": String(marked), "data-chip": row.index, "data-curve": row.name, onclick: select, onmouseenter: show, onfocus: show, onmouseleave: hideTip, onblur: hideTip }, swatch, row.name);
  return node;
}

/* What a curve says, in words. */
function learned({ name, learning: { loss, valid, time, best } }) {
  const [first, last] = [loss[0], loss[loss.length - 1]];
  const top = best === null ? "" : `, best ${best + 1}: ${group().validated} ${number(valid[best], 4)} in validation`;
  return `${name}\n${loss.length} ${group().parts}${top}\nLoss ${number(first)} to ${number(last)}, ${number(time[time.length - 1])} s of training`;
}

/* One panel; a curve breaks where a later stage of training begins, for its loss may be another one. */
function panel(rows, { key, title }, [width, height, text], along = state.along, look = markOf) {
  const [left, right, top, bottom] = [4.6 * text, text, 2.2 * text, 2.9 * text];
  const across = ({ learning }) => (along === "time" ? learning.time : learning[key].map((_, i) => i + 1));
  const values = rows.flatMap(({ learning }) => learning[key]).filter(known);
  const drawn = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, class: "curves", role: "img", "font-size": text, "aria-label": `${title} over ${along === "time" ? "seconds of training" : group().parts} of ${rows.map((row) => row.name).join(", ")}` });
  if (!values.length) return drawn;
  const log = key === "loss" && Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  const last = Math.max(...rows.flatMap(across));
  const from = along === "time" ? 0 : 1;
  const x = (value) => left + ((value - from) / (last - from || 1)) * (width - left - right);
  const y = makeScale(values, log, height - bottom, top, 6);
  const steps = ticks(from, last > from ? last : from + 1, 6).filter((value) => along === "time" || Number.isInteger(value));
  for (const value of steps) drawn.append(make("svg:text", { class: "tick", x: x(value), y: height - 1.6 * text, "text-anchor": "middle" }, String(Number(value.toPrecision(6)))));
  const writtenY = written(y.marks, 1, log);
  for (const value of y.marks) drawn.append(make("svg:line", { class: "grid", x1: left, x2: width - right, y1: y.place(value), y2: y.place(value) }), make("svg:text", { class: "tick", x: left - 6, y: y.place(value) + 4, "text-anchor": "end" }, writtenY(value)));
  drawn.append(make("svg:text", { x: left, y: text }, title + (log ? " (logarithmic)" : "")), make("svg:text", { class: "tick", x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, along === "time" ? group().along : group().parts));
  const inOrder = [...rows].sort((a, b) => state.curves.includes(a.name) - state.curves.includes(b.name)); // marked curves lie on top
  for (const row of inOrder) drawn.append(curve(row, key, across(row).map(x), y.place, look(row.name)));
  return drawn;
}

function curve(row, key, places, level, look) {
  const { best, starts } = row.learning;
  let pen = "M";
  const d = row.learning[key].map((value, i) => {
    if (!known(value)) { pen = "M"; return ""; }
    const to = `${starts.includes(i) ? "M" : pen}${places[i].toFixed(1)},${level(value).toFixed(1)}`;
    pen = "L";
    return to;
  }).join("");
  const point = best === null || !known(row.learning[key][best]) ? null : make("svg:circle", { class: "best-epoch", cx: places[best], cy: level(row.learning[key][best]), r: 3 });
  const node = make("svg:g", { class: `learned ${look}`, "data-curve": row.name, onmouseleave: hideTip, onmouseenter: () => tip(point ?? node, row, learned(row)) }, make("svg:path", { d }), make("svg:path", { class: "target", d }), point);
  return node;
}

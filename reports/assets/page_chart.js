/* ---- the chart: a quality against a cost ---- */
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

/* 1, 2 and 5 times each power of ten; the powers alone where these are too many. */
function logTicks(low, high, wanted) {
  const powers = Array.from({ length: Math.floor(Math.log10(high)) - Math.floor(Math.log10(low)) + 1 }, (_, i) => Math.floor(Math.log10(low)) + i);
  const inside = (digits) => powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`))).filter((value) => value >= low && value <= high);
  return [[1, 2, 5], [1, 3], [1]].map(inside).find((values) => values.length <= wanted) ?? inside([1]);
}

/* From values to places between two ends. On a logarithmic scale 0 has a place of its own before all others. */
function makeScale(values, log, from, to, wanted) {
  const positive = values.filter((value) => value > 0);
  const [low, high] = log ? [Math.min(...positive), Math.max(...positive)] : [Math.min(...values), Math.max(...values)];
  const start = log && positive.length < values.length ? from + 0.1 * (to - from) : from;
  const turn = log ? Math.log10 : (value) => value;
  const pad = 0.08 * (turn(high) - turn(low)) || (log ? 0.1 : 0.05 * Math.abs(high) || 0.01);
  const [a, b] = [turn(low) - pad, turn(high) + pad];
  const place = (value) => (log && !(value > 0) ? from + 0.03 * (to - from) : start + ((turn(value) - a) / (b - a)) * (to - start));
  const marks = log ? [...(start === from ? [] : [0]), ...logTicks(10 ** a, 10 ** b, wanted)] : ticks(a, b, wanted);
  return { place, marks };
}

/* Marks of a linear axis have the same number of decimals. */
function written(marks, scale, log) {
  const plain = (value) => Number((value / scale).toPrecision(5));
  const decimals = Math.max(...marks.map((value) => (String(plain(value)).split(".")[1] ?? "").length));
  const same = { minimumFractionDigits: log ? 0 : decimals, maximumFractionDigits: 12 };
  return (value) => plain(value).toLocaleString("en-US", value === 0 ? {} : same);
}

/* "Logarithmic" is offered from a factor of 3, and is the default from 20. */
function factorOf(rows, key) {
  const positive = rows.map((row) => row[key]).filter((value) => value > 0);
  return positive.length > 1 && key !== "tpme_percent" ? Math.max(...positive) / Math.min(...positive) : 1;
}
const isLog = (rows, key) => { const factor = factorOf(rows, key); return factor >= 3 && (state.log ? state.log === "1" : factor >= 20); };

/* Rows that were left out are not drawn; reference rows are always. */
const drawable = (rows) => rows.filter((row) => row.status === "ok" && (row.inside || row.baseline || !row.usable) && known(row[state.y]));
const titleOf = (axis) => (axis.key === "cost_ratio" ? `${axis.title} to ${group().reference}` : axis.title);
const labelOf = (axis) => `${titleOf(axis)}${axis.unit ? ` (${axis.unit})` : ""}`;

function emptyReason(rows, drawn, across, up) {
  if (!across || !up) return "These records hold no cost or no quality, so there is nothing to draw.";
  if (drawn.some((row) => (row.inside || !row.baseline) && known(row[across.key]))) return "";
  if (!rows.some((row) => row.usable)) return "No row can be compared: none has trusted values of T, P and M.";
  if (!state.rows.length) return "No row is ticked: tick rows in the table below, or go back to the report's choices.";
  if (across.key === "tpme_percent" && !rows.some((row) => known(row.tpme))) return "TPME compares rows, and one row alone has none: tick another one, or choose another axis.";
  return `No ticked row has both ${across.title} and ${up.title}: choose other axes.`;
}

/* Grid lines, their marks, and what the axes are. */
function drawGrid(chart, { x, y, across, up, log, narrow, left, top, end, height, bottom }) {
  const [writtenX, writtenY] = [written(x.marks, across.scale, log), written(y.marks, up.scale, false)];
  for (const value of x.marks) chart.append(make("svg:line", { class: "grid", x1: x.place(value), x2: x.place(value), y1: top, y2: height - bottom }), make("svg:text", { class: "tick", x: x.place(value), y: height - bottom + (narrow ? 20 : 16), "text-anchor": "middle" }, writtenX(value)));
  for (const value of y.marks) chart.append(make("svg:line", { class: "grid", x1: left, x2: end, y1: y.place(value), y2: y.place(value) }), make("svg:text", { class: "tick", x: left - 6, y: y.place(value) + 4, "text-anchor": "end" }, writtenY(value)));
  const way = (axis) => `, ${axis.better === 1 ? "higher" : "lower"} is better`;
  chart.append(make("svg:text", { class: "axis", x: (left + end) / 2, y: height - 6, "text-anchor": "middle" }, labelOf(across) + way(across)));
  const middle = (top + height - bottom) / 2;
  chart.append(make("svg:text", { class: "axis", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, labelOf(up) + way(up)));
}

function drawChart(rows) {
  const narrow = NARROW.matches;
  const [width, height, left, right, top, bottom] = narrow ? [560, 560, 74, 20, 18, 56] : [820, 520, 62, 24, 14, 44];
  const chart = byId("chart");
  const [across, up] = [axisOf("x"), axisOf("y")];
  const drawn = up ? drawable(rows) : [];
  const shown = across ? drawn.filter((row) => known(row[across.key])).sort((a, b) => a[across.key] - b[across.key] || b[up.key] - a[up.key]) : [];
  const reason = emptyReason(rows, drawn, across, up);
  byId("empty").hidden = !reason;
  byId("empty").textContent = reason;
  chart.setAttribute("viewBox", `0 0 ${width} ${shown.length ? height : 1}`);
  chart.replaceChildren();
  byId("chart-note").textContent = shown.length ? chartNote(drawn, shown, across, up) : "";
  if (!shown.length) return;
  const reach = (axis) => (row) => [row[`${axis.key}_low`] ?? row[axis.key], row[axis.key], row[`${axis.key}_high`] ?? row[axis.key]];
  const log = isLog(shown, across.key);
  const x = makeScale(shown.flatMap(log ? (row) => [row[across.key]] : reach(across)), log, left, width - right, narrow ? 6 : 8);
  const y = makeScale(drawn.flatMap(reach(up)), false, height - bottom, top, 7);
  const end = width - right;
  drawGrid(chart, { x, y, across, up, log, narrow, left, top, end, height, bottom });
  const front = shown.filter((row) => row.front);
  if (across.better === 1) front.reverse();
  const spots = shown.map((row) => ({ row, x: x.place(row[across.key]), y: y.place(row[up.key]) }));
  const frontSpots = front.map((row) => spots.find((spot) => spot.row === row));
  chart.append(make("svg:path", { class: "step", d: frontSpots.map((spot, i) => (i ? `H${spot.x}V${spot.y}` : `M${spot.x},${spot.y}`)).join("") }));
  const clamp = (value) => Math.max(left, Math.min(end, value));
  for (const { row, x: at, y: level } of spots) {
    const [[low, , high], [down, , over]] = [reach(up)(row), reach(across)(row)];
    if (high > low) chart.append(make("svg:line", { class: "reach", x1: at, x2: at, y1: y.place(low), y2: y.place(high) }));
    if (over > down) chart.append(make("svg:line", { class: "reach", x1: clamp(x.place(down)), x2: clamp(x.place(over)), y1: level, y2: level }));
  }
  const lines = drawn.filter((row) => row.baseline && !known(row[across.key])).map((row) => ({ row, y: y.place(row[up.key]) }));
  for (const { row, y: level } of lines) chart.append(make("svg:line", { class: "reference-line", "data-reference": row.name, x1: left, x2: end, y1: level, y2: level }));
  spots.forEach((spot, i) => chart.append(drawPoint(spot, i === 0)));
  placeNames(chart, spots, lines, [left, top, end, height - bottom], frontBoxes(frontSpots));
}

/* What the marks of the chart are, in words. */
function chartNote(drawn, shown, across, up) {
  const bars = (axis, pool) => (axis.bars && pool.some((row) => row[`${axis.key}_high`] > row[`${axis.key}_low`]) ? axis.bars : "");
  const [upwards, sideways] = [bars(up, drawn), bars(across, shown)];
  const parts = [`Best is ${up.better === 1 ? "up" : "down"} and to the ${across.better === 1 ? "right" : "left"}.`];
  if (upwards || sideways) parts.push(`Bars: ${[upwards && `${upwards} (up and down)`, sideways && `${sideways} (across)`].filter(Boolean).join(", ")}.`);
  if (shown.some((row) => row.front)) parts.push("Diamonds and line: no other compared row is better in both (Pareto front).");
  if (drawn.some((row) => row.baseline)) parts.push("Hollow squares and dashed lines: reference rows, which adapt no encoder.");
  return parts.join(" ");
}

/* The numbers of a row and its flags. */
function summary(row) {
  const place = known(row.rank) ? `Rank ${rankText(row)}, TPME ${percent(row)} %` : known(row.bound) ? `TPME ${percent(row)} %` : row.status === "ok" ? "no TPME" : `ended as ${row.status}`;
  return [
    row.name, place + (known(row.low) ? ` (95 %: ${interval(row, 2)})` : "") + (row.front ? ", on the Pareto front" : ""), group().qualities.map(({ key, title }) => `${title} ${ranged(row, key)}`).join(", "),
    `T ${spread(row.epoch_time_s, row.epoch_time_s_sd, 4)} s, P ${number(row.trainable_millions, 4)} M, M ${usedMemory(row, 4)}${known(row.energy_epoch_j) ? `, E ${energy(row, 4)}` : ""}`, ...footnotes(row).map((text, i) => `${row.notes[i]} ${text}`),
  ].join("\n");
}

/* The points are a single tab stop; arrow keys move between them. */
function drawPoint({ row, x, y }, first) {
  const reference = row.baseline && !row.inside;
  const kind = row.front ? "point front" : reference ? "point reference" : "point";
  const square = (half, turn) => make("svg:rect", { class: "dot", x: x - half, y: y - half, width: 2 * half, height: 2 * half, transform: turn ? `rotate(45 ${x} ${y})` : null });
  const shape = row.front || reference ? square(reference ? 4.5 : 5, !reference) : make("svg:circle", { class: "dot", cx: x, cy: y, r: 5 });
  const select = () => change({ open: row.name, filter: "", status: "" }, `[data-open="${row.index}"]`);
  const show = () => tip(node, row);
  const node = make("svg:g", { class: kind, tabindex: first ? 0 : -1, role: "button", "aria-label": summary(row), "data-point": row.name, onclick: select, onfocus: show, onmouseenter: show, onblur: hideTip, onmouseleave: hideTip,
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step || event.key === "Enter" || event.key === " ") event.preventDefault();
      if (event.key === "Enter" || event.key === " ") select();
      if (step) {
        const points = [...byId("chart").querySelectorAll(".point")];
        points[(points.indexOf(node) + step + points.length) % points.length].focus();
      }
    } }, make("svg:circle", { class: "halo", cx: x, cy: y, r: 11 }), shape);
  return node;
}

/* The line of the front, as boxes: from each point across, then up to the next. */
function frontBoxes(front) {
  return front.slice(1).flatMap((next, i) => [[Math.min(front[i].x, next.x), front[i].y - 2, Math.max(front[i].x, next.x), front[i].y + 2], [next.x - 2, Math.min(next.y, front[i].y), next.x + 2, Math.max(next.y, front[i].y)]]);
}

/* Greedy: each name takes the nearest free place on rings around its point; a name without one is in the tooltip only.
   Among many points the front chooses first, and the others have names only where there is room beside them. */
const RINGS = 14, CROWDED = 40;
function placeNames(chart, spots, lines, [left, top, right, bottom], fronts) {
  const taken = [...fronts, ...spots.map((spot) => [spot.x - 6, spot.y - 6, spot.x + 6, spot.y + 6]), ...lines.map((line) => [left, line.y - 1, right, line.y + 1])];
  const free = (box) => box[0] >= left && box[1] >= top && box[2] <= right && box[3] <= bottom && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
  const short = (name) => (name.length > 26 ? `${name.slice(0, 25)}…` : name);
  const write = (name, kind, findPlace) => {
    const label = make("svg:text", { class: kind, "pointer-events": "none" }, short(name));
    chart.append(label);
    const size = label.getBBox();
    const place = findPlace(size);
    if (!place) return void label.remove();
    taken.push(place.box);
    label.setAttribute("x", place.box[0]);
    label.setAttribute("y", place.box[3] - 0.24 * size.height);
    return place;
  };
  for (const line of lines) {
    write(line.row.name, "name reference", ({ width, height }) => {
      const boxes = Array.from({ length: 40 }, (_, i) => { const end = right - 4 - 16 * Math.floor(i / 2); const base = i % 2 ? line.y + height + 2 : line.y - 2; return [end - width, base - height, end, base]; });
      const box = boxes.find(free);
      return box && { box };
    });
  }
  const crowded = spots.length > CROWDED;
  const order = crowded ? [...spots].sort((a, b) => b.row.front - a.row.front) : spots;
  for (const spot of order) {
    const near = crowded && !spot.row.front && spot.row.name !== group().reference;
    const clear = (box) => free(box) && spots.every((other) => other === spot || gap(box, other) >= gap(box, spot));
    const place = write(spot.row.name, "name", (size) => ringPlace(spot, size, clear, near ? 1 : RINGS) ?? (near ? null : ringPlace(spot, size, free, RINGS)));
    if (place?.far) chart.append(make("svg:line", { class: "lead", x1: spot.x, y1: spot.y, x2: Math.min(Math.max(spot.x, place.box[0]), place.box[2]), y2: Math.min(Math.max(spot.y, place.box[1]), place.box[3]) }));
  }
}

/* From a point to a box: a name lies nearer to its own point than to any other, where there is such a place. */
const gap = ([left, top, right, bottom], { x, y }) => Math.hypot(Math.max(left - x, 0, x - right), Math.max(top - y, 0, y - bottom));

function ringPlace(spot, { width, height }, free, rings) {
  for (let ring = 0; ring < rings; ring += 1) {
    for (let turn = 0; turn < 16; turn += 1) {
      const angle = (Math.PI * 2 * (turn % 2 ? turn + 1 : -turn)) / 32;
      const [dx, dy] = [Math.cos(angle), Math.sin(angle)];
      const cx = spot.x + dx * (9 + 9 * ring) + (Math.abs(dx) < 0.2 ? 0 : (Math.sign(dx) * width) / 2);
      const cy = spot.y + dy * (9 + 9 * ring) + (Math.abs(dy) < 0.2 ? 0 : (Math.sign(dy) * height) / 2);
      const box = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2];
      if (free(box)) return { box, far: ring > 0 };
    }
  }
  return null;
}

/* The numbers of a row beside what shows it, which is emphasised wherever it is drawn. */
function tip(node, row, text = summary(row)) {
  hideTip();
  const name = CSS.escape(row.name);
  for (const other of document.querySelectorAll(`[data-point="${name}"], [data-curve="${name}"], [data-reference="${name}"]`)) other.classList.add("hot");
  const box = node.getBoundingClientRect();
  const drawn = byId("tip");
  drawn.textContent = text;
  drawn.hidden = false;
  const wide = document.documentElement.clientWidth;
  drawn.style.left = `${scrollX + Math.max(4, Math.min(box.right + 8, wide - drawn.offsetWidth - 4))}px`;
  const [above, below] = [box.top - drawn.offsetHeight - 6, box.bottom + 6];
  drawn.style.top = `${scrollY + (below + drawn.offsetHeight > innerHeight ? Math.max(4, above) : below)}px`;
}
function hideTip() {
  byId("tip").hidden = true;
  for (const node of document.querySelectorAll(".hot")) node.classList.remove("hot");
}

/* ---- one cell, opened ---- */
function detail(row) {
  const cell = row.cell;
  const part = (title, ...content) => make("div", {}, make("h3", {}, title), ...content);
  const code = (what, text) => make("pre", { tabindex: 0, role: "region", "aria-label": what }, text);
  const parts = [];
  if (cell.failure) parts.push(part(`Ended as ${row.status}`, make("p", {}, cell.failure)));
  if (row.notes.length) parts.push(part("Notes", ...footnotes(row).map((text, i) => make("p", { class: "notes" }, `${row.notes[i]} ${text}`))));
  for (const [title, entries] of Object.entries(rowNumbers(row))) if (entries.length) parts.push(part(title, pairs(title, entries)));
  if (row.learning) parts.push(part("Learning curve", ...curvesOf().map((one) => panel([row], one, [320, 150, 11], "epochs", () => "mark-0"))));
  if (Object.keys(cell.phases).length) parts.push(part(cell.curve.length ? "Phases and memory over time" : "Phases", timeline(cell), cell.curve.length ? make("p", { class: "notes" }, "The curve holds what was in memory before the cell began, too; M and the whole-run peak leave that out.") : null));
  parts.push(part("Configuration", code("Configuration", cell.configuration)));
  if (cell.command) parts.push(part("To repeat it", make("p", { class: "soft" }, `Save the configuration as cell.toml${cell.configuration.includes("\n# fill in") ? ", fill in what its first lines name" : ""}, then:`), code("Command", cell.command),
    make("p", { class: "soft" }, "With the same measured code that is the same cell. A method from a folder of your own needs ", make("code", {}, "--methods-path FOLDER"), ", too.")));
  const environment = cell.environment ? { ...group().environment, ...cell.environment } : { device: "not known: the attempt ended before" };
  parts.push(part("Measured on", pairs("Measured on", Object.entries(environment))));
  const close = make("button", { type: "button", class: "close", onclick: closeCell }, "Close (Escape)");
  return make("div", { class: "cell" }, make("p", { class: "soft" }, close, ` Cell ${cell.id}, seed ${cell.seed}, attempt ${cell.attempt}, measured code ${cell.code}`), ...parts);
}

const pairs = (what, entries) => make("table", { class: "pairs", "aria-label": what }, make("tbody", {}, ...entries.map(([key, value]) => make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, String(value))))));

/* Every known number of a row, with its unit and its spread; an axis says what the spread is. */
function rowNumbers(row) {
  const { x, y } = group().axes;
  const rank = known(row.rank) ? [["Rank by TPME", row.tied.length ? `${row.rank}, ${tiedText()} with ${row.tied.join(", ")}` : row.rank]] : [];
  if (known(row.bound)) rank.push(["TPME", `${percent(row)} %`]);
  if (row.status === "oom") rank.push(["Training peak memory M", usedMemory(row, 4)]);
  const values = (axes) => axes.filter(({ key }) => known(row[key])).map((axis) => [titleOf(axis), amountOf(axis, row)]);
  return { Costs: [...rank, ...values(x), ["Memory read by", row.source], ["Finished seeds", row.seeds]], Quality: values(y) };
}

function closeCell() {
  const row = group().rows.find(({ name }) => name === state.open);
  change({ open: "" }, row && `[data-open="${row.index}"]`);
  hideTip(); // the focus on the name would show it
}

/* What a phase does; words of a method's own phases are its own. */
const DOES = {
  load: "data and encoders are read", adapt: "the method enters the encoders", prepare: "the model is set up", cache: "the feature cache is built or read", warmup: "steps before the clock counts",
  train: "training", validate: "validation after an epoch", rank: "the whole catalogue is ranked for the users", export: "the adapted model is written", inference: "serving is timed",
  estimate: "the method estimates what to change", search: "the method searches", round: "a round of the method", count: "FLOPs and bytes are counted", probe: "the representation space is measured", other: "what the training loop does between its phases",
};

/* A lane for each kind of phase, in the colour that it has in all reports; above them, on the same time axis, the memory curve in bands of these colours. */
function timeline({ phases, curve }) {
  const [left, right, top] = [62, 258, curve.length > 1 ? 124 : 0];
  const kinds = Object.keys(phases);
  const height = top + 17 * kinds.length;
  const last = Math.max(...Object.values(phases).flat(2), ...curve.map(([time]) => time)) || 1;
  const most = Math.max(1, ...curve.map(([, used]) => used));
  const x = (time) => left + (time / last) * (right - left);
  const bands = (kind, y, tall) => phases[kind].map(([from, to]) => make("svg:rect", { class: "phase", fill: DATA.phases[kind], x: x(from), y, width: Math.max(0.8, x(to) - x(from)), height: tall }, make("svg:title", {}, `${kind}, ${number(from)} to ${number(to)} s: ${DOES[kind]}`)));
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
    drawn.append(make("svg:line", { class: "grid", x1: left, x2: right, y1: y + 8, y2: y + 8 }), make("svg:text", { x: 0, y: y + 12 }, kind, make("svg:title", {}, DOES[kind])), ...bands(kind, y + 2, 12), make("svg:text", { class: "tick", x: right + 6, y: y + 12 }, `${spent(kind)} s`));
  });
  drawn.append(make("svg:text", { class: "tick", x: left, y: height + 12 }, "0"), make("svg:text", { class: "tick", x: right, y: height + 12, "text-anchor": "end" }, `${number(last)} s`));
  return drawn;
}


/* ---- controls ---- */
/* A live region that is not touched stays silent. */
function say(id, text) { if (byId(id).textContent !== text) byId(id).textContent = text; }

function rankingText(chosen, ranked) {
  if (!chosen) return `No row ${group().rows.some((row) => row.usable) ? "is" : "can be"} ticked, so there is no TPME.`;
  if (!ranked.length) return "TPME compares rows, and one row alone has none.";
  const [first, ...tied] = ranked.filter((row) => row.rank === 1).map((row) => row.name);
  return `${chosen} rows compared; lowest TPME: ${first}${tied.length ? `, ${tiedText()}: ${tied.join(", ")}` : ""}.`;
}

/* Three sentences of the report, bold up to the colon; they hold for its own choices. */
function drawAnswer([best, cheapest, trust]) {
  const lead = (text) => { const end = text.indexOf(":") + 1; return make("p", {}, make("b", {}, text.slice(0, end)), text.slice(end)); };
  const details = make("a", { href: "#trust", onclick: (event) => { event.preventDefault(); byId("trust").scrollIntoView(); byId("trust").focus({ preventScroll: true }); } }, "Details");
  byId("answer").replaceChildren(lead(best), lead(cheapest), make("p", {}, make("b", {}, "Trust: "), `${trust} `, details));
}

/* Axes that no row has are not offered. */
function drawAxes(rows) {
  for (const which of ["x", "y"]) {
    const offered = group().axes[which].filter(({ key }) => key === state[which] || rows.some((row) => known(row[key])));
    byId(which).replaceChildren(...offered.map((axis) => make("option", { value: axis.key }, titleOf(axis))));
    byId(which).value = state[which];
    byId(`${which}-help`).textContent = axisOf(which)?.help ?? "";
  }
  const shown = drawable(rows);
  byId("log").disabled = factorOf(shown, state.x) < 3;
  byId("log").checked = isLog(shown, state.x);
}

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
  drawAnswer(current.answer);
  state.weights.forEach((weight, i) => {
    const slider = byId(`weight-${AXES[i]}`);
    if (Number(slider.value) !== weight) slider.value = String(weight);
    slider.setAttribute("aria-valuetext", `${(100 * weight).toFixed(0)} percent`);
    const output = byId(`output-${AXES[i]}`);
    output.textContent = weight.toFixed(2);
    output.dataset.value = String(weight);
  });
  document.querySelectorAll("input[name=frame]").forEach((input) => { input.checked = input.value === state.frame; input.disabled = input.value === "report" && !current.frame; });
  byId("frame-name").textContent = current.frozen ? `least and most in the file ${current.frozen}` : "least and most of the rows this report compares";
  drawAxes(rows);
  if (byId("filter").value !== state.filter) byId("filter").value = state.filter;
  byId("status").value = state.status;
  drawChart(rows);
  drawTable(rows);
  drawCurves(rows);
  drawInference(current.inference);
  const ranked = rows.filter((row) => known(row.rank)).sort((a, b) => a.tpme - b.tpme);
  say("said", rankingText(rows.filter((row) => row.inside).length, ranked));
  byId("no-intervals").hidden = ownChoices() || !current.rows.some((row) => known(row.tpme_low));
  byId("shared").replaceChildren(...current.shared.map((text) => make("li", {}, text)), make("li", {}, `${current.noise.text[0].toUpperCase()}${current.noise.text.slice(1)}.`));
  const environment = Object.entries(current.environment);
  byId("environment").replaceChildren(...(environment.length ? [make("p", { class: "notes" }, `Shared by all cells: ${environment.map(([key, value]) => `${key} ${value}`).join(", ")}.`)] : []));
  byId("footnotes").replaceChildren(...current.footnotes.map((text, i) => make("p", {}, `${i + 1} ${text}`)));
}

byId("group").append(...DATA.groups.map(({ name }, i) => make("option", { value: i }, name)));
byId("group-choice").hidden = DATA.groups.length < 2;
byId("group").addEventListener("change", (event) => change({ ...initial(Number(event.target.value)), weights: state.weights }));
AXES.forEach((axis, i) => byId(`weight-${axis}`).addEventListener("input", (event) => setWeight(i, Number(event.target.value))));
document.querySelectorAll("input[name=frame]").forEach((input) => input.addEventListener("change", () => change({ frame: input.value })));
byId("x").addEventListener("change", (event) => change({ x: event.target.value, log: "" }));
byId("y").addEventListener("change", (event) => change({ y: event.target.value }));
byId("log").addEventListener("change", (event) => change({ log: event.target.checked ? "1" : "0" }));
byId("along").addEventListener("change", (event) => change({ along: event.target.value }));
byId("filter").addEventListener("input", (event) => change({ filter: event.target.value }));
byId("status").append(...[...new Set(DATA.groups.flatMap(({ rows }) => rows.map((row) => row.status)))].sort().map((status) => make("option", { value: status }, status)));
byId("status").addEventListener("change", (event) => change({ status: event.target.value }));
byId("reset").addEventListener("click", () => change(initial(state.group)));
byId("csv").addEventListener("click", download);
addEventListener("hashchange", () => { readState(); draw(); });
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.target.matches("select, input[type=search]")) return;
  hideTip();
  if (state.open) closeCell();
});
/* A narrow window shows the chart first and folds the controls. */
function fold() { byId("controls").open = !NARROW.matches; }
NARROW.addEventListener("change", () => { fold(); draw(); });
fold();
readState();
draw();

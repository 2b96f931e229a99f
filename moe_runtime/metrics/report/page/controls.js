// What a person can press: theme, range of steps, curves, layers, times, tables of points.

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("report-theme", theme); } catch { /* a browser may keep nothing for files */ }
  repaintAll();
}

function wireTheme() {
  let theme = "system";
  try { theme = localStorage.getItem("report-theme") ?? theme; } catch { /* likewise */ }
  setTheme(THEMES.includes(theme) ? theme : "system");
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintAll);
}

function refill(...kinds) {
  for (const entry of report.drawn.values()) if (kinds.includes(entry.kind)) fill(entry);
}

function wireControls() {
  byId("range").addEventListener("submit", (event) => {
    event.preventDefault();
    const [from, to] = [Number(byId("from").value), Number(byId("to").value)];
    if (from < to) setRange([from, to]);
  });
  byId("all").addEventListener("click", () => setRange(null));
  byId("marks").addEventListener("change", markAll);
  byId("load-frame").addEventListener("input", () => refill("load"));
  byId("load-which").addEventListener("change", () => refill("load", "loadTime"));
  byId("load-layer").addEventListener("change", () => refill("loadTime"));
  byId("layer-name").addEventListener("change", () => refill("layers"));
  document.addEventListener("click", (event) => {
    const curve = event.target.closest("button.curve");
    const points = event.target.closest("button.all-points");
    const layer = event.target.closest("a.layer");
    if (curve) toggleCurve(curve);
    if (points) points.replaceWith(pointsTable(points.dataset.panel));
    if (layer) {
      byId("load-layer").value = layer.dataset.layer;
      refill("loadTime");
    }
  });
  addEventListener("hashchange", followHash);
}

function followHash() {
  const step = /^#step-(\d+)$/.exec(location.hash);
  if (step && report.data) goToStep(Number(step[1]));
}

function toggleCurve(button) {
  const isShown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(isShown));
  const entry = report.drawn.get(button.closest("figure").dataset.plot);
  if (entry) showCurve(entry, Number(button.dataset.place), isShown);
}

function pointsTable(id) {
  const keys = report.data.plots[id].curves.map(([key]) => key);
  const columns = keys.map((key) => {
    const {x, y} = report.curves.get(key);
    return new Map(Array.from(x, (step, place) => [step, y[place]]));
  });
  const steps = [...new Set(columns.flatMap((column) => [...column.keys()]))].sort((a, b) => a - b);
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const name of ["step", ...keys]) head.append(Object.assign(document.createElement("th"), {textContent: name, scope: "col"}));
  const body = table.createTBody();
  for (const step of steps) {
    const row = body.insertRow();
    row.insertCell().textContent = step;
    for (const column of columns) {
      const cell = row.insertCell();
      cell.className = "number";
      if (column.has(step)) cell.textContent = Number.isFinite(column.get(step)) ? column.get(step) : "not finite";
    }
  }
  const place = Object.assign(document.createElement("div"), {className: "all-points-table", tabIndex: 0});
  place.setAttribute("role", "region");
  place.setAttribute("aria-label", "Every point of the picture");
  place.append(table);
  return place;
}

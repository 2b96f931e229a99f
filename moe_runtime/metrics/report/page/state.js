// What the page knows: the data of the run, the pictures drawn so far, and the steps that they show.

const report = {
  data: null,
  curves: new Map(), // key -> {x, y}, Float64Array
  drawn: new Map(), // id -> {figure, plot, kind, ...}
  range: null, // [from, to]; null: all steps
  chosen: null, // a step that a link pointed to
  setting: false, // ranges move because we move them
};

const byId = (id) => document.getElementById(id);
const panelOf = (id) => document.querySelector(`figure[data-plot="${id}"]`);

function takeData(data) {
  report.data = data;
  const steps = data.steps.map(float64s);
  report.curves.clear();
  for (const [key, [place, values]] of Object.entries(data.curves)) {
    report.curves.set(key, {x: steps[place], y: float64s(values)});
  }
  report.first = Math.min(...steps.map((x) => x[0]), data.lastStep);
  for (const panel of document.querySelectorAll("figure[data-plot]")) {
    panel.hidden = !(panel.dataset.plot in data.plots);
  }
}

function allSteps() {
  const first = Number.isFinite(report.first) ? report.first : 0;
  const last = Math.max(report.data.lastStep, first);
  return first === last ? [first - 0.5, last + 0.5] : [first, last];
}

function renderersOf(figure, name) {
  return figure.renderers.filter((renderer) => renderer.name === name);
}

// Bokeh reads colours from the style sheet, but for those of a colour bar, which is no part of the page's tree.
function repaint({figure, view}) {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
  for (const bar of figure?.right ?? []) bar.major_label_text_color = ink;
  view?.request_repaint?.();
}

function repaintAll() {
  for (const entry of report.drawn.values()) repaint(entry);
}

function tellTrouble(text) {
  const place = byId("trouble");
  place.textContent = text;
  place.hidden = false;
}

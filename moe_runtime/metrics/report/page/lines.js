// Curves over steps: their data, the marks of events, and one range of steps for all of them.

const FEW_POINTS = 60; // below it each point is drawn too

function fillLines(entry) {
  const {figure, plot} = entry;
  for (const [key] of plot.curves) {
    const curve = report.curves.get(key) ?? {x: [], y: []};
    const renderers = renderersOf(figure, key);
    renderers[0].data_source.data = {x: curve.x, y: curve.y};
    renderers[1].visible = curve.x.length <= FEW_POINTS && renderers[0].visible;
  }
  const marks = report.data.marks.map(([step]) => step);
  if (report.chosen !== null) marks.push(report.chosen);
  renderersOf(figure, "marks")[0].data_source.data = {x: marks, what: marks.map(String)};
  showRange(entry);
}

function showRange({figure}) {
  const all = allSteps();
  const [start, end] = report.range ?? all;
  report.setting = true;
  figure.x_range.setv({reset_start: all[0], reset_end: all[1], start, end});
  report.setting = false;
}

function setRange(range) {
  const all = allSteps();
  const isAll = range === null || (range[0] <= all[0] && range[1] >= all[1]);
  report.range = isAll ? null : range;
  for (const entry of report.drawn.values()) if (entry.kind === "lines") showRange(entry);
  const [from, to] = report.range ?? all;
  byId("from").value = Math.max(0, Math.ceil(from));
  byId("to").value = Math.floor(to);
}

function followRange(entry) {
  const {x_range} = entry.figure;
  let waiting = false;
  const moved = () => {
    if (report.setting || waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      setRange([x_range.start, x_range.end]);
    });
  };
  x_range.properties.start.change.connect(moved);
  x_range.properties.end.change.connect(moved);
}

function showCurve(entry, key, isShown) {
  const [line, points] = renderersOf(entry.figure, key);
  line.visible = isShown;
  points.visible = isShown && (report.curves.get(key)?.x.length ?? 0) <= FEW_POINTS;
}

function goToStep(step) {
  const [first, last] = allSteps();
  const around = Math.max(10, (last - first) * 0.02);
  report.chosen = step;
  setRange([Math.max(first, step - around), Math.min(last, step + around)]);
  for (const entry of report.drawn.values()) if (entry.kind === "lines") fillLines(entry);
  byId("section-learning").scrollIntoView();
}

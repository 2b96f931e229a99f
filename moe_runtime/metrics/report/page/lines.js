// Curves over steps: their data, the marks of events, and one range of steps for all of them.

const LONE_PX = 9; // a point without a line
const LONE_ROOM = 0.03; // of all steps, beside a lone point at either end, which the frame would cut in half

// The renderers of a curve, in the order in which its form has them: marks, lines, points.
function renderersOfCurve({figure, plot}, place) {
  return [figure.renderers[1 + place], figure.renderers[1 + plot.curves.length + place]];
}

function nameLines({figure, plot}) {
  figure.left[0].axis_label = plot.unit;
  plot.curves.forEach(([, label, [colour, dash, width]], place) => {
    const [line, points] = renderersOfCurve({figure, plot}, place);
    line.name = label;
    line.glyph.setv({line_color: {value: colour}, line_width: {value: width}, line_dash: {value: dash}});
    points?.glyph.setv({fill_color: {value: colour}, size: {value: width > 1 ? 4 : 3}});
  });
}

function fillLines(entry) {
  entry.plot.curves.forEach(([key], place) => {
    const [line, points] = renderersOfCurve(entry, place);
    const {x, y} = report.curves.get(key);
    line.data_source.data = {x, y};
    if (points) points.visible = line.visible && x.length <= report.data.fewPoints;
    if (x.length === 1) points?.glyph.setv({size: {value: LONE_PX}});
  });
  fillMarks(entry);
  showRange(entry);
}

const MARK_COLOURS = {bad: "#cf4152", change: "#8a94a0", chosen: "#2f7fd0"};

function fillMarks({figure}) {
  const marks = byId("marks").checked ? report.data.marks.map(([step, , level]) => [step, level]) : [];
  if (report.chosen !== null) marks.push([report.chosen, "chosen"]);
  const data = {x: marks.map(([step]) => step), colour: marks.map(([, level]) => MARK_COLOURS[level])};
  figure.renderers[0].data_source.data = data;
}

function markAll() {
  for (const entry of report.drawn.values()) if (entry.kind === "lines") fillMarks(entry);
}

function showRange({figure, plot}) {
  const all = allSteps();
  if (plot.curves.some(([key]) => report.curves.get(key).x.length === 1)) {
    const room = LONE_ROOM * (all[1] - all[0]);
    all[0] -= room;
    all[1] += room;
  }
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

function showCurve(entry, place, isShown) {
  const [line, points] = renderersOfCurve(entry, place);
  line.visible = isShown;
  if (points) points.visible = isShown && line.data_source.data.x.length <= report.data.fewPoints;
}

function goToStep(step) {
  const [first, last] = allSteps();
  const around = Math.max(10, (last - first) * 0.02);
  report.chosen = step;
  setRange([Math.max(first, step - around), Math.min(last, step + around)]);
  markAll();
  byId("section-learning").scrollIntoView();
}

// Pictures of cells: loads of experts, numbers of layers.

const FAIR = 256; // code of a fair share
const LABEL_PX = [7, 14]; // of a label: each letter, and what keeps it from the next

function fillImage(figure, values, rows, columns, extra) {
  const source = renderersOf(figure, "image")[0].data_source;
  const Cells = source.data.image[0].constructor;
  const made = (numbers) => [new Cells(Float32Array.from(numbers).buffer, [rows, columns])];
  const data = {image: made(values), x: [0], y: [0], dw: [columns], dh: [rows]};
  for (const [name, numbers] of Object.entries(extra)) data[name] = made(numbers);
  source.data = data;
  figure.x_range.setv({start: 0, end: columns, reset_start: 0, reset_end: columns});
  figure.y_range.setv({start: rows, end: 0, reset_start: rows, reset_end: 0});
  figure.height = Math.min(620, Math.max(240, 110 + rows * 16));
}

// As many labels as have room: one below the other on the left, side by side below.
function labelAxis(axis, labels, room, isBelow) {
  const [letter, apart] = LABEL_PX;
  const longest = labels.reduce((most, label) => Math.max(most, label.length), 1);
  const every = Math.ceil((labels.length * (isBelow ? longest * letter + apart : apart)) / Math.max(room, 1));
  const shown = labels.map((label, place) => [place + 0.5, label]).filter((_, place) => place % every === 0);
  axis.ticker.ticks = shown.map(([place]) => place);
  axis.major_label_overrides = new Map(shown);
}

const labelRows = (figure, labels) => labelAxis(figure.left[0], labels, figure.height - 110, false);
const labelColumns = (figure, labels) => labelAxis(figure.below[0], labels, (figure.outer_width || 400) - 150, true);
const countTo = (count) => Array.from({length: count}, (_, place) => place);
const cells = (rows, columns, value) => {
  const numbers = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) numbers[row * columns + column] = value(row, column);
  }
  return numbers;
};

function loadFrames() {
  const load = report.data.load;
  const which = byId("load-which").value in load ? byId("load-which").value : "mean";
  load.arrays ??= {};
  load.arrays[which] ??= uint16s(load[which]);
  return load.arrays[which];
}

function prepareLoad() {
  const load = report.data.load;
  const slider = byId("load-frame");
  const atEnd = slider.value === slider.max;
  slider.max = load.lastSteps.length - 1;
  if (atEnd) slider.value = slider.max;
  document.querySelector(".of-frames").hidden = !("furthest" in load);
  setOptions(byId("load-layer"), load.layers);
}

function fillLoad({figure}) {
  prepareLoad();
  const {layers, experts, firstSteps, lastSteps} = report.data.load;
  const frame = Number(byId("load-frame").value);
  const size = layers.length * experts;
  const values = loadFrames().subarray(frame * size, (frame + 1) * size);
  const loads = Float32Array.from(values, (code) => code / FAIR);
  const extra = {
    expert: cells(layers.length, experts, (_, column) => column),
    layer: cells(layers.length, experts, (row) => row),
  };
  fillImage(figure, loads, layers.length, experts, extra);
  labelRows(figure, layers);
  labelColumns(figure, countTo(experts).map(String));
  const [first, last] = [firstSteps[frame], lastSteps[frame]];
  const steps = first === last ? `step ${last}` : `steps ${first} to ${last}`;
  byId("load-step").textContent = steps;
  byId("load-frame").setAttribute("aria-valuetext", steps);
}

function fillLoadTime({figure}) {
  prepareLoad();
  const {layers, experts, firstSteps} = report.data.load;
  const layer = Math.max(0, layers.indexOf(byId("load-layer").value));
  const frames = firstSteps.length;
  const codes = loadFrames();
  const size = layers.length * experts;
  const value = (expert, frame) => codes[frame * size + layer * experts + expert] / FAIR;
  const extra = {
    expert: cells(experts, frames, (row) => row),
    step: cells(experts, frames, (_, column) => firstSteps[column]),
  };
  fillImage(figure, cells(experts, frames, value), experts, frames, extra);
  labelRows(figure, countTo(experts).map(String));
  labelColumns(figure, firstSteps.map(String));
}

function fillLayers({figure}) {
  const layers = report.data.layers;
  setOptions(byId("layer-name"), layers.names, "violation");
  const name = Math.max(0, layers.names.indexOf(byId("layer-name").value));
  const [rows, columns] = [layers.layers.length, layers.steps.length];
  layers.array ??= float32s(layers.values);
  const values = layers.array.subarray(name * rows * columns, (name + 1) * rows * columns);
  const extra = {
    layer: cells(rows, columns, (row) => row),
    step: cells(rows, columns, (_, column) => layers.steps[column]),
  };
  fillImage(figure, values, rows, columns, extra);
  labelRows(figure, layers.layers);
  labelColumns(figure, layers.steps.map(String));
  const finite = values.filter(Number.isFinite);
  const [low, high] = finite.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const mapper = renderersOf(figure, "image")[0].glyph.color_mapper;
  mapper.setv(low < high ? {low, high} : {low: (finite[0] ?? 0) - 1, high: (finite[0] ?? 0) + 1});
}

function setOptions(select, names, first) {
  const wanted = select.value || first;
  if (select.options.length === names.length && [...select.options].every((o, n) => o.value === names[n])) return;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(wanted)) select.value = wanted;
}

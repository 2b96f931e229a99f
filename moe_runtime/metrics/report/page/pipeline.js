// Timelines: a row of boxes for each rank, measured and ideal on one clock.

function fillTimeline(entry) {
  const {figure, kind} = entry;
  const {colours, measured, ideal} = report.data.pipeline;
  const boxes = kind === "measured" ? measured : ideal;
  const rows = boxes.labels.length;
  const top = boxes.row.map((row) => rows - row - 0.12);
  const bottom = boxes.row.map((row) => rows - row - 0.88);
  renderersOf(figure, "boxes")[0].data_source.data = {
    left: boxes.start, right: boxes.end, top, bottom,
    fill: boxes.kind.map((place, box) => paler(colours[place], boxes.pale[box] * 0.55)),
    entry: boxes.entry, from: boxes.from, to: boxes.to, comm: boxes.comm, exposed: boxes.exposed,
  };
  const waits = boxes.exposed.map((exposed, box) => ({exposed, box}))
    .filter(({exposed, box}) => exposed > 0 && boxes.end[box] === boxes.to[box]);
  renderersOf(figure, "exposed")[0].data_source.data = {
    left: waits.map(({exposed, box}) => boxes.to[box] - exposed),
    right: waits.map(({box}) => boxes.to[box]),
    top: waits.map(({box}) => top[box]),
    bottom: waits.map(({box}) => bottom[box]),
  };
  const end = [measured, ideal].flatMap(({to}) => to).reduce((a, b) => Math.max(a, b), 0) || 1;
  figure.height = 90 + rows * 24;
  figure.y_range.setv({start: 0, end: rows, reset_start: 0, reset_end: rows});
  figure.x_range.setv({start: 0, end, reset_start: 0, reset_end: end});
  const places = boxes.labels.map((_, row) => rows - row - 0.5);
  figure.left[0].ticker.ticks = places;
  figure.left[0].major_label_overrides = new Map(boxes.labels.map((label, row) => [places[row], label]));
}

function paler(colour, share) {
  const channel = (place) => {
    const value = parseInt(colour.slice(place, place + 2), 16);
    return Math.round(value + (255 - value) * share).toString(16).padStart(2, "0");
  };
  return `#${channel(1)}${channel(3)}${channel(5)}`;
}

function followOtherTimeline(entry) {
  const {x_range} = entry.figure;
  const moved = () => {
    for (const other of report.drawn.values()) {
      const isOther = (other.kind === "measured" || other.kind === "ideal") && other !== entry;
      if (isOther && (other.figure.x_range.start !== x_range.start || other.figure.x_range.end !== x_range.end)) {
        other.figure.x_range.setv({start: x_range.start, end: x_range.end});
      }
    }
  };
  x_range.properties.start.change.connect(moved);
  x_range.properties.end.change.connect(moved);
}

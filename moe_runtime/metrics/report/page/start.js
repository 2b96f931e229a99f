// Draws what is in sight first, and the rest when there is time; then everything is there, for print too.

const FILL = {
  lines: fillLines, load: fillLoad, loadTime: fillLoadTime, layers: fillLayers,
  measured: fillTimeline, ideal: fillTimeline,
};
const waiting = new Set();
let seen;

function fill(entry) {
  FILL[entry.kind](entry);
}

// A picture of a form; the models of each copy have names of their own.
function copyOf(form, id) {
  const text = JSON.stringify(report.data.forms[form]);
  return JSON.parse(text.replaceAll(/"p(\d+)"/g, `"${id}-$1"`));
}

async function draw(id) {
  const plot = report.data.plots[id];
  if (!plot || report.drawn.has(id)) return;
  const place = panelOf(id).querySelector(".plot");
  report.drawn.set(id, {plot, kind: "drawing"});
  place.id = `plot-${id}`;
  const views = await Bokeh.embed.embed_item(copyOf(plot.form, id), place.id);
  const view = [...views][0];
  const entry = {plot, kind: plot.kind, figure: view.model, view};
  report.drawn.set(id, entry);
  if (matchMedia("(pointer: coarse)").matches) entry.figure.toolbar.active_drag = null;
  if (entry.kind === "lines") nameLines(entry);
  fill(entry);
  repaint(entry);
  entry.figure.hold_render = false;
  if (entry.kind === "lines") followRange(entry);
  if (entry.kind === "measured" || entry.kind === "ideal") followOtherTimeline(entry);
}

async function forget(id) {
  const entry = report.drawn.get(id);
  report.drawn.delete(id);
  entry.view?.remove?.();
  panelOf(id).querySelector(".plot").replaceChildren();
}

function watchPanels() {
  for (const panel of document.querySelectorAll("figure[data-plot]:not([hidden])")) {
    if (!report.drawn.has(panel.dataset.plot)) {
      waiting.add(panel.dataset.plot);
      seen.observe(panel);
    }
  }
}

async function drawWaiting() {
  while (true) {
    const id = waiting.values().next().value;
    if (id === undefined) {
      document.body.dataset.drawn = "all";
      await new Promise((done) => setTimeout(done, 200));
      continue;
    }
    waiting.delete(id);
    await draw(id);
    await new Promise((done) => setTimeout(done, 0));
  }
}

async function hurry(entries) {
  for (const {target, isIntersecting} of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const id = target.dataset.plot;
    if (waiting.delete(id)) await draw(id);
  }
  document.body.dataset.opened ??= performance.now().toFixed(0); // what is in sight is drawn
}

async function start() {
  wireTheme();
  if (typeof DecompressionStream === "undefined") {
    tellTrouble("This browser is too old to unpack the pictures; all tables and texts are here.");
    return;
  }
  const [library, data] = await Promise.all([unpacked("packed-library"), unpacked("packed-data")]);
  const script = document.createElement("script");
  script.textContent = library;
  document.head.append(script);
  Bokeh.set_log_level("error"); // it warns of pictures that are drawn before they are filled
  takeData(JSON.parse(data));
  wireControls();
  wirePrint();
  seen = new IntersectionObserver(hurry, {rootMargin: "200px"});
  watchPanels();
  setRange(null);
  followHash();
  drawWaiting();
  if (document.body.dataset.live === "yes") follow();
}

start().catch((error) => tellTrouble(`The pictures could not be drawn: ${error.message}`));

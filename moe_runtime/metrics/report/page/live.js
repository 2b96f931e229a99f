// A page that follows the run asks for news, and takes them in without moving anything that a person has set.

const ASK_MS = 2000;
const LONGEST_MS = 30000;

function setText(id, html) {
  const place = byId(id);
  if (!place || place.dataset.is === html) return;
  const open = new Set(Array.from(place.querySelectorAll("details[open]"), (each) => each.dataset.keep));
  const hidden = new Set(Array.from(place.querySelectorAll('[aria-pressed="false"]'), (each) => each.dataset.place));
  place.innerHTML = html;
  place.dataset.is = html;
  for (const each of place.querySelectorAll("details")) each.open = open.has(each.dataset.keep);
  for (const each of place.querySelectorAll("[aria-pressed]")) each.setAttribute("aria-pressed", String(!hidden.has(each.dataset.place)));
}

async function takeNews(news) {
  document.body.dataset.signature = news.signature;
  for (const [id, html] of Object.entries(news.texts)) setText(id, html);
  for (const [name, value] of Object.entries(news.data)) {
    if (value === null) news.data[name] = report.data[name]; // it has not changed
  }
  takeData(news.data);
  for (const [id, entry] of [...report.drawn]) {
    const plot = report.data.plots[id];
    if (entry.kind === "drawing") continue;
    const same = plot && JSON.stringify(plot) === JSON.stringify(entry.plot);
    if (same) fill(entry);
    else await forget(id);
  }
  setRange(report.range);
  watchPanels();
}

async function follow() {
  let wait = ASK_MS;
  for (;;) {
    await new Promise((done) => setTimeout(done, wait));
    if (document.hidden) continue;
    try {
      const asked = performance.now();
      const answer = await fetch(`news?have=${encodeURIComponent(document.body.dataset.signature)}`);
      if (answer.status === 200) await takeNews(await answer.json());
      byId("live").textContent = `live, as of ${new Date().toLocaleTimeString()}`;
      wait = Math.min(LONGEST_MS, Math.max(ASK_MS, 5 * (performance.now() - asked))); // of a long run less often
    } catch {
      byId("live").textContent = "the report's server does not answer; shown is what it said last";
      wait = Math.min(LONGEST_MS, wait * 2);
    }
  }
}

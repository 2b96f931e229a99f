// Paper is white and narrow. The button lays every picture out for it and paints it anew, which takes a browser a
// moment; a browser that prints by itself leaves no such moment, so pictures are scaled, and dark ones inverted.
// For those that are not drawn yet the style sheet puts their words on paper.

const PAPER_PX = 700;
let before = null; // what to go back to

function layOut() {
  repaintAll();
  for (const {view} of report.drawn.values()) {
    view?.compute_layout?.();
    view?.repaint?.();
  }
}

function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches
    ? document.documentElement.dataset.theme !== "light" : document.documentElement.dataset.theme === "dark";
}

function toPaper(isLaidOut) {
  fromPaper(); // if it was pressed twice
  const root = document.documentElement;
  before = {theme: root.dataset.theme, isLaidOut};
  root.classList.toggle("inverted", isDark() && !isLaidOut);
  root.dataset.theme = "light";
  root.classList.toggle("on-paper", isLaidOut);
  for (const plot of document.querySelectorAll(".plot")) {
    const room = plot.closest(".panels") ? PAPER_PX / 2 - 24 : PAPER_PX - 24;
    plot.style.setProperty("--paper", isLaidOut ? 1 : Math.min(1, room / Math.max(1, plot.clientWidth)));
  }
  if (isLaidOut) layOut();
}

function fromPaper() {
  if (before === null) return;
  const root = document.documentElement;
  root.classList.remove("inverted", "on-paper");
  if (before.theme === undefined) delete root.dataset.theme;
  else root.dataset.theme = before.theme;
  if (before.isLaidOut) layOut();
  before = null;
}

function wirePrint() {
  byId("print").addEventListener("click", async () => {
    while (document.body.dataset.drawn !== "all") await new Promise((done) => setTimeout(done, 50));
    toPaper(true);
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    print();
  });
  addEventListener("beforeprint", () => { if (before === null) toPaper(false); });
  addEventListener("afterprint", fromPaper);
}

// The charts: overlaid curves of all runs, and those of one run in depth.
function isDark() {
  const chosen = find("#theme").value;
  return chosen === "auto" ? system.matches : chosen === "dark";
}

function figure(chart) {
  const box = make("div", { class: "chart" });
  const caption = make("figcaption", {}, chart.title, make("span", {}, chart.about || "\u00a0"));
  return [make("figure", { class: chart.wide ? "wide" : null, "aria-label": chart.title }, caption, box), box];
}

async function draw(box, spec) {
  const result = await vegaEmbed(box, { ...spec, width: "container" }, {
    config: payload.themes[isDark() ? "dark" : "light"],
    tooltip: { theme: isDark() ? "dark" : "light" },
    renderer: "svg", // sharp on any screen and on paper
    actions: { export: true, source: false, compiled: false, editor: false },
    logLevel: 1, // errors only: Vega warns of the empty scales of a layer without points
    ast: true, // no eval, which the page's policy forbids
  });
  return result.view;
}

// A mean over the values around each, as many on both sides; gaps stay gaps.
function smoothed(ys, width) {
  return ys.map((y, index) => {
    const reach = Math.min(Math.floor(width / 2), index, ys.length - 1 - index);
    const around = ys.slice(index - reach, index + reach + 1).filter((value) => value !== null);
    return y === null ? null : around.reduce((sum, value) => sum + value, 0) / around.length;
  });
}

// Points of a curve; lone ones, which a line would not show, get a dot, and so do all of an evaluation.
function points(curve, index, axis, width) {
  const xs = (curve.grid ?? payload.runs[index].grid)[axis];
  const isGap = (place) => (curve.y[place] ?? null) === null;
  return smoothed(curve.y, width).map((y, place) => (
    { x: xs[place], y, series: `s${index}`, lone: curve.grid !== null || (isGap(place - 1) && isGap(place + 1)) }));
}

function overlaid(panel) {
  const axis = find("#axis").value;
  const width = panel.smooth ? Number(find("#smooth").value) : 1;
  const spec = structuredClone(panel.spec);
  spec.encoding.x.title = axes[axis];
  spec.layer.at(-1).encoding.tooltip[0].title = axes[axis];
  if (axis === "tokens") spec.encoding.x.axis.format = "~s";
  spec.data = { name: "points", values: panel.curves.flatMap((curve, index) => points(curve, index, axis, width)) };
  spec.params[0].value = [...hidden];
  return spec;
}

function layOut(section, panels, empty) {
  const grid = find(`#${section} .grid`);
  if (!panels.length) grid.replaceWith(make("p", { class: "empty" }, empty));
  for (const panel of panels) {
    const [element, box] = figure(panel);
    grid.append(element);
    if (panel.spec) overlays.push({ panel, box, view: null });
    else box.append(make("p", { class: "empty" }, payload.runs.length > 1 ? "not recorded by any of the runs" : "not recorded by this run"));
  }
}

async function redraw() {
  for (const overlay of overlays) {
    overlay.view?.finalize();
    overlay.view = await draw(overlay.box, overlaid(overlay.panel));
  }
  await drawDepth();
}

let depthViews = [];
async function drawDepth() {
  const { charts, notes: told } = payload.runs[run].depth;
  depthViews.forEach((view) => view.finalize());
  depthViews = [];
  notes("#depth-notes", told);
  const laid = charts.map((chart) => [chart, ...figure(chart)]);
  find("#depth .grid").replaceChildren(...laid.map(([, element]) => element));
  for (const [chart, , box] of laid) {
    if (chart.spec) depthViews.push(await draw(box, chart.spec));
    else box.append(make("p", { class: "empty" }, chart.empty));
  }
}

function queue(work) {
  document.body.dataset.drawn = "no";
  const mine = drawing = drawing.then(work).finally(() => {
    if (drawing === mine) document.body.dataset.drawn = "yes";
  });
}

"use strict";
// Shows the payload. Text of runs is only ever set as text, never as HTML.
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const find = (selector, within = document) => within.querySelector(selector);
  const hidden = new Set();
  const system = matchMedia("(prefers-color-scheme: dark)");
  const axes = { step: "step", hours: "hours", tokens: "tokens generated and trained" };
  const overlays = []; // {panel, box, view}
  let run = 0, at = 0, asked = 0, drawing = Promise.resolve();

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  function notes(place, texts) {
    find(place).replaceChildren(...texts.map((text) => make("p", { class: "note" }, text)));
  }

  // -- charts

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

  // -- runs

  function stroke(style) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    line.setAttribute("width", "22");
    line.setAttribute("height", "10");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", "M0 5H22");
    path.setAttribute("stroke", style.color);
    path.setAttribute("stroke-width", "3");
    if (style.dash[1]) path.setAttribute("stroke-dasharray", style.dash.join(" "));
    line.append(path);
    return line;
  }

  function toggle(button, id) {
    const show = hidden.delete(id);
    if (!show) hidden.add(id);
    button.setAttribute("aria-pressed", String(show));
    for (const { view } of overlays) view?.signal("hidden", [...hidden]).runAsync();
  }

  function runButtons() {
    if (payload.runs.length < 2) return;
    payload.runs.forEach((one, index) => {
      const button = make("button", { "aria-pressed": "true", title: "show or hide" }, stroke(one.style), one.label);
      button.addEventListener("click", () => toggle(button, `s${index}`));
      find("#runs").append(button);
    });
  }

  function table(place, head, rows) {
    const cells = (row, tag) => row.map((text, index) => make(index ? tag : "th", {}, text));
    const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td"))));
    find(place).replaceChildren(make("thead", {}, make("tr", {}, ...cells(head, "th"))), body);
  }

  function overview() {
    const names = payload.runs.map((one) => one.label);
    notes("#notes", payload.runs.flatMap((one) => one.notes.map((text) => names.length > 1 ? `${one.label}: ${text}` : text)));
    find("#facts").className = names.length > 1 ? "" : "one";
    const keys = [...new Set(payload.runs.flatMap((one) => Object.keys(one.facts)))];
    table("#facts", names.length > 1 ? ["", ...names] : ["", ""],
      keys.map((key) => [key, ...payload.runs.map((one) => one.facts[key] ?? "—")]));
    if (names.length < 2) return;
    const box = find("#differences");
    if (!payload.differences.length) {
      box.append(make("p", { class: "faint" }, "The runs have the same settings."));
      return;
    }
    box.append(make("p", { class: "faint" }, "Settings in which the runs differ:"),
      make("div", { class: "scroll" }, make("table", { id: "differing" })));
    table("#differing", ["", ...names], payload.differences.map(([key, values]) => [key, ...values]));
  }

  function choosers() {
    const all = document.querySelectorAll("select.run");
    for (const select of all) {
      select.append(...payload.runs.map((one, index) => make("option", { value: index }, one.label)));
      if (payload.runs.length < 2) select.closest(".chooser").remove();
      select.addEventListener("change", () => {
        run = Number(select.value);
        all.forEach((other) => { other.value = select.value; });
        enterRun();
        queue(drawDepth);
      });
    }
  }

  // -- answers

  function number(value, digits = 3) {
    return value === null ? "none" : String(Number(value.toPrecision(digits))).replace("-", "−");
  }

  function text(kind, head, body) {
    return make("div", { class: `text ${kind}` }, make("div", {}, ...head), make("pre", {}, body));
  }

  function answer(one) {
    const kind = one.reward === null ? "idle" : one.reward >= 1 ? "right" : one.reward <= 0 ? "wrong" : "idle";
    const mark = { right: "✓ ", wrong: "✗ ", idle: "" }[kind];
    const told = one.reward === null ? "ungraded" : `${mark}reward ${number(one.reward)}`;
    const finish = { stop: "ended by itself", length: "cut at the length limit" }[one.finish] ?? one.finish ?? "";
    const trained = one.weight ? `trains with weight ${number(one.weight)}` : "does not train";
    const advantage = one.advantage === null || !one.weight ? null : make("span", {}, `advantage ${number(one.advantage)}`);
    const length = make("span", {}, `${one.tokens.toLocaleString("en")} tokens`);
    const head = [make("b", { class: kind }, told), length, make("span", {}, finish), make("span", {}, trained), advantage];
    return text(kind, head.filter(Boolean), one.text);
  }

  function gate(prompt) {
    const solved = prompt.graded ? `${prompt.solved} of ${prompt.graded} answers right` : "no graded answer";
    const chosen = make("b", { style: `background:${payload.choices[prompt.choice].color}` }, payload.choices[prompt.choice].name);
    const weights = `α = ${number(prompt.rollout_weight)} on its answers, β = ${number(prompt.demonstration_weight)} on its demonstration`;
    return make("p", { class: "gate" }, `${solved} → the gate chose `, chosen, ` (${weights})`);
  }

  function demonstration(prompt, step) {
    if (prompt.demonstration === null) {
      return text("idle", [make("b", {}, "demonstration")], "(none in the ledger: it has those that trained)");
    }
    const where = prompt.demonstration_step === step ? "trains in this step" : `does not train here; as it trained in step ${prompt.demonstration_step}`;
    return text(prompt.demonstration_step === step ? "taught" : "idle", [make("b", {}, "demonstration"), make("span", {}, where)], prompt.demonstration);
  }

  function showPrompt() {
    const entry = payload.runs[run].answers.steps[at];
    const prompt = entry.prompts[asked];
    [...find("#prompts").children].forEach((tab, index) => tab.setAttribute("aria-selected", String(index === asked)));
    const shown = prompt.answers.length;
    const count = shown === prompt.recorded ? `${shown}` : `${shown} of ${prompt.recorded}`;
    const source = prompt.source ? [make("span", {}, prompt.source)] : [];
    find("#reading").replaceChildren(
      gate(prompt),
      make("div", { class: "pair" }, text("idle", [make("b", {}, `prompt ${prompt.prompt_id}`), ...source], prompt.text), demonstration(prompt, entry.step)),
      make("p", { class: "faint" }, shown ? `answers: ${count}, best first` : "nothing was generated for this prompt"),
      make("div", { class: "pair" }, ...prompt.answers.map(answer)),
    );
  }

  function showStep() {
    const entry = payload.runs[run].answers.steps[at];
    asked = Math.min(asked, entry.prompts.length - 1);
    find("#step").value = at;
    find("#at").value = `step ${entry.step}` + (entry.version === null ? "" : `, weights of version ${entry.version}`);
    find("#prompts").replaceChildren(...entry.prompts.map((prompt, index) => {
      const solved = prompt.graded ? ` · ${prompt.solved}/${prompt.graded}` : "";
      const tab = make("button", { role: "tab" }, `prompt ${prompt.prompt_id}${solved} · ${payload.choices[prompt.choice].name}`);
      tab.addEventListener("click", () => { asked = index; showPrompt(); });
      return tab;
    }));
    showPrompt();
  }

  function goTo(index) {
    at = Math.max(0, Math.min(index, payload.runs[run].answers.steps.length - 1));
    showStep();
  }

  function enterRun() {
    const { steps, notes: told } = payload.runs[run].answers;
    notes("#answers-notes", told);
    find("#stepper").hidden = !steps.length;
    if (!steps.length) {
      find("#prompts").replaceChildren();
      find("#reading").replaceChildren(make("p", { class: "empty" }, "no answers to read"));
      return;
    }
    find("#step").max = steps.length - 1;
    goTo(steps.length - 1);
  }

  // -- start

  find("#theme").addEventListener("change", () => {
    document.documentElement.dataset.theme = find("#theme").value;
    queue(redraw);
  });
  system.addEventListener("change", () => queue(redraw));
  for (const select of ["#axis", "#smooth"]) find(select).addEventListener("change", () => queue(redraw));
  find("#step").addEventListener("input", () => goTo(Number(find("#step").value)));
  find("#before").addEventListener("click", () => goTo(at - 1));
  find("#after").addEventListener("click", () => goTo(at + 1));
  runButtons();
  overview();
  choosers();
  enterRun();
  layOut("training", payload.training, "");
  layOut("evaluation", payload.evaluation, "Nothing was evaluated on held-out problems (evaluation.sets).");
  queue(redraw);
})();

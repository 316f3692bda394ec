// The runs: their buttons, facts and differences; and what starts everything.
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

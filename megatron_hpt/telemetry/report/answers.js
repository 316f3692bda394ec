// The answers: a step, a prompt of it, and what was answered.
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

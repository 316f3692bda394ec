// What all parts share: the payload, what is chosen, and making elements. Text of runs is only ever set as text, never as HTML.
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

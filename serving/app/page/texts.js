// Small helpers, and answers as text: finished words with their confidence, drafts with open slots.
// Everything from the server is set as text, never as HTML.

function make(name, attributes = {}, ...children) {
  const svgNames = ["svg", "path", "g", "circle", "text", "image", "rect", "line", "polyline"];
  const node = svgNames.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function sureness(confidence) {
  return confidence >= 0.9 ? 3 : confidence >= 0.7 ? 2 : confidence >= 0.5 ? 1 : 0;
}

// A slot that is still open, as wide as the text that will stand there, if that is known.
function slot(width = 2) {
  return make("span", { class: "pd-slot", style: `width:${width}ch`, "aria-hidden": "true" });
}

// The nodes of an answer; `pass` shows a finished answer as it stood after that pass.
function answerNodes(answer, pass = Infinity) {
  if (!answer) return [make("span", { class: "pd-none" }, "not captioned yet")];
  if (answer.pieces) {
    return answer.pieces.map((piece) => (piece === null ? slot() : document.createTextNode(piece)));
  }
  if (!answer.words.length) return [make("span", { class: "pd-none" }, "(the model says nothing)")];
  return answer.words.flatMap(([text, confidence, decided]) => {
    if (decided > pass) return [slot(text.length), " "];
    const word = make("button", {
      type: "button", tabindex: -1, class: `pd-word pd-sure-${sureness(confidence)}`, "aria-describedby": "pd-tip",
      "data-tip": `${percent(confidence)} sure, decided in pass ${decided}`,
    }, text);
    return [word, " "];
  });
}

// One tooltip for all words: by hover and by focus, gone with Escape.
function wireTip(bench) {
  const tip = bench.querySelector(".pd-tip");
  const show = (event) => {
    const word = event.target.closest?.("[data-tip]");
    if (!word) return;
    tip.textContent = word.dataset.tip;
    tip.hidden = false;
    const at = word.getBoundingClientRect(), origin = bench.getBoundingClientRect();
    const left = Math.min(at.left - origin.left, bench.clientWidth - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${at.top - origin.top - tip.offsetHeight - 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  bench.addEventListener("mouseover", show);
  bench.addEventListener("focusin", show);
  bench.addEventListener("mouseout", (event) => { if (event.target.closest?.("[data-tip]")) hide(); });
  bench.addEventListener("focusout", hide);
  bench.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

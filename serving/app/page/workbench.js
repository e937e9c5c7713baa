// The page's own part: wires the picture, the captions and the server. Runs once, with `element`, `props`, `trigger`,
// `watch` and `upload` of gradio's HTML component. The server sends views (view.py); the page sends what was done.

const bench = element.querySelector(".pd-bench");
const find = (selector) => bench.querySelector(selector);
const api = () => `${window.gradio_config?.root ?? ""}${window.gradio_config?.api_prefix ?? "/gradio_api"}`;
const url = (path) => `${api()}/file=${path.split("/").map(encodeURIComponent).join("/")}`;
let view = { image: null, regions: [], exchanges: [], busy: null, note: "", error: null };
let active = null;
let downloaded = null;

// --- what is done ---

function choose(number, scroll = false) {
  if (number === active) return;
  active = number;
  stage.activate(number);
  cards.activate(number, scroll);
}

function remove(number) {
  if (number !== null && view.regions.some((region) => region.number === number)) trigger("bench_remove", { number });
}

function mark(what) {
  setBusy("marking");
  trigger("bench_mark", { mark: { ...what, fit: find(".pd-fit").checked } });
}

async function openFile(file) {
  if (!file) return;
  setBusy("opening");
  try {
    const { path } = await upload(file);
    trigger("bench_open", { path, name: file.name });
  } catch (error) {
    setBusy(null);
    showError(`${file.name} could not be sent: ${error.message ?? error}`);
  }
}

function caption() {
  stage.addPainted();
  if (!find(".pd-caption").disabled) trigger("bench_caption");
}

const stage = makeStage(bench, { choose: (number) => choose(number, true), remove, mark });
const cards = makeCards(bench, { choose, remove, ask: (number) => {
  find(".pd-about").value = String(number);
  find(".pd-question").focus();
} });

// --- what is shown ---

const BUSY = { opening: "Opening…", marking: "Marking…", finding: "Looking for objects…", captioning: "Captioning…", asking: "Asking…" };

function setBusy(busy) {
  view.busy = busy;
  showStatus();
}

function showError(message) {
  find(".pd-error").textContent = message ?? "";
  find(".pd-error").hidden = !message;
}

function showStatus() {
  const isBusy = view.busy !== null, count = view.regions.length;
  bench.dataset.busy = view.busy ?? "";
  bench.setAttribute("aria-busy", isBusy);
  find(".pd-status").textContent = view.note || BUSY[view.busy] || "";
  find(".pd-caption").textContent = count === 1 ? "Caption 1 region" : count ? `Caption ${count} regions` : "Caption regions";
  find(".pd-caption").disabled = !view.image || !count || isBusy;
  find(".pd-stop").hidden = !["captioning", "asking"].includes(view.busy);
  find(".pd-everything").disabled = !view.image || isBusy;
  find(".pd-clear").disabled = !count || isBusy;
  find(".pd-ask button").disabled = !view.image || isBusy;
  find(".pd-exports").hidden = !view.regions.some((region) => region.caption?.words) || view.busy === "captioning";
}

function showQuestions() {
  const select = find(".pd-about"), chosen = select.value;
  select.replaceChildren(make("option", { value: "" }, "the whole picture"),
    ...view.regions.map((region) => make("option", { value: region.number }, `region ${region.number}`)));
  select.value = [...select.options].some((option) => option.value === chosen) ? chosen : "";
  find(".pd-answers").replaceChildren(...view.exchanges.map((exchange) => {
    const region = view.regions.find((one) => one.number === exchange.region);
    return make("li", { class: "pd-exchange", "data-number": exchange.region },
      make("p", { class: "pd-asked" }, region ? cards.chip(region) : make("span", { class: "pd-whole" }, "picture"), " ", exchange.question),
      make("p", { class: "pd-text" }, ...answerNodes(exchange.answer)));
  }));
}

// Drafts stay long enough to be seen, unless many wait already.
const SEEN = 90, MOST_WAITING = 6;  // milliseconds, drafts
const waiting = [];
let pause = null;

function take() {
  if (!props.value || typeof props.value !== "object") return;
  waiting.push(structuredClone(props.value));
  if (pause === null) next();
}

function next() {
  pause = null;
  while (waiting.length && pause === null) {
    render(waiting.shift());
    const isDraft = ["captioning", "asking"].includes(view.busy);
    if (isDraft && waiting.length < MOST_WAITING) pause = setTimeout(next, SEEN);
  }
}

function render(fresh) {
  view = fresh;
  bench.dataset.empty = String(!view.image);
  stage.render(view, url);
  cards.render(view);
  if (!view.regions.some((region) => region.number === active)) active = null;
  stage.activate(active);
  cards.activate(active, false);
  showQuestions();
  showError(view.error);
  showStatus();
  if (view.download && view.serial !== downloaded) {
    downloaded = view.serial;
    const link = make("a", { href: url(view.download.path), download: view.download.name });
    document.body.append(link);
    link.click();
    link.remove();
  }
}

// --- what the visitor touches ---

function setTool(name) {
  for (const button of bench.querySelectorAll(".pd-tool")) {
    const chosen = button.dataset.tool === name;
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  find(".pd-size-label").hidden = name !== "brush";
  find(".pd-fit-label").hidden = name !== "box";
  stage.setTool(name);
}

const tools = [...bench.querySelectorAll(".pd-tool")];
for (const [place, button] of tools.entries()) {
  button.addEventListener("click", () => setTool(button.dataset.tool));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const next = tools[(place + step + tools.length) % tools.length];
    setTool(next.dataset.tool);
    next.focus();
    event.preventDefault();
  });
}

for (const button of bench.querySelectorAll(".pd-choose")) button.addEventListener("click", () => find(".pd-file").click());
find(".pd-file").addEventListener("change", (event) => { openFile(event.target.files[0]); event.target.value = ""; });
find(".pd-stage").addEventListener("dragover", (event) => { event.preventDefault(); find(".pd-stage").classList.add("pd-over"); });
find(".pd-stage").addEventListener("dragleave", () => find(".pd-stage").classList.remove("pd-over"));
find(".pd-stage").addEventListener("drop", (event) => {
  event.preventDefault();
  find(".pd-stage").classList.remove("pd-over");
  openFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file && element.isConnected) openFile(file);
});
find(".pd-everything").addEventListener("click", () => { setBusy("finding"); trigger("bench_everything"); });
find(".pd-clear").addEventListener("click", () => trigger("bench_clear"));
find(".pd-caption").addEventListener("click", caption);
find(".pd-stop").addEventListener("click", () => trigger("bench_stop"));
find(".pd-ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const about = find(".pd-about").value;
  trigger("bench_ask", { question: find(".pd-question").value, region: about ? Number(about) : null });
});
find(".pd-exports").addEventListener("click", (event) => {
  const kind = event.target.dataset.export;
  if (kind) trigger("bench_export", { kind });
});
find(".pd-answers").addEventListener("mouseover", (event) => choose(Number(event.target.closest("[data-number]")?.dataset.number) || null));
cards.slider.addEventListener("input", () => cards.render(view));
bench.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { caption(); event.preventDefault(); return; }
  if (event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const tool = { b: "box", p: "point", r: "brush" }[event.key.toLowerCase()];
  if (tool) setTool(tool);
});
for (const example of props.examples ?? []) {
  const button = make("button", { type: "button", class: "pd-example" },
    make("img", { src: example.thumbnail, alt: "" }), make("span", {}, example.title));
  button.addEventListener("click", () => { setBusy("opening"); trigger("bench_example", { name: example.name }); });
  find(".pd-examples").append(button);
}
wireTip(bench);
watch("value", take);
showStatus();
take();

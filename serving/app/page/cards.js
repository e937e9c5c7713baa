// The list of captions: a card per region in its colour, its words, and what can be done with it.

function makeCards(bench, { choose, remove, ask }) {
  const list = bench.querySelector(".pd-cards");
  const replay = bench.querySelector(".pd-replay");
  const slider = replay.querySelector("input");
  let regions = [];

  function chip(region) {
    return make("span", { class: "pd-chip", style: `background:${region.color};color:${region.ink}` }, region.number);
  }

  function card(region) {
    const score = region.caption?.score;
    const head = make("div", { class: "pd-card-head" }, chip(region),
      make("span", { class: "pd-source" }, region.label ? `${region.label} (${region.source})` : region.source),
      make("span", { class: "pd-score" }, score == null ? "" : `${percent(score)} sure`),
      make("button", { type: "button", class: "pd-small pd-ask-about", "aria-label": `Ask about region ${region.number}` }, "Ask"),
      make("button", { type: "button", class: "pd-small pd-remove", "aria-label": `Remove region ${region.number}` }, "Remove"));
    const text = make("p", { class: "pd-text" }, ...answerNodes(region.caption, passShown()));
    return make("li", { class: "pd-card", tabindex: 0, "data-number": region.number, style: `--region:${region.color}`,
      "aria-label": `Region ${region.number}` }, head, text);
  }

  function passShown() {
    return Number(slider.value) >= Number(slider.max) ? Infinity : Number(slider.value);
  }

  // Cards are replaced one by one where they changed, so that focus and hover survive drafts.
  function render(view) {
    const finished = view.regions.filter((region) => region.caption?.words);
    const passes = Math.max(0, ...finished.map((region) => region.caption.passes));
    const isRunning = view.busy === "captioning";
    replay.hidden = isRunning || passes < 2;
    if (isRunning || Number(slider.max) !== passes) {
      slider.max = Math.max(1, passes);
      slider.value = slider.max;
    }
    regions = view.regions;
    const kept = new Map([...list.children].map((node) => [node.dataset.number, node]));
    const wanted = regions.map((region) => {
      const content = JSON.stringify([region.number, region.caption, region.color, passShown()]);
      const old = kept.get(String(region.number));
      if (old?.content === content) return old;
      const fresh = card(region);
      fresh.content = content;
      fresh.hadFocus = old?.contains(document.activeElement);
      fresh.classList.toggle("pd-active", Boolean(old?.classList.contains("pd-active")));
      return fresh;
    });
    list.replaceChildren(...wanted);
    wanted.find((node) => node.hadFocus)?.focus();
    replay.querySelector("output").textContent = `pass ${slider.value} of ${slider.max}`;
    bench.querySelector(".pd-legend").hidden = !finished.length;
  }

  function activate(number, scroll) {
    for (const node of list.children) {
      const active = Number(node.dataset.number) === number;
      node.classList.toggle("pd-active", active);
      if (active && scroll) node.scrollIntoView({ block: "nearest" });
    }
  }

  const numberAt = (event) => Number(event.target.closest(".pd-card")?.dataset.number) || null;
  list.addEventListener("mouseover", (event) => choose(numberAt(event)));
  list.addEventListener("mouseleave", () => choose(null));
  list.addEventListener("focusin", (event) => choose(numberAt(event)));
  list.addEventListener("click", (event) => {
    const number = numberAt(event);
    if (event.target.closest(".pd-remove")) remove(number);
    else if (event.target.closest(".pd-ask-about")) ask(number);
  });
  list.addEventListener("keydown", (event) => {
    const node = event.target.closest(".pd-card");
    if (!node) return;
    if (event.key === "Delete") remove(Number(node.dataset.number));
    if (event.key === "Escape") node.focus();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.matches(".pd-card, .pd-word")) return;
    const words = [...node.querySelectorAll(".pd-word")];
    const place = words.indexOf(event.target);
    words[Math.min(Math.max(place + step, 0), words.length - 1)]?.focus();
    event.preventDefault();
  });
  return { render, activate, chip, slider };
}

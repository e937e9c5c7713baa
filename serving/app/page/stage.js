// The picture with its regions, and marking: boxes, points and strokes by pointer and by keyboard, in image pixels.

function makeStage(bench, { choose, remove, mark }) {
  const svg = bench.querySelector(".pd-svg");
  const painted = bench.querySelector(".pd-painted");
  const layers = { picture: make("image"), regions: make("g"), badges: make("g"), pending: make("g"), cross: make("g") };
  svg.append(...Object.values(layers));
  const state = { image: null, regions: [], tool: "box", cross: null, corner: null, stroke: null, strokes: [], down: null };

  // --- geometry ---

  function pixelsPerImagePixel() {
    return (svg.clientWidth || 1) / (state.image?.width || 1);
  }

  function pointOf(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [Math.min(Math.max(at.x, 0), state.image.width), Math.min(Math.max(at.y, 0), state.image.height)];
  }

  function radius() {  // of the brush, in image pixels: the slider says hundredths of a fifth of the picture
    const share = Number(bench.querySelector(".pd-size").value) / 100;
    return Math.max(1, share * share * 0.2 * Math.max(state.image.width, state.image.height));
  }

  // --- drawing ---

  function drawRegions() {
    const largestFirst = [...state.regions].sort((a, b) => area(b.box) - area(a.box));
    layers.regions.replaceChildren(...largestFirst.map((region) => make("path", {
      d: region.outline, "fill-rule": "evenodd", class: "pd-region", "data-number": region.number,
      style: `--region:${region.color}`,
    })));
    const size = 11 / pixelsPerImagePixel();
    layers.badges.replaceChildren(...state.regions.map((region) => {
      const [x, y] = region.anchor;
      return make("g", { class: "pd-badge", "data-number": region.number },
        make("circle", { cx: x, cy: y, r: size, fill: region.color }),
        make("text", { x, y, fill: region.ink, "font-size": size * 1.25, "text-anchor": "middle", dy: "0.35em" }, region.number));
    }));
  }

  function area([x0, y0, x1, y1]) {
    return (x1 - x0) * (y1 - y0);
  }

  function drawPending() {
    const nodes = state.strokes.concat(state.stroke ? [state.stroke] : []).map((stroke) => make("polyline", {
      points: stroke.concat(stroke.length === 1 ? [stroke[0]] : []).map((point) => point.join(",")).join(" "),
      class: "pd-stroke", "stroke-width": 2 * radius(),
    }));
    if (state.corner && state.cross) {
      const [xa, ya] = state.corner, [xb, yb] = state.cross;
      nodes.push(make("rect", { x: Math.min(xa, xb), y: Math.min(ya, yb), width: Math.abs(xa - xb),
        height: Math.abs(ya - yb), class: "pd-box" }));
    }
    layers.pending.replaceChildren(...nodes);
    painted.hidden = !state.strokes.length || Boolean(state.stroke);
    const { width, height } = state.image ?? { width: 0, height: 0 };
    const isShown = state.cross && svg.classList.contains("pd-by-keys");
    layers.cross.replaceChildren(...(isShown ? [
      make("line", { x1: 0, x2: width, y1: state.cross[1], y2: state.cross[1], class: "pd-cross" }),
      make("line", { y1: 0, y2: height, x1: state.cross[0], x2: state.cross[0], class: "pd-cross" })] : []));
  }

  function render(view, url) {
    const changed = view.image?.path !== state.image?.path;
    state.image = view.image;
    state.regions = view.regions;
    svg.toggleAttribute("hidden", !view.image);
    if (changed) {
      cancel();
      state.cross = null;
    }
    if (!view.image) return;
    if (changed) {
      const { width, height } = view.image;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.style.setProperty("--ratio", width / height);
      for (const [key, value] of Object.entries({ href: url(view.image.path), width, height })) {
        layers.picture.setAttribute(key, value);
      }
    }
    const content = JSON.stringify(view.regions.map((region) => [region.number, region.outline]));
    if (content !== layers.regions.content || changed) {
      layers.regions.content = content;
      drawRegions();
    }
    drawPending();
  }

  function activate(number) {
    svg.classList.toggle("pd-some-active", number !== null);
    for (const node of svg.querySelectorAll("[data-number]")) {
      node.classList.toggle("pd-active", Number(node.dataset.number) === number);
    }
  }

  // --- marking ---

  function cancel() {
    Object.assign(state, { corner: null, stroke: null, strokes: [], down: null });
    drawPending();
  }

  function setTool(tool) {
    if (state.strokes.length) addPainted();
    cancel();
    state.tool = tool;
    svg.dataset.tool = tool;
  }

  function addPainted() {
    if (!state.strokes.length) return;
    mark({ kind: "brush", strokes: state.strokes, radius: radius() });
    cancel();
  }

  function addBox([xa, ya], [xb, yb]) {
    cancel();
    if (Math.abs(xa - xb) < 2 || Math.abs(ya - yb) < 2) return;
    mark({ kind: "box", box: [xa, ya, xb, yb] });
  }

  function endStroke() {
    if (state.stroke) state.strokes.push(state.stroke);
    state.stroke = null;
    drawPending();
  }

  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !state.image) return;
    svg.setPointerCapture(event.pointerId);
    svg.classList.remove("pd-by-keys");
    state.down = state.cross = pointOf(event);
    if (state.tool === "box") state.corner = state.down;
    if (state.tool === "brush") state.stroke = [state.down];
    drawPending();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!state.image) return;
    if (!state.down) {
      choose(Number(event.target.closest("[data-number]")?.dataset.number) || null);
      return;
    }
    state.cross = pointOf(event);
    if (state.stroke) state.stroke.push(state.cross);
    drawPending();
  });
  svg.addEventListener("pointerleave", () => { if (!state.down) choose(null); });
  svg.addEventListener("pointercancel", cancel);
  svg.addEventListener("pointerup", (event) => {
    if (!state.down) return;
    const [start, end] = [state.down, pointOf(event)];
    state.down = null;
    if (state.tool === "brush") endStroke();
    else if (state.tool === "point") mark({ kind: "point", point: end });
    else addBox(start, end);
  });

  function enter() {
    if (state.tool === "point") mark({ kind: "point", point: state.cross });
    else if (state.tool === "brush") state.stroke ? endStroke() : (state.stroke = [state.cross]);
    else if (state.corner) addBox(state.corner, state.cross);
    else state.corner = state.cross;
    drawPending();
  }

  svg.addEventListener("keydown", (event) => {
    if (!state.image || event.ctrlKey || event.metaKey) return;
    const { width, height } = state.image;
    state.cross ??= [width / 2, height / 2];
    const step = Math.max(width, height) / (event.shiftKey ? 10 : 100);
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (move) {
      state.cross = [Math.min(Math.max(state.cross[0] + move[0], 0), width), Math.min(Math.max(state.cross[1] + move[1], 0), height)];
      if (state.stroke) state.stroke.push(state.cross);
      choose(numberUnder(state.cross));
    } else if (event.key === "Enter" || event.key === " ") enter();
    else if (event.key === "Escape") cancel();
    else if (event.key === "Delete") remove(numberUnder(state.cross));
    else return;
    svg.classList.add("pd-by-keys");
    event.preventDefault();
    drawPending();
  });
  svg.addEventListener("blur", () => { svg.classList.remove("pd-by-keys"); drawPending(); });

  // The smallest region under a point, as it is drawn last.
  function numberUnder([x, y]) {
    const at = new DOMPoint(x, y);
    const hit = [...layers.regions.children].reverse().find((path) => path.isPointInFill(at));
    return hit ? Number(hit.dataset.number) : null;
  }

  painted.querySelector(".pd-paint-add").addEventListener("click", addPainted);
  painted.querySelector(".pd-paint-undo").addEventListener("click", () => { state.strokes.pop(); drawPending(); });
  bench.querySelector(".pd-size").addEventListener("input", () => { if (state.image) drawPending(); });
  new ResizeObserver(() => { if (state.image) { drawRegions(); drawPending(); } }).observe(svg);
  setTool("box");
  return { render, activate, setTool, addPainted };
}

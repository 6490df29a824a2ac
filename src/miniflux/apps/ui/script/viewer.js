/* A picture as large as the window: Escape closes it, arrows and swipes go through the history. */

(() => {
  "use strict";
  const {make, button, state, parts} = miniflux;

  const SWIPE = 50; // pixels

  function build() {
    const view = {};
    view.image = make("img", {class: "mf-large", alt: ""});
    view.words = make("p", {class: "mf-large-words", dir: "auto"});
    view.newer = button("‹", () => step(-1), {class: "mf-button mf-newer", "aria-label": "Newer picture (left arrow)"});
    view.older = button("›", () => step(1), {class: "mf-button mf-older", "aria-label": "Older picture (right arrow)"});
    view.frame = make("div", {class: "mf-frame"}, view.image);
    const close = button("✕", () => parts.viewer.close(), {class: "mf-button mf-shut", "aria-label": "Close (Escape)"});
    const dialog = make("dialog", {class: "mf-viewer", "aria-label": "Enlarged picture", tabindex: -1}, view.frame, view.newer, view.older, close, view.words);
    dialog.view = view;
    document.addEventListener("keydown", (event) => {
      if (!dialog.open) return;
      const by = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
      if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); step(by); }
    });
    dialog.addEventListener("click", (event) => { // beside the picture: away with it; on it: every pixel, or all of it
      if (event.target === view.image) view.frame.classList.toggle("mf-actual");
      else if (event.target === dialog || event.target === view.frame) dialog.close();
    });
    let from = null;
    dialog.addEventListener("touchstart", (event) => { from = event.touches.length === 1 ? event.touches[0].clientX : null; }, {passive: true});
    dialog.addEventListener("touchend", (event) => {
      const by = from == null ? 0 : event.changedTouches[0].clientX - from;
      if (Math.abs(by) > SWIPE && !view.frame.classList.contains("mf-actual") && (visualViewport?.scale ?? 1) < 1.05) step(by > 0 ? -1 : 1);
    }, {passive: true});
    dialog.addEventListener("close", () => { document.documentElement.classList.remove("mf-still"); back(); });
    document.querySelector("#mf-page").append(dialog); // where the page's styles reach it
    return dialog;
  }

  const back = () => parts.stage?.enlarge.focus({preventScroll: true});
  const listed = () => state.entries.filter((entry) => !state.gone.has(entry.id));

  /** Go to another picture; at the ends nothing happens. */
  function step(by) {
    const entries = listed(), at = entries.findIndex((entry) => entry.id === state.chosen);
    const next = miniflux.shown().running ? entries[0] : entries[at + by];
    if (next) miniflux.choose(next.id);
  }

  function enlarge() {
    parts.viewer ??= build();
    parts.viewer.view.frame.classList.remove("mf-actual");
    document.documentElement.classList.add("mf-still"); // what is behind does not scroll
    parts.viewer.showModal();
    parts.viewer.focus(); // not its first button
    drawViewer();
  }

  function drawViewer() {
    if (!parts.viewer?.open) return;
    const view = parts.viewer.view, {running, entry, source, alt} = miniflux.shown();
    if (!source) { parts.viewer.close(); return; }
    const entries = listed(), at = entries.findIndex((one) => one.id === state.chosen);
    if (view.image.getAttribute("src") !== source) view.image.src = source;
    view.image.alt = alt;
    view.words.textContent = running ? running.title : `${entry.caption || "(no prompt)"}\n${entry.line}`;
    view.newer.setAttribute("aria-disabled", Boolean(running) || at <= 0); // not disabled: the keyboard would lose its place
    view.older.setAttribute("aria-disabled", !running && at >= entries.length - 1);
  }

  Object.assign(miniflux, {enlarge, drawViewer});
})();

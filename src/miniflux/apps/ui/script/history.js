/* The history: pictures to choose from, newest first; on a phone one row of them, or all. */

(() => {
  "use strict";
  const {make, button, state, parts} = miniflux;

  function history(element) {
    const all = button("Show all", () => {
      const open = element.classList.toggle("mf-all");
      all.textContent = open ? "Show fewer" : "Show all";
      all.setAttribute("aria-expanded", open);
    }, {class: "mf-button mf-more-tiles", id: "mf-show-all", "aria-expanded": false});
    const view = parts.history = {
      list: make("div", {class: "mf-tiles", role: "list", "aria-label": "Pictures of this session, newest first"}),
      note: make("p", {class: "mf-note"}),
      zip: make("a", {class: "mf-button", id: "mf-download-all", href: "studio/pictures.zip", download: "miniflux.zip",
        title: "All pictures of the history with their settings, as one file"}, "Download all"),
      all,
    };
    element.replaceChildren(make("div", {class: "mf-history-head"},
      make("div", {}, make("h2", {class: "mf-heading"}, "History"), view.note), all, view.zip), view.list);
    drawHistory();
  }

  function tileOf(entry) {
    const image = make("img", {src: entry.url, alt: "", loading: "lazy", decoding: "async"});
    const pick = make("button", {type: "button", class: "mf-tile", title: entry.caption,
      "aria-label": `Show: ${entry.caption.slice(0, 120) || "a picture without prompt"}, ${entry.line}`,
      onclick: () => { miniflux.choose(entry.id); parts.stage?.image.scrollIntoView({block: "nearest"}); }},
      image, make("span", {class: "mf-words", dir: "auto"}, entry.caption || "(no prompt)"), make("span", {class: "mf-line"}, entry.line),
      entry.cached ? make("span", {class: "mf-badge"}, "cached") : null);
    const tile = make("div", {role: "listitem"}, pick);
    tile.dataset.id = entry.id;
    return tile;
  }

  function drawHistory() {
    const view = parts.history;
    if (!view) return;
    const tiles = new Map([...view.list.children].map((tile) => [tile.dataset.id, tile]));
    const entries = state.entries.filter((entry) => !state.gone.has(entry.id));
    view.note.textContent = entries.length
      ? "Only this browser sees them. They stay when the page is loaded again."
      : "Nothing drawn yet. What you draw stays here when the page is loaded again.";
    view.zip.hidden = view.all.hidden = !entries.length;
    let place = view.list.firstChild;
    for (const entry of entries) {
      const tile = tiles.get(entry.id) ?? tileOf(entry);
      tiles.delete(entry.id);
      tile.firstChild.toggleAttribute("aria-current", entry.id === state.chosen);
      if (tile !== place) view.list.insertBefore(tile, place);
      else place = place.nextSibling;
    }
    for (const tile of tiles.values()) tile.remove();
  }

  Object.assign(miniflux, {history, drawHistory});
})();

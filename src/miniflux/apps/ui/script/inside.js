/* Looking inside: words of a picture and their maps, by steps and blocks; what a patch looks at. */

(() => {
  "use strict";
  const {make, button, state, parts} = miniflux;
  const STEPS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;

  function inside(element, props, tell, watch) {
    const note = make("p", {class: "mf-note", id: "mf-inside-note", role: "status"});
    const body = make("div", {class: "mf-inside-body"});
    const start = button("Look inside", () => {
      if (!miniflux.there()) return;
      if (state.chosen) tell.look({id: state.chosen});
      else miniflux.say({kind: "error", text: "There is no picture yet: draw one, or choose one of the history."});
    }, {id: "mf-look"});
    let waits = null, news = 0, seen = {};

    /** Ask for another map of the same picture. */
    function ask(what) {
      if (!miniflux.there()) return;
      const {id, word, step, block} = seen, at = seen.patch ? middle(seen.patch.box) : null;
      tell.view({id, word, step, block, at, ...what});
    }

    const middle = ([left, top, width, height]) => [left + width / 2, top + height / 2].map((x) => Math.min(Math.max(x, 0), 1));

    function learned() {
      if (!waits) return;
      news = state.jobs.some((job) => job.id === waits.waits) ? 0 : news + 1;
      if (news < 2) { if (news) miniflux.ask(); return; } // the first may be from before it was in line
      const {id} = waits;
      waits = null;
      tell.view({id, waited: true});
    }

    function strip(kind, all, items, chosen) {
      const one = (name, label) => button("", () => ask({[kind]: name}), {class: "mf-cell", "aria-pressed": String(name === chosen), "aria-label": label,
        "data-kind": kind, "data-name": name ?? ""});
      const cells = items.map(({name, label, map}) => {
        const cell = one(name, label);
        cell.append(make("img", {src: map, alt: ""}), make("span", {}, label));
        return cell;
      });
      const every = one(null, all);
      every.append(make("span", {}, all));
      return make("div", {class: "mf-strip", role: "group", "aria-label": `By ${kind}`}, every, ...cells);
    }

    function figureOf(value) {
      const image = make("img", {src: value.map, alt: `Map of ${value.word}`});
      const pick = make("button", {type: "button", class: "mf-map", id: "mf-map", "aria-label": `Map of ${value.word}: click a patch to see what it looks at; arrows go to the next one`}, image);
      pick.addEventListener("click", (event) => {
        const box = image.getBoundingClientRect();
        const key = event.detail === 0; // by the keyboard: the middle
        ask({at: key ? [0.5, 0.5] : [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height].map((x) => Math.min(Math.max(x, 0), 1))});
      });
      pick.addEventListener("keydown", (event) => {
        const way = STEPS[event.key];
        if (!way || !seen.patch) return;
        event.preventDefault();
        const [, , width, height] = seen.patch.box, [x, y] = middle(seen.patch.box);
        const at = [x + way[0] * width, y + way[1] * height];
        if (at.every((share) => share >= 0 && share <= 1)) ask({at});
      });
      const which = [value.step == null ? "mean over all steps" : `step ${value.step}`, value.block == null ? "all blocks" : value.block].join(", ");
      return make("figure", {class: "mf-looked"}, pick, make("figcaption", {class: "mf-note"}, `How much each patch looks at \u201c${value.word}\u201d: ${which}. Click a patch.`));
    }

    function patchOf(patch) {
      if (!patch) return null;
      const where = `The patch in row ${patch.row + 1}, column ${patch.column + 1}`;
      const rows = [...patch.words, ...patch.rest].map(([name, share], i) => make("tr", {class: i < patch.words.length ? "" : "mf-other"},
        make("th", {scope: "row", dir: "auto"}, name), make("td", {}, percent(share))));
      return make("figure", {class: "mf-looked", id: "mf-patch"},
        patch.map ? make("img", {src: patch.map, alt: `${where}: what it looks at`}) : make("p", {class: "mf-note"}, "The picture is too large to keep what each of its patches looks at."),
        make("figcaption", {class: "mf-note"}, `${where} looks at this (mean over all steps and blocks), and at:`),
        make("table", {class: "mf-shares"}, make("tbody", {}, ...rows)));
    }

    function draw() {
      const value = props.value ?? {};
      if (value.waits) {
        if (waits?.waits === value.waits) return;
        waits = value;
        news = 0;
        note.textContent = "The picture is drawn once more, to see what happens inside.";
        miniflux.ask();
        return;
      }
      seen = value;
      if (!value.words) {
        note.textContent = "Draws the chosen picture once more and shows where its words are: by step, by block, and what each patch looks at.";
        body.replaceChildren();
        return;
      }
      const focused = body.contains(document.activeElement) ? document.activeElement : null;
      const again = focused && (focused.id ? `#${focused.id}` : `[data-kind="${focused.dataset.kind}"][data-name="${CSS.escape(focused.dataset.name)}"]`);
      note.textContent = value.about;
      const words = value.words.map((word) => button(word, () => ask({word}), {class: "mf-button mf-word", "aria-pressed": String(word === value.word), dir: "auto",
        "data-kind": "word", "data-name": word}));
      const patch = patchOf(value.patch);
      body.replaceChildren(
        make("p", {class: "mf-caption", dir: "auto"}, value.caption),
        make("div", {class: "mf-word-row", role: "group", "aria-label": "Words"}, ...words),
        make("div", {class: "mf-looks"}, figureOf(value), ...(patch ? [patch] : [])),
        strip("step", "all steps", value.steps, value.step),
        strip("block", "all blocks", value.blocks, value.block));
      if (again) body.querySelector(again)?.focus();
    }

    parts.inside = {learned};
    element.replaceChildren(make("div", {class: "mf-actions"}, start), note, body);
    watch("value", draw);
    draw();
  }

  Object.assign(miniflux, {inside});
})();

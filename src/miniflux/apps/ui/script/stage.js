/* The stage: the picture, its settings, what can be done with it, and the line. */

(() => {
  "use strict";
  const {make, button, state, parts} = miniflux;

  function seconds(left) {
    if (left == null) return "no estimate yet";
    if (left < 10) return `${Math.max(left, 0.1).toFixed(1)} s left`;
    return left < 120 ? `${Math.round(left)} s left` : `${Math.round(left / 60)} min left`;
  }

  function stage(element, props, tell, watch) {
    // Nothing is told to a server that is not there: Gradio would wait for it.
    const told = Object.fromEntries(Object.entries(tell).map(([name, act]) => [name, (what) => { if (miniflux.there()) act(what); }]));
    const view = parts.stage = {tell: told, shown: null};
    view.image = make("img", {class: "mf-image", alt: "", hidden: true});
    view.enlarge = button("", () => miniflux.enlarge(), {class: "mf-enlarge", id: "mf-enlarge", "aria-label": "Enlarge the picture", title: "Enlarge", hidden: true});
    view.enlarge.append(view.image);
    view.empty = make("p", {class: "mf-empty"}, "Your pictures appear here.");
    view.bar = make("progress", {class: "mf-bar", max: 1, value: 0, "aria-label": "steps done", hidden: true});
    view.jobs = make("ol", {class: "mf-jobs", "aria-label": "In line"});
    view.about = make("section", {class: "mf-about", "aria-label": "About this picture", hidden: true});
    element.replaceChildren(make("figure", {class: "mf-figure"}, view.enlarge, view.empty, view.bar), view.jobs, view.about);
    watch("value", () => { miniflux.say(props.value); miniflux.ask(); });
    miniflux.say(props.value);
    drawStage();
    miniflux.ask();
  }

  /** What is to be seen: the picture being drawn, unless another one was chosen meanwhile. */
  function shown() {
    const running = state.live ? state.jobs.find((job) => job.state === "running" && job.preview) : null;
    const entry = state.entries.find((one) => one.id === state.chosen);
    return {running, entry, source: running?.preview ?? entry?.url ?? null,
      alt: running ? "Preview of the picture being drawn" : entry ? entry.caption || "A picture without prompt" : ""};
  }

  function drawStage() {
    const view = parts.stage;
    if (!view) return;
    const {running, entry, source, alt} = shown();
    const works = state.jobs.find((job) => job.state === "running");
    view.image.hidden = view.enlarge.hidden = !source;
    view.empty.hidden = Boolean(source);
    view.empty.textContent = state.jobs.length ? "" : "Your pictures appear here.";
    if (source && view.image.getAttribute("src") !== source) view.image.src = source;
    view.image.classList.toggle("mf-rough", Boolean(running));
    view.image.alt = alt;
    view.bar.hidden = !works;
    if (works) { view.bar.max = works.steps; view.bar.value = works.done; }
    drawJobs(view);
    if (view.shown !== (entry?.id ?? null)) drawAbout(view, entry);
    miniflux.drawViewer?.();
  }

  function drawJobs(view) {
    const rows = new Map([...view.jobs.children].map((row) => [row.dataset.id, row]));
    for (const job of state.jobs) {
      let row = rows.get(job.id);
      rows.delete(job.id);
      if (!row) {
        row = make("li", {class: "mf-job"},
          make("span", {class: "mf-job-what"}, job.title), make("span", {class: "mf-job-where"}),
          button("Cancel", () => parts.stage.tell.cancel({id: job.id}), {class: "mf-button mf-cancel"}));
        row.dataset.id = job.id;
        row.lastChild.setAttribute("aria-label", `Cancel: ${job.title.slice(0, 80)}`);
      }
      const where = job.state === "running"
        ? `step ${job.done} of ${job.steps} · ${seconds(job.left)}`
        : `place ${job.place} in line · ${seconds(job.left)}`;
      if (row.children[1].textContent !== where) row.children[1].textContent = where;
      if (!row.isConnected) view.jobs.append(row);
    }
    for (const row of rows.values()) {
      const focused = row.contains(document.activeElement);
      row.remove();
      if (focused) (view.jobs.querySelector("button") ?? parts.message).focus(); // the keyboard stays where it was
    }
    view.jobs.hidden = !state.jobs.length;
  }

  function remove(entry) {
    if (!miniflux.there() || state.gone.has(entry.id)) return; // pressed twice
    state.gone.add(entry.id);
    parts.stage.tell.remove({id: entry.id});
    const left = state.entries.filter((one) => one.id === entry.id || !state.gone.has(one.id)), at = left.findIndex((one) => one.id === entry.id);
    miniflux.choose((left[at + 1] ?? left[at - 1])?.id ?? null); // the next one, not the newest
  }

  async function drawAbout(view, entry) {
    view.shown = entry?.id ?? null;
    view.about.hidden = !entry;
    if (!entry) return;
    const id = entry.id, act = (name) => () => parts.stage.tell[name]({id});
    const facts = make("dl", {class: "mf-facts"});
    const focused = view.about.contains(document.activeElement) ? document.activeElement.id : "";
    view.about.replaceChildren(
      make("p", {class: "mf-caption", dir: "auto"}, entry.caption || "(no prompt)"),
      make("div", {class: "mf-badges"},
        entry.cached ? make("span", {class: "mf-badge", title: "Drawn before with the same settings, answered at once"}, "from the cache") : null,
        entry.title ? make("span", {class: "mf-badge"}, entry.title) : null),
      make("div", {class: "mf-actions"},
        button("Use these settings", act("use"), {id: "mf-use"}),
        button("Same with another seed", act("again"), {id: "mf-again"}),
        make("a", {class: "mf-button", id: "mf-download", href: `${entry.url}?download=1`, download: `miniflux-${id.slice(0, 8)}.png`}, "Download"),
        make("a", {class: "mf-button", id: "mf-bare", href: `${entry.url}?download=1&bare=1`, download: `miniflux-${id.slice(0, 8)}.png`, title: "The picture alone: nobody can read from it how it was made"}, "Without settings"),
        button("Delete", () => remove(entry), {id: "mf-remove"})),
      make("details", {class: "mf-details"}, make("summary", {}, "Settings"), facts));
    if (focused) document.getElementById(focused)?.focus();
    try {
      const reply = await fetch(`studio/about/${id}`);
      if (!reply.ok || view.shown !== id) return;
      for (const [name, value] of await reply.json()) facts.append(make("dt", {}, name), make("dd", {dir: "auto"}, value));
    } catch (error) {
      // gone meanwhile; the next state says so
    }
  }

  Object.assign(miniflux, {stage, drawStage, shown});
})();

/* What the page draws itself: the stage, the history and the list of LoRAs. Every text goes in as text, never as markup.

   Gradio calls the three functions when it mounts their elements; each is given its element, its properties and how to
   tell the server. Everything else comes from GET studio/state, asked often while something is being drawn. */

window.miniflux ??= (() => {
  "use strict";

  const QUICK = 90, SLOW = 1500; // milliseconds between two questions: while we draw, while nothing happens in view
  const state = {jobs: [], entries: [], mark: "", chosen: null, newest: null};
  const parts = {};
  let timer = null, asking = false, again = false;

  /** An element with attributes and children; strings become text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child != null));
    return element;
  }

  const button = (text, act, attributes = {}) =>
    make("button", {type: "button", class: "mf-button", onclick: act, ...attributes}, text);

  function seconds(left) {
    if (left == null) return "no estimate yet";
    if (left < 10) return `${Math.max(left, 0.1).toFixed(1)} s left`;
    return left < 120 ? `${Math.round(left)} s left` : `${Math.round(left / 60)} min left`;
  }

  // What the server knows

  async function ask() {
    if (asking) { again = true; return; }
    asking = true;
    clearTimeout(timer);
    try {
      const running = state.jobs.find((job) => job.state === "running");
      const seen = running ? `${running.id}:${running.done}` : "";
      const reply = await fetch(`studio/state?mark=${encodeURIComponent(state.mark)}&seen=${encodeURIComponent(seen)}`);
      if (reply.ok) learn(await reply.json());
    } catch (error) {
      // the server is away; the next question may find it
    }
    asking = false;
    const wait = state.jobs.length ? QUICK : SLOW;
    if (again || state.jobs.length || !document.hidden) timer = setTimeout(ask, again ? 0 : wait);
    again = false;
  }

  function learn(news) {
    const before = state.jobs.find((job) => job.state === "running");
    for (const job of news.jobs) if (before && before.id === job.id) job.preview ??= before.preview;
    state.jobs = news.jobs;
    for (const end of news.ended) {
      if (end.state === "failed") say({kind: "error", text: end.error});
      else if (end.state === "cancelled") say({kind: "info", text: "Stopped. Everything else is as it was."});
    }
    if (news.entries) {
      state.entries = news.entries;
      state.mark = news.mark;
      const newest = state.entries[0]?.id ?? null;
      if (newest !== state.newest || !state.entries.some((entry) => entry.id === state.chosen)) state.chosen = newest;
      state.newest = newest;
      drawHistory();
    }
    drawStage();
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });

  // The stage: the picture, its settings, what can be done with it, and the line

  function stage(element, props, tell, watch) {
    const view = parts.stage = {tell, shown: null};
    view.image = make("img", {class: "mf-image", alt: "", hidden: true});
    view.empty = make("p", {class: "mf-empty"}, "Your pictures appear here.");
    view.bar = make("progress", {class: "mf-bar", max: 1, value: 0, "aria-label": "steps done", hidden: true});
    view.message = make("p", {class: "mf-message", role: "status", "aria-live": "polite", tabindex: -1, hidden: true});
    view.jobs = make("ol", {class: "mf-jobs", "aria-label": "In line"});
    view.about = make("section", {class: "mf-about", "aria-label": "About this picture", hidden: true});
    element.replaceChildren(
      view.message,
      make("figure", {class: "mf-figure"}, view.image, view.empty, view.bar), view.jobs, view.about,
    );
    watch("value", () => { say(props.value); ask(); });
    say(props.value);
    drawStage();
    ask();
  }

  function say(message) {
    const view = parts.stage;
    if (!view || !message) return;
    view.message.hidden = !message.text;
    view.message.className = `mf-message mf-${message.kind}`;
    view.message.textContent = message.text ?? "";
  }

  function drawStage() {
    const view = parts.stage;
    if (!view) return;
    const running = state.jobs.find((job) => job.state === "running");
    const entry = state.entries.find((one) => one.id === state.chosen);
    const source = running?.preview ?? (entry ? entry.url : null);
    view.image.hidden = !source;
    view.empty.hidden = Boolean(source);
    view.empty.textContent = state.jobs.length ? "" : "Your pictures appear here.";
    if (source && view.image.getAttribute("src") !== source) view.image.src = source;
    view.image.classList.toggle("mf-rough", Boolean(running?.preview));
    view.image.alt = running ? "Preview of the picture being drawn" : entry ? entry.caption || "A picture without prompt" : "";
    view.bar.hidden = !running;
    if (running) { view.bar.max = running.steps; view.bar.value = running.done; }
    drawJobs(view);
    if (view.shown !== (entry?.id ?? null)) drawAbout(view, entry);
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
      if (focused) (view.jobs.querySelector("button") ?? view.message).focus(); // the keyboard stays where it was
    }
    view.jobs.hidden = !state.jobs.length;
  }

  async function drawAbout(view, entry) {
    view.shown = entry?.id ?? null;
    view.about.hidden = !entry;
    if (!entry) return;
    const id = entry.id, act = (name) => () => parts.stage.tell[name]({id});
    const facts = make("dl", {class: "mf-facts"});
    const focused = view.about.contains(document.activeElement) ? document.activeElement.id : "";
    view.about.replaceChildren(
      make("p", {class: "mf-caption"}, entry.caption || "(no prompt)"),
      make("div", {class: "mf-badges"},
        entry.cached ? make("span", {class: "mf-badge", title: "Drawn before with the same settings, answered at once"}, "from the cache") : null,
        entry.title ? make("span", {class: "mf-badge"}, entry.title) : null),
      make("div", {class: "mf-actions"},
        button("Use these settings", act("use"), {id: "mf-use"}),
        button("Same with another seed", act("again"), {id: "mf-again"}),
        make("a", {class: "mf-button", id: "mf-download", href: `${entry.url}?download=1`, download: `miniflux-${id.slice(0, 8)}.png`}, "Download"),
        make("a", {class: "mf-button", id: "mf-bare", href: `${entry.url}?download=1&bare=1`, download: `miniflux-${id.slice(0, 8)}.png`, title: "The picture alone: nobody can read from it how it was made"}, "Without settings"),
        button("Delete", act("remove"), {id: "mf-remove"})),
      make("details", {class: "mf-details"}, make("summary", {}, "Settings"), facts));
    if (focused) document.getElementById(focused)?.focus();
    try {
      const reply = await fetch(`studio/about/${id}`);
      if (!reply.ok || view.shown !== id) return;
      for (const [name, value] of await reply.json()) facts.append(make("dt", {}, name), make("dd", {}, value));
    } catch (error) {
      // gone meanwhile; the next state says so
    }
  }

  // The history: a list of pictures to choose from

  function history(element) {
    parts.history = {
      list: make("div", {class: "mf-tiles", role: "list", "aria-label": "Pictures of this session, newest first"}),
      note: make("p", {class: "mf-note"}),
    };
    element.replaceChildren(make("h2", {class: "mf-heading"}, "History"), parts.history.note, parts.history.list);
    drawHistory();
  }

  function drawHistory() {
    const view = parts.history;
    if (!view) return;
    const tiles = new Map([...view.list.children].map((tile) => [tile.dataset.id, tile]));
    view.note.textContent = state.entries.length
      ? "Only this browser sees them. They stay when the page is loaded again."
      : "Nothing drawn yet. What you draw stays here when the page is loaded again.";
    let place = view.list.firstChild;
    for (const entry of state.entries) {
      let tile = tiles.get(entry.id);
      tiles.delete(entry.id);
      if (!tile) {
        const image = make("img", {src: entry.url, alt: "", loading: "lazy", decoding: "async"});
        const pick = make("button", {type: "button", class: "mf-tile", "aria-label": `Show: ${entry.caption.slice(0, 120) || "a picture without prompt"}, ${entry.line}`,
          onclick: () => { state.chosen = entry.id; drawStage(); drawHistory(); parts.stage?.image.scrollIntoView({block: "nearest"}); }},
          image, make("span", {class: "mf-line"}, entry.line), entry.cached ? make("span", {class: "mf-badge"}, "cached") : null);
        tile = make("div", {role: "listitem"}, pick);
        tile.dataset.id = entry.id;
      }
      tile.firstChild.toggleAttribute("aria-current", entry.id === state.chosen);
      if (tile !== place) view.list.insertBefore(tile, place);
      else place = place.nextSibling;
    }
    for (const tile of tiles.values()) tile.remove();
  }

  // LoRAs: each with a switch and a strength

  function loras(element, props, watch) {
    const list = make("ul", {class: "mf-loras"});
    element.replaceChildren(list);
    let ours = null;

    function change(id, what) {
      ours = props.value = (props.value ?? []).map((row) => (row.id === id ? {...row, ...what} : row));
    }

    function draw() {
      const known = new Map((ours ?? []).map((row) => [row.id, row]));
      // What the page asked for when it was loaded may come after the first changes: those are kept.
      if (props.value?.some((row) => row.late)) props.value = props.value.map(({late, ...row}) => (late && known.get(row.id)) || row);
      if (props.value === ours || JSON.stringify(props.value) === JSON.stringify(ours)) return;
      ours = props.value;
      list.replaceChildren(...(props.value ?? []).map((row) => {
        const fixed = typeof row.strength !== "number";
        const about = {"data-id": row.id, disabled: Boolean(row.reason) || fixed};
        const on = make("input", {type: "checkbox", id: `mf-on-${row.id}`, checked: row.on && !row.reason, disabled: Boolean(row.reason)});
        const range = make("input", {type: "range", min: 0, max: 2, step: 0.05, value: fixed ? 1 : row.strength, "aria-label": `Strength of ${row.label}`, ...about});
        const number = make("input", {type: "number", min: -10, max: 10, step: 0.05, value: fixed ? 1 : row.strength, "aria-label": `Strength of ${row.label} as a number`, ...about});
        const fill = () => range.style.setProperty("--fill", `${Math.min(Math.max(range.value / 2, 0), 1) * 100}%`);
        const set = (from, to) => {
          if (from.value === "" || !Number.isFinite(from.valueAsNumber)) return;
          to.value = from.value;
          on.checked = true;
          fill();
          change(row.id, {strength: from.valueAsNumber, on: true});
        };
        on.addEventListener("change", () => change(row.id, {on: on.checked}));
        range.addEventListener("input", () => set(range, number));
        number.addEventListener("input", () => set(number, range));
        fill();
        const lines = [make("label", {class: "mf-lora-name", for: `mf-on-${row.id}`}, on, make("span", {}, row.label)),
          make("div", {class: "mf-lora-strength"}, range, fixed ? make("span", {class: "mf-note"}, "by block") : number),
          make("p", {class: "mf-note"}, row.reason || row.about)];
        if (row.receipt) lines.push(make("details", {class: "mf-details"}, make("summary", {}, "Receipt"), make("pre", {tabindex: 0}, row.receipt)));
        return make("li", {class: row.reason ? "mf-lora mf-off" : "mf-lora"}, ...lines);
      }));
    }

    watch("value", draw);
    draw();
  }

  /** Put files into the field for files, as soon as it is there: it comes late, and is away while it uploads. */
  function give(files) {
    const input = document.querySelector("#mf-files input[type=file]");
    if (!input) { setTimeout(give, 50, files); return; }
    input.files = files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
  }

  // The whole page: files dropped anywhere, light and dark, Ctrl+Enter

  function page(element) {
    const dark = () => document.body.classList.contains("dark");
    const toggle = button("", () => {
      document.body.classList.toggle("dark");
      localStorage.setItem("miniflux-theme", dark() ? "dark" : "light");
      label();
    }, {class: "mf-button mf-theme"});
    const label = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Change to ${dark() ? "light" : "dark"} colours`); };
    const kept = localStorage.getItem("miniflux-theme");
    if (kept) document.body.classList.toggle("dark", kept === "dark");
    label();
    element.replaceChildren(make("header", {class: "mf-header"},
      make("h1", {}, "miniflux"), make("p", {}, "FLUX pictures from words, on this machine"), toggle));
    document.documentElement.lang = "en";

    addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("mf-dropping"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("mf-dropping"); });
    addEventListener("drop", (event) => {
      document.body.classList.remove("mf-dropping");
      if (event.defaultPrevented || !event.dataTransfer?.files.length) return; // the field has taken them itself
      event.preventDefault();
      give(event.dataTransfer.files);
    });
    addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        document.querySelector("#mf-draw")?.click();
      }
    });
  }

  const note = (element, text) => element.replaceChildren(make("p", {class: "mf-note mf-drop-note"}, text));

  return {page, stage, history, loras, note};
})();

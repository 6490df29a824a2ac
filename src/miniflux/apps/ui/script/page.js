/* What the page draws itself: the stage, the history and the list of LoRAs. Every text goes in as text, never as markup.

   Gradio calls `page`, `stage`, `history`, `inside` and `loras` when it mounts their elements; each is given its element, its
   properties and how to tell the server. Everything else comes from GET studio/state, asked often while something is
   being drawn. The other files in this folder add their parts to `miniflux`; this one comes first. */

window.miniflux ??= (() => {
  "use strict";

  const QUICK = 90, SLOW = 1500, GONE = 1000; // milliseconds between two questions: while we draw, else, while nobody answers
  const PATIENCE = 8000; // milliseconds for an answer: a server that draws on all cores may take a while
  const BACK = "miniflux-restarted";
  const state = {jobs: [], entries: [], mark: "", chosen: null, newest: null, live: true, server: null, away: false, gone: new Set()};
  const parts = {};
  let timer = null, asking = false, again = false, leaving = false;

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

  // What the server knows

  async function ask() {
    if (asking) { again = true; return; }
    asking = true;
    clearTimeout(timer);
    try {
      const running = state.jobs.find((job) => job.state === "running");
      const seen = running ? `${running.id}:${running.done}` : "";
      const reply = await fetch(`studio/state?mark=${encodeURIComponent(state.mark)}&seen=${encodeURIComponent(seen)}`,
        {signal: AbortSignal.timeout(PATIENCE)});
      if (reply.ok) { learn(await reply.json()); absent(""); }
      else absent(reply.status === 401 || reply.status === 403
        ? "The server does not know you any more. Load the page again; what is in the controls stays."
        : `The server answers with error ${reply.status}. Trying again …`);
    } catch (error) {
      if (!leaving) absent("The server does not answer: it was stopped, or the network is down. Trying again …");
    }
    asking = false;
    const wait = state.away ? GONE : state.jobs.length ? QUICK : SLOW;
    if (again || state.jobs.length || !document.hidden) timer = setTimeout(ask, again ? 0 : wait);
    again = false;
  }

  /** Say that nobody answers, as long as it is so; nothing is sent meanwhile. */
  function absent(why) {
    if (!why && !state.away) return;
    if (!why) miniflux.say({kind: "ok", text: "The server is back."});
    state.away = Boolean(why);
    document.body.classList.toggle("mf-away", state.away);
    if (!parts.away) return;
    parts.away.hidden = !state.away;
    if (parts.away.textContent !== why) parts.away.textContent = why;
    document.body.style.setProperty("--mf-banner", `${parts.away.offsetHeight}px`); // so much room is left for it
  }

  /** Whether the server is there to be told something; if it is not, that is said once more. */
  function there() {
    if (!state.away) return true;
    parts.away?.classList.remove("mf-nudge");
    void parts.away?.offsetWidth; // so that it moves again
    parts.away?.classList.add("mf-nudge");
    return false;
  }

  function learn(news) {
    if (state.server && news.server !== state.server) { // another process: what Gradio has in this page is of no use to it
      sessionStorage.setItem(BACK, "1");
      location.reload();
      return;
    }
    state.server = news.server;
    const before = new Map(state.jobs.map((job) => [job.id, job]));
    for (const job of news.jobs) {
      if (!before.has(job.id)) state.live = true; // what was just asked for is looked at
      job.preview ??= before.get(job.id)?.preview;
    }
    state.jobs = news.jobs;
    for (const end of news.ended) {
      if (end.state === "failed") miniflux.say({kind: "error", text: end.error});
      else if (end.state === "cancelled") miniflux.say({kind: "info", text: "Stopped. Everything else is as it was."});
    }
    if (news.entries) {
      const place = state.entries.findIndex((entry) => entry.id === state.chosen);
      state.entries = news.entries;
      state.mark = news.mark;
      const newest = state.entries[0]?.id ?? null, added = newest !== state.newest && !state.known?.has(newest);
      state.known = new Set(state.entries.map((entry) => entry.id));
      for (const id of state.gone) if (!state.known.has(id)) state.gone.delete(id);
      if (added && !parts.viewer?.open) state.chosen = newest;
      else if (!state.known.has(state.chosen)) state.chosen = state.entries[Math.min(Math.max(place, 0), state.entries.length - 1)]?.id ?? null;
      state.newest = newest;
      miniflux.drawHistory();
    }
    miniflux.drawStage();
    parts.inside?.learned();
  }

  /** Show a picture of the history. */
  function choose(id) {
    state.chosen = id;
    state.live = false;
    miniflux.drawStage();
    miniflux.drawHistory();
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  addEventListener("pagehide", () => { leaving = true; });
  addEventListener("pageshow", () => { leaving = false; });
  addEventListener("online", () => ask());
  addEventListener("offline", () => ask());

  /** Put files into the field for files, as soon as it is there: it comes late, and is away while it uploads. */
  function give(files) {
    if (!there()) return;
    const input = document.querySelector("#mf-files input[type=file]");
    if (!input) { setTimeout(give, 50, files); return; }
    input.files = files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
  }

  // The whole page: files dropped anywhere, light and dark, Ctrl+Enter, and on a phone the bar below

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
    parts.away = make("p", {class: "mf-banner", role: "alert", hidden: true});
    element.replaceChildren(parts.away, make("header", {class: "mf-header"},
      make("h1", {}, "miniflux"), make("p", {}, "FLUX pictures from words, on this machine"), toggle), miniflux.toast(), bar());
    document.documentElement.lang = "en";
    if (sessionStorage.getItem(BACK)) {
      sessionStorage.removeItem(BACK);
      miniflux.say({kind: "info", text: "The server was started again. What was in line is gone."});
    }
    if (narrow.matches) fold();

    addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("mf-dropping"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("mf-dropping"); });
    addEventListener("drop", (event) => {
      document.body.classList.remove("mf-dropping");
      if (event.defaultPrevented || !event.dataTransfer?.files.length) return; // the field has taken them itself
      event.preventDefault();
      give(event.dataTransfer.files);
    });
    addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        document.querySelector("#mf-draw")?.click();
      }
    });
    addEventListener("input", (event) => { // who writes a seed means it: it is kept for the next picture
      if (!event.target.closest?.("#mf-seed")) return;
      const lock = document.querySelector("#mf-lock input"), wanted = !["", "-1"].includes(event.target.value.trim());
      if (lock && lock.checked !== wanted) lock.click();
    }, true);
    addEventListener("click", (event) => { // before Gradio, which would wait for a server that is not there
      if (!event.target.closest?.("#mf-draw, #mf-draw-all, #mf-draw-grid, #mf-die, #mf-forget")) return;
      if (!there()) event.stopPropagation();
      else if (narrow.matches && event.target.closest("#mf-draw-all, #mf-draw-grid, #mf-draw")) go("#mf-stage");
    }, true);
  }

  const narrow = matchMedia("(max-width: 900px)");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const go = (selector) => document.querySelector(selector)?.scrollIntoView({behavior: calm.matches ? "auto" : "smooth", block: "start"});

  /** On a phone: where to go, and *Draw* where its own button is out of sight. */
  function bar() {
    const draw = button("Draw", () => document.querySelector("#mf-draw")?.click(), {class: "mf-button mf-go-draw", hidden: true});
    const found = new IntersectionObserver(([seen]) => { draw.hidden = seen.isIntersecting; });
    const look = setInterval(() => {
      const own = document.querySelector("#mf-draw");
      if (own) { clearInterval(look); found.observe(own); }
    }, 100);
    const to = (text, selector) => button(text, () => go(selector), {class: "mf-button mf-go"});
    return make("nav", {class: "mf-nav", "aria-label": "Go to"},
      to("Prompt", "#mf-page"), to("Picture", "#mf-stage"), to("History", "#mf-history"), to("Settings", "#mf-settings"), draw);
  }

  /** Close the groups of controls, once they are there: on a phone they would be a long way to scroll. */
  function fold() {
    const done = new Set();
    const close = () => {
      for (const label of document.querySelectorAll("#mf-settings > .mf-room > button.label-wrap")) {
        if (done.has(label)) continue;
        done.add(label);
        setTimeout(() => label.classList.contains("open") && label.click()); // once it listens
      }
    };
    const watcher = new MutationObserver(close);
    watcher.observe(document, {childList: true, subtree: true});
    setTimeout(() => watcher.disconnect(), 5000);
    close();
  }

  const note = (element, text) => element.replaceChildren(make("p", {class: "mf-note mf-drop-note"}, text));

  return {page, note, make, button, state, parts, ask, choose, there};
})();

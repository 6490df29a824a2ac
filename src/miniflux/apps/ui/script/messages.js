/* What the server and the page have to say: always in view, over whatever is there, and read out. */

(() => {
  "use strict";
  const {make, button, parts} = miniflux;

  const BRIEF = 120; // letters; longer messages stay until they are closed
  const STAY = 8000; // milliseconds for the others
  let timer = null, undoing = [];

  function toast() {
    parts.message = make("p", {class: "mf-message", role: "status", "aria-live": "polite", tabindex: -1, hidden: true});
    parts.undo = button("Undo", () => {
      if (!miniflux.there()) return;
      for (const id of undoing) miniflux.state.gone.delete(id);
      parts.stage?.tell.restore({id: undoing.join(",")});
      close();
    }, {class: "mf-button mf-undo", hidden: true});
    const box = make("div", {class: "mf-toast"}, parts.message, parts.undo,
      button("✕", close, {class: "mf-button mf-close", "aria-label": "Close this message"}));
    box.addEventListener("mouseenter", () => clearTimeout(timer));
    box.addEventListener("focusin", () => clearTimeout(timer));
    return box;
  }

  function close() {
    clearTimeout(timer);
    parts.message.hidden = true;
    parts.undo.hidden = true;
    undoing = [];
  }

  /** Show a message; one without text takes the last one away. */
  function say(message) {
    const view = parts.message;
    if (!view || !message) return;
    clearTimeout(timer);
    if (message.kind === "error") { miniflux.state.gone.clear(); miniflux.drawHistory?.(); }
    const pictures = message.undo ?? [];
    undoing = pictures.length && !view.hidden ? [...undoing, ...pictures] : pictures; // several, one after another
    const text = undoing.length > 1 ? `${undoing.length} pictures deleted.` : message.text ?? "";
    parts.undo.hidden = !undoing.length;
    view.hidden = !text;
    view.className = `mf-message mf-${message.kind}`;
    view.textContent = text;
    const stays = message.kind === "error" || undoing.length || text.length > BRIEF || text.includes("\n");
    if (text && !stays) timer = setTimeout(close, STAY);
  }

  Object.assign(miniflux, {toast, say});
})();

/* What is in the controls stays when the page is loaded again: in this tab, and for the next one that is opened. Nothing
   of it is sent anywhere. */

(() => {
  "use strict";

  const NAME = "miniflux-controls";
  let found = null, timer = null;

  function all() {
    if (found) return found;
    for (const store of [sessionStorage, localStorage]) {
      try {
        const read = JSON.parse(store.getItem(NAME));
        if (read && typeof read === "object" && !Array.isArray(read)) return found = read;
      } catch (error) {
        // not ours, or cut off: as if there were none
      }
    }
    return found = {};
  }

  const kept = (name) => all()[name];

  /** Remember values by name; written a moment later, since typing changes them often. */
  function keep(values) {
    Object.assign(all(), values);
    clearTimeout(timer);
    timer = setTimeout(write, 200);
  }

  function write() {
    clearTimeout(timer);
    for (const store of [sessionStorage, localStorage]) {
      try {
        store.setItem(NAME, JSON.stringify(all()));
      } catch (error) {
        // no room, or forbidden: the page works as well, and forgets
      }
    }
  }

  /** The controls as they were left, where that is still possible; the others as they are.

     `about` has, by name: what may be chosen, and the bounds of numbers. Model and what depends on it come back only if
     the page was started with the same one. */
  function asLeft(about, now) {
    const before = all(), other = before.first !== about.first;
    keep({first: about.first});
    return about.names.map((name, i) => {
      const value = before[name], limits = about.limits[name];
      if (value === undefined || typeof value !== typeof now[i] || (other && about.ofModel.includes(name))) return now[i];
      if (about.choices[name] && !about.choices[name].includes(value)) return now[i];
      if (limits && !(value >= limits[0])) return now[i];
      if (limits && value > limits[1]) return {__type__: "update", value, maximum: value};
      return value;
    });
  }

  addEventListener("pagehide", write);
  document.addEventListener("visibilitychange", () => { if (document.hidden) write(); });

  Object.assign(miniflux, {kept, keep, asLeft, allKept: () => JSON.stringify(all())});
})();

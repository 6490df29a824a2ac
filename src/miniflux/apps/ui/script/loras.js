/* LoRAs: each with a switch and a strength; those that were dropped can be removed. */

(() => {
  "use strict";
  const {make, button} = miniflux;

  function loras(element, props, tell, watch) {
    const list = make("ul", {class: "mf-loras"});
    element.replaceChildren(list);
    const kept = new Map((miniflux.kept("loras") ?? []).map((row) => [row.id, row])); // from before the page was loaded again
    let ours = null;

    const keep = () => miniflux.keep({loras: (ours ?? []).map(({id, on, strength}) => ({id, on, strength}))});

    function change(id, what) {
      ours = props.value = (props.value ?? []).map((row) => (row.id === id ? {...row, ...what} : row));
      keep();
    }

    /** Rows of a page that was just loaded: as they were left, or as they were set since. */
    function asLeft(rows) {
      const known = new Map((ours ?? []).map((row) => [row.id, row]));
      return rows.map(({late, ...row}) => {
        const before = known.get(row.id) ?? kept.get(row.id);
        return late && before ? {...row, on: before.on, strength: before.strength} : row;
      });
    }

    function rowOf(row) {
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
      const name = make("label", {class: "mf-lora-name", for: `mf-on-${row.id}`}, on, make("span", {}, row.label));
      const away = row.dropped
        ? button("Remove", () => { if (miniflux.there()) tell.remove({id: row.id}); }, {class: "mf-button mf-lora-remove", "aria-label": `Remove the LoRA ${row.label}`})
        : null;
      const lines = [make("div", {class: "mf-lora-head"}, name, away),
        make("div", {class: "mf-lora-strength"}, range, fixed ? make("span", {class: "mf-note"}, "by block") : number),
        make("p", {class: "mf-note"}, row.reason || row.about)];
      if (row.receipt) lines.push(make("details", {class: "mf-details"}, make("summary", {}, "Receipt"), make("pre", {tabindex: 0}, row.receipt)));
      return make("li", {class: row.reason ? "mf-lora mf-off" : "mf-lora"}, ...lines);
    }

    function draw() {
      if (props.value?.some((row) => row.late)) props.value = asLeft(props.value);
      if (props.value === ours || JSON.stringify(props.value) === JSON.stringify(ours)) return;
      const first = ours === null;
      ours = props.value;
      list.replaceChildren(...(props.value ?? []).map(rowOf));
      if (!first) keep(); // at first those that were dropped are not in it yet
    }

    watch("value", draw);
    draw();
  }

  /** Models of the folder that cannot be used, and why. */
  function refused(element, props, watch) {
    const draw = () => {
      const names = Object.entries(props.value ?? {});
      const title = `${names.length} ${names.length === 1 ? "file" : "files"} of the models' folder cannot be used`;
      element.replaceChildren(...(names.length ? [make("details", {class: "mf-details mf-refused"}, make("summary", {}, title),
        make("ul", {}, ...names.map(([, reason]) => make("li", {}, reason))))] : []));
    };
    watch("value", draw);
    draw();
  }

  Object.assign(miniflux, {loras, refused});
})();

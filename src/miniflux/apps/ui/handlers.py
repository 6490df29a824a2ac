"""What happens when something is pressed: read the controls, call the service, show what it says."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from miniflux.apps.ui import fitting, form
from miniflux.apps.ui.layout import HELP, LEAST, MOST, Controls, learned, unable
from miniflux.apps.ui.routes import COOKIE, valid
from miniflux.apps.ui.site import Shelf, Site
from miniflux.apps.ui.slots import ITSELF, Slots, sized, steering_from
from miniflux.checkpoints.folders import SAFETENSORS
from miniflux.conditions.making import canny
from miniflux.errors import InputError, MinifluxError
from miniflux.families import FAMILIES
from miniflux.pictures import on_white, open_picture
from miniflux.service import Axis, Grid, Job, batch, parse_prompts
from miniflux.settings import Request, read_picture

log = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MAX_LIST_BYTES = 2**20  # of a file with prompts
GREYED = ("guidance", "scale", "negative", "window_from", "window_to", "step_cache")
"""Controls that are without effect at times."""
_count = itertools.count(1)

OF_MODEL = ("model", "steps", "guidance", "method", "scale", "width", "height", "aspect")
"""Controls that are set anew when the page is started with another model."""
Given = dict[Any, Any]
"""What Gradio gives a handler, and what it takes from it: values or updates by their components."""


def said(kind: str, text: str) -> dict[str, Any]:
    """A message for the stage; `count` tells two equal ones apart."""
    return {"kind": kind, "text": text, "count": next(_count)}


def connect(page: gr.Blocks, site: Site, c: Controls) -> None:
    """Give every control its handler, inside the page that is open."""
    handlers = Handlers(site, c)
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    form_in = set(c.settings.values())
    drawn_in = form_in | c.slots
    filled = [*c.settings.values(), c.lock, c.aspect, c.stage, c.also, c.forget, c.more]

    def on(listen: Any, handler: Callable[..., Given], inputs: Any, outputs: list[Any], mode: str = "multiple") -> None:
        """Gradio by default drops what comes while the same handler is at work: a second press, the end of a drag."""
        listen(_telling(handler, c), inputs, outputs, trigger_mode=mode, **quick)

    on(c.draw.click, handlers.draw, {*drawn_in, c.lock}, [c.seed, c.stage])
    on(c.draw_all.click, handlers.draw_all, {*drawn_in, c.prompts}, [c.stage])
    on(c.draw_grid.click, handlers.draw_grid, {*drawn_in, c.x, c.x_values, c.y, c.y_values}, [c.stage])
    on(c.die.click, handlers.roll, None, [c.seed])
    on(c.forget.click, handlers.forget, None, [c.rest, c.also, c.forget])
    on(c.model.input, handlers.model, form_in, [
        *(c.settings[name] for name in GREYED), c.method, c.steps, c.width, c.height, c.aspect, c.loras,
    ], "always_last")  # fmt: skip
    greyed = [c.settings[name] for name in GREYED]
    on(c.method.input, handlers.method, form_in, greyed, "always_last")
    on(c.aspect.input, handlers.aspect, {c.aspect, c.model}, [c.width, c.height], "always_last")
    for side in (c.width, c.height):
        on(side.input, handlers.side, {c.width, c.height, c.model}, [c.aspect], "always_last")
    on(c.edges.click, handlers.edges, {c.control, c.width, c.height}, [c.control, c.stage])
    writing = c.rewrite.click(_telling(handlers.writing, c), {c.writer}, [c.stage], **quick)
    written = [c.prompt, c.before, c.take_back, c.stage]
    writing.then(_telling(handlers.rewrite, c), {c.prompt, c.writer, c.told, c.heat}, written, **quick)
    on(c.take_back.click, handlers.take_back, {c.before}, [c.prompt, c.take_back])
    on(c.files.upload, handlers.files, {*form_in, c.files}, [*filled, c.prompts, c.files])
    on(c.stage.use, handlers.use, None, filled)
    on(c.stage.again, handlers.again, None, [c.stage])
    on(c.stage.cancel, handlers.cancel, None, [c.stage])
    on(c.stage.remove, handlers.remove, None, [c.stage])
    on(c.stage.restore, handlers.restore, None, [c.stage])
    on(c.inside.look, handlers.look, None, [c.inside, c.stage])
    on(c.inside.view, handlers.view, None, [c.inside, c.stage], "always_last")
    on(c.loras.remove, handlers.remove_lora, {c.model, c.loras}, [c.loras, c.stage])
    _keep(page, site, c, quick)
    writers = [c.writer, c.told, c.heat, c.rewrite, c.unable]
    left = {"js": "() => [miniflux.allKept()]"}
    page.load(
        _telling(handlers.arrive, c),
        {c.kept},
        [*c.settings.values(), c.also, c.forget, c.more, c.aspect, c.refused, c.stage, *writers],
        **left,
        **quick,
    )


def _keep(page: gr.Blocks, site: Site, c: Controls, quick: dict[str, Any]) -> None:
    """What is in the controls is kept by the browser, and comes back when the page is loaded again."""
    kept = c.keeping
    lists = {name: [value for _, value in it.choices] for name, it in kept.items() if _is_list(it)}
    limits = {name: [it.minimum, it.maximum] for name, it in kept.items() if isinstance(it, gr.Slider)}
    about = {"names": list(kept), "choices": lists, "limits": limits, "first": site.first, "ofModel": OF_MODEL}
    inputs = list(kept.values())
    names = json.dumps(list(kept))
    keep = f"(...now) => {{ miniflux.keep(Object.fromEntries({names}.map((name, i) => [name, now[i]]))); return []; }}"
    gr.on([it.change for it in inputs], None, inputs, None, js=keep, trigger_mode="multiple", **quick)
    page.load(None, inputs, inputs, js=f"(...now) => miniflux.asLeft({json.dumps(about)}, now)", **quick)


def _is_list(component: Any) -> bool:
    return isinstance(component, gr.Dropdown) and not component.allow_custom_value


def _telling(handler: Callable[..., Given], c: Controls) -> Callable[..., Given]:
    """A handler whose errors become messages, and change nothing."""

    @functools.wraps(handler)
    def told(*arguments: Any) -> Given:
        try:
            return handler(*arguments)
        except Exception as error:  # the page stays usable, whatever it is
            return {c.stage: said("error", _line(error))}

    return told


def _line(error: Exception) -> str:
    """What to say of an error: what can be mended in its own words; the rest is for the log."""
    if isinstance(error, MinifluxError):
        return (str(error).splitlines() or [type(error).__name__])[0]
    log.error("a handler of the page failed", exc_info=error)
    return f"A fault of ours: {type(error).__name__}. The log says more."


class Handlers:
    """All handlers; each is given values by component, and returns updates by component."""

    def __init__(self, site: Site, controls: Controls) -> None:
        self.site, self.c = site, controls

    def _who(self, web: gr.Request) -> tuple[str, Shelf]:
        session = valid(web.cookies.get(COOKIE))
        if session is None:
            raise InputError("this browser keeps no cookie, by which the page would know what is yours")
        return session, self.site.shelf(session)

    def values(self, given: Given) -> dict[str, Any]:
        """What the controls hold, by the names that `form` uses."""
        return {name: given.get(component) for name, component in self.c.settings.items()}

    def _request(self, given: Given, who: tuple[str, Shelf], **other: Any) -> Request:
        session, shelf = who
        slots = Slots.of(*(given.get(component) for component in (self.c.image, self.c.references, self.c.control)))
        values = {**self.values(given), **other}
        networks = self.site.models.catalogue.networks
        model = self.site.listed.get(str(values["model"]), next(iter(self.site.listed.values())))
        near, keep = functools.partial(fitting.size_like, model=model), functools.partial(self.site.give, session)
        family = FAMILIES[model.variant.family]
        try:
            values["steering"] = steering_from(values, slots, networks, near, keep, family)
        finally:
            self._read(session, given)
        return form.request_from(values, shelf, self.site.listed, networks)

    def _read(self, session: str, given: Given) -> None:
        """The editor sends all it has whenever it is asked, and makes new files of it; other slots have theirs once."""
        kept = [given.get(self.c.control), *(given.get(self.c.references) or ())]
        self.site.uploads.use(session, [Path(path) for path in kept if path])
        editor = given.get(self.c.image) or {}
        sent = [editor.get("background"), editor.get("composite"), *(editor.get("layers") or ())]
        self.site.uploads.done(session, [Path(path) for path in sent if path])

    def _begun(self, job: Job) -> dict[str, Any]:
        """What to say of a job that was just put in line."""
        if job.state != "done":
            return said("info", "\n".join(dict.fromkeys(filter(None, map(self._unlearned, job.requests)))))
        many = "they were" if sum(request.images for request in job.requests) > 1 else "it was"
        return said("cached", f"From the cache: {many} drawn before with the same settings.")

    def _unlearned(self, request: Request) -> str:
        model = fitting.listed_as(request.model, self.site.listed)
        return "" if model is None else fitting.unlearned(request, model)

    # Drawing

    def draw(self, given: Given, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        seed = given[self.c.seed] if given[self.c.lock] else ""
        request = self._request(given, (session, shelf), seed=seed)
        drawn = seed if given[self.c.lock] else str(request.seed)  # a locked field that says -1 goes on saying it
        return {self.c.stage: self._begun(self.site.submit(session, [request])), self.c.seed: drawn}

    def draw_all(self, given: Given, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        requests = batch(self._request(given, (session, shelf)), parse_prompts(given[self.c.prompts] or ""))
        return {self.c.stage: self._begun(self.site.submit(session, requests, f"batch of {len(requests)}"))}

    def draw_grid(self, given: Given, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        x = Axis.parse(given[self.c.x], given[self.c.x_values] or "")
        y = Axis.parse(given[self.c.y], given[self.c.y_values] or "") if given[self.c.y] else None
        for axis in (x, y):
            self._check_axis(axis)
        x, y = self._models(x), None if y is None else self._models(y)
        grid = Grid(self._request(given, (session, shelf)), x, y)
        return {self.c.stage: self._begun(self.site.submit_grid(session, grid))}

    def _check_axis(self, axis: Axis | None) -> None:
        """An axis of models may name those of the list only, never a path."""
        if axis is not None and axis.setting == "model":
            for name in axis.values:
                if name not in self.site.listed:
                    raise MinifluxError(f"model {name!r} is not in the list: {', '.join(self.site.listed)}")

    def _models(self, axis: Axis) -> Axis:
        """An axis of models as requests take them."""
        if axis.setting != "model":
            return axis
        return Axis(axis.setting, tuple(self.site.listed[name].model for name in axis.values))

    def again(self, event: gr.EventData, web: gr.Request) -> Given:
        session, _ = self._who(web)
        request = self.site.history.get(session, str(event.id)).request
        return {self.c.stage: self._begun(self.site.submit(session, [form.with_new_seed(request, form.new_seed())]))}

    def cancel(self, event: gr.EventData, web: gr.Request) -> Given:
        job = self.site.job(self._who(web)[0], str(event.id))
        if job is not None:
            job.cancel()
        return {self.c.stage: said("info", "")}

    def remove(self, event: gr.EventData, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        self.site.history.delete(session, str(event.id))
        if shelf.recording is not None and shelf.recording.id == str(event.id):
            shelf.recording = None
        return {self.c.stage: {**said("info", "Deleted."), "undo": [str(event.id)]}}

    # Looking inside; the room of studies is imported when somebody does

    def look(self, event: gr.EventData, web: gr.Request) -> Given:
        """Show what was seen of a picture, or draw it once more to see it."""
        from miniflux.apps.ui import inside

        session, shelf = self._who(web)
        id = str(getattr(event, "id", ""))
        if shelf.recording is not None and shelf.recording.id == id:
            return {self.c.inside: inside.view(shelf.recording)}
        job = inside.look(self.site, session, self.site.history.get(session, id))
        return {self.c.inside: {"waits": job.id, "id": id}, self.c.stage: said("info", "")}

    def view(self, event: gr.EventData, web: gr.Request) -> Given:
        """A map of what was seen; nothing where the job that was waited for has ended without one."""
        from miniflux.apps.ui import inside

        _, shelf = self._who(web)
        recording, id = shelf.recording, getattr(event, "id", None)
        if recording is None or recording.id != id:
            if getattr(event, "waited", False):
                return {self.c.inside: {}}
            raise InputError("what was seen of this picture is not kept any more: look inside once more")
        asked = {name: getattr(event, name, None) for name in ("word", "step", "block", "at")}
        return {self.c.inside: inside.view(recording, **asked)}

    # Filling the controls

    def use(self, event: gr.EventData, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        entry = self.site.history.get(session, str(event.id))
        updates, notes = self._filled(entry.request, shelf)
        return {**updates, self.c.stage: _filled_in("The controls have the settings of this picture.", notes)}

    def _filled(self, request: Request, shelf: Shelf) -> tuple[Given, list[str]]:
        c, site = self.c, self.site
        values, notes = form.values_from(request, shelf, site.listed, site.models.catalogue.networks)
        model = site.listed[values["model"]]
        updates: Given = {c.settings[name]: gr.update(value=value) for name, value in values.items()}
        updates[c.loras] = values["loras"]
        for name, update in self._grey(values["model"], values["method"]).items():
            updates[name] = {**updates[name], **update}
        updates[c.guidance]["value"] = 3.0 if values["guidance"] is None else values["guidance"]
        for name, (least, most) in self._limits(model.name).items():
            slider = c.settings[name]
            value = updates[slider]["value"]
            updates[slider] |= {"minimum": min(least, value), "maximum": max(most, value)}
        if unlearned := fitting.unlearned(request, model):
            notes.append(unlearned.rstrip("."))
        shape = form.aspect_of(values["width"], values["height"], model.size) or "own size"
        updates[c.aspect] = gr.update(value=shape, info=learned(model))
        if values["rest"]:
            notes.append(f"also in use, without a control: {form.plainly(values['rest'])}")
        updates[c.lock], updates[c.as_reference] = True, False
        if form.more_than_usual(values):
            updates[c.more] = gr.update(open=True)
        updates[c.forget] = gr.update(visible=bool(values["rest"]))
        updates[c.also] = gr.update(value=form.plainly(values["rest"]), visible=bool(values["rest"]))
        return updates, notes

    def _limits(self, model: str) -> dict[str, tuple[float, float]]:
        """Where the sliders begin and end with a model."""
        sides = fitting.sides_of(self.site.listed[model])
        return {**{name: (LEAST[name], most) for name, most in MOST.items()}, "width": sides, "height": sides}

    def _grey(self, model: str, method: str) -> Given:
        grey = form.greyed(self.site.listed[model], method)
        return {
            self.c.settings[name]: gr.update(interactive=name not in grey, info=grey.get(name, HELP[name]))
            for name in GREYED
        }

    def model(self, given: Given, web: gr.Request) -> Given:
        c, (_, shelf) = self.c, self._who(web)
        model = self.site.listed[given[c.model]]
        method, scale = form.usual_method(model)  # that of a base model draws nothing good with another
        updates = self._grey(model.name, method)
        updates[c.method] = method
        updates[c.scale]["value"] = scale
        if "step_cache" in form.greyed(model, method):
            updates[c.step_cache]["value"] = form.NO_CACHE
        if model.guidance is not None:
            updates[c.guidance]["value"] = model.guidance
        for side in (c.width, c.height):
            least, most = fitting.sides_of(model)
            updates[side] = gr.update(value=model.size, minimum=least, maximum=most)
        rows = form.rows(shelf, model.name, given=given[c.loras])
        aspect = gr.update(value="1:1", info=learned(model))
        return {**updates, c.steps: model.steps, c.aspect: aspect, c.loras: rows}

    def method(self, given: Given) -> Given:
        return self._grey(given[self.c.model], given[self.c.method])

    def aspect(self, given: Given) -> Given:
        if given[self.c.aspect] not in form.ASPECTS:
            return {self.c.width: gr.skip()}
        width, height = form.size_of(given[self.c.aspect], self.site.listed[given[self.c.model]].size)
        return {self.c.width: width, self.c.height: height}

    def side(self, given: Given) -> Given:
        base = self.site.listed[given[self.c.model]].size
        return {self.c.aspect: form.aspect_of(given[self.c.width], given[self.c.height], base) or "own size"}

    def edges(self, given: Given, web: gr.Request) -> Given:
        """The control picture as its edges, at the size that is drawn."""
        session, _ = self._who(web)
        if given[self.c.control] is None:
            raise InputError("there is no control picture whose edges could be found")
        size = int(given[self.c.width]), int(given[self.c.height])
        found = canny(sized(on_white(open_picture(given[self.c.control])), size))
        place = self.site.uploads.hold(session, "edges.png", lambda path: found.save(path, "PNG"))
        return {self.c.control: str(place), self.c.stage: said("ok", "The control picture shows its edges.")}

    def writing(self, given: Given) -> Given:
        return {self.c.stage: said("info", f"The {given[self.c.writer]} is writing. A large one takes its time.")}

    def rewrite(self, given: Given, web: gr.Request) -> Given:
        """The prompt as a language model writes it, with a way back."""
        self._who(web)
        prompt, heat = given[self.c.prompt] or "", (given[self.c.heat] or "").strip()
        if not prompt.strip():
            raise InputError("there is no prompt that could be rewritten")
        temperature = form.number_from("temperature", heat) if heat else None
        writer = str(given[self.c.writer] or "")
        written = self.site.models.writers.write(writer, prompt, given[self.c.told] or None, temperature)
        return {
            self.c.prompt: written.text,
            self.c.before: prompt,
            self.c.take_back: gr.update(visible=True),
            self.c.stage: said("ok", f"The prompt is rewritten by the {writer}."),
        }

    def take_back(self, given: Given) -> Given:
        return {self.c.prompt: given[self.c.before], self.c.take_back: gr.update(visible=False)}

    def roll(self) -> Given:
        return {self.c.seed: str(form.new_seed())}

    def forget(self) -> Given:
        return {self.c.rest: {}, self.c.also: gr.update(visible=False), self.c.forget: gr.update(visible=False)}

    def arrive(self, given: Given, web: gr.Request) -> Given:
        """What the page needs to know when it was loaded: the LoRAs that this browser has dropped, and what goes with
        the controls as it has left them. Their values the page has put back itself, before this comes."""
        c, (_, shelf) = self.c, self._who(web)
        self.site.refresh()
        left = fitting.left_from(given[c.kept])
        model = left.get("model")
        method = left.get("method")
        if model not in self.site.listed or left.get("first") != self.site.first:
            model, method = self.site.first, None
        usual, _ = form.usual_method(self.site.listed[model])
        updates = self._grey(model, method if method in form.METHODS else usual)
        updates[c.loras] = [{**row, "late": True} for row in form.rows(shelf, model)]
        if form.more_than_usual(left):
            updates[c.more] = gr.update(open=True)
        if isinstance(left.get("rest"), dict) and left["rest"]:
            updates[c.also] = gr.update(value=form.plainly(left["rest"]), visible=True)
            updates[c.forget] = gr.update(visible=True)
        for name, (least, most) in self._limits(model).items():
            value, slider = left.get(name), updates.setdefault(c.settings[name], gr.update())
            slider |= {"minimum": fitting.bound(value, least, min), "maximum": fitting.bound(value, most, max)}
        updates[c.aspect] = gr.update(info=learned(self.site.listed[model]))
        updates[c.refused] = gr.update(value=self.site.models.catalogue.refused)
        writers, why = unable(self.site)
        if (writers or why) and writers != [value for _, value in c.writer.choices]:
            updates |= {one: gr.update(visible=bool(writers)) for one in (c.told, c.heat, c.rewrite)}
            updates[c.writer] = gr.update(choices=writers, value=next(iter(writers), None), visible=bool(writers))
            updates[c.unable] = gr.update(value=why, visible=bool(why))
        networks = [ITSELF, *self.site.models.catalogue.networks]
        if networks != [value for _, value in c.network.choices]:
            updates[c.network] = gr.update(choices=networks, value=ITSELF)
        if list(self.site.listed) != [value for _, value in c.model.choices]:
            updates[c.model] = gr.update(choices=list(self.site.listed), value=model)
        return updates

    def remove_lora(self, given: Given, event: gr.EventData, web: gr.Request) -> Given:
        session, shelf = self._who(web)
        lora = shelf.loras.get(str(event.id))
        self.site.remove_lora(session, str(event.id))
        rows = form.rows(shelf, given[self.c.model], given=given[self.c.loras])
        name = "" if lora is None else f" {lora.label}"
        return {self.c.loras: rows, self.c.stage: said("info", f"The LoRA{name} is removed.")}

    def restore(self, event: gr.EventData, web: gr.Request) -> Given:
        session, _ = self._who(web)
        back = [self.site.history.restore(session, id) for id in str(event.id).split(",")]
        return {
            self.c.stage: said("ok", "The picture is back." if len(back) == 1 else f"{len(back)} pictures are back.")
        }

    # Files

    def files(self, given: Given, web: gr.Request) -> Given:
        """LoRAs into the list, pictures into the controls, prompts into the batch; what cannot be read is said."""
        session, shelf = self._who(web)
        updates: Given = {self.c.files: None}
        good: list[str] = []
        bad: list[str] = []
        for file in given[self.c.files] or []:
            path = Path(file)
            try:
                good.append(self._file(path, session, shelf, given, updates))
            except Exception as error:  # whatever it is, the other files are taken, and more can be dropped
                text = _line(error).replace(str(path), path.name)
                bad.append(text if path.name in text else f"{path.name}: {text}")
        updates[self.c.stage] = said("error" if bad else "ok", "\n".join([*bad, *good]))
        return updates

    def _file(self, path: Path, session: str, shelf: Shelf, given: Given, updates: Given) -> str:
        """Take one file; what to say of it."""
        kind = path.suffix.lower()
        if kind in SAFETENSORS:
            lora = self.site.keep_lora(session, path)
            model = given[self.c.model]
            updates[self.c.loras] = form.rows(shelf, model, given=given[self.c.loras], on={lora.id})
            return f"{path.name}: {lora.about}."
        if kind in PICTURES:
            reading = read_picture(path)
            if not reading.requests:
                raise MinifluxError(f"{path.name}: no settings are in this picture")
            filled, notes = self._filled(reading.requests[0], shelf)
            updates.update(filled)
            origin = "" if reading.origin == "miniflux" else f" of {reading.origin}"
            if len(reading.requests) > 1:
                notes.append(f"they are those of the first of its {len(reading.requests)} pictures")
            notes += [f"not understood: {one}" for one in reading.not_understood]
            return _filled_in(f"The controls have the settings{origin} in {path.name}.", notes)["text"]
        if kind == ".txt":
            if path.stat().st_size > MAX_LIST_BYTES:
                raise MinifluxError(f"{path.name}: larger than {MAX_LIST_BYTES} bytes")
            prompts = parse_prompts(path.read_bytes())
            updates[self.c.prompts] = "\n".join(prompts)
            return f"{path.name}: {len(prompts)} prompts, ready in the batch."
        raise MinifluxError(
            f"{path.name}: a LoRA (.safetensors, .sft), a picture or a list of prompts (.txt) is expected"
        )


def _filled_in(text: str, notes: list[str]) -> dict[str, Any]:
    return said("info" if notes else "ok", "\n".join([text, *notes]))

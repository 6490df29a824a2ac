"""What stands where on the page. The words beside the controls are in `HELP`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from miniflux.apps.ui import fitting, form
from miniflux.apps.ui.site import Shelf, Site
from miniflux.apps.ui.slots import ITSELF, plain
from miniflux.arguments import AUTO
from miniflux.checkpoints.folders import SAFETENSORS
from miniflux.sampling import SOLVERS
from miniflux.sampling.schedules import SPACINGS
from miniflux.service import Listed
from miniflux.upsampling.rewriting import SYSTEM

SCRIPTS = ("page", "messages", "keeping", "stage", "history", "viewer", "loras", "inside")
"""What the page does itself, in this order."""

HELP = {
    "prompt": "What to draw, in plain words. Ctrl+Enter draws.",
    "negative": "What should not be in the picture",
    "model": "What draws; all that are on this machine",
    "steps": "More is slower and finer",
    "guidance": "How closely the words are followed",
    "method": "A second way to follow the words; most take twice the time",
    "scale": "How strongly it works; 1 is neutral",
    "solver": "How each step is computed",
    "schedule": "How the noise falls",
    "window_from": "Share of the steps after which the method begins",
    "window_to": "Share of the steps after which it ends; less is quicker",
    "shift": "Moves the noise levels, as 3; empty: as the model was made",
    "step_cache": "Quicker, and a little different",
    "restart": "Go back to more noise: low, high, times, as 0.3, 0.6, 2",
    "seed": "The same seed and settings give the same picture; empty or -1: a random one",
    "lock": "Keep the seed for the next picture",
    "aspect": "Shape of the picture, at about the pixels that suit {name}, which learned {learned}",
    "width": "In pixels",
    "height": "In pixels",
    "images": "Each from the next seed",
    "prompts": "One prompt per line; everything else as set above",
    "x": "What changes from left to right",
    "y": "What changes from top to bottom",
    "x_values": "Between commas; whole numbers also as 1-4",
    "y_values": "The same; prompts go on lines of their own",
    "as_picture": "Width and height are then those of the picture, as near as the model can draw them",
    "strength": "How much is changed, of what is painted or of all; at 1 nothing of it is left",
    "grow": "What was painted, larger by so many pixels",
    "feather": "A soft edge of so many pixels around it",
    "outpaint": "Pixels to add: left, top, right, bottom, as 0, 0, 64, 0",
    "writer": "What rewrites it; that takes as long as the model is large",
    "told": "What it is told to do",
    "heat": "0: the likeliest words; above it others, too; empty: as released",
    "as_reference": "Width and height are then those at which the model sees it; of FLUX.3 cut back to it",
    "network": "What sees the control picture: a Canny or Depth model itself, or a network in the folder of models",
    "network_scale": "How strongly the network works",
    "network_mode": "Of Union ControlNets: canny, tile, depth, blur, pose, gray, low quality",
}
AXES = [
    ("seed", "seed"),
    ("steps", "steps"),
    ("guidance", "guidance"),
    ("strength of the first LoRA", "lora"),
    ("strength of the second LoRA", "lora 2"),
    ("solver", "solver"),
    ("schedule", "schedule"),
    ("scale of the guidance method", "guide.scale"),
    ("static shift", "shift"),
    ("prompt", "prompt"),
    ("negative prompt", "negative"),
    ("model", "model"),
    ("width", "width"),
    ("height", "height"),
]
MOST = {"steps": 100, "guidance": 10, "scale": 10, "images": 16}
LEAST = {"steps": 1, "guidance": 0, "scale": 0, "images": 1}
"""Where sliders end and begin; settings of pictures that lie beyond make them longer."""

STAGE = """miniflux.stage(element, props, {
  use: (d) => trigger('use', d), again: (d) => trigger('again', d),
  cancel: (d) => trigger('cancel', d), remove: (d) => trigger('remove', d),
  restore: (d) => trigger('restore', d),
}, watch);"""
LORAS = "miniflux.loras(element, props, {remove: (d) => trigger('remove', d)}, watch);"
INSIDE = (
    """miniflux.inside(element, props, {look: (d) => trigger('look', d), view: (d) => trigger('view', d)}, watch);"""
)
"""Gradio finds the names of our events in these texts."""

PAINT = "Paint over what is drawn anew; with nothing painted, all of it is changed."
SLOT = 512  # pixels of the editor's sides while it is empty
DROP = (
    "Drop anywhere on the page: a LoRA (.safetensors), a saved picture, whose settings fill the controls, or a list of "
    "prompts (.txt)."
)
NO_AXIS = ("nothing", "")


def learned(model: Listed) -> str:
    """What to say beside the shapes of pictures."""
    return HELP["aspect"].format(name=model.name, learned=model.variant.learned)


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Every component that a handler reads or writes. The first ones are named as the values in `form`."""

    prompt: gr.Textbox
    negative: gr.Textbox
    model: gr.Dropdown
    loras: gr.HTML
    steps: gr.Slider
    guidance: gr.Slider
    method: gr.Dropdown
    scale: gr.Slider
    solver: gr.Dropdown
    schedule: gr.Dropdown
    seed: gr.Textbox
    images: gr.Slider
    width: gr.Slider
    height: gr.Slider
    window_from: gr.Slider
    window_to: gr.Slider
    shift: gr.Textbox
    step_cache: gr.Dropdown
    restart: gr.Textbox
    as_picture: gr.Checkbox
    as_reference: gr.Checkbox
    strength: gr.Slider
    grow: gr.Slider
    feather: gr.Slider
    outpaint: gr.Textbox
    network: gr.Dropdown
    network_scale: gr.Slider
    network_mode: gr.Textbox
    rest: gr.JSON
    lock: gr.Checkbox
    aspect: gr.Dropdown
    prompts: gr.Textbox
    x: gr.Dropdown
    x_values: gr.Textbox
    y: gr.Dropdown
    y_values: gr.Textbox
    stage: gr.HTML
    image: gr.ImageEditor
    references: gr.Gallery
    control: gr.Image
    edges: gr.Button
    files: gr.File
    draw: gr.Button
    die: gr.Button
    forget: gr.Button
    also: gr.Textbox
    more: gr.Accordion
    draw_all: gr.Button
    draw_grid: gr.Button
    kept: gr.Textbox
    refused: gr.HTML
    writer: gr.Dropdown
    told: gr.Textbox
    heat: gr.Textbox
    rewrite: gr.Button
    before: gr.Textbox
    take_back: gr.Button
    unable: gr.Textbox
    inside: gr.HTML

    @property
    def settings(self) -> dict[str, Any]:
        """The components whose values make a request, by the names that `form` uses."""
        names = [f.name for f in fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("lock")]}

    @property
    def slots(self) -> set[Any]:
        """The components that hold pictures; their values are files, and are sent only where they are wanted."""
        return {self.image, self.references, self.control}

    @property
    def keeping(self) -> dict[str, Any]:
        """The components that are as they were left when the page is loaded again; LoRAs see to it themselves, and
        references are gone then, with the wish to be as large as one."""
        more = ("lock", "aspect", "prompts", "x", "x_values", "y", "y_values", "told", "heat")
        return {name: it for name, it in self.settings.items() if name not in ("loras", "as_reference")} | {
            name: getattr(self, name) for name in more
        }


def build(site: Site) -> Controls:
    """Lay everything out, inside the `gr.Blocks` that is open."""
    first = site.listed[site.first]
    grey = form.greyed(first, form.usual_method(first)[0])

    def usable(name: str) -> dict[str, Any]:
        return {"interactive": name not in grey, "info": grey.get(name, HELP[name]), "elem_id": f"mf-{name}"}

    made: dict[str, Any] = {}
    drawn: dict[str, Any] = {"html_template": "<div></div>", "apply_default_css": False, "padding": False}
    script = "\n".join((Path(__file__).parent / "script" / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    gr.HTML(None, elem_id="mf-page", js_on_load=f"{script}\nminiflux.page(element);", **drawn)
    made["kept"] = gr.Textbox(visible=False)
    with gr.Row(elem_id="mf-columns"):
        with gr.Column(elem_id="mf-left", scale=0, min_width=0):
            with gr.Column(elem_id="mf-compose", min_width=0):
                made["prompt"] = gr.Textbox(
                    label="Prompt", value="a red circle on a blue background", lines=3, max_lines=8, **usable("prompt")
                )
                made["draw"] = gr.Button("Draw", variant="primary", elem_id="mf-draw")
            with gr.Column(elem_id="mf-settings"):
                made |= _model(site, usable, drawn)
                made |= _sampling(site, usable)
                made |= _shape(site, usable)
                made |= _longer(site, usable)
                made |= _pictures(site, usable, drawn)
                made |= _more(usable)
                made |= _many()
        with gr.Column(elem_id="mf-right", scale=1, min_width=0):
            made["stage"] = gr.HTML(
                None,
                elem_id="mf-stage",
                js_on_load=STAGE,
                **drawn,
            )
            with gr.Accordion("Look inside", open=False, elem_classes="mf-room", elem_id="mf-inside"):
                made["inside"] = gr.HTML(None, elem_id="mf-inside-view", js_on_load=INSIDE, **drawn)
            gr.HTML(None, elem_id="mf-history", js_on_load="miniflux.history(element);", **drawn)
    return Controls(**made)


def unable(site: Site) -> tuple[list[str], str]:
    """The language models that can write, and what to say if none can."""
    found, refused = site.models.writers.listed()
    reasons = [reason if name in reason else f"{name}: {reason}" for name, reason in refused.items()]
    why = "No language model that can write is here: FLUX.2's text encoder, whole, or another Qwen3 or Mistral in the "
    return list(found), "" if found else "\n".join([f"{why}folder of --models.", *reasons])


def _longer(site: Site, usable: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    names, why = unable(site)
    with gr.Accordion("A longer prompt, by a language model", open=False, elem_classes="mf-room", elem_id="mf-longer"):
        made["unable"] = gr.Textbox(
            why, show_label=False, interactive=False, lines=2, max_lines=10, visible=not names, elem_id="mf-unable"
        )
        some: dict[str, Any] = {"visible": bool(names)}
        made["writer"] = gr.Dropdown(
            names, value=names[0] if names else None, label="Written by", **usable("writer"), **some
        )
        made["told"] = gr.Textbox(label="Told", value=SYSTEM, lines=2, max_lines=10, **usable("told"), **some)
        made["heat"] = gr.Textbox(label="Temperature", value="", lines=1, max_lines=1, **usable("heat"), **some)
        made["rewrite"] = gr.Button("Rewrite the prompt", size="sm", elem_id="mf-rewrite", **some)
        made["before"] = gr.Textbox(visible=False)
        made["take_back"] = gr.Button("Take it back", size="sm", visible=False, elem_id="mf-take-back")
    return made


def _model(site: Site, usable: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion("Model and LoRAs", elem_classes="mf-room"):
        made["model"] = gr.Dropdown(list(site.listed), value=site.first, label="Model", **usable("model"))
        made["refused"] = gr.HTML(
            site.models.catalogue.refused,
            elem_id="mf-refused",
            js_on_load="miniflux.refused(element, props, watch);",
            **drawn,
        )
        made["loras"] = gr.HTML(
            [{**row, "late": True} for row in form.rows(Shelf(site.bundled), site.first)],
            elem_id="mf-loras",
            js_on_load=LORAS,
            **drawn,
        )
        gr.HTML(None, elem_id="mf-drop-note", js_on_load=f'miniflux.note(element, "{DROP}");', **drawn)
        made["files"] = gr.File(
            show_label=False,
            label="LoRAs, saved pictures, lists of prompts",
            file_count="multiple",
            file_types=[*SAFETENSORS, ".png", ".jpg", ".jpeg", ".webp", ".txt"],
            elem_id="mf-files",
        )
    return made


def _sampling(site: Site, usable: Any) -> dict[str, Any]:
    first = site.listed[site.first]
    usual = 3.0 if first.guidance is None else first.guidance
    method, scale = form.usual_method(first)
    made: dict[str, Any] = {}
    with gr.Accordion("Steps and guidance", elem_classes="mf-room"):
        made["steps"] = gr.Slider(1, MOST["steps"], value=first.steps, step=1, label="Steps", **usable("steps"))
        made["guidance"] = gr.Slider(0, MOST["guidance"], value=usual, step=0.1, label="Guidance", **usable("guidance"))
        made["method"] = gr.Dropdown(
            [(label, name) for name, label in form.METHODS.items()],
            value=method,
            label="Guidance method",
            **usable("method"),
        )
        made["scale"] = gr.Slider(
            0, MOST["scale"], value=scale, step=0.1, label="Scale of the method", **usable("scale")
        )
        made["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=6, **usable("negative"))
        with gr.Row():
            made["solver"] = gr.Dropdown(
                list(SOLVERS), value="euler", label="Solver", allow_custom_value=True, min_width=120, **usable("solver")
            )
            made["schedule"] = gr.Dropdown(
                [AUTO, *SPACINGS],
                value=AUTO,
                label="Schedule",
                allow_custom_value=True,
                min_width=120,
                **usable("schedule"),
            )
        made["also"] = gr.Textbox(
            label="Also in use, from a picture", interactive=False, visible=False, elem_id="mf-also"
        )
        made["forget"] = gr.Button("Forget these", size="sm", visible=False, elem_id="mf-forget")
        made["rest"] = gr.JSON({}, visible=False)
    return made


def _shape(site: Site, usable: Any) -> dict[str, Any]:
    first = site.listed[site.first]
    least, most = fitting.sides_of(first)
    made: dict[str, Any] = {}
    with gr.Accordion("Size, seed, number", elem_classes="mf-room"):
        told: dict[str, Any] = {**usable("aspect"), "info": learned(first)}
        made["aspect"] = gr.Dropdown([*form.ASPECTS, "own size"], value="1:1", label="Aspect", **told)
        with gr.Row():
            for side in ("width", "height"):
                about: dict[str, Any] = {"label": side.capitalize(), "min_width": 120, **usable(side)}
                made[side] = gr.Slider(least, most, value=first.size, step=fitting.SIDE, **about)
        with gr.Row(elem_id="mf-seeds"):
            # Text, because browsers round numbers above 2**53, and seeds go to 2**64.
            made["seed"] = gr.Textbox(label="Seed", value="0", lines=1, max_lines=1, min_width=120, **usable("seed"))
            made["die"] = gr.Button("⚄ Roll", elem_id="mf-die", min_width=80)
            made["lock"] = gr.Checkbox(label="Lock", value=False, min_width=120, **usable("lock"))
        made["images"] = gr.Slider(1, MOST["images"], value=1, step=1, label="Number of pictures", **usable("images"))
    return made


def _pictures(site: Site, usable: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    bare: dict[str, Any] = {"buttons": [], "sources": ["upload", "clipboard"]}
    with gr.Accordion("Pictures to start from", open=False, elem_classes="mf-room", elem_id="mf-pictures"):
        made["image"] = plain(
            gr.ImageEditor(
                label="Picture to change",
                type="filepath",
                height=380,
                transforms=(),
                brush=gr.Brush(default_size=24, colors=["#e0218a"], color_mode="fixed"),
                layers=False,
                canvas_size=(SLOT, SLOT),
                elem_id="mf-image",
                **bare,
            )
        )
        gr.HTML(None, elem_id="mf-paint-note", js_on_load=f'miniflux.note(element, "{PAINT}");', **drawn)
        made["as_picture"] = gr.Checkbox(label="As large as the picture", value=True, **usable("as_picture"))
        made["strength"] = gr.Slider(
            0.05, 1, value=0.75, step=0.05, label="Strength of the change", **usable("strength")
        )
        with gr.Row():
            for name, least in (("grow", -32), ("feather", 0)):
                made[name] = gr.Slider(
                    least, 32, value=0, step=1, label=name.capitalize(), min_width=120, **usable(name)
                )
        made["outpaint"] = gr.Textbox(label="Outpaint", lines=1, max_lines=1, value="", **usable("outpaint"))
        made["references"] = plain(
            gr.Gallery(
                label="References: what Kontext, FLUX.2 and FLUX.3 look at",
                type="filepath",
                columns=3,
                height=160,
                object_fit="contain",
                file_types=["image"],
                interactive=True,
                elem_id="mf-references",
                sources=["upload", "clipboard"],
                buttons=[],
            )
        )
        made["as_reference"] = gr.Checkbox(
            label="As large as the first reference", value=False, **usable("as_reference")
        )
        made["control"] = plain(
            gr.Image(
                label="Control picture",
                type="filepath",
                image_mode=None,
                height=220,
                elem_id="mf-control",
                **bare,
            )
        )
        made["edges"] = gr.Button("Find its edges", size="sm", elem_id="mf-edges")
        made["network"] = gr.Dropdown(
            [ITSELF, *site.models.catalogue.networks], value=ITSELF, label="Seen by", **usable("network")
        )
        with gr.Row():
            made["network_scale"] = gr.Slider(
                0, 2, value=1, step=0.05, label="Scale of the network", min_width=120, **usable("network_scale")
            )
            made["network_mode"] = gr.Textbox(
                label="Mode", lines=1, max_lines=1, value="", min_width=120, **usable("network_mode")
            )
    return made


def _more(usable: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion(
        "More: shift, step cache, restart", open=False, elem_classes="mf-room", elem_id="mf-more"
    ) as made["more"]:
        with gr.Row():
            for end, share in (("from", 0.0), ("to", 1.0)):
                made[f"window_{end}"] = gr.Slider(
                    0, 1, value=share, step=0.05, label=f"Method {end}", min_width=120, **usable(f"window_{end}")
                )
        made["step_cache"] = gr.Dropdown(
            [(label, name) for name, label in form.STEP_CACHES.items()],
            value=form.NO_CACHE,
            label="Step cache",
            **usable("step_cache"),
        )
        with gr.Row():
            for name in ("shift", "restart"):
                made[name] = gr.Textbox(
                    label=name.capitalize(), lines=1, max_lines=1, min_width=120, value="", **usable(name)
                )
    return made


def _many() -> dict[str, Any]:
    made: dict[str, Any] = {}

    def text(name: str, label: str, lines: int, value: str = "") -> gr.Textbox:
        return gr.Textbox(label=label, info=HELP[name], lines=lines, max_lines=10, value=value, elem_id=f"mf-{name}")

    with gr.Accordion("Batch: a list of prompts", open=False, elem_classes="mf-room", elem_id="mf-batch"):
        made["prompts"] = text("prompts", "Prompts", 4)
        made["draw_all"] = gr.Button("Draw all", elem_id="mf-draw-all")
    with gr.Accordion("X/Y grid: two settings compared", open=False, elem_classes="mf-room", elem_id="mf-grid"):
        for name, choices, axis, values in (("x", AXES, "seed", "1-3"), ("y", [NO_AXIS, *AXES], "steps", "4, 8, 20")):
            made[name] = gr.Dropdown(choices, value=axis, label=name.upper(), info=HELP[name], elem_id=f"mf-{name}")
            made[f"{name}_values"] = text(f"{name}_values", f"{name.upper()} values", 1, values)
        made["draw_grid"] = gr.Button("Draw grid", elem_id="mf-draw-grid")
    return made

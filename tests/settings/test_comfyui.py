"""ComfyUI graphs as people make them: what is understood is right, everything else is listed, nothing is fatal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflux.errors import InputError, SettingsError
from miniflux.settings import LoraUse, comfyui
from miniflux.settings.foreign import Mapped
from tests.hanging import no_hang


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes: Any) -> dict[str, Any]:
    sampler = node("KSampler", seed=5, steps=4, cfg=1, sampler_name="euler", scheduler="simple", denoise=1)
    sampler["inputs"] |= {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": sampler,
        "4": node("UNETLoader", unet_name="flux1-schnell.safetensors", weight_dtype="default"),
        "5": node("EmptyLatentImage", width=512, height=256, batch_size=1),
        "6": node("CLIPTextEncode", text="a star"),
        "7": node("CLIPTextEncode", text="blurry"),
        "8": node("VAEDecode", samples=["3", 0]),
        "9": node("SaveImage", images=["8", 0]),
        **changes,
    }


def read(nodes: Any, what: str = "prompt") -> Mapped:
    return comfyui.read(what, json.dumps(nodes))


def told(mapped: Mapped) -> str:
    return "\n".join(mapped.not_understood)


def with_sampler(**inputs: Any) -> dict[str, Any]:
    nodes = graph()
    nodes["3"]["inputs"] |= inputs
    return nodes


def test_the_plain_graph_is_all_understood() -> None:
    mapped = read(graph())
    assert (mapped.request.prompt, mapped.request.steps, mapped.request.width) == ("a star", 4, 512)
    assert [line for line in mapped.not_understood if "noise is drawn otherwise" not in line] == []


def test_texts_joined_by_nodes() -> None:
    joined = {
        "6": node("CLIPTextEncode", text=["20", 0]),
        "20": node("StringConcatenate", string_a=["21", 0], string_b="in fog", delimiter=", "),
        "21": node("PrimitiveString", value="a star"),
    }
    assert read(graph(**joined)).request.prompt == "a star, in fog"
    for other in (
        node("Text Concatenate", text_a="a", text_b="b", delimiter=" "),
        node("CR Text Concatenate", text1=["21", 0], text2="b"),
        node("ImpactWildcardProcessor", wildcard_text="{a|b}", populated_text="a", mode=True, seed=1),
        node("DPRandomGenerator", text="{a|b}"),
        node("SomeNode", text="a", other="b"),
        node("SomeNode"),
    ):
        mapped = read(graph(**{**joined, "20": other}))
        assert mapped.request.prompt == ""
        assert f"text: comes from node 20, {other['class_type']}, which is not understood" in told(mapped)


def test_two_texts_that_differ_are_told() -> None:
    flux = node("CLIPTextEncodeFlux", clip_l="tags", t5xxl="a long text", guidance=2.5)
    mapped = read(graph(**{"4": node("UNETLoader", unet_name="flux1-dev.safetensors"), "6": flux}))
    assert (mapped.request.prompt, mapped.request.guidance) == ("a long text", 2.5)
    assert "clip_l is another text than t5xxl, which is taken: 'tags'" in told(mapped)
    flux["inputs"]["clip_l"] = "a long text"
    assert "another text" not in told(read(graph(**{"6": flux})))


def test_conditionings_that_are_combined_are_told() -> None:
    both = {"10": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0])}
    nodes = with_sampler(positive=["10", 0], negative=None)
    mapped = read({**nodes, **both})
    assert mapped.request.prompt == "a star"
    assert "ConditioningCombine between the prompt" in told(mapped) and "node 7: CLIPTextEncode" in told(mapped)
    control = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1)
    mapped = read({**with_sampler(cfg=2, positive=["10", 0], negative=["10", 1]), "10": control})
    assert (mapped.request.prompt, mapped.request.negative) == ("a star", "blurry")
    assert told(mapped).count("ControlNetApplyAdvanced") == 2


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"denoise": ["50", 0]}, "denoise"),
        ({"cfg": ["50", 0]}, "cfg"),
        ({"steps": ["50", 0]}, "steps"),
        ({"seed": ["50", 0]}, "seed"),
        ({"cfg": ["99", 0]}, "cfg: linked to nothing"),
        ({"denoise": "0.5"}, "denoise '0.5'"),
        ({"steps": 4.7}, "steps 4.7: no whole number"),
        ({"steps": True}, "steps True"),
        ({"cfg": "lots"}, "cfg 'lots'"),
        ({"cfg": None}, "cfg None"),
        ({"positive": None}, "prompt: no text leads"),
        ({"positive": ["99", 0]}, "prompt: no text leads"),
        ({"sampler_name": None}, "sampler None"),
        ({"latent_image": ["50", 0]}, "begins with latents of MathExpression"),
    ],
)
def test_values_that_are_not_certain_are_told(inputs: dict[str, Any], said: str) -> None:
    maths = node("MathExpression|pysssss", expression="a*2", a=["51", 0])
    assert said in told(read({**with_sampler(**inputs), "50": maths, "51": node("PrimitiveInt", value=3)}))


def test_strings_where_numbers_are() -> None:
    mapped = read(with_sampler(steps="4", seed="7", cfg="2.5", denoise="1.0"))
    assert (mapped.request.steps, mapped.request.seed) == (4, 7)
    assert mapped.request.guide is not None and mapped.request.guide.scale == 2.5
    assert mapped.request.negative == "blurry" and "denoise" not in told(mapped)
    nodes = graph(**{"5": node("EmptyLatentImage", width="512", height=256.0, batch_size="2")})
    assert (read(nodes).request.width, read(nodes).request.height, read(nodes).request.images) == (512, 256, 2)


def test_values_that_are_certain_are_followed() -> None:
    nodes = with_sampler(steps=["50", 0], seed=["51", 0], positive=["60", 0], cfg=["53", 0])
    nodes |= {
        "50": node("PrimitiveInt", value=6, control_after_generate="fixed"),
        "51": node("Seed (rgthree)", seed=["52", 0]),
        "52": node("INTConstant", value=11),
        "53": node("PrimitiveFloat", value=1.0),
        "60": node("Reroute", **{"": ["61", 0]}),
        "61": node("Reroute", **{"": ["6", 0]}),
    }
    mapped = read(nodes)
    assert (mapped.request.prompt, mapped.request.steps, mapped.request.seed) == ("a star", 6, 11)
    assert not [line for line in mapped.not_understood if line.startswith("node")]


def test_entries_that_are_no_nodes_are_told() -> None:
    mapped = read(graph(extra=5, version="1", nothing=None, odd={"class_type": 3}, list=[1]))
    assert mapped.request.prompt == "a star"
    for name in ("extra", "version", "nothing", "odd", "list"):
        assert f"the entry '{name}' is no node" in told(mapped)
    with pytest.raises(SettingsError, match="no node"):
        read({"a": 1})


def test_other_lora_nodes_are_told() -> None:
    lora = node("LoraLoader|pysssss", lora_name={"content": "a.safetensors"}, strength_model=1, model=["4", 0])
    assert "LoraLoader|pysssss between" in told(read({**with_sampler(model=["40", 0]), "40": lora}))
    lora = node("LoraLoader", lora_name={"content": "a"}, strength_model="0.5", strength_clip="0.5", model=["4", 0])
    mapped = read({**with_sampler(model=["40", 0]), "40": lora})
    assert mapped.request.loras == () and "LoRA {'content': 'a'}" in told(mapped)
    lora["inputs"]["lora_name"] = "a.safetensors"
    mapped = read({**with_sampler(model=["40", 0]), "40": lora})
    assert mapped.request.loras == (LoraUse("a.safetensors", 0.5),) and "strength_clip" not in told(mapped)


def test_precisions_and_weights_are_told() -> None:
    loader = node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")
    assert "weight_dtype 'fp8_e4m3fn'" in told(read(graph(**{"4": loader})))
    assert "weights in the prompt" in told(read(graph(**{"6": node("CLIPTextEncode", text="a (star:1.3)")})))


def test_half_characters_and_long_prompts_are_told() -> None:
    assert "half a character" in told(read(graph(**{"6": node("CLIPTextEncode", text="a \ud83d")})))
    assert read(graph(**{"6": node("CLIPTextEncode", text="a \ud83d\ude00")})).request.prompt == "a \U0001f600"
    assert "at most 131072" in told(read(graph(**{"6": node("CLIPTextEncode", text="a" * 200_000)})))


def test_circles_and_towers_of_texts_end() -> None:
    tower = {
        str(i): node("StringConcatenate", string_a=[str(i + 1), 0], string_b=[str(i + 1), 0], delimiter="")
        for i in range(100, 3000)
    }
    for last in (
        node("PrimitiveString", value="x" * 1000),
        node("StringConcatenate", string_a=["100", 0], string_b=""),
    ):
        with no_hang():
            mapped = read(graph(**{**tower, "3000": last, "6": node("CLIPTextEncode", text=["100", 0])}))
        assert mapped.request.prompt == "" and "which is not understood" in told(mapped)


# The editor's form


def item(id: int, kind: str, values: Any = None, inputs: Any = (), outputs: Any = (), mode: int = 0) -> dict[str, Any]:
    """`inputs`: (name, type, link)."""
    given = [{"name": name, "type": type, "link": link} for name, type, link in inputs]
    return {
        "id": id,
        "type": kind,
        "mode": mode,
        "widgets_values": values,
        "inputs": given,
        "outputs": [{"type": type} for type in outputs],
    }


SAMPLER = [5, "fixed", 4, 1, "euler", "simple", 1]


def workflow(*more: dict[str, Any], links: Any = (), positive: int = 1, model: int = 3) -> dict[str, Any]:
    inputs = [("model", "MODEL", model), ("positive", "CONDITIONING", positive), ("latent_image", "LATENT", 2)]
    return {
        "nodes": [
            item(3, "KSampler", SAMPLER, inputs, ["LATENT"]),
            item(4, "UNETLoader", ["flux1-schnell.safetensors", "default"], (), ["MODEL"]),
            item(5, "EmptyLatentImage", [512, 256, 1], (), ["LATENT"]),
            item(6, "CLIPTextEncode", ["a star"], (), ["CONDITIONING"]),
            *more,
        ],
        "links": [
            *([1, 6, 0, 3, 1, "CONDITIONING"], [2, 5, 0, 3, 2, "LATENT"], [3, 4, 0, 3, 0, "MODEL"]),
            *links,
        ],
    }


def edited(*more: dict[str, Any], **options: Any) -> Mapped:
    return read(workflow(*more, **options), "workflow")


def test_bypassed_nodes_hand_on_what_they_get() -> None:
    inputs = [("model", "MODEL", 10), ("clip", "CLIP", None)]
    lora = item(20, "LoraLoader", ["a.safetensors", 0.5, 0.5], inputs, ["MODEL", "CLIP"], mode=4)
    links = [[10, 4, 0, 20, 0, "MODEL"], [11, 20, 0, 3, 0, "MODEL"]]
    mapped = edited(lora, links=links, model=11)
    assert mapped.request.loras == () and mapped.request.model == "flux1-schnell"
    mapped = edited({**lora, "mode": 0}, links=links, model=11)
    assert mapped.request.loras == (LoraUse("a.safetensors", 0.5),)


def test_muted_nodes_give_nothing() -> None:
    muted = item(20, "FluxGuidance", [9.0], [("conditioning", "CONDITIONING", 1)], ["CONDITIONING"], mode=2)
    mapped = edited(muted, links=[[11, 20, 0, 3, 1, "CONDITIONING"]], positive=11)
    assert mapped.request.prompt == "" and "positive is linked to nothing" in told(mapped)
    assert "no text leads" in told(mapped)


def test_nodes_of_the_editor_alone_are_followed() -> None:
    text = item(6, "CLIPTextEncode", ["old"], [("text", "STRING", 30)], ["CONDITIONING"])
    primitive = item(21, "PrimitiveNode", ["a moon", "fixed"], (), ["STRING"])
    setter = item(22, "SetNode", ["cond"], [("CONDITIONING", "CONDITIONING", 31)], ["*"])
    getter = item(23, "GetNode", ["cond"], (), ["CONDITIONING"])
    reroute = item(24, "Reroute", None, [("", "*", 32)], ["CONDITIONING"])
    links = [
        *([30, 21, 0, 6, 0, "STRING"], [31, 6, 0, 22, 0, "*"], [32, 23, 0, 24, 0, "*"]),
        {"id": 33, "origin_id": 24, "origin_slot": 0, "target_id": 3, "target_slot": 1, "type": "*"},
        *(None, 7, [1], {}, {"id": 9}),
    ]
    made = workflow(primitive, setter, getter, reroute, links=links, positive=33)
    made["nodes"][3] = text
    made["nodes"] += [None, 5, {}, {"id": 90}, {"id": 91, "type": "Note", "widgets_values": ["x"]}]
    mapped = read(made, "workflow")
    assert mapped.request.prompt == "a moon"
    assert "an entry that is no node: 5" in told(mapped) and "link 7" in told(mapped)
    assert not [line for line in mapped.not_understood if line.startswith("node")]


def test_sub_graphs_are_opened() -> None:
    inner = {
        "id": "u-1",
        "name": "text",
        "nodes": [
            item(6, "CLIPTextEncode", ["a comet"], (), ["CONDITIONING"]),
            item(7, "FluxGuidance", [2.0], [("conditioning", "CONDITIONING", 1)], ["CONDITIONING"]),
            item(8, "LoraLoaderModelOnly", ["a.safetensors", 0.5], [("model", "MODEL", 3)], ["MODEL"]),
        ],
        "links": [
            {"id": 1, "origin_id": 6, "origin_slot": 0, "target_id": 7, "target_slot": 0},
            {"id": 2, "origin_id": 7, "origin_slot": 0, "target_id": -20, "target_slot": 0},
            {"id": 3, "origin_id": -10, "origin_slot": 0, "target_id": 8, "target_slot": 0},
            {"id": 4, "origin_id": 8, "origin_slot": 0, "target_id": -20, "target_slot": 1},
        ],
    }
    outer = item(40, "u-1", [], [("model", "MODEL", 50)], ["CONDITIONING", "MODEL"])
    links = [[50, 4, 0, 40, 0, "MODEL"], [51, 40, 0, 3, 1, "CONDITIONING"], [52, 40, 1, 3, 0, "MODEL"]]
    made = workflow(outer, links=links, positive=51, model=52)
    made["definitions"] = {"subgraphs": [inner]}
    made["nodes"][1]["widgets_values"] = ["flux1-dev.safetensors", "default"]
    request = read(made, "workflow").request
    assert (request.prompt, request.guidance, request.model) == ("a comet", 2.0, "flux1-dev")
    assert request.loras == (LoraUse("a.safetensors", 0.5),)
    inner["nodes"].append(item(9, "u-1"))  # within itself
    with no_hang():
        assert read(made, "workflow").request.prompt == "a comet"


def test_group_nodes_and_unknown_ones_are_told() -> None:
    group = item(40, "workflow>two", ["x"], (), ["CONDITIONING"])
    mapped = edited(group, links=[[51, 40, 0, 3, 1, "CONDITIONING"]], positive=51)
    assert mapped.request.prompt == "" and "workflow>two" in told(mapped)


def test_widgets_in_every_form() -> None:
    made = workflow()
    made["nodes"][0]["widgets_values"] = {"seed": 9, "steps": 3, "cfg": 1, "sampler_name": "euler", "scheduler": "beta"}
    assert (read(made, "workflow").request.seed, read(made, "workflow").request.steps) == (9, 3)
    made["nodes"][0]["widgets_values"] = [5, 7, 1, "euler", "simple", 1]  # of old files, without the control of seeds
    assert read(made, "workflow").request.steps == 7
    unknown = item(21, "My Text", ["a cloud"], [("text", "STRING", None)], ["STRING"])
    unknown["inputs"][0]["widget"] = {"name": "text"}
    made = workflow(unknown, links=[[30, 21, 0, 6, 0, "STRING"]])
    made["nodes"][3]["inputs"] = [{"name": "text", "type": "STRING", "link": 30, "widget": {"name": "text"}}]
    assert read(made, "workflow").request.prompt == "a cloud"


def test_either_form_in_either_place() -> None:
    assert read(workflow(), "prompt").request.prompt == "a star"
    assert read(graph(), "workflow").request.prompt == "a star"
    assert read({"prompt": graph(), "client_id": "x"}).request.prompt == "a star"
    assert read({"output": graph(), "workflow": {}}).request.prompt == "a star"


LEAVES = st.none() | st.booleans() | st.integers(-5, 70) | st.floats(allow_nan=False)
JSON = st.recursive(
    LEAVES | st.sampled_from(["3", "6", "x", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "text"]), inner, max_size=3),
    max_leaves=6,
)


def broken(value: Any, draw: Any) -> Any:
    """The value with some of its parts exchanged for anything."""
    if draw(st.integers(0, 25)) == 0:
        return draw(JSON)
    if isinstance(value, dict):
        return {name: broken(x, draw) for name, x in value.items() if draw(st.integers(0, 40))}
    if isinstance(value, list):
        return [broken(x, draw) for x in value if draw(st.integers(0, 40))]
    return value


@settings(max_examples=150)
@given(st.data())
def test_any_graph_is_read_or_refused(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([graph(), workflow()]))
    try:
        mapped = read(broken(whole, data.draw))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert mapped.request.prompt in ("a star", "blurry", "") or mapped.not_understood

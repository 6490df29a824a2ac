"""Networks that steer, from their files: told from their keys, loaded strictly, refused by name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import miniflux
from miniflux import conditions
from miniflux.checkpoints import open_tensors, save
from miniflux.checkpoints.loading import bare, compare
from miniflux.checkpoints.networks import BY_KIND
from miniflux.conditions import again
from miniflux.errors import CheckpointError, InputError, MinifluxError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.controlnet import ControlNet, ControlNetConfig
from miniflux.models.flux1 import run_block
from miniflux.models.ip_adapter import IPAdapterConfig, XlabsIPAdapter
from miniflux.models.redux import Redux, ReduxConfig
from miniflux.models.vision import SiglipVision, VisionConfig
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.pipeline import Pipeline
from miniflux.sampling import cache, denoising, guide
from miniflux.steering import _config
from tests.checkpoints.raw import sparse
from tests.tiny import AUTOENCODER, randomise

Manifest = Callable[[str], dict[str, list[int]]]
KINDS = {
    "diffusers-controlnet-5-0-single-mode": ("ControlNet", {"depth": 5, "depth_single_blocks": 0, "modes": 0}),
    "diffusers-controlnet-instantx-union": ("ControlNet", {"depth": 5, "depth_single_blocks": 10, "modes": 10}),
    "diffusers-controlnet-shakker-depth": ("ControlNet", {"depth": 5, "depth_single_blocks": 10, "modes": 0}),
    "diffusers-controlnet-shakker-union-pro-2": ("ControlNet", {"depth": 6, "depth_single_blocks": 0, "modes": 0}),
    "xlabs-flux-controlnet-v3": ("ControlNet", {"depth": 2, "hint_channels": 16, "control_channels": 64}),
    "bfl-flux1-redux-dev": ("Redux", {"redux_dim": 1152, "txt_in_features": 4096}),
    "diffusers-redux-image-encoder": ("Redux", {"redux_dim": 1152, "txt_in_features": 4096}),
    "xlabs-flux-ip-adapter": ("XlabsIPAdapter", {"double": 19, "words": 4, "embedding": 768}),
    "te-siglip-so400m-patch14-384-vision": ("SiglipVision", {"image_size": 384, "num_attention_heads": 16}),
}
TINY = miniflux.tiny().transformer.config
PHOTO = Image.effect_noise((64, 48), 90).convert("RGB")


@pytest.mark.parametrize("name", KINDS)
def test_published_files_fit(name: str, manifest: Manifest, tmp_path: Path) -> None:
    """Strictly, at full size, in every layout that was published; their sizes are told from shapes alone."""
    kind, sizes = KINDS[name]
    path = sparse(tmp_path / "a.safetensors", manifest(name))
    record = next(one for network, one in BY_KIND.items() if network.__name__ == kind)
    config = _config(record, open_tensors(path), path)
    assert {field: getattr(config, field) for field in sizes} == sizes
    assert not compare(bare(record.kind, config), open_tensors(path)).problems


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


def controlnet(**more: int) -> ControlNet:

    sizes = {**asdict(TINY), "depth": 1, "depth_single_blocks": 1, "control_channels": TINY.out_channels, **more}
    return randomise(ControlNet(ControlNetConfig(**sizes))).eval()


def tower() -> SiglipVision:
    return randomise(SiglipVision(VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        hidden_act="gelu", layer_norm_eps=1e-6,
    ))).eval()  # fmt: skip


def steered(network: ControlNet | None = None) -> dict[str, conditions.Condition]:
    """One of each kind."""
    redux = randomise(Redux(ReduxConfig(redux_dim=16, txt_in_features=TINY.context_in_dim, inner=24)))
    adapter = randomise(XlabsIPAdapter(IPAdapterConfig(
        embedding=16, context=12, words=2, hidden_size=TINY.hidden_size, double=TINY.depth,
    )))  # fmt: skip
    return {
        "controlnet": conditions.ControlNet(network or controlnet(), PHOTO, scale=0.5),
        "redux": conditions.Redux(conditions.Steering(redux, tower()), PHOTO),
        "ip-adapter": conditions.IPAdapter(conditions.Steering(adapter, tower()), PHOTO, scale=0.5),
    }


SIZE = {"width": 64, "height": 48, "steps": 3}


@pytest.mark.parametrize("name", ["controlnet", "redux", "ip-adapter"])
def test_a_scale_of_zero_changes_nothing_and_windows_add_up(name: str, pipe: Pipeline) -> None:
    """Where an invariant is known: no strength, no change; a window of no step likewise; scale one is in between."""
    plain = pipe.generate("a star", **SIZE).latents
    condition = steered()[name]
    moved = pipe.generate("a star", conditions=[condition], **SIZE).latents
    assert not torch.equal(moved, plain)
    if name == "redux":  # whose words are there even if they say nothing
        return

    for silent in (replace(condition, scale=0.0), replace(condition, scale=lambda sigma: 0.0)):
        assert torch.equal(pipe.generate("a star", conditions=[silent], **SIZE).latents, plain)
    early, late = (replace(condition, window=window) for window in ((0.0, 1 / 3), (1 / 3, 1.0)))
    first = pipe.generate("a star", conditions=[early], **SIZE, stop=1).latents
    assert torch.equal(first, pipe.generate("a star", conditions=[condition], **SIZE, stop=1).latents)
    assert torch.equal(pipe.generate("a star", conditions=[late], **SIZE, stop=1).latents,
                       pipe.generate("a star", **SIZE, stop=1).latents)  # fmt: skip
    both = pipe.generate("a star", conditions=[early, late], **SIZE).latents
    torch.testing.assert_close(both, moved, rtol=0, atol=1e-5)


def test_all_of_them_at_once(pipe: Pipeline) -> None:
    """Two ControlNets, Redux, an IP-Adapter, a reference, a picture with a mask, CFG and a step cache: in one call; a
    cache that may leave nothing out changes nothing."""
    given = [*steered().values(), conditions.ControlNet(controlnet(), PHOTO), conditions.Reference(PHOTO)]
    mask = torch.zeros(48, 64)
    mask[16:] = 1
    options = {**SIZE, "image": PHOTO, "mask": mask, "guide": guide("cfg", scale=2.0), "conditions": given}
    plain = pipe.generate("a star", **options)
    careful = pipe.generate("a star", **options, cache=cache("first-block", threshold=0.0))
    assert torch.equal(plain.latents, careful.latents) and torch.isfinite(plain.latents).all()
    told = [about["kind"] for about in plain.settings[0]["conditions"]]
    assert told == ["ControlNet", "Redux", "IPAdapter", "ControlNet", "Reference"]


def test_what_does_not_fit_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    wide = controlnet(hidden_size=2 * TINY.hidden_size, num_heads=2 * TINY.num_heads)
    with pytest.raises(InputError, match=f"for transformers of hidden_size {2 * TINY.hidden_size}, got one of"):
        pipe.generate("a star", conditions=[conditions.ControlNet(wide, PHOTO)], **SIZE)
    with pytest.raises(InputError, match="the network must be a ControlNet or Flux2ControlNet, as .* gives it, got 3"):
        conditions.ControlNet(3, PHOTO)  # pyright: ignore
    with pytest.raises(InputError, match="scale must have a number for each of 2 blocks, got 3"):
        conditions.ControlNet(controlnet(), PHOTO, scale=[1, 2, 3])
    with pytest.raises(InputError, match="window must be"):
        conditions.ControlNet(controlnet(), PHOTO, window=(0.5, 0.2))
    with pytest.raises(InputError, match="Redux needs a vision tower"):
        conditions.Redux(Redux(ReduxConfig(redux_dim=1, txt_in_features=1, inner=1)), PHOTO)  # pyright: ignore
    save(randomise(Autoencoder(AUTOENCODER)), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match="expected a ControlNet, Redux or an IP-Adapter, found Autoencoder"):
        conditions.load(tmp_path / "ae.safetensors")
    save(Redux(ReduxConfig(redux_dim=16, txt_in_features=8, inner=24)), tmp_path / "redux.safetensors")
    with pytest.raises(CheckpointError, match="with the vision tower of SigLIP, and none is beside it: give vision="):
        conditions.load(tmp_path / "redux.safetensors")


def test_files_are_part_of_settings_and_key(tmp_path: Path) -> None:
    """A picture of the bundled model with a ControlNet from a file: it is told with its hash, and cached by it."""
    pipe = miniflux.load("nano", cache=tmp_path / "pictures.cache")
    config = pipe.transformer.config

    sizes = {**asdict(config), "depth": 1, "depth_single_blocks": 0, "control_channels": config.out_channels}
    save(randomise(ControlNet(ControlNetConfig(**sizes))), tmp_path / "net.safetensors")
    network = conditions.load(tmp_path / "net.safetensors")
    condition = conditions.ControlNet(network, PHOTO, scale=0.1)
    options = {"steps": 2, "width": 64, "height": 64, "conditions": [condition]}
    first, second = (pipe.generate("a star", **options) for _ in range(2))
    assert (first.settings[0]["cached"], second.settings[0]["cached"]) == (False, True)
    assert [stamp.path for part, stamp in first.files if part == "ControlNet"] == [str(tmp_path / "net.safetensors")]


def for_nano() -> list[conditions.Condition]:
    """One of each kind, of the widths of the bundled model, that steers it a little."""
    config = miniflux.load("nano").transformer.config
    sizes = {**asdict(config), "depth": 1, "depth_single_blocks": 1, "control_channels": config.out_channels}
    network = randomise(ControlNet(ControlNetConfig(**sizes))).eval()
    redux = randomise(Redux(ReduxConfig(redux_dim=16, txt_in_features=config.context_in_dim, inner=24)))
    adapter = randomise(XlabsIPAdapter(IPAdapterConfig(
        embedding=16, context=12, words=2, hidden_size=config.hidden_size, double=config.depth,
    )))  # fmt: skip
    return [
        conditions.ControlNet(network, PHOTO, scale=0.02),
        conditions.Redux(conditions.Steering(redux, tower()), PHOTO, scale=0.1),
        conditions.IPAdapter(conditions.Steering(adapter, tower()), PHOTO, scale=0.05),
    ]


@pytest.mark.parametrize("mode", ["stream", "offload", "text-freed"])
def test_every_memory_mode(mode: str) -> None:
    """With a LoRA, CFG and a step cache: the same latents wherever the weights are."""
    given = [*for_nano(), conditions.Reference(PHOTO)]
    options = {**SIZE, "guide": guide("cfg", scale=2.0), "cache": "tea", "conditions": given}
    latents = []
    for memory in ("resident", mode):
        pipe = miniflux.load("nano", memory=memory, dtype="float32")
        miniflux.lora.attach(pipe, "realism", 0.5)
        latents.append(pipe.generate("a red circle on a blue background", **options).latents)
    assert torch.equal(*latents)


def test_two_threads_do_not_disturb_each_other(pipe: Pipeline) -> None:
    """One pipeline and the same networks, with different pictures at the same time."""
    nets = [controlnet(), controlnet()]
    pictures = [PHOTO, Image.effect_noise((64, 48), 20).convert("RGB")]

    def draw(i: int) -> torch.Tensor:
        given = [conditions.ControlNet(net, pictures[i], scale=0.5) for net in nets]
        return pipe.generate("a star", seed=i, conditions=given, **SIZE).latents

    alone = [draw(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(draw, range(2)), alone, strict=True))


KINDS_OF_PICTURES = {
    "palette": lambda: PHOTO.convert("P"),
    "transparent": lambda: Image.merge("RGBA", (*PHOTO.split(), Image.new("L", PHOTO.size, 128))),
    "16-bit grey": lambda: Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21),
    "CMYK": lambda: PHOTO.convert("CMYK"),
    "1x1": lambda: Image.new("RGB", (1, 1), "red"),
    "20,000 wide": lambda: Image.new("RGB", (20_000, 2), "red"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_PICTURES)
def test_pictures_of_every_kind_are_seen_as_they_look(kind: str, pipe: Pipeline) -> None:
    """The same as the plain RGB picture that a viewer shows, over white."""
    picture = KINDS_OF_PICTURES[kind]()
    plain = on_white(open_picture(picture))
    network, (_, redux, adapter) = controlnet(), steered().values()
    for seen, shown in (
        (conditions.ControlNet(network, picture), conditions.ControlNet(network, plain)),
        (replace(redux, picture=picture), replace(redux, picture=plain)),
        (replace(adapter, picture=picture), replace(adapter, picture=plain)),
        (conditions.Reference(picture, size=(32, 32)), conditions.Reference(plain, size=(32, 32))),
    ):
        a, b = (pipe.generate("a star", conditions=[one], **SIZE).latents for one in (seen, shown))
        assert torch.equal(a, b) and torch.isfinite(a).all()


def test_what_is_no_picture_is_refused_everywhere(tmp_path: Path) -> None:
    """A truncated JPEG, a bomb, a text, nothing: by name, before anything is decoded or computed."""
    whole = io.BytesIO()
    PHOTO.save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:200])
    (tmp_path / "text.png").write_text("a star")
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    network, (_, redux, adapter) = controlnet(), steered().values()
    for name in ("cut.jpg", "text.png", "bomb.png", "none.png"):
        path = str(tmp_path / name)
        for give in (
            lambda path=path: conditions.ControlNet(network, path),
            lambda path=path: replace(redux, picture=path),
            lambda path=path: replace(adapter, picture=path),
            lambda path=path: conditions.Reference(path),
            lambda path=path: conditions.Control(path),
        ):
            with pytest.raises(InputError, match=name):
                give()


def test_texts_in_one_batch_are_told_apart(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the texts of a guide go through the network side by side: each with its own picture."""
    given = [*steered().values()][0::2]
    options = {**SIZE, "guide": guide("cfg", scale=2.0), "negative": "a circle", "conditions": given, "images": 2}
    alone = pipe.generate("a star", **options).latents
    monkeypatch.setattr(denoising, "_on_accelerator", lambda x: True)
    torch.testing.assert_close(pipe.generate("a star", **options).latents, alone, rtol=0, atol=1e-4)


def test_controlnets_of_different_depths_keep_to_their_own_blocks(pipe: Pipeline) -> None:
    """Two at once add to each block what each of them alone adds there, whatever their numbers of blocks."""
    nets = [controlnet(depth=depth, depth_single_blocks=0) for depth in (1, 2)]
    added: list[dict[str, torch.Tensor]] = []

    def looking(run: object) -> object:
        def look(name: str, block: object, streams: tuple, context: tuple) -> tuple:  # type: ignore[type-arg]
            before = run_block(name, block, streams, context)  # type: ignore[arg-type]
            out = run(name, block, streams, context)  # type: ignore[operator]
            if name == "double_blocks.0":
                added[-1][name] = out[0] - before[0]
            return out

        return look

    for chosen in (nets[:1], nets[1:], nets):
        added.append({})
        given = [conditions.ControlNet(net, PHOTO, scale=0.1) for net in chosen]
        pipe.generate("a star", conditions=given, wraps=[looking], **{**SIZE, "steps": 1})
    one, two, both = (found["double_blocks.0"] for found in added)
    torch.testing.assert_close(both, one + two)


def test_what_is_drawn_has_the_size_of_the_first_reference(pipe: Pipeline) -> None:
    """Unless another is asked for; to whole tokens."""
    photo, wide = Image.new("RGB", (70, 47), "red"), Image.new("RGB", (96, 32), "blue")
    given = [conditions.Reference(photo), conditions.Reference(wide, index=2)]
    assert pipe.generate("a star", steps=1, conditions=given).images[0].size == (64, 48)
    assert pipe.generate("a star", steps=1, conditions=given[1:]).images[0].size == (96, 32)
    assert pipe.generate("a star", steps=1, conditions=given, width=32).images[0].size[0] == 32


def test_another_vision_tower_is_refused(tmp_path: Path) -> None:
    """The wrong encoder is the commonest mistake with IP-Adapters: by kind, and by width."""
    save(tower(), tmp_path / "siglip.safetensors")
    adapter = XlabsIPAdapter(IPAdapterConfig(embedding=16, context=12, words=2, hidden_size=16, double=1))
    save(adapter, tmp_path / "ip.safetensors")
    with pytest.raises(CheckpointError, match="expected the vision tower of CLIP, found .*SigLIP"):
        conditions.load(tmp_path / "ip.safetensors", vision=tmp_path / "siglip.safetensors")
    save(Redux(ReduxConfig(redux_dim=20, txt_in_features=8, inner=24)), tmp_path / "redux.safetensors")
    with pytest.raises(CheckpointError, match="sees in 16 channels, and .* wants 20"):
        conditions.load(tmp_path / "redux.safetensors", vision=tmp_path / "siglip.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "picture",
    "pictures",
    "negative",
    "index",
    "size",
    "scale",
    "window",
    "mode",
    "together",
    "network",
    "kind",
    "x",
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*again.KINDS, "Other"]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5), st.booleans()
)
def test_whatever_a_file_says_of_conditions_is_refused_in_words(
    kind: str, told: dict[str, object], known: bool
) -> None:
    """Settings are other people's: no error but ours comes of them."""
    about = {**told, "kind": kind} | ({"picture": digest_of(PHOTO)} if known else {})
    networks = [one.network for one in FUZZED.values()]
    with contextlib.suppress(MinifluxError):
        place = list(again.NETWORKS).index(kind) if kind in again.NETWORKS else None
        again.again([about], [PHOTO] if known else [], [] if place is None else networks[place : place + 1])


FUZZED = steered()


XLABS = {"hint_channels": 4, "control_channels": 16, "depth_single_blocks": 0}


@pytest.mark.parametrize(
    ("more", "name"), [(XLABS, "of XLabs, 1 blocks"), ({"modes": 3}, "ControlNet, 1 + 1 blocks, union of 3 modes")]
)
def test_our_own_files_are_read_back_and_named(more: dict[str, int], name: str, tmp_path: Path) -> None:
    """Under its own names, of either kind; rotary axes that no release has stand in the header."""
    path = tmp_path / "net.safetensors"
    save(controlnet(**more), path)
    network = conditions.load(path).network
    assert isinstance(network, ControlNet) and network.config.axes_dim == TINY.axes_dim
    (part,) = miniflux.checkpoints.inspect(path).parts
    assert part.network == "ControlNet" and name in part.variant

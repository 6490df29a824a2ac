"""FLUX.2's ControlNet on a picture: what it is shown, where it adds, in every memory mode; what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniflux
from miniflux import conditions, lora
from miniflux.apps.cli import main
from miniflux.checkpoints import save
from miniflux.checkpoints.files import open_tensors
from miniflux.checkpoints.loading import bare, compare
from miniflux.checkpoints.networks import BY_KIND
from miniflux.conditions import Control, ControlNet, Reference, again
from miniflux.errors import CheckpointError, InputError, ReplayError
from miniflux.families.flux2 import image_ids, reference_ids, text_ids
from miniflux.memory.ledger import Line
from miniflux.models.causal_lm import CausalLm
from miniflux.models.flux1 import run_block
from miniflux.models.flux2 import Flux2
from miniflux.models.flux2_controlnet import Flux2ControlNet, Flux2ControlNetConfig
from miniflux.models.layers import rope_rotations
from miniflux.pictures import from_image
from miniflux.pipeline import Pipeline
from miniflux.sampling import cache, guide, initial_noise, pack
from miniflux.sampling.forwards import Told, Words, flux2_velocity
from miniflux.service.catalogue import Catalogue
from miniflux.settings.steered import ConditionUse
from miniflux.steering import _config
from miniflux.text import ChatForm, ChatText, load_chat_tokenizer
from tests.checkpoints.raw import sparse
from tests.lora.test_attach import control_lora
from tests.models.test_flux2_controlnet import published
from tests.test_families import saved
from tests.test_steering import controlnet
from tests.tiny import randomise

PHOTO, EDGES = (Image.effect_noise((64, 48), level).convert("RGB") for level in (60, 90))
SEEN = [picture.resize((64, 64)) for picture in (PHOTO, EDGES)]  # sides that FLUX.2 sees
SIZE = {"width": 64, "height": 48, "steps": 3, "seed": 3}
CONFIG = Flux2ControlNetConfig(control_channels=260, hidden_size=64, num_heads=4, depth=2)


def net(**more: int) -> Flux2ControlNet:
    network = randomise(Flux2ControlNet(replace(CONFIG, **more))).requires_grad_(False)
    for block in network.control_transformer_blocks:
        cast(Any, block).after_proj.weight.mul_(0.3)
    return network


def deep(name: str = "flux2-dev") -> Pipeline:
    """A tiny model with double blocks for two hints, and some between them."""
    pipe = miniflux.tiny(name)
    pipe.transformer = randomise(Flux2(replace(cast(Flux2, pipe.transformer).config, depth=4)), 7).requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return deep()


def left_half() -> Tensor:
    mask = torch.zeros(48, 64)
    mask[:, :30] = 1  # not of whole tokens, nor of whole places of the latent
    return mask


def by_hand(
    pipe: Pipeline, network: Flux2ControlNet, tokens: Tensor, references: list[Image.Image], scale: float
) -> Tensor:
    """One step: the transformer's double blocks with the hints added after 0 and 2, told by hand."""
    model, words = cast(Flux2, pipe.transformer), pipe.text.encode(["a star"], pipe.text.length, "released")
    x = pack(initial_noise(48, 64, 3, 128, 1), 1)
    seen = [pack(pipe.autoencoder.encode(from_image(one)[None]), 1) for one in references]
    ids = torch.cat([image_ids(1, 3, 4), *(reference_ids(i, 4, 4) for i in range(1, len(seen) + 1))], dim=1)
    length = words.txt.shape[1]
    rows = torch.cat([tokens, *(torch.zeros(1, 16, 260) for _ in seen)], dim=1)
    hints: list[Tensor] = []

    def run(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        if name == "double_blocks.0":
            pe = rope_rotations(torch.cat((text_ids(1, length), ids), 1), model.config.axes_dim, model.config.theta)
            hints.extend(network(rows, *streams, context[0], context[1], pe, context[3]))
        out = run_block(name, block, streams, context)
        number = {"double_blocks.0": 0, "double_blocks.2": 1}.get(name)
        return out if number is None else (out[0] + scale * hints[number], out[1])

    told = Told(
        torch.cat((x, *seen), 1),
        ids,
        Words(words.txt, text_ids(1, length), None, words.mask),
        torch.ones(1),
        torch.tensor([4.0]),
    )
    with torch.inference_mode():
        return x - flux2_velocity(model, told, run=run)[:, :12]


@pytest.mark.parametrize("given", ["control", "control and mask", "mask", "nothing"])
@pytest.mark.parametrize("references", [0, 2])
def test_tokens_and_hints(given: str, references: int, pipe: Pipeline) -> None:
    """Control latents, the mask (1 where the picture stays) and the picture with a grey hole, side by side; what is not
    given is zeros, or an even grey. References are seen with rows of zeros."""
    network, mask = net(), left_half()
    latents = lambda pixels: pack(pipe.autoencoder.encode(pixels[None]), 1)  # noqa: E731
    control, more = torch.zeros(1, 12, 128), {}
    stays, hidden = torch.zeros(48, 64), torch.zeros(3, 48, 64)
    if "control" in given:
        control = latents(from_image(EDGES))
    if "mask" in given:
        more = {"image": PHOTO, "mask": mask}
        stays, hidden = 1 - mask, from_image(PHOTO) * (mask < 0.5)
    places = rearrange(stays[::8, ::8], "(h p) (w q) -> 1 (h w) (p q)", p=2, q=2)
    tokens = torch.cat((control, places, latents(hidden)), dim=-1)
    pictures = SEEN[:references]
    condition = ControlNet(network, EDGES if "control" in given else None, scale=0.4, **more)
    options = {**SIZE, "steps": 1, "guidance": 4.0}
    found = pipe.generate(
        "a star", conditions=[condition, *(Reference(x, index=i + 1) for i, x in enumerate(pictures))], **options
    )
    torch.testing.assert_close(pack(found.latents, 1), by_hand(pipe, network, tokens, pictures, 0.4), rtol=0, atol=2e-5)


def test_no_strength_no_change_and_windows_add_up(pipe: Pipeline) -> None:
    plain = pipe.generate("a star", **SIZE).latents
    condition = ControlNet(net(), EDGES, scale=0.5)
    moved = pipe.generate("a star", conditions=[condition], **SIZE).latents
    assert not torch.equal(moved, plain)
    for silent in (0.0, [0.0, 0.0], lambda sigma: 0.0):
        assert torch.equal(
            pipe.generate("a star", conditions=[replace(condition, scale=silent)], **SIZE).latents, plain
        )
    assert torch.equal(
        pipe.generate("a star", conditions=[replace(condition, scale=[0.5, 0.5])], **SIZE).latents, moved
    )
    halves = [
        pipe.generate("a star", conditions=[replace(condition, scale=one)], **SIZE).latents
        for one in ([0.5, 0], [0, 0.5])
    ]
    assert not torch.equal(halves[0], moved) and not torch.equal(*halves)
    early, late = (replace(condition, window=window) for window in ((0.0, 1 / 3), (1 / 3, 1.0)))
    one = {**SIZE, "stop": 1}
    assert torch.equal(
        pipe.generate("a star", conditions=[late], **one).latents, pipe.generate("a star", **one).latents
    )
    both = pipe.generate("a star", conditions=[early, late], **SIZE).latents
    torch.testing.assert_close(both, moved, rtol=0, atol=1e-5)


def test_a_picture_does_not_depend_on_its_neighbours_and_others_may_steer_too(pipe: Pipeline) -> None:
    """Two at once add up after a block; a careful step cache, a guide, a reference and a mask of the picture itself."""
    condition = ControlNet(net(), EDGES, scale=0.3, image=PHOTO, mask=left_half())
    two = pipe.generate("a star", conditions=[condition], images=2, **SIZE).latents
    alone = pipe.generate("a star", conditions=[condition], **{**SIZE, "seed": 4}).latents
    assert torch.equal(two[1:], alone)
    given = [condition, ControlNet(net(), PHOTO, scale=0.2), Reference(SEEN[0])]
    options = {**SIZE, "image": PHOTO, "mask": left_half(), "guide": guide("cfg", scale=2.0), "conditions": given}
    plain = pipe.generate("a star", **options)
    careful = pipe.generate("a star", **options, cache=cache("first-block", threshold=0.0))
    assert torch.equal(plain.latents, careful.latents) and torch.isfinite(plain.latents).all()


@pytest.fixture(scope="module")
def files(tokenizer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in files, with the width of a FLUX.2 dev and the language model of a klein."""
    small = deep("flux2-klein-base-4b")
    lm = cast(CausalLm, small.text.networks["lm"])
    config = replace(lm.config, vocab_size=151936, num_hidden_layers=lm.config.depth + 1, layers_read=None)
    network = randomise(CausalLm(replace(config, tie_word_embeddings=True)), 5).requires_grad_(False)
    small.text = ChatText(network, load_chat_tokenizer(tokenizer("qwen3"), cast(ChatForm, small.variant.chat)))
    return saved(small, tmp_path_factory.mktemp("flux2"), tokenizer("qwen3"))


def test_every_memory_mode(files: Path) -> None:
    """The same latents wherever the weights are; with a control LoRA as well."""
    network = net()
    found: dict[str, list[Tensor]] = {}
    for memory in ("resident", "offload", "stream"):
        pipe = miniflux.load(files, device="cpu", memory=memory)
        given: list[Any] = [ControlNet(network, EDGES, scale=0.4), Reference(SEEN[0])]
        found[memory] = [pipe.generate("a star", conditions=given, **SIZE).latents]
        lora.attach(pipe, control_lora(pipe.transformer.config), name="edges")
        found[memory].append(pipe.generate("a star", conditions=[given[0], Control(EDGES)], **SIZE).latents)
    for memory in ("offload", "stream"):
        assert all(torch.equal(a, b) for a, b in zip(found[memory], found["resident"], strict=True)), memory
    assert not torch.equal(*found["resident"])


def test_the_ledger_counts_it(files: Path) -> None:
    """Its weights from the first step on, once however often it steers, and what it adds for every image token."""
    pipe, network = miniflux.load(files, device="cpu", memory="stream"), net()
    assert pipe.memory is not None
    once, twice = (
        [ControlNet(network, EDGES)],
        [ControlNet(network, EDGES), ControlNet(conditions.Steering(network), PHOTO)],
    )
    plans = [miniflux.plan.Plan.of(pipe.as_it_is(), "a star", conditions=given, **SIZE) for given in ([], once, twice)]
    none, one, two = (pipe.memory.ledger(plan.needs()) for plan in plans)
    size = sum(4 * p.numel() for p in network.parameters())
    line = Line("networks that steer: weights", ram=size)
    for found in (one, two):
        assert [phase for phase, lines in found.phases.items() if line in lines] == ["denoising", "decoding"]
    computed = [
        {x.what: x.ram for x in found.phases["denoising"]}["transformer: activations"] for found in (none, one, two)
    ]
    each = 4 * 2 * 64 * 12  # float32, two blocks, hidden, image tokens
    assert [more - computed[0] for more in computed[1:]] == [each, 2 * each]


def test_the_published_file_fits(tmp_path: Path) -> None:
    """Strictly, at full size, told from its keys; sizes from shapes."""
    path = sparse(tmp_path / "a.safetensors", published())
    record = BY_KIND[Flux2ControlNet]
    config = _config(record, open_tensors(path), path)
    assert config == Flux2ControlNetConfig(control_channels=260, hidden_size=6144, num_heads=48, depth=4)
    assert not compare(bare(record.kind, config), open_tensors(path)).problems
    (part,) = miniflux.checkpoints.inspect(path).parts
    assert (part.network, part.layout) == ("ControlNet", "diffusers")
    assert part.variant == "FLUX.2 ControlNet, 4 blocks, for conditions.load"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_files_there_and_back(layout: str, tmp_path: Path, pipe: Pipeline) -> None:
    """Both spellings are told, load to the same bits and draw the same; a missing or foreign tensor is refused."""
    network, path = net(), tmp_path / "net.safetensors"
    save(network, path, layout=layout)
    loaded = conditions.load(path)
    assert isinstance(loaded.network, Flux2ControlNet) and loaded.network.config == CONFIG
    state = loaded.network.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert [what for what, _ in loaded.files] == ["ControlNet"]
    options = {**SIZE, "steps": 1}
    drawn = [
        pipe.generate("a star", conditions=[ControlNet(one, EDGES)], **options).latents for one in (network, loaded)
    ]
    assert torch.equal(*drawn)
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "1.after_proj.bias" not in key}, path)
    with pytest.raises(CheckpointError, match=r"1\.after_proj\.bias"):
        conditions.load(path)
    save_file({**tensors, "stranger": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="stranger"):
        conditions.load(path)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="sees control pictures by itself"):
        conditions.load(path, vision="tower")


def test_what_does_not_fit_is_refused(pipe: Pipeline) -> None:
    draw: Callable[..., Any] = lambda pipe, one: pipe.generate("a star", conditions=[one], **SIZE)  # noqa: E731
    with pytest.raises(InputError, match=r"was made for FLUX\.2 dev, and this network is a Flux1"):
        draw(miniflux.tiny("flux1-dev"), ControlNet(net(), EDGES))
    with pytest.raises(InputError, match=r"was made for FLUX\.1, and this network is a Flux2"):
        draw(pipe, ControlNet(controlnet(), EDGES))
    with pytest.raises(InputError, match="for transformers of hidden_size 96, got one of 64"):
        draw(pipe, ControlNet(net(hidden_size=96, num_heads=6), EDGES))
    with pytest.raises(InputError, match="for transformers of num_heads 2, got one of 4"):
        draw(pipe, ControlNet(net(num_heads=2), EDGES))
    with pytest.raises(InputError, match="every second of 4 double blocks, and the transformer has 2"):
        draw(miniflux.tiny("flux2-dev"), ControlNet(net(), EDGES))
    with pytest.raises(InputError, match="control tokens of 100 channels, and two pictures and a mask .* have 260"):
        draw(pipe, ControlNet(net(control_channels=100), EDGES))
    with pytest.raises(InputError, match=r"control pixels must be \(3, 48, 64\), got 3x96x128"):
        draw(pipe, ControlNet(net(), torch.zeros(3, 96, 128)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mask": left_half()}, "image is what is completed and mask says where"),
        ({"image": PHOTO}, "image is what is completed and mask says where"),
        ({"image": PHOTO, "mask": torch.zeros(48, 32)}, "the mask is 32x48, the image 64x48: make them equal"),
        ({"image": PHOTO, "mask": Image.new("L", (64, 64))}, "the mask is 64x64, the image 64x48"),
        ({"image": PHOTO, "mask": Image.new("RGBA", (64, 48), (0, 0, 0, 9))}, "transparent in places"),
        ({"image": PHOTO, "mask": left_half() * 2}, "numbers from 0 to 1"),
        ({"image": "no.png", "mask": left_half()}, "no.png"),
        ({"mode": "canny"}, "mode 'canny' has no effect: this ControlNet tells kinds of control by itself"),
        ({"scale": [1.0, 2.0, 3.0]}, "scale must have a number for each of 2 blocks, got 3"),
        ({"window": (0.5, 0.2)}, "window must be"),
    ],
)
def test_bad_input_is_refused_when_it_is_made(more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ControlNet(net(), EDGES, **more)


def test_a_controlnet_of_flux1_takes_neither_mask_nor_no_picture() -> None:
    with pytest.raises(InputError, match="sees a control picture, and none is given"):
        ControlNet(controlnet())
    with pytest.raises(InputError, match=r"completes no picture: image and mask are for that of FLUX\.2"):
        ControlNet(controlnet(), EDGES, image=PHOTO, mask=left_half())


def test_settings_make_it_again(pipe: Pipeline) -> None:
    """What settings tell of it, its pictures and its mask - in any order - are the condition again, for replay and for
    requests; without the mask it is refused."""
    network = conditions.Steering(net())
    mask = Image.fromarray((left_half() * 255).byte().numpy())
    condition = ControlNet(network, EDGES, scale=0.4, image=PHOTO, mask=mask)
    drawn = pipe.generate("a star", conditions=[condition], **SIZE)
    (told,) = drawn.settings[0]["conditions"]
    assert set(told) == {"kind", "picture", "image", "mask", "scale", "window"}
    made = again.again([told], [mask, PHOTO, EDGES], [network])
    assert torch.equal(pipe.generate("a star", conditions=made, **SIZE).latents, drawn.latents)
    assert ConditionUse.from_json("it", told).pictures == (told["picture"], told["image"], told["mask"])
    with pytest.raises(ReplayError, match="with another picture"):
        again.again([told], [PHOTO, EDGES], [network])
    for same in (mask.convert("RGB"), left_half(), left_half() * 0.6 + 0.1):
        other = ControlNet(network, EDGES, scale=0.4, image=PHOTO, mask=same)
        assert torch.equal(pipe.generate("a star", conditions=[other], **SIZE).latents, drawn.latents)


def test_its_own_precision(pipe: Pipeline) -> None:
    """A network in bfloat16 beside a transformer in float32 computes in its own, and stays as it is."""
    options = {**SIZE, "guidance": 4.0}
    fine, coarse = net(), net().to(torch.bfloat16)
    found = [
        pipe.generate("a star", conditions=[ControlNet(one, EDGES, 0.3)], **options).latents for one in (fine, coarse)
    ]
    assert not torch.equal(*found) and next(coarse.parameters()).dtype == torch.bfloat16
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.01


def test_on_the_command_line_and_in_the_folder_of_the_page(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--controlnet` takes its file, replay makes the picture again, and the page's list knows what it is for."""
    save(net(), tmp_path / "net.safetensors", layout="diffusers")
    SEEN[1].save(tmp_path / "edges.png")
    edges, path, out = (str(tmp_path / name) for name in ("edges.png", "net.safetensors", "out.png"))
    how = ("--model", str(files), "--steps", "2", "--size", "64x64", "-o", out)
    assert main(["generate", "a star", *how, "--controlnet", f"{path}={edges}:0.4"]) == 0
    assert main(["replay", out, "--picture", edges, "--network", path]) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert main(["generate", "a star", *how, "--controlnet", f"{path}={edges}:0.4:canny"]) == 2
    assert "tells kinds of control by itself" in capsys.readouterr().err
    known = Catalogue(folder=tmp_path)
    known.scan()
    assert known.networks["net.safetensors"] == ("ControlNet", tmp_path / "net.safetensors") and not known.refused

"""ControlNets, Redux and IP-Adapters against the pipelines of diffusers, vision towers against transformers: the same
numbers from the same random weights, files and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as their_vae
from PIL import Image
from safetensors.torch import save_file

import miniflux
from miniflux import conditions
from miniflux.conditions.seeing import clip_pixels, siglip_pixels
from miniflux.errors import CheckpointError, ConfigError, InputError
from miniflux.models.ip_adapter import InstantxIPAdapter
from miniflux.models.vision import VisionConfig
from tests.parity.peers import diffusers, transformers
from tests.parity.test_conditions import PHOTO, assert_same, models, ours, theirs
from tests.parity.test_pipeline import PROMPT, SIZES, WIDTH
from tests.tiny import randomise

OTHER = Image.effect_noise(PHOTO.size, 50).convert("RGB")
SIGLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 7}  # fmt: skip
CLIP_L = {**SIGLIP, "projection_dim": 16}


@pytest.fixture(autouse=True)
def mean_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(their_vae.DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def controlnet(**more: Any) -> Any:
    sizes = {
        "patch_size": 1,
        "in_channels": SIZES.in_channels,
        "num_layers": 1,
        "num_single_layers": 0,
        "attention_head_dim": SIZES.hidden_size // SIZES.num_heads,
        "num_attention_heads": SIZES.num_heads,
        "joint_attention_dim": SIZES.context_in_dim,
        "pooled_projection_dim": SIZES.vec_in_dim,
        "guidance_embeds": True,
        "axes_dims_rope": list(SIZES.axes_dim),
    }
    return randomise(diffusers.FluxControlNetModel(**{**sizes, **more})).eval()


def saved(network: Any, folder: Path) -> conditions.Steering:
    network.save_pretrained(folder)
    return conditions.load(folder)


@pytest.mark.parametrize("blocks", [(1, 0), (2, 0), (2, 2), (1, 1)])
def test_controlnets(blocks: tuple[int, int], tmp_path: Path) -> None:
    """Of every number of blocks, with and without the guidance input, weighted."""
    parts, pipe = models(64, tmp_path / "model")
    network = controlnet(num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=blocks != (2, 0))
    expected = theirs(
        diffusers.FluxControlNetPipeline(controlnet=network, **parts),
        control_image=PHOTO,
        controlnet_conditioning_scale=0.7,
    )
    condition = conditions.ControlNet(saved(network, tmp_path / "net"), PHOTO, scale=0.7)
    assert_same(ours(pipe, conditions=[condition]), expected)
    assert float((ours(pipe) - expected).abs().max()) > 1e-2  # it does steer


def test_union_and_several_controlnets(tmp_path: Path) -> None:
    """A Union network with two kinds of control, and another network beside it; each in its own window."""
    parts, pipe = models(64, tmp_path / "model")
    union, plain = controlnet(num_layers=2, num_single_layers=1, num_mode=10), controlnet(num_layers=1)
    nets = [saved(net, tmp_path / name) for net, name in ((union, "union"), (plain, "plain"))]
    single = theirs(
        diffusers.FluxControlNetPipeline(controlnet=union, **parts),
        control_image=PHOTO, control_mode=2, control_guidance_start=0.25, control_guidance_end=0.75,
    )  # fmt: skip
    windowed = conditions.ControlNet(nets[0], PHOTO, window=(0.25, 0.75), mode="depth")
    assert_same(ours(pipe, conditions=[windowed]), single)
    both = theirs(
        diffusers.FluxControlNetPipeline(controlnet=diffusers.FluxMultiControlNetModel([union]), **parts),
        control_image=[PHOTO, OTHER], control_mode=[2, 4], controlnet_conditioning_scale=[0.5, 0.3],
        control_guidance_start=[0.0, 0.0], control_guidance_end=[1.0, 1.0],  # else it takes the first picture alone
    )  # fmt: skip
    steered = [conditions.ControlNet(nets[0], picture, scale, mode=mode) for picture, scale, mode in
               ((PHOTO, 0.5, 2), (OTHER, 0.3, "pose"))]  # fmt: skip
    assert_same(ours(pipe, conditions=steered), both)
    with pytest.raises(InputError, match=r"mode must be one of canny \(0\).*got None"):
        conditions.ControlNet(nets[0], PHOTO)
    with pytest.raises(InputError, match="mode 3 has no effect"):
        conditions.ControlNet(nets[1], PHOTO, mode=3)
    with pytest.raises(ConfigError, match="takes a mode from 0 to 9"):
        nets[0].network(*[torch.zeros(0)] * 7)


def test_xlabs_controlnets(tmp_path: Path) -> None:
    """Pixels through convolutions, and every block of the transformer is given one of the residuals in turn."""
    parts, pipe = models(64, tmp_path / "model")
    network = controlnet(num_layers=2, conditioning_embedding_channels=16, patch_size=2)
    expected = theirs(diffusers.FluxControlNetPipeline(controlnet=network, **parts), control_image=PHOTO)
    assert_same(ours(pipe, conditions=[conditions.ControlNet(saved(network, tmp_path / "net"), PHOTO)]), expected)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_controlnets_over_a_picture(strength: float, tmp_path: Path) -> None:
    """Image to image, and inpainting, with a ControlNet."""
    parts, pipe = models(64, tmp_path / "model")
    network = controlnet(num_layers=2)
    told = {"image": PHOTO, "control_image": OTHER, "controlnet_conditioning_scale": 0.7, "strength": strength}
    condition = conditions.ControlNet(saved(network, tmp_path / "net"), OTHER, scale=0.7)
    if strength == 0.5:  # where theirs, which rounds the first step down, starts where ours does
        expected = theirs(
            diffusers.FluxControlNetImg2ImgPipeline(controlnet=network, **parts),
            **told,
            latents=_noised(pipe, strength),
        )
        assert_same(ours(pipe, conditions=[condition], image=PHOTO, strength=strength), expected)
        return
    mask = np.zeros((PHOTO.height, WIDTH), np.uint8)
    mask[16:, 32:] = 255
    expected = theirs(
        diffusers.FluxControlNetInpaintPipeline(controlnet=network, **parts), **told, mask_image=Image.fromarray(mask),
        latents=miniflux.sampling.initial_noise(PHOTO.height, WIDTH, 3),
    )  # fmt: skip
    assert_same(ours(pipe, conditions=[condition], image=PHOTO, mask=Image.fromarray(mask)), expected)


def _noised(pipe: miniflux.Pipeline, strength: float) -> torch.Tensor:
    """What diffusers' image-to-image pipelines begin with, packed: they take given latents as they are."""
    from miniflux.plan import Plan
    from miniflux.sampling import add_noise, initial_noise, pack

    plan = Plan.of(pipe.variant, PROMPT, width=WIDTH, height=PHOTO.height, steps=4, image=PHOTO, strength=strength)
    start = pipe.autoencoder.encode(torch.from_numpy(np.asarray(PHOTO)).permute(2, 0, 1)[None].float() / 127.5 - 1)
    return pack(add_noise(start, 0.0, plan.levels[0], initial_noise(PHOTO.height, WIDTH, 3)))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Random vision towers of transformers, and folders of them."""
    made: dict[str, tuple[Any, Path]] = {}
    for name, network in (
        ("siglip", transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))),
        ("clip", transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP_L))),
    ):
        folder = tmp_path_factory.mktemp(name) / "image_encoder"
        randomise(network).eval().save_pretrained(folder)
        made[name] = network, folder
    return made


def redux(tmp_path: Path, tower: Path) -> tuple[Any, conditions.Steering]:
    network = randomise(diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(24, SIZES.context_in_dim)).eval()
    network.save_pretrained(tmp_path / "redux")
    return network, conditions.load(tmp_path / "redux", vision=tower)


def test_vision_towers(towers: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """Every token and the pooled vector; and pictures are prepared to a grey level as transformers prepares them."""
    pixels = torch.randn(2, 3, 28, 28)
    _, steering = redux(tmp_path, towers["siglip"][1])
    with torch.no_grad():
        found, expected = steering.vision(pixels), towers["siglip"][0](pixels)
    assert_close(found, (expected.last_hidden_state, expected.pooler_output))
    adapter, _ = xlabs(tmp_path)
    eyes = conditions.load(adapter, vision=towers["clip"][1]).vision
    with torch.no_grad():
        found, expected = eyes(pixels), towers["clip"][0](pixels)
    assert_close(found, (expected.last_hidden_state, expected.image_embeds))
    with pytest.raises(InputError, match=r"sees pictures of \(3, 28, 28\), got \(3, 14, 28\)"):
        eyes(torch.zeros(1, 3, 14, 28))

    config = VisionConfig(**{**SIGLIP, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 224})
    for size in ((224, 224), (300, 231), (231, 300), (97, 480), (1, 1)):
        picture = Image.effect_noise(size, 80).convert("RGB")
        square = {"height": 224, "width": 224}
        fit = transformers.SiglipImageProcessorPil(size=square)(picture, return_tensors="pt").pixel_values
        assert float((fit - siglip_pixels(picture, config)).abs().max()) <= 1.01 / 127.5
        cut = transformers.CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
        assert float((cut - clip_pixels(picture, config)).abs().max()) <= 1.01 / 255 / 0.26


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


def test_redux(towers: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """One picture beside a prompt, and two of them summed as diffusers does it."""
    parts, pipe = models(64, tmp_path / "model")
    network, steering = redux(tmp_path, towers["siglip"][1])
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=towers["siglip"][0],
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        image_embedder=network,
        **{name: parts[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")},
    )
    for pictures, scale in (([PHOTO], 1.0), ([PHOTO, OTHER], [0.7, 0.5])):
        made = prior(pictures, prompt=[PROMPT] * len(pictures), prompt_embeds_scale=scale)
        expected = theirs(diffusers.FluxPipeline(**parts), prompt=None, **dict(made))
        condition = conditions.Redux(steering, pictures, scale=scale, together="diffusers")
        assert_same(ours(pipe, conditions=[condition], t5_length=512), expected)
    appended = conditions.Redux(steering, [PHOTO, OTHER], scale=[0.7, 0.5])
    assert appended.tokens(1, 1) == 32 and not torch.equal(
        ours(pipe, conditions=[appended], t5_length=512), ours(pipe, conditions=[condition], t5_length=512)
    )


def xlabs(folder: Path, diffusers_names: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random adapter as XLabs publishes theirs."""
    width, hidden = SIZES.context_in_dim, SIZES.hidden_size
    generator = torch.Generator().manual_seed(5)
    shapes = {"ip_adapter_proj_model.proj": (4 * width, 16)}
    for i in range(SIZES.depth):
        for x in "kv":
            shapes[f"double_blocks.{i}.processor.ip_adapter_double_stream_{x}_proj"] = (hidden, width)
    tensors = {f"{key}.weight": torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
    tensors |= {f"{key}.bias": torch.randn(shape[0], generator=generator) for key, shape in shapes.items()}
    tensors |= {f"ip_adapter_proj_model.norm.{x}": torch.randn(width, generator=generator) for x in ("weight", "bias")}
    if diffusers_names:
        tensors = {
            key.replace("ip_adapter_proj_model.", "image_proj.").replace("double_blocks.", "ip_adapter.")
            .replace("processor.", "").replace("ip_adapter_double_stream_k_proj", "to_k_ip")
            .replace("ip_adapter_double_stream_v_proj", "to_v_ip"): value
            for key, value in tensors.items()
        }  # fmt: skip
    save_file(tensors, folder / "ip.safetensors")
    return folder / "ip.safetensors", tensors


@pytest.mark.parametrize("diffusers_names", [False, True])
def test_xlabs_ip_adapter(diffusers_names: bool, towers: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """Beside CFG, too, whose other text sees a black picture."""
    parts, pipe = models(64, tmp_path / "model")
    path, _ = xlabs(tmp_path, diffusers_names)
    pipeline = diffusers.FluxPipeline(
        image_encoder=towers["clip"][0],
        feature_extractor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        **parts,
    )
    pipeline.load_ip_adapter(tmp_path, weight_name=path.name, image_encoder_pretrained_model_name_or_path=None)
    pipeline.set_ip_adapter_scale(0.6)
    steering = conditions.load(path, vision=towers["clip"][1])
    condition = conditions.IPAdapter(steering, PHOTO, scale=0.6)
    assert_same(ours(pipe, conditions=[condition]), theirs(pipeline, ip_adapter_image=PHOTO))
    expected = theirs(pipeline, ip_adapter_image=PHOTO, true_cfg_scale=2.0, negative_prompt="")
    guide = miniflux.sampling.guide("cfg", scale=2.0)
    assert_same(ours(pipe, conditions=[condition], guide=guide), expected)


def test_instantx_ip_adapter(towers: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """No other program here runs it: against its formula, block by block; and torch's own file is read safely."""
    width, hidden, pairs = SIZES.context_in_dim, SIZES.hidden_size, 3
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    content = {
        "image_proj": {
            "proj.0.weight": draw(48, 24), "proj.0.bias": draw(48), "proj.2.weight": draw(5 * width, 48),
            "proj.2.bias": draw(5 * width), "norm.weight": draw(width), "norm.bias": draw(width),
        },
        "ip_adapter": {f"{i}.to_{x}_ip.weight": draw(hidden, width) for i in range(pairs) for x in "kv"},
    }  # fmt: skip
    torch.save(content, tmp_path / "ip-adapter.bin")
    steering = conditions.load(tmp_path / "ip-adapter.bin", vision=towers["siglip"][1])
    network = steering.network
    assert isinstance(network, InstantxIPAdapter) and (network.config.double, network.config.single) == (1, 2)
    seen, q = draw(1, 24), draw(1, SIZES.num_heads, 6, hidden // SIZES.num_heads)
    proj = content["image_proj"]
    inner = torch.nn.functional.gelu(seen @ proj["proj.0.weight"].T + proj["proj.0.bias"])
    words = (inner @ proj["proj.2.weight"].T + proj["proj.2.bias"]).view(1, 5, width)
    words = torch.nn.functional.layer_norm(
        words, (width,), content["image_proj"]["norm.weight"], content["image_proj"]["norm.bias"]
    )
    torch.testing.assert_close(network.words(seen), words)
    for name, i in (("double_blocks.0", 0), ("single_blocks.1", 2)):
        k, v = (words @ content["ip_adapter"][f"{i}.to_{x}_ip.weight"].T for x in "kv")
        k, v = (one.view(1, 5, SIZES.num_heads, -1).transpose(1, 2) for one in (k, v))
        k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        expected = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(network.look(name, q, words), expected)
    assert network.look("single_blocks.2", q, words) is None
    torch.save({"image_proj": Path("x")}, tmp_path / "bad.bin")
    with pytest.raises(CheckpointError, match=r"bad.bin: cannot be read"):
        conditions.load(tmp_path / "bad.bin")


def test_folders_of_pipelines(towers: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """What diffusers saves of pipelines with a ControlNet, with a vision tower, and of Redux: loaded from folders."""
    parts, pipe = models(64, tmp_path / "plain")
    network = controlnet(num_layers=2)
    whole = diffusers.FluxControlNetPipeline(controlnet=network, **parts)
    whole.save_pretrained(tmp_path / "controlnet")
    steering, again = conditions.load(tmp_path / "controlnet"), miniflux.load(tmp_path / "controlnet", device="cpu")
    condition = conditions.ControlNet(steering, PHOTO, scale=0.7)
    expected = theirs(whole, control_image=PHOTO, controlnet_conditioning_scale=0.7)
    assert_same(ours(again, conditions=[condition]), expected)

    extractor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    seeing = diffusers.FluxPipeline(image_encoder=towers["clip"][0], feature_extractor=extractor, **parts)
    seeing.save_pretrained(tmp_path / "seeing")
    assert torch.equal(ours(miniflux.load(tmp_path / "seeing", device="cpu")), ours(pipe))
    path, _ = xlabs(tmp_path / "seeing")
    assert conditions.load(path).vision is not None  # image_encoder beside it

    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=towers["siglip"][0],
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        image_embedder=randomise(diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(24, SIZES.context_in_dim)),
    )
    prior.save_pretrained(tmp_path / "prior")
    told = conditions.load(tmp_path / "prior")
    assert told.vision is not None and next(what for what, _ in told.files) == "Redux"

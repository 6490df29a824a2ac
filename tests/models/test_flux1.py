"""The FLUX.1 transformer against outputs of the original release, published key lists and its own symmetries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.errors import ConfigError
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.sampling import image_ids
from tests.reference import of_exponentials
from tests.tiny import FLUX1, flux1_inputs, randn, randomise, shapes

RELEASES = ["flux1_dev", "flux1_schnell", "flux1_fill", "flux1_control"]
INPUTS = ["img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance"]


def load(case) -> Flux1:
    model = Flux1(Flux1Config(**case.about["config"]))
    model.load_state_dict(case.weights)
    return model


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


@pytest.mark.parametrize("release", RELEASES)
@torch.inference_mode()
def test_forward_equals_the_release(golden, release: str) -> None:
    """One forward and the activations after every block: the first name that differs tells where the paths part."""
    case = golden(release)
    model, seen = load(case), {}

    def keep(name: str):
        def hook(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, Tensor]) -> None:
            seen.update({name: out} if isinstance(out, Tensor) else {f"{name}_img": out[0], f"{name}_txt": out[1]})

        return hook

    for i, block in enumerate(model.double_blocks):
        block.register_forward_hook(keep(f"double_{i}"))
    for i, block in enumerate(model.single_blocks):
        block.register_forward_hook(keep(f"single_{i}"))
    told = {name: case[name] for name in INPUTS}
    atol = 2e-5 + of_exponentials(lambda: model(**told))
    output = model(**told)

    assert set(seen) == {name for name in case.tensors if name.startswith(("double_", "single_"))}
    for name, activation in seen.items():
        assert_close(activation, case[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(output, case["output"], rtol=0, atol=atol)
    assert_close(output.double(), case["output_float64"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "flux1-fill-dev", "flux1-canny-dev"])
def test_keys_are_those_of_the_published_file(published, manifest, name: str) -> None:
    """A renamed attribute or a wrong width would make an official file unloadable."""
    params = {"out_channels": 64} | published["flux1"][name]["params"]
    with torch.device("meta"):
        model = Flux1(Flux1Config(**params))
    assert shapes(model) == manifest(f"bfl-{name}")


def test_qkv_bias_and_mlp_ratio_reach_the_layers() -> None:
    """Config fields that no release varies are still read."""
    model = Flux1(replace(FLUX1, qkv_bias=False, mlp_ratio=2.0))
    assert not [key for key in model.state_dict() if key.endswith("qkv.bias")]
    assert model.double_blocks[0].txt_mlp[0].out_features == 64
    assert model.single_blocks[0].linear1.out_features == 3 * 32 + 64


@torch.inference_mode()
def test_theta_reaches_the_rotations(model: Flux1) -> None:
    """Another base of the frequencies is another model."""
    other = Flux1(replace(FLUX1, theta=2_000))
    other.load_state_dict(model.state_dict())
    inputs = flux1_inputs(FLUX1)
    assert (other(**inputs) - model(**inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"axes_dim": (4, 6, 8)}, r"\(4, 6, 8\).*head size 16"),
        ({"axes_dim": (5, 5, 6)}, r"\(5, 5, 6\) must be even"),
    ],
)
def test_config_refuses_contradictions(change: dict, message: str) -> None:
    """The message names the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        replace(FLUX1, **change)


def test_config_from_lists_is_hashable() -> None:
    """Configs read from JSON hold lists; the frozen config must not."""
    assert hash(replace(FLUX1, axes_dim=[4, 6, 6])) == hash(FLUX1)


def test_guidance_is_required_where_the_model_reads_it(model: Flux1) -> None:
    """A dev model without guidance would silently be another model."""
    with pytest.raises(ConfigError, match="guidance must be a tensor"):
        model(**flux1_inputs(FLUX1) | {"guidance": None})


@torch.inference_mode()
def test_guidance_acts_in_dev_and_not_in_schnell(model: Flux1) -> None:
    """The guidance input is wired where it exists and nowhere else."""
    schnell = randomise(Flux1(replace(FLUX1, guidance_embed=False)))
    inputs = flux1_inputs(FLUX1)
    other = inputs | {"guidance": inputs["guidance"] + 3}
    assert (model(**inputs) - model(**other)).abs().max() > 1e-3
    assert torch.equal(schnell(**inputs), schnell(**other))
    assert torch.equal(schnell(**inputs), schnell(**inputs | {"guidance": None}))


@pytest.mark.parametrize("name", ["img", "txt", "y", "timesteps", "img_ids"])
@torch.inference_mode()
def test_every_input_matters(model: Flux1, name: str) -> None:
    """No input is dropped on the way."""
    inputs = flux1_inputs(FLUX1)
    changed = inputs | {name: inputs[name].flip(1 if name == "img_ids" else 0) * 1.5}
    assert (model(**inputs) - model(**changed)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@torch.inference_mode()
def test_masked_text_equals_trimmed_text(model: Flux1, dtype: torch.dtype) -> None:
    """Padding behind the mask is as good as absent, whatever it holds; a mask of 0 and 1 means the same."""
    inputs, kept = flux1_inputs(FLUX1), [3, 5]
    mask = (torch.arange(5)[None] < torch.tensor(kept)[:, None]).to(dtype)
    masked = model(**inputs, txt_mask=mask)
    nonsense = torch.where(mask.bool()[..., None], inputs["txt"], 100 * randn(*inputs["txt"].shape, seed=9))
    assert_close(model(**inputs | {"txt": nonsense}, txt_mask=mask), masked, rtol=0, atol=2e-5)
    for i, length in enumerate(kept):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        alone |= {"txt": alone["txt"][:, :length], "txt_ids": alone["txt_ids"][:, :length]}
        assert_close(masked[i : i + 1], model(**alone), rtol=0, atol=2e-5)
    assert (masked[0] - model(**inputs)[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_picture_of_a_batch_equals_it_alone(model: Flux1) -> None:
    """Nothing leaks from one picture of a batch into another."""
    inputs = flux1_inputs(FLUX1, batch=3)
    together = model(**inputs)
    for i in range(3):
        alone = model(**{name: value[i : i + 1] for name, value in inputs.items()})
        assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_order_of_tokens_is_only_in_the_ids(model: Flux1) -> None:
    """Image tokens shuffled with their ids come out shuffled; text tokens, all at zero, may come in any order."""
    inputs = flux1_inputs(FLUX1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = inputs | {"img": inputs["img"][:, order], "img_ids": inputs["img_ids"][:, order]}
    shuffled |= {"txt": inputs["txt"].flip(1)}
    assert_close(model(**shuffled), model(**inputs)[:, order], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_only_relative_positions_matter(model: Flux1) -> None:
    """Moving all tokens, text included, changes nothing; moving the image against the text does."""
    inputs, move = flux1_inputs(FLUX1), torch.tensor([1.0, 30.0, 20.0])
    both = inputs | {"img_ids": inputs["img_ids"] + move, "txt_ids": inputs["txt_ids"] + move}
    assert_close(model(**both), model(**inputs), rtol=0, atol=2e-5)
    one = inputs | {"img_ids": image_ids(2, 3, 4, index=1)}
    assert (model(**one) - model(**inputs)).abs().max() > 1e-4


@torch.inference_mode()
def test_bfloat16_stays_close(model: Flux1) -> None:
    """Half-precision weights and inputs run through every path and lose digits, not meaning."""
    inputs = flux1_inputs(FLUX1)
    half = Flux1(FLUX1).bfloat16()
    half.load_state_dict(model.state_dict())
    output = half(**{name: x if name.endswith("ids") else x.bfloat16() for name, x in inputs.items()})
    assert output.dtype == torch.bfloat16
    # the same rounded inputs, so that only the arithmetic is compared
    rounded = {name: x if name.endswith("ids") else x.bfloat16().float() for name, x in inputs.items()}
    exact = model(**rounded)
    assert (output.float() - exact).norm() < 0.05 * exact.norm()

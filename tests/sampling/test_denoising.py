"""The denoising loop against whole runs of the original release, and on velocity fields with known solutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import miniflux
from miniflux.errors import ConfigError, InputError
from miniflux.models import layers
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.sampling import Moment, State, denoise, flux1_schedule, solver
from tests.reference import of_exponentials
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

SIGMAS = [1.0, 0.7, 0.3, 0.0]


class Field(nn.Module):
    """A velocity field written as a function of tokens and sigma; remembers its arguments."""

    def __init__(self, velocity) -> None:
        super().__init__()
        self.velocity, self.calls = velocity, []

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, txt_mask=None) -> Tensor:
        self.calls.append({"img": img, "ids": img_ids, "t": timesteps, "guidance": guidance, "mask": txt_mask})
        return self.velocity(img, timesteps[:, None, None])


def run(model: nn.Module, inputs: dict, timesteps: list[float], **options) -> Tensor:
    """`denoise` from the arguments of a forward."""
    names = ["img", "img_ids", "txt", "txt_ids"]
    return denoise(model, *(inputs[name] for name in names), inputs["y"], timesteps, **options)


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


@pytest.fixture
def inputs() -> dict:
    return flux1_inputs(FLUX1)


@pytest.mark.parametrize("release", ["flux1_dev", "flux1_schnell", "flux1_fill", "flux1_control"])
def test_run_equals_the_release(golden, release: str) -> None:
    """A whole Euler run; Fill and Control append their condition to the channels of every step."""
    case = golden(release)
    model = Flux1(Flux1Config(**case.about["config"]))
    model.load_state_dict(case.weights)
    inputs = {name: case[name] for name in ["img", "img_ids", "txt", "txt_ids", "y"]}
    cond = None
    if "denoise_cond" in case:
        inputs["img"], cond = case["denoise_input"], case["denoise_cond"]
    guidance = case.about["guidance_in_denoise"]

    def drawn() -> Tensor:
        return run(model, inputs, case["denoise_timesteps"].tolist(), guidance=guidance, img_cond=cond)

    assert_close(drawn(), case["denoise_output"], rtol=0, atol=1e-4 + of_exponentials(drawn))


def test_kontext_run_equals_the_release(golden) -> None:
    """Reference tokens stand behind the image tokens in the sequence and are left out of the result."""
    case = golden("flux1_dev")
    model = Flux1(Flux1Config(**case.about["config"]))
    model.load_state_dict(case.weights)
    actual = run(
        model,
        case.tensors,
        case["denoise_timesteps"].tolist(),
        guidance=case.about["kontext_guidance"],
        img_cond_seq=case["kontext_seq"],
        img_cond_seq_ids=case["kontext_seq_ids"],
    )
    assert_close(actual, case["kontext_output"], rtol=0, atol=1e-4)


def test_euler_step() -> None:
    """Straight ahead, against the direction of time."""
    x, v = torch.tensor([2.0]), torch.tensor([4.0])
    assert solver("euler").step(x, v, 1.0, 0.25, State(), None)[0].item() == -1.0


def test_straight_paths_are_exact_in_any_number_of_steps(inputs: dict) -> None:
    """On the straight flow v = noise - picture, one step and many arrive at the picture."""
    picture = randn(*inputs["img"].shape, seed=5)
    field = Field(lambda _x, _t: inputs["img"] - picture)
    for steps in (1, 2, 7):
        assert_close(run(field, inputs, flux1_schedule(steps, 256)), picture, rtol=0, atol=1e-6)


def test_linear_field_closed_form(inputs: dict) -> None:
    """For v = x each Euler step multiplies by 1 + (next - sigma); for v = sigma it adds sigma (next - sigma)."""
    expected = inputs["img"] * (1 - 0.3) * (1 - 0.4) * (1 - 0.3)
    assert_close(run(Field(lambda x, _t: x), inputs, SIGMAS), expected)
    expected = inputs["img"] - 1.0 * 0.3 - 0.7 * 0.4 - 0.3 * 0.3
    assert_close(run(Field(lambda x, t: t.expand_as(x)), inputs, SIGMAS), expected)


def test_what_the_network_is_given(inputs: dict) -> None:
    """Every noise level but the last, one value per picture; guidance, mask and conditions on every step."""
    field, mask = Field(lambda x, _t: x[..., :16]), torch.ones(2, 5, dtype=torch.bool)
    cond, seq, seq_ids = randn(2, 15, 3, seed=6), randn(2, 3, 16, seed=7), randn(2, 3, 3, seed=8)
    run(field, inputs, SIGMAS, guidance=2.5, img_cond_seq=seq, img_cond_seq_ids=seq_ids, txt_mask=mask)
    assert [call["t"].tolist() for call in field.calls] == [[torch.tensor(s).item()] * 2 for s in SIGMAS[:-1]]
    for call in field.calls:
        assert call["guidance"].tolist() == [2.5, 2.5]
        assert call["mask"] is mask
        assert torch.equal(call["img"][:, 12:], seq)
        assert torch.equal(call["ids"], torch.cat([inputs["img_ids"], seq_ids], dim=1))
    assert torch.equal(field.calls[0]["img"][:, :12], inputs["img"])

    field = Field(lambda x, _t: x[..., :16])
    run(field, inputs, SIGMAS, guidance=None, img_cond=cond[:, :12])
    for call in field.calls:
        assert call["guidance"] is None
        assert torch.equal(call["img"][..., 16:], cond[:, :12])


def test_masked_text_equals_trimmed_text(model: Flux1, inputs: dict) -> None:
    """The mask reaches the network at every step."""
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    trimmed = inputs | {"txt": inputs["txt"][:, :3], "txt_ids": inputs["txt_ids"][:, :3]}
    masked = run(model, inputs, SIGMAS, txt_mask=mask)
    assert_close(masked, run(model, trimmed, SIGMAS), rtol=0, atol=2e-5)
    assert (masked - run(model, inputs, SIGMAS)).abs().max() > 1e-3


def test_picture_of_a_batch_equals_it_alone(model: Flux1, inputs: dict) -> None:
    """The result must not depend on the company."""
    together = run(model, inputs, SIGMAS)
    for i in range(2):
        alone = run(model, {name: value[i : i + 1] for name, value in inputs.items()}, SIGMAS)
        assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_guidance_acts_where_the_model_has_it(model: Flux1, inputs: dict) -> None:
    """Another strength is another picture; none at all is refused."""
    assert (run(model, inputs, SIGMAS, guidance=1.0) - run(model, inputs, SIGMAS, guidance=4.0)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="guidance"):
        run(model, inputs, SIGMAS, guidance=None)


def test_callback_sees_every_step(model: Flux1, inputs: dict) -> None:
    """1, 2, ... with the latents of that moment; the last ones are the result, and the noise is left as it was."""
    before, seen = inputs["img"].clone(), []
    result = run(model, inputs, SIGMAS, callback=lambda moment: seen.append((moment.step, moment.x.clone())))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result)
    assert_close(run(model, inputs, SIGMAS[:2]), seen[0][1])
    assert torch.equal(inputs["img"], before)


def test_callback_may_stop_the_run(inputs: dict) -> None:
    """An exception from the callback ends the loop at once."""
    field = Field(lambda x, _t: x)

    def stop(moment: Moment) -> None:
        if moment.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(field, inputs, SIGMAS, callback=stop)
    assert len(field.calls) == 2


def test_half_precision_keeps_the_sum_in_float32(inputs: dict) -> None:
    """A thousand small steps in bfloat16 would get stuck: 1 + 0.001 is 1 there."""
    half = inputs | {"img": torch.ones(2, 12, 16, dtype=torch.bfloat16)}
    field = Field(lambda x, _t: torch.full_like(x, -1.0))
    result = run(field, half, flux1_schedule(1000, 256, shift=False))
    assert result.dtype == torch.float32
    assert_close(result, torch.full_like(result, 2.0), rtol=0, atol=1e-4)
    assert field.calls[0]["img"].dtype == field.calls[0]["t"].dtype == torch.bfloat16


def test_gradients_are_off(model: Flux1, inputs: dict) -> None:
    """A run that keeps its graph would fill the memory."""
    assert not run(model, inputs, SIGMAS).requires_grad


def test_reference_tokens_need_their_positions(inputs: dict) -> None:
    """Tokens without ids, or ids without tokens, would fail deep inside the attention."""
    field = Field(lambda x, _t: x)
    for half in ({"img_cond_seq": randn(2, 3, 16)}, {"img_cond_seq_ids": randn(2, 3, 3)}):
        with pytest.raises(InputError, match="img_cond_seq and img_cond_seq_ids"):
            run(field, inputs, SIGMAS, **half)


@pytest.mark.parametrize("name", ["flux1-schnell", "flux2-klein-4b", "flux3-klein"])
def test_rotations_are_made_once_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps there are."""
    pipe, made, numbers, plain = miniflux.tiny(name), [], [], layers._rotations
    monkeypatch.setattr(layers, "_rotations", lambda *given: made.append(given) or plain(*given))
    for steps in (1, 4):
        made.clear()
        pipe.generate("a red circle", width=32, height=32, steps=steps)
        numbers.append(len(made))
    assert numbers[0] == numbers[1] > 0

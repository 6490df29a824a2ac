"""Noise, packing and position ids against the original release and written-out loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError
from miniflux.sampling import image_ids, initial_noise, pack, text_ids, unpack
from tests.tiny import randn

SIDES = st.integers(1, 100)
SEEDS = st.integers(0, 2**64 - 1)
BITS = 2**32  # of a seed that torch's CPU generator reads


def test_noise_and_packing_equal_the_release(golden) -> None:
    """Bit for bit: the same seed is the same picture as in the original code."""
    case = golden("sampling")
    about, noise = case.about, case["noise"]
    assert torch.equal(initial_noise(about["noise_height"], about["noise_width"], about["noise_seed"]), noise)
    assert torch.equal(pack(noise), case["noise_packed"])
    assert torch.equal(unpack(case["noise_packed"], about["noise_height"], about["noise_width"]), noise)
    assert torch.equal(case["noise_unpacked_again"], noise)


@given(SIDES, SIDES, SEEDS, st.integers(1, 5))
def test_noise_depends_on_seed_and_size_only(height: int, width: int, seed: int, channels: int) -> None:
    """Rounded up to whole tokens; the same again from the same seed, whatever torch's own generator does."""
    noise = initial_noise(height, width, seed, channels)
    assert noise.shape == (1, channels, 2 * -(-height // 16), 2 * -(-width // 16))
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    state = torch.random.get_rng_state()
    torch.rand(3)
    assert torch.equal(initial_noise(height, width, seed, channels), noise)
    torch.random.set_rng_state(state)
    initial_noise(height, width, seed, channels)
    assert torch.equal(torch.random.get_rng_state(), state)


@given(SEEDS, st.one_of(SEEDS, st.integers(0, 9)))
def test_noise_differs_between_seeds(one: int, other: int) -> None:
    """Two seeds are two pictures, unless they agree in the 32 bits that torch reads, as documented."""
    same = torch.equal(initial_noise(64, 64, one), initial_noise(64, 64, other))
    assert same == (one % BITS == other % BITS)


def test_noise_is_standard_normal() -> None:
    """Mean 0 and variance 1 within five standard errors of 65,536 numbers."""
    noise = initial_noise(512, 512, seed=0)
    assert abs(noise.mean()) < 5 / 256
    assert abs(noise.var() - 1) < 5 * 2**0.5 / 256


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, None])
def test_bad_seeds(seed: object) -> None:
    """The message names the seed and the range."""
    with pytest.raises(InputError, match=f"seed must be a whole number from 0 to {2**64 - 1}, got {seed!r}"):
        initial_noise(64, 64, seed)


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, 0), (-16, 64)])
def test_bad_sizes(height: int, width: int) -> None:
    """A picture without pixels has no noise."""
    with pytest.raises(InputError, match=f"height and width must be at least 1, got {height}x{width}"):
        initial_noise(height, width, 0)


@given(st.integers(1, 3), st.integers(1, 4), SIDES, SIDES)
def test_unpack_undoes_pack(batch: int, channels: int, height: int, width: int) -> None:
    """There and back, for sizes that are no multiples of 16 too."""
    rows, columns = -(-height // 16), -(-width // 16)
    latent = randn(batch, channels, 2 * rows, 2 * columns)
    tokens = pack(latent)
    assert tokens.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(unpack(tokens, height, width), latent)


def test_pack_written_out() -> None:
    """Tokens run along rows; in a token, channels first, then rows and columns of the patch."""
    latent = randn(2, 3, 4, 6)
    tokens = pack(latent)
    for row in range(2):
        for column in range(3):
            for c in range(3):
                for i in range(2):
                    for j in range(2):
                        expected = latent[:, c, 2 * row + i, 2 * column + j]
                        assert torch.equal(tokens[:, 3 * row + column, 4 * c + 2 * i + j], expected)


@pytest.mark.parametrize("shape", [(1, 4, 3, 4), (1, 4, 4, 5)])
def test_pack_needs_whole_patches(shape: tuple[int, ...]) -> None:
    """A latent of odd sides has no tokens."""
    with pytest.raises(InputError, match=rf"{shape[2]}x{shape[3]}.*even"):
        pack(torch.zeros(shape))


def test_unpack_needs_the_size_of_the_tokens() -> None:
    """Tokens of another size would give a scrambled picture."""
    with pytest.raises(InputError, match="6 tokens do not fill 32x32 pixels, which needs 4"):
        unpack(torch.zeros(1, 6, 64), 32, 32)


def test_unpack_needs_whole_patches() -> None:
    """Channels of a token are patches of 2x2."""
    with pytest.raises(InputError, match=r"6 channels.*multiple of 4"):
        unpack(torch.zeros(1, 4, 6), 32, 32)


def test_image_ids() -> None:
    """(index, row, column) in the order of `pack`."""
    expected = [[3, row, column] for row in range(2) for column in range(4)]
    assert image_ids(2, 2, 4, index=3).tolist() == [expected, expected]
    assert image_ids(1, 1, 1).tolist() == [[[0, 0, 0]]]


def test_text_ids() -> None:
    """All text sits at the origin."""
    assert text_ids(2, 3).tolist() == [[[0, 0, 0]] * 3] * 2

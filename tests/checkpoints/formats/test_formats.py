"""Each format alone: packed and unpacked, against the packages that define it and against its own grid."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.formats.encodings import kinds_of
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.checkpoints.formats.nvfp4 import from_tiles, to_tiles
from miniflux.errors import CheckpointError
from tests.checkpoints.formats.made import WRITERS, random_blocks
from tests.tiny import randn

# Relative error (Frobenius) that packing normal numbers may cost, a little above what each grid must cost.
ERRORS: dict[str, float] = {
    **dict.fromkeys(("fp8_e4m3", "fp8_scaled", "fp8_scaled_old", "fp8_rows"), 0.027),
    **dict.fromkeys(("fp8_e5m2", "fp8_scaled_e5m2"), 0.054),
    "int8": 0.009,
    "nf4": 0.094,
    "fp4": 0.125,
    "nvfp4": 0.097,
    "nvfp4_comfy": 0.097,
    "Q8_0": 0.006,
    "Q5_1": 0.040,
    "Q5_0": 0.045,
    "Q4_1": 0.082,
    "Q4_0": 0.090,
    "Q5_K": 0.038,
    "Q4_K": 0.075,
    "Q6_K": 0.018,
    "Q3_K": 0.150,
    "Q2_K": 0.285,
    "IQ4_NL": 0.080,
    "IQ4_XS": 0.080,
}
OLD = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # which the package `gguf` can write
# Where the codes are in blocks whose scales are searched for: first byte, last, and the bits of a code that are there.
CODES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "Q2_K": ((16, 80, 0, 2),),
    "Q3_K": ((32, 96, 0, 2), (0, 32, 2, 1)),
    "Q4_K": ((16, 144, 0, 4),),
    "Q5_K": ((48, 176, 0, 4), (16, 48, 4, 1)),
    "Q6_K": ((0, 128, 0, 4), (128, 192, 4, 2)),
    "IQ4_NL": ((2, 18, 0, 4),),
    "IQ4_XS": ((8, 136, 0, 4),),
}
# Relative errors of ggml's own `quantize_row_*_reference` (2023), of normal numbers and of their cubes.
GGML = {
    "Q2_K": (0.3055, 0.4403),
    "Q3_K": (0.1518, 0.1533),
    "Q4_K": (0.0726, 0.0928),
    "Q5_K": (0.0387, 0.0606),
    "Q6_K": (0.0178, 0.0244),
}
OF_WRITERS = {  # the format that a file of tests/checkpoints/formats/made.py is in
    "fp8 e4m3": "fp8_e4m3",
    "fp8 e5m2": "fp8_e5m2",
    "scaled fp8, old": "fp8_scaled_old",
    "scaled fp8, comfy_quant": "fp8_scaled",
    "scaled fp8 e5m2, comfy_quant": "fp8_scaled_e5m2",
    "fp8 by rows": "fp8_rows",
    "int8": "int8",
    "nf4": "nf4",
    "nf4, nested": "nf4",
    "fp4": "fp4",
    "fp4, nested": "fp4",
    "nvfp4": "nvfp4",
    "nvfp4, header": "nvfp4_comfy",
}


@pytest.mark.parametrize("name", ERRORS)
def test_packing_costs_what_the_grid_must(name: str) -> None:
    weight = randn(48, 512)
    form = FORMATS[name]
    parts = form.pack(weight)
    relative = float((form.unpack(parts) - weight).norm() / weight.norm())
    assert 0.5 * ERRORS[name] < relative < ERRORS[name]
    again = form.pack(form.unpack(parts))
    assert torch.equal(form.unpack(again), form.unpack(parts)) or name in (*CODES, *OLD[1:])


def test_every_format_that_is_written_is_tested() -> None:
    assert ERRORS.keys() == FORMATS.keys()
    assert OF_WRITERS.keys() | {"scaled fp8, header"} == WRITERS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_known_before_anything_is_packed(name: str) -> None:
    for shape in ((64, 256), (130, 256), (256, 512)):
        parts = FORMATS[name].pack(torch.ones(shape))
        assert kinds_of(FORMATS[name], shape) == {key: (t.dtype, tuple(t.shape)) for key, t in parts.items()}


@pytest.mark.parametrize("writer", OF_WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacking_is_rounded_once(writer: str, dtype: torch.dtype) -> None:
    """Into a given buffer of any dtype: the numbers of the specification, rounded to it."""
    parts, dense = WRITERS[writer][0](randn(40, 64, seed=3))
    out = torch.full((40, 64), torch.nan, dtype=dtype)
    assert FORMATS[OF_WRITERS[writer]].unpack(parts, out=out) is out
    assert torch.equal(out, dense.to(dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_statistics_in_half_precision(nested: bool) -> None:
    """Some programs cast every float of a file: the tables and scales then are what they were rounded to."""
    parts, _ = WRITERS["nf4, nested" if nested else "nf4"][0](randn(8, 64, seed=3))
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in parts.items()}
    wide = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    assert torch.equal(FORMATS["nf4"].unpack(half), FORMATS["nf4"].unpack(wide))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in BLOCKS])
def test_pieces_make_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = FORMATS[name].pack(randn(37, 192, seed=5))
    whole = FORMATS[name].unpack(parts)
    monkeypatch.setattr("miniflux.checkpoints.formats.base.CHUNK", 500)
    assert torch.equal(FORMATS[name].unpack(parts), whole)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_read_as_ggml_reads_them(kind: str) -> None:
    """Every bit pattern of every byte occurs; sizes are those of the package."""
    wanted = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[wanted] == (BLOCKS[kind].numbers, BLOCKS[kind].bytes)
    raw = random_blocks(kind, 96, 1024)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, wanted))
    assert torch.equal(FORMATS[kind].unpack({"weight": torch.from_numpy(raw)}), expected)


@pytest.mark.parametrize("kind", OLD)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_blocks_are_written_as_ggml_writes_them(kind: str, seed: int, size: float) -> None:
    """The same bytes, zeros and constant blocks included."""
    weight = randn(6, 64, seed=seed) * size
    weight[0, :32], weight[1, :32], weight[2, 5] = 0, size, -9 * size
    raw = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(FORMATS[kind].pack(weight)["weight"].numpy(), raw)


@pytest.mark.parametrize("kind", CODES)
def test_the_package_reads_what_is_written(kind: str) -> None:
    """Zeros, constants, one-sided and tiny numbers included."""
    weight = randn(8, 256, seed=2)
    weight[0], weight[1], weight[2], weight[3] = 0, 1, weight[2].abs(), -weight[3].abs()
    weight[4, :32], weight[5] = 50, 1e-30
    raw = FORMATS[kind].pack(weight)["weight"]
    read = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(read, FORMATS[kind].unpack({"weight": raw}))
    assert torch.isfinite(read).all() and not read[0].any()
    assert torch.allclose(read[1], weight[1], rtol=0.02)
    for row in (2, 3):
        assert float((read[row] - weight[row]).norm() / weight[row].norm()) < ERRORS[kind]


@pytest.mark.parametrize("kind", CODES)
def test_every_number_has_the_nearest_code(kind: str) -> None:
    """Whatever the scales: none of the numbers that the group could say is nearer."""
    weight = torch.cat((randn(16, 512, seed=3), randn(16, 512, seed=4) ** 3))
    raw = FORMATS[kind].pack(weight)["weight"]
    error = (FORMATS[kind].unpack({"weight": raw}) - weight).abs()
    nearest = torch.full_like(error, torch.inf)
    for code in range(1 << sum(width for *_, width in CODES[kind])):
        same = raw.view(-1, BLOCKS[kind].bytes).clone()
        for start, stop, shift, width in CODES[kind]:
            some = code >> shift & ((1 << width) - 1)
            same[:, start:stop] = sum(some << at for at in range(0, 8, width))
        nearest = torch.minimum(nearest, (FORMATS[kind].unpack({"weight": same.view_as(raw)}) - weight).abs())
    assert (error <= nearest + 1e-5 * weight.abs().amax()).all()


@pytest.mark.parametrize("kind", GGML)
def test_scales_are_no_worse_than_those_of_ggml(kind: str) -> None:
    for weight, theirs in zip((randn(48, 512), randn(48, 512, seed=1) ** 3), GGML[kind], strict=True):
        read = FORMATS[kind].unpack(FORMATS[kind].pack(weight))
        assert float((read - weight).norm() / weight.norm()) < 1.02 * theirs


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS", "Q4_K"])
def test_searched_scales_are_better_than_the_range(kind: str) -> None:
    """In as many bits; Q4_0 has the range alone."""
    weight = randn(32, 512, seed=1)
    errors = {name: (FORMATS[name].unpack(FORMATS[name].pack(weight)) - weight).norm() for name in (kind, "Q4_0")}
    assert errors[kind] < 0.92 * errors["Q4_0"]


def test_tiles_of_scales() -> None:
    """cuBLAS' order, from its documentation: row r, column c of a tile is at (r % 32) * 16 + (r // 32) * 4 + c."""
    scale = (
        torch.arange(130 * 6, dtype=torch.int32).remainder(120).to(torch.uint8).view(torch.float8_e4m3fn).view(130, 6)
    )
    tiles = to_tiles(scale)
    assert tuple(tiles.shape) == (256, 8)
    flat, plain = tiles.view(torch.uint8).flatten(), scale.view(torch.uint8)
    for r, c in ((0, 0), (1, 3), (33, 2), (127, 5), (128, 4), (129, 5)):
        tile = (r // 128) * 2 + c // 4
        assert flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] == plain[r, c]
    assert torch.equal(from_tiles(tiles, 130, 6).view(torch.uint8), plain)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("Q4_K", (4, 64), "GGUF Q4_K needs rows of a multiple of 256"),
        ("Q8_0", (4, 30), "GGUF Q8_0 needs rows of a multiple of 32"),
        ("nvfp4", (4, 24), "nvfp4 needs rows of a multiple of 16"),
        ("nf4", (3, 30), "bitsandbytes nf4 needs a multiple of 64 numbers"),
        ("int8", (64,), "int8 needs a matrix"),
        ("fp8_scaled", (2, 3, 4), "fp8 scaled needs a matrix"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    assert not FORMATS[name].holds(shape)
    with pytest.raises(CheckpointError, match=message):
        FORMATS[name].pack(torch.ones(shape))


@pytest.mark.parametrize("name", ERRORS)
def test_zeros_and_large_numbers(name: str) -> None:
    """Neither divides by zero nor overflows into NaN."""
    weight = torch.zeros(4, 256)
    assert not FORMATS[name].unpack(FORMATS[name].pack(weight)).any()
    weight[1:] = 3e4
    back = FORMATS[name].unpack(FORMATS[name].pack(weight))
    assert torch.isfinite(back).all() and not back[0].any()
    assert name.startswith("fp8_e") or torch.allclose(back[1:], weight[1:], rtol=0.01)

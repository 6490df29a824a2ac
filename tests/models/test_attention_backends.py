"""Ways to compute attention: each against softmax in float64, and packages that are not here through stand-ins that
know no more than their arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux.errors import InputError
from miniflux.models.attention import BACKENDS, attention_by, available
from miniflux.models.layers import attention, rope_rotations
from tests.tiny import randn

SHAPE = (2, 3, 20, 16)  # pictures, heads, tokens, channels of a head
MASK = (torch.arange(20) < torch.tensor([[13], [20]]))[:, None, None]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    yield
    attention_by.cache_clear()


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in float64."""
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v.double()


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*SHAPE, seed=i).to(dtype) for i in range(3)]


def check(kernel: Callable[..., Tensor], dtype: torch.dtype, mask: Tensor | None = None) -> None:
    q, k, v = tensors(dtype)
    found = kernel(q, k, v, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(q, k, v, mask), rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("kind", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_sdpa(kind: SDPBackend, mask: Tensor | None, dtype: torch.dtype) -> None:
    with sdpa_kernel(kind):
        check(BACKENDS["sdpa"].make(), dtype, mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@torch.inference_mode()
def test_flex(mask: Tensor | None, dtype: torch.dtype) -> None:
    check(BACKENDS["flex"].make(), dtype, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("name", available())
@torch.inference_mode()
def test_whatever_is_here(name: str) -> None:
    """Also 8 bits, in which a result is right to a few parts of a hundred."""
    q, k, v = (randn(2, 4, 300, 64, seed=i).to("cuda", torch.bfloat16) for i in range(3))
    found = BACKENDS[name].make()(q, k, v, None)
    torch.testing.assert_close(found.double(), exact(q, k, v), rtol=0, atol=2e-2)


def beside(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`flash_attn_func` of version 2: tensors are (B, L, H, D)."""
    assert not options and q.shape == (2, 20, 3, 16)
    return exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).to(q)


def with_sums(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same of version 3 in its first releases."""
    return beside(q, k, v, **options), torch.zeros(2, 3, 20)


def in_bits(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
    """`sageattn`."""
    assert tensor_layout == "HND" and not is_causal and q.shape == SHAPE
    return exact(q, k, v).to(q)


PACKAGES: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("flash2", "flash_attn", "flash_attn_func", beside),
    ("flash3", "flash_attn_interface", "flash_attn_func", with_sums),
    ("flash3", "flash_attn_interface", "flash_attn_func", beside),
    ("sage", "sageattention", "sageattn", in_bits),
]


def install(monkeypatch: pytest.MonkeyPatch, package: str, function: str, stand_in: Callable[..., Any]) -> None:
    module = ModuleType(package)
    module.__spec__ = ModuleSpec(package, None)
    setattr(module, function, stand_in)
    monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.parametrize(("name", "package", "function", "stand_in"), PACKAGES)
def test_packages_get_what_they_expect(
    name: str, package: str, function: str, stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, package, function, stand_in)
    check(BACKENDS[name].make(), torch.bfloat16)


def test_cudnn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = torch.nn.attention.sdpa_kernel

    def noted(kind: Any) -> Any:
        asked.append(kind)
        return real(SDPBackend.MATH)

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", noted)
    check(BACKENDS["cudnn"].make(), torch.bfloat16, MASK)
    assert asked == [SDPBackend.CUDNN_ATTENTION]


@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_it_takes_the_place_of_attention(name: str) -> None:
    """Rotations, fewer queries than keys, masks and heads side by side are as ever."""
    ids = torch.arange(20.0)[None, :, None].expand(2, -1, 2)
    pe = rope_rotations(ids, (8, 8), 100)
    q, k, v = tensors()
    for mask in (None, MASK):
        expected = attention(q[:, :, 5:], k, v, pe, mask)
        torch.testing.assert_close(attention_by(name)(q[:, :, 5:], k, v, pe, mask), expected, rtol=0, atol=0)
    pipe = miniflux.tiny("flux1-dev")
    found, expected = (pipe.generate("a", steps=1, attend=attend) for attend in (attention_by(name), None))
    assert torch.equal(found.latents, expected.latents)
    assert attention_by(name) is attention_by(name)  # so that compiled blocks know it again


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0, as far as one can tell by asking."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.usefixtures("hopper")
def test_auto_takes_the_first_that_takes_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_by("auto").names == ("cudnn", "sdpa")
    attention_by.cache_clear()
    install(monkeypatch, "flash_attn_interface", "flash_attn_func", with_sums)
    install(monkeypatch, "sageattention", "sageattn", in_bits)
    chosen = attention_by("auto")
    assert chosen.names == ("flash3", "cudnn", "sdpa")  # none in 8 bits
    v = torch.empty(1, 2, 3, 128, dtype=torch.bfloat16, device="meta")
    on_cuda = type("Cuda", (), {"shape": v.shape, "dtype": v.dtype, "device": torch.device("cuda")})
    assert BACKENDS["flash3"].unfit(on_cuda, False) is None  # type: ignore[arg-type]
    assert "knows no masks" in str(BACKENDS["flash3"].unfit(on_cuda, True))  # type: ignore[arg-type]
    assert BACKENDS["cudnn"].unfit(on_cuda, True) is None  # type: ignore[arg-type]
    check(lambda q, k, v, mask: chosen.kernels[-1](q, k, v, mask), torch.float32, MASK)
    with pytest.raises(InputError, match="'sage' does not take these tensors: it runs on cuda, the tensors are on cpu"):
        attention_by("sage")(*tensors(), rope_rotations(torch.zeros(2, 20, 1), (16,), 100))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fast", "unknown attention 'fast'; known: auto, flash3, cudnn"),
        ("flash2", "'flash2' cannot be used here: flash_attn is not installed .pip install flash-attn"),
        ("flash3", "flash_attn_interface is not installed .from the folder hopper"),
        ("sage", "sageattention is not installed .pip install sageattention"),
    ],
)
def test_what_is_not_here_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        attention_by(name)


def test_a_missing_or_other_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cudnn' cannot be used here: it needs a CUDA device, and there is none"):
        attention_by("cudnn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(InputError, match=r"of compute capability 8\.x, 9\.x, 10\.x, 12\.x, this one has 7\.x"):
        attention_by("cudnn")


@pytest.mark.usefixtures("hopper")
def test_a_package_for_another_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", "another_func", beside)
    with pytest.raises(InputError, match="'flash2': its package cannot be imported: .*flash_attn_func"):
        attention_by("flash2")


@pytest.mark.usefixtures("hopper")
def test_tensors_that_do_not_fit_are_told() -> None:
    wrong = torch.empty(1, 2, 3, 20, dtype=torch.float32)
    on_cuda = {"shape": wrong.shape, "dtype": wrong.dtype, "device": torch.device("cuda")}
    for change, said in (
        ({}, "computes in torch.float16 and torch.bfloat16, the tensors are torch.float32"),
        ({"dtype": torch.float16}, "multiples of 8 up to 128, these have 20 channels"),
    ):
        given: Any = type("Given", (), {**on_cuda, **change})
        assert said in str(BACKENDS["cudnn"].unfit(given, False))

"""The layer that stands for a linear: what it keeps, what it shares, and that it behaves like one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.checkpoints import FORMATS, QuantizedLinear
from miniflux.checkpoints.quantized import dense_weight, free_scratch, scratch
from tests.tiny import randn


def layer(name: str, weight: Tensor, swapped: bool = False, stacks: int = 1) -> QuantizedLinear:
    """A packed layer in memory, made as loading makes it."""
    form, rows = FORMATS[name], len(weight) // stacks
    packed = [form.pack(weight[i * rows : (i + 1) * rows]) for i in range(stacks)]
    stored = {
        f"part{i}": form.read({k: (t.dtype, tuple(t.shape)) for k, t in parts.items()}, parts.__getitem__)
        for i, parts in enumerate(packed)
    }
    made = QuantizedLinear(*weight.shape, True, stored, swapped)
    state = {buffer: packed[i][part] for i in range(stacks) for part, buffer in made.names(i).items()}
    made.load_state_dict({**state, "bias": randn(len(weight), seed=9)}, assign=True)
    return made


def test_keys_are_those_of_the_file() -> None:
    """Of one stack of rows; parts with a dot in their name get a line instead, and stacks are numbered."""
    assert list(layer("int8", randn(8, 16)).state_dict()) == ["bias", "weight", "weight_scale"]
    assert list(layer("nf4", randn(8, 16)).origins.items()) == [
        ("weight", "part0.weight"),
        ("weight_absmax", "part0.weight.absmax"),
        ("weight_quant_map", "part0.weight.quant_map"),
    ]
    two = layer("fp8_scaled", randn(8, 16), stacks=2)
    assert list(two.origins) == ["weight_0", "weight_scale_0", "weight_1", "weight_scale_1"]


@pytest.mark.parametrize("name", ["fp8_scaled", "int8", "nf4", "nvfp4", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stacks", [1, 2])
def test_it_computes_what_the_unpacked_layer_computes(name: str, dtype: torch.dtype, stacks: int) -> None:
    """In the dtype of the input, for any leading shape, with the halves of the rows swapped or not."""
    weight = randn(32, 64)
    for swapped in (False, True):
        packed = layer(name, weight, swapped, stacks)
        plain = torch.cat([FORMATS[name].unpack(FORMATS[name].pack(half)) for half in weight.chunk(stacks)])
        plain = torch.cat(plain.chunk(2)[::-1]) if swapped else plain
        assert torch.equal(packed.dense(), plain) and torch.equal(dense_weight(packed), plain)
        assert packed.bias is not None
        for x in (randn(64), randn(5, 64), randn(2, 3, 64)):
            y = packed(x.to(dtype))
            assert torch.equal(y, F.linear(x.to(dtype), plain.to(dtype), packed.bias.to(dtype))) and y.dtype == dtype


def test_memory_for_unpacking_is_shared() -> None:
    """One buffer for all layers of a thread, as large as the largest; another dtype, or thread, has its own."""
    free_scratch()
    small, large = layer("int8", randn(8, 16)), layer("int8", randn(64, 32))
    for made in (large, small, large):
        made(torch.ones(made.in_features))
    cpu = torch.device("cpu")
    first = scratch((8, 16), torch.float32, cpu)
    assert first.data_ptr() == scratch((64, 32), torch.float32, cpu).data_ptr()
    assert first.untyped_storage().nbytes() == 64 * 32 * 4
    assert scratch((4, 4), torch.bfloat16, cpu).data_ptr() != first.data_ptr()
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(scratch((8, 16), torch.float32, cpu).data_ptr()))
    thread.start()
    thread.join()
    assert seen != [first.data_ptr()]
    free_scratch()


def test_threads_do_not_disturb_each_other() -> None:
    """Many layers in many threads at once give what they give alone."""
    layers = [layer("nf4", randn(96, 64, seed=i)) for i in range(4)]
    x = randn(3, 64)
    alone = [made(x) for made in layers]
    wrong: list[int] = []

    def work(i: int) -> None:
        for turn in range(40):
            j = (i + turn) % 4
            if not torch.equal(layers[j](x), alone[j]):
                wrong.append(j)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_back() -> None:
    """The shared memory serves calls in and outside of inference mode."""
    free_scratch()
    made, x = layer("int8", randn(8, 16)), torch.ones(2, 16)
    with torch.inference_mode():
        inside = made(x)
    assert torch.equal(made(x), inside)
    with torch.inference_mode():
        assert torch.equal(made(x), inside)


def test_gradients_of_the_input() -> None:
    """As through a linear, for layers one after the other that share memory; packed weights get none."""
    one, two = layer("nf4", randn(48, 64)), layer("int8", randn(32, 48, seed=1))
    x = randn(5, 64).requires_grad_()
    two(one(x)).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    hidden = F.linear(y, one.dense(), one.bias)
    F.linear(hidden, two.dense(), two.bias).square().sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
    assert all(not tensor.requires_grad for tensor in [*one.buffers(), *one.parameters()])


def test_moves_and_casts_leave_packed_parts_alone() -> None:
    made = layer("fp8_scaled", randn(8, 16))
    before = made.dense()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        cast(made)
        assert made.weight.dtype == torch.float8_e4m3fn and made.weight_scale.dtype == torch.float32
        assert torch.equal(made.dense(), before)
    assert made.bias is not None and made.bias.dtype == torch.float16
    other = copy.deepcopy(made)
    assert torch.equal(other.dense(), before) and other.weight.data_ptr() != made.weight.data_ptr()
    assert made.to("meta").dense().is_meta and tuple(made.dense().shape) == (8, 16)


def test_more_inputs_than_packed() -> None:
    """Those that a control LoRA adds meet a weight of zero."""
    made, x = layer("int8", randn(8, 16)), randn(3, 24)
    made.in_features = 24
    assert torch.equal(made(x), made(x[:, :16]))


def test_it_says_what_it_is() -> None:
    assert repr(layer("nf4", randn(8, 16))) == (
        "QuantizedLinear(in_features=16, out_features=8, bias=True, bitsandbytes nf4)"
    )


def test_it_compiles() -> None:
    """Without a break: what is shared between threads is left out of compiled code."""
    made, x = layer("nvfp4", randn(16, 32)), randn(4, 32)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), made(x))

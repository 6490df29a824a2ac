"""The strength that a header or a config states, against PEFT: patterns, rank-stabilised LoRAs, flat entries."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from miniflux.errors import CheckpointError, LoraError
from miniflux.lora import attach, read
from miniflux.lora.patterns import Patterns
from miniflux.lora.stated import Stated
from miniflux.models.flux1 import Flux1
from tests.parity.peers import flux1_pair
from tests.tiny import FLUX1, randn

peft = pytest.importorskip("peft", reason="parity of patterns needs PEFT: pip install miniflux[test]")
from peft.utils.other import get_pattern_key  # noqa: E402

TARGETS = ["to_q", "to_k", "to_out.0", "proj_out", "proj_mlp", "ff.net.0.proj", "add_q_proj"]
NAMES = [
    *(f"transformer_blocks.{i}.attn.{part}" for i in (0, 1, 10) for part in ("to_q", "to_k", "to_out.0")),
    *(f"single_transformer_blocks.{i}.{part}" for i in (0, 1, 11) for part in ("attn.to_q", "proj_out", "proj_mlp")),
    *("proj_out", "context_embedder", "transformer_blocks.0.ff.net.0.proj", "time_text_embed.text_embedder.linear_1"),
]
HAND_MADE = [
    *(
        "proj_out",
        "^proj_out",
        "^transformer_blocks.0.attn.to_q",
        "0.attn.to_q",
        r"attn\.to_[qk]",
        ".*to_q",
        "to_(q|k)$",
    ),
    *(r"single_transformer_blocks\.\d+\.proj_(out|mlp)", r"(?<!single_)transformer_blocks\.\d\..*", r"\d+\.attn\..+"),
    *(
        r"(?!single).*proj_out",
        r"[^.]+\.1\..*",
        "blocks.*.0.*q",
        "to_q|to_k",
        "",
        ".*",
        r"\w+\.proj_mlp\b",
        "(?:a|t)+o_q",
    ),
    *(
        r".{3}_q",
        r"to_q{1,2}",
        r"\D*1\D*",
        r"proj_[\w]{3}",
        "o_q",
        "transformer_blocks.1",
        r"(?P<x>attn)\.to_k",
        ".+?q",
    ),
    *(r".*\.1{1,}\..*", "(a+)+b", r"^(?:single_)?transformer_blocks\.[01]\.attn\.to_q$", r"[a-z_]+\.[0-9]+\.proj_out"),
]


@pytest.mark.parametrize("key", HAND_MADE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_pattern_fits_as_in_peft(key: str) -> None:
    patterns = Patterns("the file", [key])
    for name in NAMES:
        assert (patterns.first(name) is not None) == (get_pattern_key([key], name) == key), name


letters = st.sampled_from(["to_q", "q", "t", "attn", "0", "1", "blocks", "single", "_", "proj", r"\.", ".", "o"])
classes = st.sampled_from([r"\d", r"\w", r"\W", r"\D", r"\s", r"[a-z]", "[^.]", "[0-9_]", r"[\d.]", r"\b", r"\B"])
whole = st.recursive(
    letters | classes | st.sampled_from(["^", "$", ".*", ""]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(
            "(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{0,2}", "{,3}?", "{3,1}"])
        ),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
        inner.map("(?<={})".format),
    ),
    max_leaves=6,
)


@given(keys=st.lists(whole, min_size=1, max_size=4), name=st.sampled_from(NAMES))
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_first_pattern_wins_as_in_peft(keys: list[str], name: str) -> None:
    """Made-up regular expressions, several at once: the same key, and what PEFT cannot read is refused."""
    try:
        for key in keys:
            re.compile(rf"(.*\.)?({key})$")
    except re.error:
        with pytest.raises(LoraError, match="no regular expression"):
            Patterns("the file", keys)
        return
    assert (Patterns("the file", keys).first(name) or name) == get_pattern_key(keys, name)


def tensors_like(wrapped: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a PEFT model, in the names of a file."""
    state = peft.get_peft_model_state_dict(wrapped)
    return {key.replace("base_model.model.", prefix, 1): tensor.contiguous() for key, tensor in state.items()}


rules = st.dictionaries(
    st.sampled_from([k for k in HAND_MADE if k not in (r"to_q{1,2}",)]), st.sampled_from([1, 2, 3, 5]), max_size=4
)


@given(
    ranks=rules, alphas=rules, rslora=st.booleans(), alpha=st.sampled_from([1, 4, 7]), way=st.sampled_from([0, 1, 2])
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore")
def test_every_module_has_the_strength_that_peft_gives_it(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[str, int],
    alphas: dict[str, int],
    rslora: bool,
    alpha: int,
    way: int,
) -> None:
    """A random adapter on a tiny FLUX, its config in diffusers' JSON, in flat entries, and in PEFT's own file."""
    theirs, _ = flux1_pair(FLUX1)
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=TARGETS, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    wrapped = peft.get_peft_model(theirs, config)
    expected = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in wrapped.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    folder = tmp_path_factory.mktemp("adapter")
    about = {"r": 4, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    if way == 0:
        file, prefix = folder / "a.safetensors", "transformer."
        told = {f"transformer.{key}": value for key, value in about.items()}
        save_file(tensors_like(wrapped, prefix), file, {"lora_adapter_metadata": json.dumps(told)})
    elif way == 1:
        file, prefix = folder / "a.safetensors", "transformer."
        flat = {f"transformer.{k}": str(v) if isinstance(v, bool) else json.dumps(v) for k, v in about.items()}
        save_file(tensors_like(wrapped, prefix), file, flat)
    else:
        file, prefix = folder, "base_model.model."
        wrapped.save_pretrained(folder)
    found = {group.module.removeprefix(prefix): group.factor for group in read(file).groups}
    assert found == pytest.approx(expected)


MODULE = "transformer.single_transformer_blocks.1.proj_out"


def made(tmp_path: Path, metadata: dict[str, str], rank: int = 4) -> Path:
    path = tmp_path / "a.safetensors"
    down, up = randn(rank, 5 * FLUX1.hidden_size), randn(FLUX1.hidden_size, rank, seed=1)
    save_file({f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}, path, metadata)
    return path


FLAT: list[tuple[dict[str, str], float]] = [
    ({"transformer.r": "4", "transformer.lora_alpha": "8"}, 2.0),
    ({"transformer.lora_alpha": "2"}, 0.5),
    ({"transformer.lora_alpha": "6.0", "transformer.use_rslora": "True"}, 3.0),
    ({"transformer.lora_alpha": "6.0", "transformer.use_rslora": "false"}, 1.5),
    ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"proj_out": 2, "1.proj_out": 16}'}, 0.5),
    ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"^proj_out": 2}'}, 2.0),
    ({"r": "4", "lora_alpha": "8"}, 2.0),
    ({"lora_alpha": "8", "init_lora_weights": "gaussian"}, 2.0),
    ({"lora_alpha": "8", "init_lora_weights": "True"}, 2.0),
    ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'}, 2.0),
    ({"text_encoder.lora_alpha": "8"}, 1.0),
    ({"transformer.lora_alpha": "None"}, 1.0),
    ({"rank": "16", "ss_network_alpha": "1", "format": "pt"}, 1.0),
]


@pytest.mark.parametrize(("metadata", "scale"), FLAT)
def test_flat_entries_of_the_header(metadata: dict[str, str], scale: float, tmp_path: Path) -> None:
    """As SimpleTuner and others write them, with and without the component in front."""
    assert [group.factor for group in read(made(tmp_path, metadata)).groups] == [scale]


def test_text_encoders_have_configs_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    inner = "text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {
            f"text_encoder.{inner}.lora_A.weight": randn(2, 8),
            f"text_encoder.{inner}.lora_B.weight": randn(8, 2, seed=1),
        },
        path,
        {
            "transformer.lora_alpha": "2",
            "text_encoder.lora_alpha": "4",
            "text_encoder.alpha_pattern": f'{{"^{inner}": 6}}',
        },
    )
    assert [group.factor for group in read(path).groups] == [3.0]


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"transformer.lora_alpha": "abc"}, "transformer.lora_alpha is no JSON"),
        ({"transformer.lora_alpha": '"8"'}, "the lora_alpha of .* is '8'"),
        ({"transformer.lora_alpha": "0"}, "expected a number, not 0"),
        (
            {"transformer.init_lora_weights": "pissa_niter_16"},
            "init_lora_weights of transformer .* is pissa_niter_16: it",
        ),
        ({"lora_adapter_metadata": '{"transformer.init_lora_weights": "olora"}'}, "is olora: it was trained beside"),
        ({"transformer.lora_alpha": "8", "transformer.r": "16"}, "the rank 16, its tensors have 4"),
        (
            {"transformer.lora_alpha": "8", "transformer.rank_pattern": '{"proj_out": 8}'},
            "the rank 8, its tensors have 4",
        ),
        ({"transformer.lora_alpha": "8", "transformer.r": "-4"}, "expected a whole number above 0"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": "[1]"}, "is not a JSON object"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"(": 1}'}, r"'\(' is no regular expression"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"(?i)x": 1}'}, r"'\(\?i\)x' is no regular"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"(?i:x)": 1}'}, "has flags, which is not read"),
        (
            {"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"(?P<x>a)(?P=x)": 1}'},
            "a reference to a group",
        ),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"(?<=a*)b": 1}'}, "fixed-width"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"a{2000}": 1}'}, "more than 1000 counted"),
    ],
)
def test_bad_statements_are_refused_by_name(metadata: dict[str, str], error: str, tmp_path: Path) -> None:
    with pytest.raises((LoraError, CheckpointError), match=error):
        read(made(tmp_path, metadata))


HOSTILE = [
    "(a+)+b",
    "(.*)*x",
    "(.*.*.*.*.*.*.*.*.*)+x",
    "((((.+)+)+)+)+y",
    r"(\w|\w\w|\w\w\w)*!",
    "(?=(.*.*)*)(.|.)*(.|.)*z",
    "(" * 5000,
    "(a?){1000}" * 40,
    "((a{0,999}){0,999}){0,999}",
    ".*" * 5000 + "x",
    "|".join(["(.*)*q"] * 2000),
    "x" * 100_000,
]


@pytest.mark.parametrize("key", HOSTILE, ids=lambda key: key[:20])
def test_hostile_patterns_do_not_hang(key: str) -> None:
    """They are matched, or refused by name, in bounded time for all modules of a file."""
    start, said = time.perf_counter(), ""
    try:
        stated = Stated("the file", {"lora_alpha": "1", "alpha_pattern": json.dumps({key: 3})}, None)
        for i in range(300):
            stated.factor("transformer", f"transformer.single_transformer_blocks.{i}.attn.to_out_of_the_way", "LoRA", 4)
    except LoraError as error:
        said = str(error)
    assert time.perf_counter() - start < 15
    assert not said or (repr(key[:20])[:-1] in said and len(said) < 400)


def test_as_many_patterns_as_modules_are_quick() -> None:
    """diffusers writes one pattern per module."""
    names = [
        f"single_transformer_blocks.{i}.{part}" for i in range(100) for part in ("proj_out", "proj_mlp", "attn.to_q")
    ]
    patterns = Patterns("the file", [f"^{name}" for name in names])
    start = time.perf_counter()
    assert [patterns.first(name) for name in names] == [f"^{name}" for name in names]
    assert time.perf_counter() - start < 2


def test_a_lora_of_the_header_has_the_strength_of_its_first_pattern(network: Flux1, tmp_path: Path) -> None:
    """Item 3: strength 2 as PEFT has it, where the longest suffix gave 4."""
    told = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"proj_out": 8, "1.proj_out": 16}}
    receipt = attach(network, made(tmp_path, {"lora_adapter_metadata": json.dumps(told)}))
    assert [module.scale for module in receipt.modules] == [2.0]


@pytest.mark.parametrize("whole_factors", [True, False])
@torch.no_grad()
def test_kronecker_products_that_peft_saved(whole_factors: bool, tmp_path: Path) -> None:
    """PEFT counts alpha / r of its config beside whole factors as well."""
    theirs, ours = flux1_pair(FLUX1)
    config = peft.LoKrConfig(r=32 if whole_factors else 2, alpha=6, target_modules=["proj_mlp"])
    wrapped = peft.get_peft_model(theirs, config)
    for i, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "lokr" in name:
            parameter.copy_(randn(*parameter.shape, seed=i))
    wrapped.save_pretrained(tmp_path)
    receipt = attach(ours, tmp_path)
    layer = wrapped.base_model.model.single_transformer_blocks[0].proj_mlp
    assert {module.rank == 0 for module in receipt.modules} == {whole_factors}
    torch.testing.assert_close(receipt.modules[0].change.delta(), layer.get_delta_weight("default"))  # type: ignore

"""Layouts as tables: there and back is the identity, and the published key lists map with nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from miniflux.checkpoints import from_layout, layouts_of, load_into, to_layout
from miniflux.checkpoints.layouts import counterparts, detect, own_shapes
from miniflux.checkpoints.loading import compare
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND, NETWORKS, networks_of
from miniflux.errors import CheckpointError
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.controlnet import ControlNet, ControlNetConfig
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux2_controlnet import Flux2ControlNet, Flux2ControlNetConfig
from miniflux.models.flux3 import Flux3
from miniflux.models.ip_adapter import InstantxIPAdapter, IPAdapterConfig, XlabsIPAdapter
from miniflux.models.redux import Redux, ReduxConfig
from miniflux.models.t5 import T5Encoder
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.models.vision import ClipVision, SiglipVision, VisionConfig
from miniflux.variants import FLUX1_AUTOENCODER, VARIANTS
from tests.tiny import AUTOENCODER, CLIP, FLUX1, FLUX2, FLUX2_AUTOENCODER, FLUX3, LM, T5, TINY, randn

Manifest = Callable[[str], dict[str, list[int]]]
DEV, SCHNELL = VARIANTS["flux1-dev"], VARIANTS["flux1-schnell"]
FILL, CANNY = (VARIANTS[f"flux1-{name}-dev"].transformer for name in ("fill", "canny"))

FLUX1_SIZES = st.builds(
    lambda **change: Flux1(replace(FLUX1, **change)),
    depth=st.integers(0, 3),
    depth_single_blocks=st.integers(0, 12),
    mlp_ratio=st.sampled_from([1.0, 2.5, 4.0]),
    qkv_bias=st.booleans(),
    guidance_embed=st.booleans(),
)
FLUX2_SIZES = st.builds(
    lambda **change: Flux2(replace(FLUX2, **change)),
    depth=st.integers(0, 3),
    depth_single_blocks=st.integers(0, 12),
    mlp_ratio=st.sampled_from([1.0, 2.5, 3.0]),
    guidance_embed=st.booleans(),
)
FLUX3_SIZES = st.builds(
    lambda **change: Flux3(replace(FLUX3, **change)),
    depth=st.integers(0, 3),
    depth_single_blocks=st.integers(0, 12),
    mlp_ratio=st.sampled_from([1.0, 2.5, 3.0]),
    flow_map=st.booleans(),
)
LEVELS: dict[str, Any] = {
    "ch_mult": st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    "num_res_blocks": st.integers(1, 2),
}
AUTOENCODER_SIZES = st.one_of(
    st.builds(lambda **change: Autoencoder(replace(AUTOENCODER, **change)), **LEVELS),
    st.builds(
        lambda **change: Flux2Autoencoder(replace(FLUX2_AUTOENCODER, **change)),
        decoder_ch=st.sampled_from([None, 4, 12]),
        **LEVELS,
    ),
)


def meta(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


def there_and_back(module: nn.Module, layout: str) -> dict[str, Tensor]:
    """Their tensors, after checking both directions bitwise and that nobody touched what they were given."""
    ours = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    given_ours, copy_ours = dict(ours), {key: tensor.clone() for key, tensor in ours.items()}
    theirs = to_layout(module, given_ours, layout)
    assert list(given_ours) == list(ours) and all(given_ours[key] is ours[key] for key in ours)

    given_theirs, copy_theirs = dict(theirs), {key: tensor.clone() for key, tensor in theirs.items()}
    back = from_layout(module, given_theirs, layout)
    assert list(given_theirs) == list(theirs) and all(given_theirs[key] is theirs[key] for key in theirs)

    assert same(back, ours) and same(ours, copy_ours) and same(theirs, copy_theirs)
    assert same(to_layout(module, back, layout), theirs)
    return theirs


@settings(max_examples=20)
@given(FLUX1_SIZES)
def test_flux1_there_and_back(module: Flux1) -> None:
    """Any depth (also ten and more, where `1` is a prefix of `10`), MLP width, with and without bias and guidance."""
    theirs = there_and_back(module, "diffusers")
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(p.numel() for p in module.parameters())
    assert not theirs.keys() & module.state_dict().keys()
    assert detect(module, theirs) == "diffusers" and detect(module, module.state_dict()) == "original"


@settings(max_examples=20)
@given(st.one_of(FLUX2_SIZES, FLUX3_SIZES))
def test_flux2_and_flux3_there_and_back(module: Flux2 | Flux3) -> None:
    """Any depth, MLP width, with and without guidance or a time aimed at."""
    theirs = there_and_back(module, "diffusers")
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(p.numel() for p in module.parameters())
    assert not theirs.keys() & module.state_dict().keys()
    assert detect(module, theirs) == "diffusers" and detect(module, module.state_dict()) == "original"


@settings(max_examples=20)
@given(AUTOENCODER_SIZES)
def test_autoencoder_there_and_back(module: Autoencoder | Flux2Autoencoder) -> None:
    """Any number of levels: diffusers counts those of the decoder from the other end. Statistics of latents count."""
    theirs = there_and_back(module, "diffusers")
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in module.state_dict().values())
    assert detect(module, theirs) == "diffusers" and detect(module, module.state_dict()) == "original"


TEXT: list[tuple[nn.Module, str]] = [
    (ClipTextEncoder(CLIP), "without prefix"),
    (T5Encoder(T5), "encoder embedding"),
    *((CausalLm(LM), layout) for layout in ("language model", "bare", "llama.cpp")),
    *((CausalLm(replace(LM, qk_norm=False)), layout) for layout in ("language model", "llama.cpp")),  # a Mistral
    (CausalLm(replace(LM, layers_read=2)), "bare"),
]


@pytest.mark.parametrize(("module", "layout"), TEXT, ids=[f"{type(module).__name__}, {name}" for module, name in TEXT])
def test_text_encoders_there_and_back(module: nn.Module, layout: str) -> None:
    theirs = there_and_back(module, layout)
    assert detect(module, theirs) == layout and detect(module, module.state_dict()) == "original"


FULL: dict[str, tuple[Callable[[Any], nn.Module], Any, str]] = {
    "bfl-flux1-dev": (Flux1, DEV.transformer, "original"),
    "bfl-flux1-schnell": (Flux1, SCHNELL.transformer, "original"),
    "bfl-flux1-fill-dev": (Flux1, FILL, "original"),
    "bfl-flux1-canny-dev": (Flux1, CANNY, "original"),
    "diffusers-flux1-dev": (Flux1, DEV.transformer, "diffusers"),
    "diffusers-flux1-schnell": (Flux1, SCHNELL.transformer, "diffusers"),
    "diffusers-flux1-fill-dev": (Flux1, FILL, "diffusers"),
    "diffusers-flux1-canny-dev": (Flux1, CANNY, "diffusers"),
    "bfl-flux1-ae": (Autoencoder, FLUX1_AUTOENCODER, "original"),
    "diffusers-flux1-vae": (Autoencoder, FLUX1_AUTOENCODER, "diffusers"),
    "te-clip-l": (ClipTextEncoder, DEV.clip, "original"),
    "te-t5-xxl": (T5Encoder, DEV.t5, "original"),
    **{
        f"{whose}-{name}": (kind, VARIANTS[variant].transformer, layout)
        for whose, layout in (("bfl", "original"), ("diffusers", "diffusers"))
        for name, kind, variant in (
            ("flux2-dev", Flux2, "flux2-dev"),
            ("flux2-klein-4b", Flux2, "flux2-klein-4b"),
            ("flux2-klein-9b", Flux2, "flux2-klein-9b"),
            ("flux3", Flux3, "flux3-klein-base"),
            ("flux3-distilled", Flux3, "flux3-klein"),
        )
    },
    "bfl-flux2-ae": (Flux2Autoencoder, VARIANTS["flux2-dev"].autoencoder, "original"),
    "diffusers-flux2-vae": (Flux2Autoencoder, VARIANTS["flux2-dev"].autoencoder, "diffusers"),
    "te-qwen3-4b": (CausalLm, VARIANTS["flux2-klein-4b"].lm, "original"),
    "te-qwen3-8b": (CausalLm, VARIANTS["flux2-klein-9b"].lm, "original"),
    "te-qwen3-vl-4b-language-model": (CausalLm, VARIANTS["flux3-klein"].lm, "language model"),
    "te-mistral-small-24b-language-model": (CausalLm, VARIANTS["flux2-dev"].lm, "original"),
}


def needless(config: Any, keys: Collection[str]) -> set[str]:
    """Of a published text encoder, what no prompt needs."""
    if not isinstance(config, CausalLmConfig):
        return {key for key in keys if key in ("text_model.embeddings.position_ids", "encoder.embed_tokens.weight")}
    read = re.compile(r"model\.(?:language_model\.)?(?:embed_tokens\.|layers\.(\d+)\.)")
    assert config.layers_read is not None and config.layers_read < config.num_hidden_layers
    return {key for key in keys if not (found := read.match(key)) or int(found[1] or 0) >= config.layers_read}


@pytest.mark.parametrize("name", FULL)
def test_published_keys_map_with_nothing_left_over(name: str, manifest: Manifest) -> None:
    """Full size, on the meta device: every key is used, shapes become those of the network, and back exactly."""
    build, config, layout = FULL[name]
    shapes, module = manifest(name), meta(build, config)
    counts = {key: torch.int64 for key in shapes if key.endswith("num_batches_tracked")}
    theirs = {key: torch.empty(shape, dtype=counts.get(key), device="meta") for key, shape in shapes.items()}
    report = compare(module, theirs)
    assert (report.layout, report.problems) == (layout, {})
    assert set(report.used) | set(report.redundant) == set(theirs)
    assert set(report.redundant) == needless(config, shapes)
    ours = from_layout(module, theirs, layout)
    assert {key: tensor.shape for key, tensor in ours.items()} == {k: t.shape for k, t in module.state_dict().items()}
    back = to_layout(module, ours, layout)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == {k: shapes[k] for k in report.used}


@pytest.mark.parametrize("layout", layouts_of(CausalLm(LM)))
def test_a_language_model_takes_as_many_layers_as_are_read(layout: str) -> None:
    """In every layout the rest of a whole file, last norm and output layer included, is needless and nothing more."""
    whole, part = CausalLm(LM), meta(CausalLm, replace(LM, layers_read=2))
    state = to_layout(whole, whole.state_dict(), layout)
    report = load_into(part, state)
    assert report.layout == layout
    assert set(report.used) == set(to_layout(part, part.state_dict(), layout)) < set(state)
    assert set(report.redundant) == set(state) - set(report.used)
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in part.state_dict().items())


def test_diffusers_fused_rows_are_in_order() -> None:
    """Which rows of our joined linears are q, k, v and the MLP; a permutation would pass every shape check."""
    module = Flux1(FLUX1)
    hidden, linear1 = FLUX1.hidden_size, "single_blocks.1.linear1.weight"
    rows = torch.arange(module.state_dict()[linear1].shape[0])[:, None].expand(-1, hidden).float()
    theirs = to_layout(module, module.state_dict() | {linear1: rows}, "diffusers")
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    starts = {name: float(theirs[f"single_transformer_blocks.1.{name}.weight"][0, 0]) for name in names}
    assert starts == {"attn.to_q": 0, "attn.to_k": hidden, "attn.to_v": 2 * hidden, "proj_mlp": 3 * hidden}


def fields_of(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


VISION = VisionConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    hidden_act="gelu", layer_norm_eps=1e-6, projection_dim=6,
)  # fmt: skip
ADAPTER = IPAdapterConfig(embedding=6, context=8, words=2, hidden_size=16, double=2, single=1)
CONFIGS = {
    Flux1: FLUX1,
    Autoencoder: AUTOENCODER,
    ClipTextEncoder: CLIP,
    T5Encoder: T5,
    Flux2: FLUX2,
    Flux3: FLUX3,
    Flux2Autoencoder: FLUX2_AUTOENCODER,
    CausalLm: LM,
    TinyDecoder: TINY,
    ControlNet: ControlNetConfig(**fields_of(FLUX1), control_channels=16, modes=3, hint_channels=4),
    Flux2ControlNet: Flux2ControlNetConfig(control_channels=36, hidden_size=32, num_heads=2, depth=2),
    Redux: ReduxConfig(redux_dim=6, txt_in_features=8, inner=12),
    XlabsIPAdapter: replace(ADAPTER, single=0),
    InstantxIPAdapter: ADAPTER,
    SiglipVision: replace(VISION, projection_dim=0),
    ClipVision: VISION,
}


@pytest.mark.parametrize("build", BY_KIND)
def test_every_row_of_a_table_is_used(build: type[nn.Module]) -> None:
    """A row that matches nothing is a typing error that nobody would notice."""
    module, record = meta(build, CONFIGS[build]), BY_KIND[build]
    for layout, rows in record.rows.items():
        found = counterparts(module, layout).values()
        theirs = [key for origin in found for key in origin.keys if origin.how not in ("second third", "last third")]
        assert len(theirs) == len(set(theirs))
        for row in rows if layout in record.layouts else ():
            fewer = replace(record.layouts[layout], rows=[other for other in rows if other is not row])
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(BY_KIND, build, replace(record, layouts={**record.layouts, layout: fewer}))
                with pytest.raises(AssertionError, match="no row for"):
                    counterparts(module, layout)


@pytest.mark.parametrize("build", BY_KIND)
def test_shapes_under_our_names_are_the_networks_own(build: type[nn.Module]) -> None:
    """The inverse of every table, on names and shapes alone: no network is needed for it."""
    module, record = meta(build, CONFIGS[build]), BY_KIND[build]
    ours = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for layout in ("original", *record.layouts):
        theirs = to_layout(module, module.state_dict(), layout)
        assert own_shapes(record, {key: tuple(tensor.shape) for key, tensor in theirs.items()}) == ours


def test_layouts_of_a_network() -> None:
    assert layouts_of(meta(Flux1, FLUX1)) == ["original", "diffusers", "all-in-one"]
    assert layouts_of(nn.Linear(2, 2)) == ["original"]
    with pytest.raises(CheckpointError, match="Flux1 has no layout 'banana'; known: original, diffusers, all-in-one"):
        counterparts(meta(Flux1, FLUX1), "banana")


def test_t5_embedding_twice_or_under_its_second_name() -> None:
    """Files hold it as `shared`, as `encoder.embed_tokens`, or as both."""
    second = "encoder.embed_tokens.weight"
    state = {key: torch.full_like(tensor, i) for i, (key, tensor) in enumerate(T5Encoder(T5).state_dict().items())}
    both = {**state, second: state["shared.weight"]}
    alone = {key: tensor for key, tensor in both.items() if key != "shared.weight"}
    for given_state, layout, redundant in [(both, "original", {second}), (alone, "encoder embedding", set())]:
        module = meta(T5Encoder, T5)
        report = load_into(module, given_state)
        assert (report.layout, set(report.redundant)) == (layout, redundant)
        assert same(dict(module.state_dict()), state)


@pytest.mark.parametrize("build", [network.kind for network in NETWORKS if network.redundant])
def test_redundant_tensors_are_accepted_and_reported(build: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """Published text encoders carry them; refusing would make the files unloadable, silence would hide a difference."""
    config, redundant = CONFIGS[build], BY_KIND[build].redundant
    state = build(config).state_dict() | {key: randn(3) for key in redundant}
    with caplog.at_level("INFO"):
        report = load_into(meta(build, config), state)
    assert report.redundant == redundant
    assert not set(report.used) & set(report.redundant)
    for why in set(redundant.values()):
        keys = [key for key in report.redundant if redundant[key] == why]  # many with one reason are counted
        for key in keys if len(keys) < 5 else [f"{keys[0]} and {len(keys) - 1} more"]:
            assert f"not needed: {key} ({why})" in caplog.text and f"not needed: {key} ({why})" in str(report)


def test_what_is_redundant_for_one_network_is_unused_in_another() -> None:
    state = Autoencoder(AUTOENCODER).state_dict() | {"logit_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match="unused: logit_scale"):
        load_into(meta(Autoencoder, AUTOENCODER), state)


def test_rows_of_other_heights_are_misshapen() -> None:
    """q, k and v that add up to the right height but are not equally high belong to another kind of attention."""
    module = Flux1(FLUX1)
    theirs = to_layout(module, module.state_dict(), "diffusers")
    q, k = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    theirs |= {q: randn(FLUX1.hidden_size + 8, FLUX1.hidden_size), k: randn(FLUX1.hidden_size - 8, FLUX1.hidden_size)}
    with pytest.raises(CheckpointError, match=r"misshapen: double_blocks\.0\.img_attn\.qkv\.weight: \[40, 32\]"):
        load_into(meta(Flux1, FLUX1), theirs)


def test_convolutions_of_old_diffusers_files() -> None:
    """Some files keep the two trailing axes of the attention's 1x1 convolutions."""
    module = Autoencoder(AUTOENCODER)
    theirs = to_layout(module, module.state_dict(), "diffusers")
    four = {k: t[..., None, None] if ".attentions." in k and t.ndim == 2 else t for k, t in theirs.items()}
    assert sum(tensor.ndim == 4 for tensor in four.values()) == 8 + sum(tensor.ndim == 4 for tensor in theirs.values())
    other = meta(Autoencoder, AUTOENCODER)
    load_into(other, four)
    assert same(dict(other.state_dict()), dict(module.state_dict()))


def test_variants_share_their_tables() -> None:
    """Every registered model can be read and written in every layout of its networks."""
    parts: dict[Any, None] = {}  # those that variants share once
    for chosen in VARIANTS.values():
        networks = networks_of(chosen)
        assert networks.keys() >= {"transformer", "autoencoder"} and networks.keys() & {"t5", "lm"}
        parts |= dict.fromkeys(network.of(chosen) for network in networks.values())
    for config in parts:
        module = meta(BY_CONFIG[type(config)].kind, config)
        for layout in layouts_of(module):
            theirs = to_layout(module, module.state_dict(), layout)
            assert not compare(module, theirs).problems

"""Prompts rewritten by a language model, against transformers' `generate` and the pipeline of diffusers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from miniflux.errors import CheckpointError, InputError, TokenizerError, WeightsNotFoundError
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.text.chat import load_tokenizer
from miniflux.upsampling import load_upsampler
from miniflux.upsampling.rewriting import MISTRAL, QWEN, QWEN_VL, Upsampler, generate, next_token
from tests.tiny import randomise

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = {"Qwen3": True, "Qwen3, untied": False, "Mistral": False}  # whether the embedding is the output layer
MARKS = {
    "Qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "Mistral": ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"],
}


def theirs(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    name, tied = kind.partition(",")[0], KINDS[kind]
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)
    model = randomise(getattr(transformers, f"{name}ForCausalLM")(config))
    if tied:  # or it says its last word again and again
        model.lm_head.weight.data *= 0.25
    return model


def ours(kind: str, peer: Any) -> CausalLm:
    config = CausalLmConfig(
        **SIZES, rope_theta=1e6, qk_norm=kind != "Mistral", tie_word_embeddings=KINDS[kind], rms_norm_eps=1e-6
    )
    model, weights = CausalLm(config), peer.state_dict()
    if KINDS[kind]:
        del weights["lm_head.weight"]
    model.load_state_dict(weights)
    return model.eval()


def bytes_of(kind: str) -> Tokenizer:
    """A tokenizer of single bytes with the marks of a family."""
    marks = MARKS[kind.partition(",")[0]]
    made = Tokenizer(BPE({mark: i for i, mark in enumerate([*marks, *sorted(ByteLevel.alphabet())])}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore
    made.decoder = Bytes()  # type: ignore
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made


@pytest.fixture(scope="module")
def writers() -> dict[str, tuple[Any, Upsampler]]:
    """Each model of transformers, and what rewrites with its weights."""
    found: dict[str, tuple[Any, Upsampler]] = {}
    for kind in KINDS:
        peer = theirs(kind)
        found[kind] = peer, Upsampler(ours(kind, peer), bytes_of(kind))
    return found


Writers = dict[str, tuple[Any, Upsampler]]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_greedy_tokens_equal_transformers(writers: Writers, kind: str, pads: int) -> None:
    """Also of those that read padding on the left: it changes nothing."""
    peer, upsampler = writers[kind]
    ids = torch.randint(10, 290, (1, 12), generator=drawn(3))
    padded = torch.cat((torch.zeros(1, pads, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(12 + pads) >= pads).long()[None]
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = peer.generate(padded, attention_mask=mask, eos_token_id=None, **options)[0, 12 + pads :].tolist()
    assert len(set(expected)) > 3
    assert generate(upsampler.lm, ids[0].tolist(), (), 40, 0.0, drawn()) == expected
    ends = [expected[9], expected[25]]
    stopped = peer.generate(padded, attention_mask=mask, eos_token_id=ends, **options)[0, 12 + pads : -1].tolist()
    assert generate(upsampler.lm, ids[0].tolist(), ends, 40, 0.0, drawn()) == stopped != expected


@pytest.mark.filterwarnings("ignore:the answer was cut off")
@pytest.mark.parametrize("system", [None, "Say more.\nIn English."])
@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_transformers(writers: Writers, kind: str, system: str | None) -> None:
    """From text to text: the form, the tokens, the answer, its end."""
    peer, upsampler = writers[kind]
    text = upsampler.turns.text("a big café", system)
    ids = upsampler.tokenizer.encode(text, add_special_tokens=False).ids
    told = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), "eos_token_id": sorted(upsampler.ends)}
    new = peer.generate(torch.tensor([ids]), **told, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, len(ids) :]
    expected = upsampler.tokenizer.decode(new.tolist(), skip_special_tokens=True).strip()
    assert len(new) > 1
    assert upsampler.rewrite("a big café", system=system, max_new_tokens=30) == expected


def test_text_equals_the_pipeline_of_diffusers(writers: Writers) -> None:
    """With the text of the release, in its window of 2048 tokens with padding on the left. Drawn at a temperature at
    which the likeliest token is certain."""
    transformers, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    peer, upsampler = writers["Mistral"]
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=upsampler.tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    words.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
    )
    system = "Describe a picture in full."
    before, peer.generation_config.eos_token_id = peer.generation_config.eos_token_id, 1
    asked: list[dict[str, Any]] = []

    def written_by_peer(**options: Any) -> Any:
        asked.append(options)
        return peer.generate(**{**options, "max_new_tokens": 60})

    pipe: Any = SimpleNamespace(
        text_encoder=SimpleNamespace(generate=written_by_peer, device="cpu", dtype=torch.float32),
        tokenizer=SimpleNamespace(apply_chat_template=words.apply_chat_template, tokenizer=words),
    )
    module = __import__(diffusers.Flux2Pipeline.__module__, fromlist=["SYSTEM_MESSAGE_UPSAMPLING_T2I"])
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "SYSTEM_MESSAGE_UPSAMPLING_T2I", system)
    (expected,) = diffusers.Flux2Pipeline.upsample_prompt(pipe, "a [IMG]cat", temperature=1e-7)
    patch.undo()
    peer.generation_config.eos_token_id = before
    assert asked[0]["input_ids"].shape == (1, 2048) and asked[0]["max_new_tokens"] == 512
    with pytest.warns(UserWarning, match="cut off after 60"):
        assert upsampler.rewrite("a [IMG]cat", system=system, max_new_tokens=60) == expected.strip()


def test_forms_equal_the_chat_templates(tokenizer: Callable[[str], Path]) -> None:
    """As jinja writes Qwen3's own; that of Qwen3-VL has no thoughts, that of Mistral marks instead of roles."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(tokenizer("qwen3"))
    for system in (None, "Be brief.\n"):
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": "a cat"})
        if peer.chat_template is not None:
            text = peer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            assert QWEN.text("a cat", system) == text
            assert QWEN_VL.text("a cat", system) == text.removesuffix("<think>\n\n</think>\n\n")
    assert MISTRAL.text("a [IMG]cat", "Say.") == "<s>[SYSTEM_PROMPT]Say.[/SYSTEM_PROMPT][INST]a cat[/INST]"
    assert MISTRAL.text("a cat", None) == "<s>[INST]a cat[/INST]"


def test_the_published_tokenizer_goes_there_and_back(tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    """From its three files, and as `tokenizer.json`."""
    text = "Ein Käfer, 1960er: \u7ea2\u8272 \U0001f697  on\n\tice"
    words = load_tokenizer(tokenizer("qwen3"))
    words.save(str(tmp_path / "tokenizer.json"))
    for one in (words, load_tokenizer(tmp_path)):
        assert one.decode(one.encode(f"{text}<|im_end|>").ids) == text
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="expected tokenizer.json, tekken.json, or vocab.json"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("temperature", [0.15, 1.0, 2.5])
def test_draws_have_the_probabilities_of_softmax(temperature: float) -> None:
    """Pearson's sum over 30 tokens, of 5,000 draws: under the 0.9999 quantile of 29 degrees of freedom."""
    logits, generator = torch.randn(30, generator=drawn(5)), drawn(1)
    counts = torch.bincount(
        torch.tensor([next_token(logits, temperature, generator) for _ in range(5_000)]), minlength=30
    )
    expected = 5_000 * (logits.double() / temperature).softmax(0)
    likely = expected > 5  # the rest together, where the sum would not be one of squares of normal numbers
    found = torch.cat((counts[likely], counts[~likely].sum()[None])).double()
    wanted = torch.cat((expected[likely], expected[~likely].sum()[None]))
    assert float(((found - wanted) ** 2 / wanted.clamp_min(1)).sum()) < 68.0


def test_first_tokens_have_the_probabilities_of_the_model(writers: Writers) -> None:
    """Those of its logits: of 400 seeds, as many as softmax says, within four standard deviations."""
    _, upsampler = writers["Mistral"]
    with torch.inference_mode():
        logits = upsampler.lm.logits(upsampler.lm(torch.tensor([[20, 30, 40]]))[0])[0, -1]
    best, chance = int(logits.argmax()), float((logits.double() / 0.3).softmax(0).max())
    assert 0.1 < chance < 0.95
    said = [generate(upsampler.lm, [20, 30, 40], (), 1, 0.3, drawn(seed))[0] for seed in range(400)]
    assert abs(said.count(best) - 400 * chance) < 4 * (400 * chance * (1 - chance)) ** 0.5


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_a_seed_says_what_is_drawn(writers: Writers) -> None:
    """And no other generator has a part in it. The lower the temperature, the likelier: in the end the likeliest."""
    _, upsampler = writers["Qwen3, untied"]
    options: dict[str, Any] = {"max_new_tokens": 20}
    texts: list[str] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(texts))
        texts.append(upsampler.rewrite("a cat", temperature=1.0, seed=seed, **options))
    assert texts[0] == texts[1] != texts[2]
    greedy = upsampler.rewrite("a cat", seed=5, **options)
    for cold in (1e-4, 1e-300, 5e-324):
        assert upsampler.rewrite("a cat", temperature=cold, seed=9, **options) == greedy
    assert texts[0] != greedy


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_a_system_text_may_lie_in_a_file(writers: Writers, tmp_path: Path) -> None:
    _, upsampler = writers["Mistral"]
    said = tmp_path / "system.txt"
    expected = upsampler.rewrite("a cat", system="Say mörê.\nMuch.", max_new_tokens=5)
    for text in (b"", b"\n", b"\r\n"):
        said.write_bytes("Say mörê.\nMuch.".encode() + text)
        assert upsampler.rewrite("a cat", system=said, max_new_tokens=5) == expected
    assert upsampler.rewrite("a cat", system=str(said), max_new_tokens=5) != expected  # a text is no path


@pytest.mark.parametrize(
    ("wrong", "about"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"length": 0}, "length"),
        ({"length": 20}, "over the limit of 20"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"system": ""}, "system is empty"),
        ({"system": " \n"}, "system is empty"),
        ({"system": 3}, "system must be a text"),
        ({"system": Path("not-there.txt")}, "not-there.txt cannot be read"),
        ({"system": Path(".")}, "cannot be read"),
        ({"images": ["a picture"]}, "images: 1 given; .*vision.*Pixtral"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"prompt": 3}, "must be a string"),
    ],
    ids=repr,
)
def test_bad_arguments_are_refused(writers: Writers, wrong: dict[str, Any], about: str) -> None:
    _, upsampler = writers["Qwen3"]
    with pytest.raises(InputError, match=about):
        upsampler.rewrite(**{"prompt": "a cat", **wrong})


def test_bad_system_files_are_refused(writers: Writers, tmp_path: Path) -> None:
    _, upsampler = writers["Qwen3"]
    file, pipe = tmp_path / "system.txt", tmp_path / "pipe"
    for content, about in (
        (b"", "system.txt is empty"),
        (b"\n", "system.txt is empty"),
        (b"a\xe9b", "not UTF-8"),
        (b"a" * 1_000_001, "1,000,000 bytes"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=about):
            upsampler.rewrite("a cat", system=file)
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe"):
        upsampler.rewrite("a cat", system=pipe)


def test_a_prompt_of_the_full_length_is_read(writers: Writers) -> None:
    _, upsampler = writers["Mistral"]
    count = len(upsampler.tokenizer.encode(MISTRAL.text("a cat", None), add_special_tokens=False).ids)
    with pytest.warns(UserWarning, match="cut off after 9 tokens"):
        upsampler.rewrite("a cat", length=count, max_new_tokens=9)
    with pytest.raises(InputError, match="1 over the limit"):
        upsampler.rewrite("a cat", length=count - 1)


def test_an_end_ends_and_no_answer_is_said(writers: Writers, monkeypatch: pytest.MonkeyPatch) -> None:
    """`<|endoftext|>`, `<|im_end|>`, `</s>`."""
    for kind in ("Qwen3", "Mistral"):
        upsampler = writers[kind][1]
        words = upsampler.tokenizer
        ends = {"</s>"} if kind == "Mistral" else {"<|im_end|>", "<|endoftext|>"}
        assert upsampler.ends == {words.token_to_id(end) for end in ends}
        for end in sorted(upsampler.ends):
            queue = iter([*words.encode(" a dog ").ids, end])
            monkeypatch.setattr("miniflux.upsampling.rewriting.next_token", lambda *_, queue=queue: next(queue))
            assert upsampler.rewrite("a cat") == "a dog"
            monkeypatch.setattr("miniflux.upsampling.rewriting.next_token", lambda *_, end=end: end)
            with pytest.raises(InputError, match="answered nothing to 'a cat'"):
                upsampler.rewrite("a cat")


def test_what_cannot_write_is_refused(writers: Writers) -> None:
    _, upsampler = writers["Mistral"]
    with pytest.raises(InputError, match="all of its 3 layers.* 2 are there"):
        Upsampler(CausalLm(replace(upsampler.lm.config, layers_read=2)), upsampler.tokenizer)
    with pytest.raises(InputError, match="264 tokens and the language model 200"):
        Upsampler(CausalLm(replace(upsampler.lm.config, vocab_size=200)), upsampler.tokenizer)
    plain = Tokenizer(BPE({"a": 0}, []))
    with pytest.raises(TokenizerError, match="begins a turn"):
        Upsampler(upsampler.lm, plain)
    with pytest.raises(TokenizerError, match="</s> is no token"):
        Upsampler(upsampler.lm, plain, MISTRAL)
    with pytest.raises(InputError, match="at least one token"):
        generate(upsampler.lm, [], (), 1, 0.0, drawn())
    with pytest.raises(InputError, match="not finite"):
        next_token(torch.tensor([0.0, float("nan")]), 0.0, drawn())


# Out of a folder


def written(folder: Path, kind: str, peer: Any, **about: Any) -> Path:
    """A model of transformers in its folder, with its tokenizer."""
    peer.save_pretrained(folder)
    bytes_of(kind).save(str(folder / "tokenizer.json"))
    if about:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **about}))
    return folder


@pytest.mark.filterwarnings("ignore:the answer was cut off")
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_is_read(writers: Writers, tmp_path: Path, kind: str, shards: bool) -> None:
    peer, upsampler = writers[kind]
    folder = written(tmp_path / "lm", kind, peer)
    if shards:
        peer.save_pretrained(folder, max_shard_size="30KB")
        (folder / "model.safetensors").unlink()
    found = load_upsampler(folder, device="cpu")
    assert found.turns == upsampler.turns and not any(p.requires_grad for p in found.lm.parameters())
    assert found.lm.config.tie_word_embeddings == KINDS[kind]
    options: dict[str, Any] = {"max_new_tokens": 25}
    assert found.rewrite("a cat", **options) == upsampler.rewrite("a cat", **options)
    half = load_upsampler(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.lm.parameters()} == {torch.bfloat16} and half.rewrite("a cat", **options)


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_the_text_encoder_of_a_pipeline_is_read(writers: Writers, tmp_path: Path) -> None:
    """A Mistral within one that sees pictures, whose config says falsely that its output layer is the embedding; the
    tokenizer lies beside it."""
    transformers = pytest.importorskip("transformers")
    peer, upsampler = writers["Mistral"]
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    whole = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=peer.config, vision_config=vision, image_token_index=7, tie_word_embeddings=False
        )
    )
    whole.model.language_model.load_state_dict(peer.model.state_dict())
    whole.lm_head.load_state_dict(peer.lm_head.state_dict())
    folder = written(tmp_path / "text_encoder", "Mistral", whole, tie_word_embeddings=True)
    (tmp_path / "tokenizer").mkdir()
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer")
    found = load_upsampler(str(folder), device="cpu")
    assert found.rewrite("a cat", max_new_tokens=25) == upsampler.rewrite("a cat", max_new_tokens=25)


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_a_second_copy_of_the_embedding_is_not_loaded(
    writers: Writers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is one; else it is the output layer, as transformers takes it."""
    peer, _ = writers["Qwen3"]
    folder = written(tmp_path, "Qwen3", peer)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert load_upsampler(folder, device="cpu").lm.config.tie_word_embeddings
    other = torch.randn(300, 32, generator=drawn(8))
    save_file({**weights, "lm_head.weight": other}, folder / "model.safetensors")
    with caplog.at_level(logging.INFO):
        found = load_upsampler(folder, device="cpu")
    assert torch.equal(found.lm.lm_head.weight, other) and "not its embedding" in caplog.text


def test_what_is_not_in_a_folder_is_named(writers: Writers, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        load_upsampler(tmp_path / "nothing")
    folder = tmp_path / "lm"
    folder.mkdir()
    with pytest.raises(WeightsNotFoundError, match="missing: config.json; weights.*; a tokenizer"):
        load_upsampler(folder)
    written(folder, "Mistral", writers["Mistral"][0])
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"missing: weights \(\*.safetensors\)$"):
        load_upsampler(folder)


def test_a_language_model_that_only_reads_is_refused(writers: Writers, tmp_path: Path) -> None:
    """All missing keys are named: nothing is written with random weights."""
    folder = written(tmp_path, "Mistral", writers["Mistral"][0])
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith(("lm_head", "model.norm", "model.layers.2"))}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as found:
        load_upsampler(folder, device="cpu")
    assert all(name in str(found.value) for name in ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp"))


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_text", "qwen3_5_moe"])
def test_the_upsampler_of_flux3_is_refused(writers: Writers, tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, "Mistral", writers["Mistral"][0], model_type=kind)
    with pytest.raises(CheckpointError, match=f"'{kind}'.*flux-3-image-klein-pup.*gated delta nets"):
        load_upsampler(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": {"model_type": kind}}))
    with pytest.raises(CheckpointError, match="gated delta nets"):
        load_upsampler(folder, device="cpu")


def test_other_models_and_bad_choices_are_refused(writers: Writers, tmp_path: Path) -> None:
    folder = written(tmp_path, "Mistral", writers["Mistral"][0], model_type="llama")
    with pytest.raises(CheckpointError, match="llama"):
        load_upsampler(folder, device="cpu")
    written(folder, "Mistral", writers["Mistral"][0])
    with pytest.raises(InputError, match="dtype"):
        load_upsampler(folder, device="cpu", dtype="int8")
    with pytest.raises(InputError, match="device"):
        load_upsampler(folder, device="nowhere")
    with pytest.raises(CheckpointError, match="empty"):
        load_upsampler("")


def test_qwen3_vl_has_no_thoughts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = transformers.models.qwen3_vl.Qwen3VLTextConfig(**SIZES, rope_parameters=rope)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config=text.to_dict(), vision_config={**vision, "deepstack_visual_indexes": [0]}, tie_word_embeddings=True
    )
    peer = randomise(transformers.Qwen3VLForConditionalGeneration(config))
    peer.lm_head.weight.data *= 0.25
    found = load_upsampler(written(tmp_path, "Qwen3", peer), device="cpu")
    assert found.turns == QWEN_VL and found.lm.config.tie_word_embeddings
    ids = torch.randint(10, 250, (1, 12), generator=drawn(3))
    expected = peer.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 12:]
    assert generate(found.lm, ids[0].tolist(), (), 20, 0.0, drawn()) == expected.tolist()

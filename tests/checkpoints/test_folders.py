"""Folders as people have them: what systems and programs leave there is passed over, and of variants one is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miniflux.checkpoints import inspect, open_tensors
from miniflux.checkpoints.folders import entries, is_litter, models, named, tensor_paths, unread, walk
from miniflux.errors import CheckpointError
from miniflux.models.autoencoder import Autoencoder
from miniflux.strictjson import MAX_MARKS
from tests.checkpoints.raw import entry, raw
from tests.tiny import AUTOENCODER

# What an AppleDouble file begins with, as macOS writes it beside a file on exFAT or a network disk.
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60)
LITTER = [
    *("._model.safetensors", "._model.safetensors.index.json", ".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.INI"),
    *("model.safetensors.part", "model.safetensors.incomplete", "model.safetensors.crdownload", "~$model.safetensors"),
    *("model.safetensors.aria2", "model.safetensors~", "model.safetensors:Zone.Identifier", ".gitattributes"),
]
LITTER_FOLDERS = [".ipynb_checkpoints", ".git", ".cache", "__MACOSX", "@eaDir", "$RECYCLE.BIN"]


def put(*paths: Path, value: float = 1) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.full((1,), value)}, path)


def litter(folder: Path) -> None:
    """Everything that is not the user's."""
    for name in LITTER:
        (folder / name).write_bytes(APPLE_DOUBLE)
    for name in LITTER_FOLDERS:
        put(folder / name / "model.safetensors", folder / name / "model-checkpoint.safetensors")


def shards(folder: Path, stem: str, index: str | None = None, value: float = 1, skip: tuple[int, ...] = ()) -> None:
    """Two shards, with the variant where `stem` says; `index` is the name of their index."""
    names = [stem.format(n=f"{i:05}-of-00002") for i in (1, 2)]
    for i, name in enumerate(names):
        if i not in skip:
            save_file({f"a{i}": torch.full((1,), value)}, folder / name)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": {f"a{i}": name for i, name in enumerate(names)}}))


def test_litter_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors")
    litter(tmp_path)
    assert [path.name for path in entries(tmp_path)] == ["model.safetensors"]
    assert tensor_paths(tmp_path) == [tmp_path / "model.safetensors"]
    assert [model.path for model in walk(tmp_path)] == [tmp_path / "model.safetensors"]
    assert len(inspect(tmp_path).parts) == 1


@pytest.mark.parametrize(
    "name", ["model.safetensors", "flux1-dev.v2.sft", "Model.SAFETENSORS", "vae", "part", "a.lockers"]
)
def test_what_is_not_litter(name: str) -> None:
    assert not is_litter(name)


def test_litter_beside_shards(tmp_path: Path) -> None:
    """A `._` companion of every shard, and of the index."""
    shards(tmp_path, "model-{n}.safetensors", "model.safetensors.index.json")
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"._{path.name}").write_bytes(APPLE_DOUBLE)
    assert set(open_tensors(tmp_path)) == {"a0", "a1"}


def test_a_companion_that_is_named_as_the_file(tmp_path: Path) -> None:
    (tmp_path / "._a.safetensors").write_bytes(APPLE_DOUBLE)
    with pytest.raises(CheckpointError, match="it looks like what macOS keeps beside a file"):
        open_tensors(tmp_path / "._a.safetensors")


@pytest.mark.parametrize("name", ["model.sft", "model.SFT", "MODEL.SafeTensors"])
def test_every_ending_of_safetensors(name: str, tmp_path: Path) -> None:
    put(tmp_path / name)
    assert tensor_paths(tmp_path) == [tmp_path / name] and set(open_tensors(tmp_path / name)) == {"a"}
    assert named(tmp_path, "model.safetensors") == tmp_path / name
    assert named(tmp_path, "other.safetensors") is None


VARIANTS = {
    "a file": lambda f: put(f / "model.fp16.safetensors", value=2),
    "two": lambda f: put(f / "model.fp16.safetensors", f / "model.bf16.safetensors", value=2),
    "shards": lambda f: shards(f, "model.fp16-{n}.safetensors", "model.safetensors.index.fp16.json", 2),
    "shards, newer": lambda f: shards(f, "model-{n}.fp16.safetensors", "model.fp16.safetensors.index.json", 2),
    "shards without index": lambda f: shards(f, "model-{n}.fp16.safetensors", None, 2),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_of_variants_the_plain_one(name: str, sharded: bool, tmp_path: Path) -> None:
    """Without it the only one there is; by its name any."""
    VARIANTS[name](tmp_path)
    if name != "two":
        assert {float(t) for t in open_tensors(tmp_path).values()} == {2}
    else:
        with pytest.raises(CheckpointError, match=r"found model\.bf16\.safetensors, model\.fp16\.safetensors"):
            open_tensors(tmp_path)
    asked = sorted(tmp_path.glob("*.json")) or sorted(tmp_path.glob("*.safetensors"))
    if sharded:
        shards(tmp_path, "model-{n}.safetensors", "model.safetensors.index.json")
    else:
        put(tmp_path / "model.safetensors")
    assert {float(t) for t in open_tensors(tmp_path).values()} == {1}
    (plain,) = models(tmp_path)
    assert len(plain.others) == (2 if name == "two" else 1)
    assert {float(t) for t in open_tensors(asked[0]).values()} == {2}


def test_small_files_of_all_variants_and_shards_of_one(tmp_path: Path) -> None:
    """`hf download --include "*.json" "*fp16*"` brings the index of the plain variant, too."""
    shards(tmp_path, "model.fp16-{n}.safetensors", "model.safetensors.index.fp16.json", 2)
    shards(tmp_path, "model-{n}.safetensors", "model.safetensors.index.json", skip=(0, 1))
    assert {float(t) for t in open_tensors(tmp_path).values()} == {2}
    shards(tmp_path, "model-{n}.safetensors", skip=(1,))  # begun: not silently another
    with pytest.raises(
        CheckpointError, match=r"index\.json names 2 files.* missing: model-00002-of-00002\.safetensors$"
    ):
        open_tensors(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, "model-{n}.safetensors")
    assert set(open_tensors(tmp_path)) == {"a0", "a1"}
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is one of 2 files, of which these are missing: number 1 of 2"):
        open_tensors(tmp_path)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """As to blobs of the Hugging Face cache that were deleted: nothing is there."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert models(tmp_path) == [] and named(tmp_path, "model.safetensors") is None
    with pytest.raises(CheckpointError, match=r"found none; model\.safetensors leads nowhere"):
        tensor_paths(tmp_path)


def test_folders_that_hold_each_other(tmp_path: Path) -> None:
    """A link to a folder above does not make an endless walk."""
    put(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [model.path for model in walk(tmp_path)] == [tmp_path / "a" / "model.safetensors"]


def test_folders_at_any_depth_and_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that lies deeper than people usually keep them is none that may be lost."""
    deep = tmp_path.joinpath(*"abcdefgh") / "model.safetensors"
    put(tmp_path / "b.safetensors", deep)
    assert [model.path for model in walk(tmp_path)] == [tmp_path / "b.safetensors", deep]
    monkeypatch.setattr("miniflux.checkpoints.folders.MAX_FOLDERS", 8)
    with pytest.raises(CheckpointError, match="holds more than 8 folders; give the one of the model"):
        walk(tmp_path)


# Of a file that holds a network and cannot be read: its name, and what stands beside it.
LOST = [
    "ae.pt",
    "flux1.ckpt",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "ae.safetensors.part",
    "ae.GGUF.aria2",
]
FOUND = {
    "pytorch_model.bin": "model.safetensors",
    "pytorch_model-00001-of-00002.bin": "model.fp16.safetensors",
    "pytorch_model.fp16.bin": "model.safetensors",
    "tf_model.h5": "model.sft",
    "flux1-dev.safetensors.crdownload": "flux1-dev.safetensors",
    "optimizer.bin": "model.safetensors",
    "._ae.pt": "model.safetensors",
    "notes.txt.part": "model.safetensors",
}


@pytest.mark.parametrize("name", LOST)
def test_files_that_hold_a_network_and_cannot_be_read(name: str, tmp_path: Path) -> None:
    put(tmp_path / "other.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"x")
    assert list(unread(tmp_path)) == [tmp_path / "a" / name]


@pytest.mark.parametrize("name", FOUND)
def test_files_whose_network_can_be_read_beside_them(name: str, tmp_path: Path) -> None:
    put(tmp_path / FOUND[name])
    (tmp_path / name).write_bytes(b"x")
    assert unread(tmp_path) == {}


def test_links_of_networks_that_lead_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors")
    for name in ("ae.safetensors", "text_encoder_2", "README.md"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    assert {path.name for path in unread(tmp_path)} == {"ae.safetensors", "text_encoder_2"}


def test_tags_of_a_trainer_in_the_header(tmp_path: Path) -> None:
    """sd-scripts writes every tag of its data, and how often: a string of some MB, full of commas."""
    tags = json.dumps({"10_set": {f'tag, "{i}" \\ [of {{many]': i for i in range(300_000)}})
    header = {"__metadata__": {"ss_tag_frequency": tags, "ss_tag": "漢字, " * 100_000}, "a": entry(0, 8)}
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(8)))
    assert tags.count(",") > 2 * MAX_MARKS and len(tags) > 10_000_000
    source = open_tensors(tmp_path / "a.safetensors")
    assert source.metadata["ss_tag_frequency"] == tags and source["a"].tolist() == [0, 0]


def test_a_header_that_is_too_large_is_called_that(tmp_path: Path) -> None:
    """Not that the file were no safetensors file."""
    header = {"__metadata__": {"ss_tag_frequency": "tag, " * 5_000_000}, "a": entry(0, 8)}
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(8)))
    with pytest.raises(
        CheckpointError, match=r": its header has 25,000,\d+ bytes, of which at most 20,000,000"
    ) as caught:
        open_tensors(tmp_path / "a.safetensors")
    assert "not a safetensors" not in str(caught.value) and "\n" not in str(caught.value)
    header = {"__metadata__": dict.fromkeys((f"{i}" for i in range(MAX_MARKS)), "1"), "a": entry(0, 8)}
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(8)))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its header is JSON of more than 250,000 items"):
        open_tensors(tmp_path / "a.safetensors")


def test_a_folder_of_an_autoencoder_with_litter(tmp_path: Path) -> None:
    """Through the reader that users have."""
    from miniflux.checkpoints import load_into, save

    save(Autoencoder(AUTOENCODER), tmp_path / "diffusion_pytorch_model.safetensors", layout="diffusers")
    litter(tmp_path)
    assert not load_into(Autoencoder(AUTOENCODER), tmp_path).problems


def test_litter_where_loras_pictures_and_caches_are_kept(tmp_path: Path) -> None:
    """PEFT's folder, the page's history, the cache of pictures, a LoRA's folder that a replay finds again."""
    from miniflux.cache import ENDING, ResultCache
    from miniflux.lora import read
    from miniflux.replay import _tensors
    from miniflux.service.history import History

    peft = tmp_path / "peft"
    peft.mkdir()
    key = "base_model.model.single_blocks.0.linear2.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(2, 6), key.format("B"): torch.ones(4, 2)}, peft / "adapter_model.safetensors"
    )
    (peft / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    litter(peft)
    (peft / "._adapter_config.json").write_bytes(APPLE_DOUBLE)
    (peft / "._adapter_model.safetensors").write_bytes(APPLE_DOUBLE)
    assert read(peft).groups[0].factor == 2
    assert _tensors(peft) == [peft / "adapter_model.safetensors"]
    history = tmp_path / "history"
    (history / "pictures").mkdir(parents=True)
    (history / "pictures" / "._a.png").write_bytes(APPLE_DOUBLE)
    assert History(history)._sizes == {}
    (tmp_path / f"._a{ENDING}").write_bytes(APPLE_DOUBLE)
    assert ResultCache(tmp_path).keys() == []

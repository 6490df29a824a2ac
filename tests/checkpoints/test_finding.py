"""Where files are looked for, in which order, and what is said when they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miniflux.checkpoints.finding import BUNDLED, PARTS, find, hub_cache, places, snapshot
from miniflux.errors import InputError, WeightsNotFoundError
from miniflux.variants import VARIANTS

DEV, SCHNELL, NANO = VARIANTS["flux1-dev"], VARIANTS["flux1-schnell"], VARIANTS["nano-dev"]
VARIABLES = ("MINIFLUX_WEIGHTS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
FOLDERS = {"transformer": "transformer", "vae": "autoencoder", "text_encoder": "clip", "text_encoder_2": "t5"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine is seen: an empty home, no variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("USERPROFILE", str(path))
    return path


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def tokenizers(folder: Path) -> None:
    touch(folder / "tokenizer" / "vocab.json", folder / "tokenizer_2" / "spiece.model")


def folders(root: Path) -> Path:
    """A model in the diffusers layout."""
    for name in FOLDERS:
        touch(root / name / "model.safetensors")
    tokenizers(root)
    return root


def singles(root: Path, file: str = "flux1-dev.safetensors") -> Path:
    """A model in the single files that other programs use too."""
    touch(*(root / name for name in (file, "ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors")))
    tokenizers(root)
    return root


def cached(hub: Path, repository: str, revision: str = "abc123") -> Path:
    """A repository as the Hugging Face library keeps it: a reference and links to blobs."""
    root = hub / ("models--" + repository.replace("/", "--"))
    touch(root / "refs" / "main")
    (root / "refs" / "main").write_text(revision)
    place = root / "snapshots" / revision
    for path in list(folders(root / "elsewhere").rglob("*.*")):
        link, blob = place / path.relative_to(root / "elsewhere"), root / "blobs" / str(abs(hash(path)))
        touch(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return place


def test_the_folder_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part under any of its names."""
    root = singles(tmp_path / "weights")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    files = find(DEV)
    assert files.transformer == root / "flux1-dev.safetensors" and files.autoencoder == root / "ae.safetensors"
    assert files.clip == root / "clip_l.safetensors" and files.t5 == root / "t5xxl_fp16.safetensors"
    assert files.clip_tokenizer == root / "tokenizer" and files.t5_tokenizer == root / "tokenizer_2"


def test_a_folder_per_variant_comes_before_the_shared_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models with a folder each may share text encoders in the root."""
    root = folders(tmp_path / "weights")
    touch(root / "flux1-schnell" / "flux1-schnell.safetensors", root / "flux1-schnell" / "vae" / "a.safetensors")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    files = find(SCHNELL)
    assert files.transformer == root / "flux1-schnell" / "flux1-schnell.safetensors"
    assert files.autoencoder == root / "flux1-schnell" / "vae" and files.t5 == root / "text_encoder_2"
    assert find(DEV).transformer == root / "transformer" and find(DEV).autoencoder == root / "vae"


def test_the_single_file_comes_before_the_folder(tmp_path: Path) -> None:
    """In a published repository, which holds both; another variant's file is not taken."""
    root = folders(tmp_path)
    touch(root / "flux1-dev.safetensors", root / "ae.safetensors")
    assert find(DEV, [root]).transformer == root / "flux1-dev.safetensors"
    assert find(DEV, [root]).autoencoder == root / "ae.safetensors"
    assert find(SCHNELL, [root]).transformer == root / "transformer"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "{}/hf", "XDG_CACHE_HOME": "{}/xdg"}, "hf/hub"),
        ({"HF_HUB_CACHE": "{}/hub", "HF_HOME": "{}/hf"}, "hub"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "~/hf"}, "home/hf/hub"),
        ({"HF_HUB_CACHE": "~/hub"}, "home/hub"),
    ],
)
def test_the_hugging_face_cache(
    variables: dict[str, str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variables mean what they mean to the Hugging Face library."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert hub_cache() == tmp_path / place
    assert snapshot(DEV.repository) is None
    found = cached(tmp_path / place, DEV.repository)
    assert snapshot(DEV.repository) == found and find(DEV).t5 == found / "text_encoder_2"
    with pytest.raises(WeightsNotFoundError):
        find(SCHNELL)


def test_the_cache_of_the_hugging_face_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of folders are theirs: what their library finds offline, this finds too."""
    hub = pytest.importorskip("huggingface_hub", reason="compares with huggingface_hub: pip install miniflux[test]")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", DEV.repository)
    theirs = hub.try_to_load_from_cache(DEV.repository, "vae/model.safetensors", cache_dir=tmp_path / "hub")
    assert isinstance(theirs, str) and Path(theirs).parent == find(DEV).autoencoder


def test_a_half_downloaded_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links without blobs are not there; a reference to no snapshot neither."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = cached(tmp_path, DEV.repository)
    (found / "tokenizer" / "vocab.json").resolve().unlink()
    with pytest.raises(WeightsNotFoundError, match=r"^flux1-dev: not on this machine: clip_tokenizer \(tokenizer\)\n"):
        find(DEV)
    (found.parents[1] / "refs" / "main").write_text("another")
    assert snapshot(DEV.repository) is None


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given parts, given folders, the package, the variable, the cache - part by part."""
    given, root, hub = tmp_path / "given", tmp_path / "root", tmp_path / "hub"
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    place = cached(hub, DEV.repository)
    assert find(DEV).autoencoder == place / "vae"
    folders(root)
    assert find(DEV).autoencoder == root / "vae"
    folders(root / "flux1-dev")
    assert find(DEV).autoencoder == root / "flux1-dev" / "vae"
    touch(given / "vae" / "model.safetensors")
    files = find(DEV, [given])
    assert files.autoencoder == given / "vae" and files.transformer == root / "flux1-dev" / "transformer"
    touch(tmp_path / "mine.safetensors")
    files = find(DEV, [given], {"autoencoder": tmp_path / "mine.safetensors"})
    assert files.autoencoder == tmp_path / "mine.safetensors" and files.clip == root / "flux1-dev" / "text_encoder"
    assert places(DEV, [given]) == [given, root / "flux1-dev", root, place]


def test_an_earlier_place_wins_under_any_name(tmp_path: Path) -> None:
    """A folder `vae` in the first place, before `ae.safetensors` in the second."""
    first, second = folders(tmp_path / "first"), singles(tmp_path / "second")
    assert find(DEV, [first, second]).autoencoder == first / "vae"
    assert find(DEV, [second, first]).autoencoder == second / "ae.safetensors"


def test_the_bundled_model_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not replaced by official files that lie in the user's folder under the same names."""
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(singles(tmp_path)))
    for variant in (NANO, VARIANTS["nano-schnell"]):
        assert {path.parent for path in vars(find(variant)).values()} == {BUNDLED}
    assert places(DEV) == [tmp_path / "flux1-dev", tmp_path]


def test_a_home_in_the_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not always replace the tilde."""
    singles(home / "weights")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", "~/weights")
    assert find(DEV).transformer == home / "weights" / "flux1-dev.safetensors"


def test_sharded_folders_count_by_their_index(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "transformer" / "model.safetensors").rename(root / "transformer" / "model.safetensors.index.json")
    assert find(DEV, [root]).transformer == root / "transformer"


@pytest.mark.parametrize("part", PARTS)
def test_an_empty_folder_does_not_count(part: str, tmp_path: Path) -> None:
    """An earlier place with an empty folder must not hide a later one that has the files."""
    early, late = tmp_path / "early", folders(tmp_path / "late")
    name = PARTS[part][-1] if part.endswith("tokenizer") else next(k for k, v in FOLDERS.items() if v == part)
    (early / name).mkdir(parents=True)
    touch(early / name / "config.json")
    assert getattr(find(DEV, [early, late]), part) == late / name


def test_nothing_there_names_everything(tmp_path: Path, home: Path) -> None:
    """The message is all a newcomer has: each part, each place, and how to get them."""
    with pytest.raises(WeightsNotFoundError) as caught:
        find(DEV, [tmp_path / "mine"])
    text = str(caught.value)
    for part, names in PARTS.items():
        assert f"{part} ({' or '.join(names).format(file=DEV.file)})" in text.splitlines()[0]
    assert f"looked in: {tmp_path / 'mine'}\n" in text
    assert "the variable MINIFLUX_WEIGHTS is not set" in text
    assert f"{home / '.cache/huggingface/hub'} has no snapshot of {DEV.repository}" in text
    assert f"huggingface.co/{DEV.repository} ({DEV.licence}, to be accepted there); weights/README.md" in text
    assert '"nano"' in text
    with pytest.raises(WeightsNotFoundError, match=r"FLUX.1-schnell \(Apache-2.0\);") as caught:
        find(SCHNELL)
    assert "looked in: no folder at all" in str(caught.value)


def test_only_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = singles(tmp_path / "weights")
    (root / "clip_l.safetensors").unlink()
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsNotFoundError) as caught:
        find(DEV)
    first, second, *rest = str(caught.value).splitlines()
    assert first == "flux1-dev: not on this machine: clip (text_encoder or clip_l.safetensors)"
    assert second == f"looked in: {root / 'flux1-dev'}, {root}"
    assert not [line for line in rest if "MINIFLUX_WEIGHTS" in line]


def test_shared_parts_are_found_in_the_snapshot_of_another_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three repositories hold the same text encoders; the transformer of another one is never taken."""
    root = singles(tmp_path / "weights")
    (root / "clip_l.safetensors").unlink()
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = cached(tmp_path / "hub", SCHNELL.repository)
    assert find(DEV).clip == folder / "text_encoder" and find(DEV).t5.parent == root
    (root / DEV.file).unlink()
    with pytest.raises(WeightsNotFoundError, match=r"not on this machine: transformer \(.*\)\n"):
        find(DEV)


def test_parts_that_were_given_but_are_not_there(tmp_path: Path) -> None:
    """A wrong path is not replaced by a file found elsewhere."""
    root = folders(tmp_path)
    with pytest.raises(WeightsNotFoundError, match=r"not on this machine: autoencoder \(.*typo\.safetensors\)\n"):
        find(DEV, [root], {"autoencoder": root / "typo.safetensors"})
    with pytest.raises(WeightsNotFoundError, match=r"t5_tokenizer \(.*text_encoder\)\n"):
        find(DEV, [root], {"t5_tokenizer": root / "text_encoder"})
    with pytest.raises(
        InputError, match="unknown part 'vae' of a model; parts are transformer, autoencoder, clip, t5,"
    ):
        find(DEV, [root], {"vae": root / "vae"})


def test_finding_changes_nothing(tmp_path: Path, home: Path) -> None:
    """No folders made, no environment changed."""
    before = dict(os.environ)
    with pytest.raises(WeightsNotFoundError):
        find(DEV, [tmp_path])
    assert dict(os.environ) == before and list(tmp_path.iterdir()) == [home] and not list(home.iterdir())

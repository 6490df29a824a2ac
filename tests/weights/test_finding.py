"""Where files are looked for, in which order, and what is said when they are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miniflux.errors import InputError, WeightsNotFoundError
from miniflux.variants import VARIANTS, Variant
from miniflux.weights import hubcache
from miniflux.weights.finding import BUNDLED, PARTS, find, needed, places
from miniflux.weights.hubcache import hub_cache, snapshot

DEV, SCHNELL, NANO = VARIANTS["flux1-dev"], VARIANTS["flux1-schnell"], VARIANTS["nano-dev"]
KLEIN, FLUX3 = VARIANTS["flux2-klein-4b"], VARIANTS["flux3-klein"]
VARIABLES = ("MINIFLUX_WEIGHTS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
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
    clip = folder / "tokenizer"
    touch(clip / "vocab.json", clip / "merges.txt", folder / "tokenizer_2" / "spiece.model")


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
        ({"HUGGINGFACE_HUB_CACHE": "{}/old", "HF_HOME": "{}/hf"}, "old"),
        ({"HUGGINGFACE_HUB_CACHE": "~/old"}, "home/old"),
        ({"HF_HUB_CACHE": "{}/hub", "HUGGINGFACE_HUB_CACHE": "{}/old"}, "hub"),
        ({"HF_HOME": "$PLACE/hf"}, "disk/hf/hub"),
        ({"HF_HUB_CACHE": "${{PLACE}}/hub"}, "disk/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "$HOME/old"}, "home/old"),
        ({"XDG_CACHE_HOME": "$PLACE/xdg"}, "disk/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "home/xdg/huggingface/hub"),
    ],
)
@pytest.mark.parametrize("package", [True, False], ids=["huggingface_hub is here", "and not here"])
def test_the_hugging_face_cache(
    variables: dict[str, str], place: str, package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variables mean what they mean to the Hugging Face library, whose constants were set when it was imported."""
    monkeypatch.setenv("PLACE", str(tmp_path / "disk"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    if package:
        pytest.importorskip("huggingface_hub", reason="compares with huggingface_hub: pip install miniflux[test]")
        if "" not in variables.values():  # which the package takes for the folder it runs in
            code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            assert Path(run.stdout.strip()) == tmp_path / place
    else:
        monkeypatch.setattr(hubcache, "_as_the_package_says", lambda: None)
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
        files = vars(find(variant))
        assert {path.parent for path in files.values() if path is not None} == {BUNDLED}
        assert {part for part, path in files.items() if path is None} == {"lm", "lm_tokenizer"}
    assert places(DEV) == [tmp_path / "flux1-dev", tmp_path]


def test_a_home_in_the_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not always replace the tilde."""
    singles(home / "weights")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", "~/weights")
    assert find(DEV).transformer == home / "weights" / "flux1-dev.safetensors"


def test_sharded_folders_count_by_their_index(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "transformer" / "model.safetensors").rename(root / "transformer" / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors"}}
    (root / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find(DEV, [root]).transformer == root / "transformer"


@pytest.mark.parametrize("variant", [DEV, KLEIN, FLUX3], ids=lambda variant: variant.name)
@pytest.mark.parametrize("part", PARTS)
def test_an_empty_folder_does_not_count(part: str, variant: Variant, tmp_path: Path) -> None:
    """An earlier place with an empty folder must not hide a later one that has the files. Who has not the part, has
    none of it."""
    early, late = tmp_path / "early", folders(tmp_path / "late")
    if part not in needed(variant):
        assert getattr(find(variant, [late]), part) is None
        return
    name = next(name for name in needed(variant)[part] if not name.endswith(".safetensors"))
    (early / name).mkdir(parents=True)
    touch(early / name / "config.json")
    assert find(variant, [early, late]).of(part) == late / name


def test_what_each_variant_is_made_of() -> None:
    """One text encoder or two, each with its tokenizer; single files as their releases and ComfyUI call them."""
    both = {"transformer", "autoencoder"}
    old, new = both | {"clip", "t5", "clip_tokenizer", "t5_tokenizer"}, both | {"lm", "lm_tokenizer"}
    assert set(PARTS) == old | new
    for variant in VARIANTS.values():
        parts = needed(variant)
        assert set(parts) == (old if variant.family == "flux1" else new)
        assert parts["transformer"] == (variant.file, "transformer")
    assert needed(KLEIN)["lm"] == ("text_encoder", "qwen_3_4b.safetensors")
    assert needed(KLEIN)["autoencoder"] == ("flux2-vae.safetensors", "ae.safetensors", "vae")
    assert needed(KLEIN)["lm_tokenizer"] == ("tokenizer",)


def test_single_files_of_flux2(tmp_path: Path) -> None:
    """As ComfyUI's folders hold them, beside those of FLUX.1."""
    root = singles(tmp_path)
    touch(
        root / "diffusion_models" / KLEIN.file, root / "vae" / "flux2-vae.safetensors", root / "vae" / "ae.safetensors"
    )
    touch(root / "text_encoders" / KLEIN.lm_file, root / "text_encoders" / "clip_l.safetensors")
    files = find(KLEIN, [root])
    assert files.transformer == root / "diffusion_models" / KLEIN.file
    assert files.autoencoder == root / "vae" / "flux2-vae.safetensors"
    assert (files.lm, files.lm_tokenizer) == (root / "text_encoders" / KLEIN.lm_file, root / "tokenizer")
    assert (files.clip, files.t5, files.tiny) == (None, None, None)
    for part in ("t5", "clip_tokenizer"):
        with pytest.raises(InputError, match=f"flux2-klein-4b has no part '{part}'; its parts are transformer, auto"):
            find(KLEIN, [root], {part: root / "ae.safetensors"})


def test_nothing_there_names_everything(tmp_path: Path, home: Path) -> None:
    """The message is all a newcomer has: each part, each place, and how to get them."""
    with pytest.raises(WeightsNotFoundError) as caught:
        find(DEV, [tmp_path / "mine"])
    text = str(caught.value)
    for part, names in needed(DEV).items():
        assert f"{part} ({' or '.join(names)})" in text.splitlines()[0]
    assert "lm" not in needed(DEV) and "; lm" not in text
    assert f"looked in: {tmp_path / 'mine'}\n" in text
    assert "the variable MINIFLUX_WEIGHTS is not set" in text
    assert f"{home / '.cache/huggingface/hub'} has no snapshot of {DEV.repository}" in text
    assert f"miniflux fetch {DEV.name} (--dry-run lists every file)" in text
    assert f"huggingface.co/{DEV.repository} ({DEV.licence}, to be accepted there)" in text
    assert '"nano"' in text
    with pytest.raises(WeightsNotFoundError, match=r"FLUX.1-schnell \(Apache-2.0\)") as caught:
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


def test_asking_the_package_does_not_import_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes half a second; nor is a package that cannot be asked in the way."""
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub_cache() == tmp_path / "hub" and "huggingface_hub" not in sys.modules
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub" / "__init__.py").touch()
    (tmp_path / "huggingface_hub" / "constants.py").write_text("from . import nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hub_cache() == tmp_path / "hub"


def test_a_cache_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows without developer mode snapshots hold the files themselves, and there are no blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / f"models--{DEV.repository.replace('/', '--')}"
    folders(root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_bytes(b"abc\r\n")
    assert find(DEV).transformer == root / "snapshots" / "abc" / "transformer"


def test_of_several_snapshots_the_one_of_the_main_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for revision in ("ffff", "aaaa", "cccc"):
        found = cached(tmp_path, DEV.repository, revision)
    (found.parents[1] / "refs" / "main").write_text("aaaa")
    assert snapshot(DEV.repository) == found.parent / "aaaa" == find(DEV).t5.parent


@pytest.mark.parametrize("gone", ["model-00001.safetensors", "model-00002.safetensors"])
def test_a_shard_whose_blob_is_gone(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is not found, and what it lacks is said; another place that has it whole is taken."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    t5 = cached(tmp_path / "hub", DEV.repository) / "text_encoder_2"
    (t5 / "model.safetensors").unlink()
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        touch(tmp_path / name)
        (t5 / name).symlink_to(tmp_path / name)
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (t5 / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find(DEV).t5 == t5
    (tmp_path / gone).unlink()
    with pytest.raises(WeightsNotFoundError, match=rf"machine: t5 \(.*; in {t5} these are missing: {gone}\)\n"):
        find(DEV)
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(folders(tmp_path / "weights")))
    assert find(DEV).t5 == tmp_path / "weights" / "text_encoder_2"


@pytest.mark.parametrize(
    ("name", "given"),
    [("flux1-dev.sft", "ae.sft"), ("FLUX1-DEV.SFT", "AE.SAFETENSORS"), ("flux1-dev.safetensors", "ae.sft")],
)
def test_other_endings_in_the_folder_of_the_variable(
    name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black Forest Labs first published `flux1-dev.sft` and `ae.sft`."""
    root = singles(tmp_path / "weights")
    (root / "flux1-dev.safetensors").rename(root / name)
    (root / "ae.safetensors").rename(root / given)
    touch(root / "._flux1-dev.safetensors", root / "flux1-schnell.sft.part")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(root))
    assert (find(DEV).transformer, find(DEV).autoencoder) == (root / name, root / given)
    with pytest.raises(WeightsNotFoundError, match=r"transformer \(flux1-schnell"):
        find(SCHNELL)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("{}/nothing", "which is not there"),
        ("{}/flux1-dev.safetensors", "a file; it must name the folder, {}"),
        (os.pathsep.join(("{}/a", "{}/b")), "several folders; it must name one"),
        ("$NOWHERE/weights", "which is not there"),
    ],
)
def test_a_variable_that_names_no_folder(
    value: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said in one line, also where the model is found elsewhere."""
    touch(tmp_path / "flux1-dev.safetensors", tmp_path / "a" / "x", tmp_path / "b" / "x")
    value = value.format(tmp_path, tmp_path)
    monkeypatch.setenv("MINIFLUX_WEIGHTS", value)
    said = f"MINIFLUX_WEIGHTS names {value}, {why.format(tmp_path)}"
    with pytest.raises(WeightsNotFoundError) as caught:
        find(DEV)
    assert said in str(caught.value).splitlines()
    caplog.clear()
    monkeypatch.setenv("MINIFLUX_WEIGHTS", value + "2" if "several" not in why else value + os.pathsep)
    assert find(NANO).transformer.parent == BUNDLED
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("it is passed over")


def test_a_variable_in_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", str(tmp_path))
    monkeypatch.setenv("MINIFLUX_WEIGHTS", "$DISK/weights")
    root = singles(tmp_path / "weights")
    assert find(DEV).transformer == root / "flux1-dev.safetensors"


def test_the_old_place_hands_on_what_is_asked_for() -> None:
    """Programs import from where these modules were."""
    from miniflux.checkpoints.finding import BUNDLED as bundled
    from miniflux.checkpoints.hub import complete_parts
    from miniflux.weights import finding, hub

    assert bundled is finding.BUNDLED and complete_parts is hub.complete_parts
    with pytest.raises(ImportError, match="nothing"):
        from miniflux.checkpoints.finding import nothing  # noqa: F401

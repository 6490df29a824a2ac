"""Models in files and folders that somebody names: told by their headers, drawn with as the library draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import miniflux
from miniflux.apps.cli import main
from miniflux.errors import InputError, MinifluxError
from miniflux.lora.attaching import BUNDLED_LORAS
from miniflux.service import Catalogue, Models, catalogue
from miniflux.settings import Request
from miniflux.weights.finding import BUNDLED
from tests.steered import network

PARTS = ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
NANO = BUNDLED / "flux1-nano-dev.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As people have it: fine-tunes, a GGUF, an fp8 file, a pipeline's folder, and much that is no model."""
    root, one = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("one")
    for part in PARTS:
        (root / part).symlink_to(BUNDLED / part)
    (root / "diffusion_models").mkdir()
    shutil.copy(NANO, root / "diffusion_models" / "my-tune.safetensors")
    shutil.copy(BUNDLED / "flux1-nano-schnell.safetensors", root / "quick.SFT")
    for name, kind in (("small.gguf", "Q8_0"), ("light.safetensors", "fp8")):
        assert main(["convert", str(NANO), str(root / name), "--format", kind]) == 0
    for part in (*PARTS, NANO.name):
        (one / part).symlink_to(BUNDLED / part)
    assert main(["convert", str(one), str(root / "pipeline"), "--layout", "diffusers"]) == 0
    (root / "loras").mkdir()
    shutil.copy(BUNDLED_LORAS / "realism.safetensors", root / "loras" / "realism.safetensors")
    (root / "._my-tune.safetensors").write_bytes(b"what macOS leaves")
    (root / "cut.safetensors").write_bytes(NANO.read_bytes()[:5000])
    (root / "notes.txt").write_text("no model")
    return root


def without(source: Path, target: Path, key: str) -> None:
    """A copy of a safetensors file that lacks a tensor."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != key}  # noqa: SIM118
        save_file(tensors, target, file.metadata())


def draws(models: Models, model: str) -> torch.Tensor:
    request = Request(prompt="a star", model=model, width=64, height=64, steps=1)
    return models.draw(request, lambda done, preview: None).latents


def test_folder_is_listed_by_what_its_files_hold(folder: Path) -> None:
    """Names as short as may be, formats and variants; encoders, LoRAs and litter are passed over, the broken told."""
    found = Catalogue(folder=folder)
    assert found.scan() and not found.scan()
    models = {model.name: (model.variant.name, model.format) for model in found.listed() if model.path}
    assert set(models) == {"my-tune.safetensors", "quick.SFT", "small.gguf", "light.safetensors", "pipeline"}
    assert [name for name, (variant, _) in models.items() if variant == "nano-schnell"] == ["quick.SFT"]
    assert "Q8_0" in models["small.gguf"][1] and "fp8" in models["light.safetensors"][1].lower()
    assert set(found.refused) == {"cut.safetensors"}
    assert str(folder) not in found.refused["cut.safetensors"]


def test_listed_files_draw_what_the_library_draws(folder: Path) -> None:
    models = Models(folder=folder)
    models.catalogue.scan()
    for model in models.listed():
        if model.path:
            own = miniflux.load(model.path, weights=folder)
            drawn = own.generate("a star", width=64, height=64, steps=1).latents
            assert torch.equal(draws(models, model.model), drawn), model.name
    tune = next(model for model in models.listed() if model.name == "my-tune.safetensors")
    assert torch.equal(draws(models, "nano-dev"), draws(models, tune.model))


def test_new_and_removed_files_are_noticed_and_others_not_opened_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mine"
    shutil.copytree(folder, root, symlinks=True)
    found = Catalogue(folder=root)
    found.scan()
    opened: list[Path] = []
    checked = catalogue.checked

    def noted(path: Path, first: list[Path]) -> object:
        opened.append(path)
        return checked(path, first)

    monkeypatch.setattr(catalogue, "checked", noted)
    shutil.copy(NANO, root / "another.safetensors")
    (root / "small.gguf").unlink()
    assert found.scan() and opened == [root / "another.safetensors"]
    names = {model.name for model in found.listed()}
    assert "another.safetensors" in names and "small.gguf" not in names


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for part in PARTS:
        (tmp_path / part).symlink_to(BUNDLED / part)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copy(NANO, tmp_path / place / "model.safetensors")
    found = Catalogue(folder=tmp_path)
    found.scan()
    names = sorted(model.name for model in found.listed() if model.path)
    assert names == ["b/model.safetensors", "model.safetensors"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "neither a model nor a file"),
        (lambda path: shutil.copy(BUNDLED_LORAS / "realism.safetensors", path), "FLUX.1 transformer|LoRA"),
        (lambda path: shutil.copy(BUNDLED / "ae.safetensors", path), "found Autoencoder"),
        (lambda path: path.write_bytes(NANO.read_bytes()[:4000]), "model.safetensors"),
        (lambda path: path.write_bytes(b""), "model.safetensors"),
        (lambda path: path.mkdir(), "expected a folder"),
        (lambda path: without(NANO, path, "double_blocks.1.img_mod.lin.weight"), "double_blocks.1.img_mod.lin.weight"),
    ],
    ids=["nothing", "LoRA", "autoencoder", "cut", "empty", "empty folder", "incomplete"],
)
def test_file_that_cannot_be_used_is_refused_from_its_header(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(MinifluxError, match=said):
        Catalogue(weights=BUNDLED).add(path)


def test_networks_that_steer_are_told_from_their_keys(tmp_path: Path) -> None:
    """Listed apart from the models, with the kind of condition that they are for."""
    (tmp_path / "control").mkdir()
    path = Path(network(tmp_path / "control" / "edges.safetensors"))
    catalogue = Catalogue(folder=tmp_path)
    bundled = {"canny (bundled)": ("ControlNet", BUNDLED / "controlnets" / "canny.safetensors")}
    assert catalogue.networks == bundled
    assert catalogue.scan() and not catalogue.scan() and not catalogue.refused
    name = str(path.relative_to(tmp_path))
    assert catalogue.networks == {**bundled, name: ("ControlNet", path)} and not any(
        one.path for one in catalogue.listed()
    )
    path.unlink()
    assert catalogue.scan() and catalogue.networks == bundled


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Catalogue(folder=tmp_path / "gone")


def test_links_in_a_circle_end(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(folder, root, symlinks=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    found = Catalogue(folder=root)
    found.scan()
    assert len([model for model in found.listed() if model.path]) == 5


def test_lora_for_a_file_is_compared_with_its_sizes(folder: Path) -> None:
    models = Models(folder=folder)
    models.catalogue.scan()
    path = next(model.model for model in models.listed() if model.name == "small.gguf")
    assert models.lora("realism", path).applied == models.lora("realism", "nano-dev").applied

"""Saving: what comes out is what other programs read, and a failure leaves the old file as it was."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from miniflux.checkpoints import layouts_of, load_into, saving, to_layout
from miniflux.checkpoints.configs import config_of_transformer
from miniflux.checkpoints.saving import save
from miniflux.errors import CheckpointError, InputError, OutputError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, randomise

NETWORKS = [Flux1(FLUX1), Autoencoder(AUTOENCODER), ClipTextEncoder(CLIP), T5Encoder(T5)]
CASES = [(module, layout) for module in NETWORKS for layout in layouts_of(module)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "layout"), CASES, ids=[f"{type(m).__name__}, {layout}" for m, layout in CASES])
def test_there_and_back(module: nn.Module, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The reference library reads the tensors of the layout, bitwise, and nothing else lies in the folder."""
    module = randomise(module).to(dtype)
    path = tmp_path / "a.safetensors"
    save(module, path, layout=layout)
    expected, found = to_layout(module, module.state_dict(), layout), load_file(path)
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == dtype and torch.equal(found[key], expected[key]) for key in found)
    assert names(tmp_path) == ["a.safetensors"]


def test_what_was_loaded_can_be_saved_again(tmp_path: Path) -> None:
    """Loaded weights are views of one mapped file, and that may even be the file that is written."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(randomise(Flux1(FLUX1)), first)
    content = first.read_bytes()
    with torch.device("meta"):
        module = Flux1(FLUX1)
    load_into(module, first)
    for layout, path in [("diffusers", second), ("original", first)]:
        save(module, path, layout=layout)
    assert first.read_bytes() == content
    load_into(module, second)
    save(module, first)
    assert first.read_bytes() == content


def test_weights_that_do_not_lie_in_order(tmp_path: Path) -> None:
    """Transposed or expanded weights are written as the values they stand for."""
    module = nn.Linear(4, 6)
    module.weight = nn.Parameter(torch.arange(24.0).view(4, 6).T)
    module.bias = nn.Parameter(torch.ones(1).expand(6))
    save(module, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["weight"], module.weight) and torch.equal(found["bias"], torch.ones(6))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    """So that a checksum tells whether a recipe was repeated; in each process the library orders metadata anew."""
    for name in ("a", "b"):
        save(randomise(Flux1(FLUX1)), tmp_path / f"{name}.safetensors", metadata={key: key for key in "abcdefgh"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    text = (tmp_path / "a.safetensors").read_bytes()
    assert text.index(b'"format"') < text.index(b'"axes_dim"') < text.index(b'"a":"a"') < text.index(b'"h":"h"')


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_metadata(tmp_path: Path) -> None:
    """`format` is what transformers insists on; the caller's own strings come along and win."""
    path = tmp_path / "a.safetensors"
    save(nn.Linear(2, 2), path)
    assert header(path) == {"format": "pt"}
    save(nn.Linear(2, 2), path, metadata={"title": "märz", "format": "np"})
    assert header(path) == {"format": "np", "title": "märz"}
    with pytest.raises(InputError, match="strings, got 5 for 'steps'"):
        save(nn.Linear(2, 2), path, metadata={"steps": 5})  # type: ignore[dict-item]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_transformer_of_any_size_can_be_told_from_its_file(layout: str, tmp_path: Path) -> None:
    """Rotary axes are in no shape: without them in the header, a file of unusual sizes could not be loaded alone."""
    config = replace(FLUX1, axes_dim=(2, 10, 4), mlp_ratio=2.5, qkv_bias=layout == "original", guidance_embed=False)
    path = tmp_path / "a.safetensors"
    save(Flux1(config), path, layout=layout)
    entries: Any = load_file(path)
    assert header(path)["axes_dim"] == "[2, 10, 4]"
    assert config_of_transformer(entries, header(path)) == config


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.bak", "a.SAFETENSORS", ".safetensors"])
def test_other_endings_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"written as \.safetensors, got the ending"):
        save(nn.Linear(2, 2), tmp_path / name)
    assert not names(tmp_path)


def test_an_unknown_layout_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no layout 'banana'; known: original, diffusers"):
        save(Flux1(FLUX1), tmp_path / "a.safetensors", layout="banana")
    assert not names(tmp_path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """No folder, a file in place of the folder, a folder in place of the file: one line, and nothing left behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    before = names(tmp_path)
    for place, reason in [
        ("nowhere/a.safetensors", "No such file"),
        ("file/a.safetensors", "Not a directory"),
        ("folder.safetensors", "Is a directory"),
        ("x" * 300 + ".safetensors", "too long"),
    ]:
        with pytest.raises(OutputError, match=f"cannot be written: .*{reason}") as caught:
            save(nn.Linear(2, 2), tmp_path / place)
        assert str(caught.value).startswith(str(tmp_path / place)) and "\n" not in str(caught.value)
        assert names(tmp_path) == before and not names(tmp_path / "folder.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        save(nn.Linear(2, 2), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "stopped"],
)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_half_way(
    failure: BaseException, expected: type, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up or the user stops: the old file is intact, and no half file stays."""
    path = tmp_path / "a.safetensors"
    if old is not None:
        path.write_bytes(old)

    def half(place: Path, _tensors: object, _metadata: object) -> None:
        assert place != path
        Path(place).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(saving, "write_tensors", half)
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else r"a\.safetensors: .*No space left"):
        save(nn.Linear(2, 2), path)
    assert names(tmp_path) == ([] if old is None else ["a.safetensors"])
    assert old is None or path.read_bytes() == old


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    """A true failure of the operating system after a part was written."""
    resource = pytest.importorskip("resource", reason="limits the size of files, which POSIX systems can")
    path = tmp_path / "a.safetensors"
    save(nn.Linear(2, 2), path)
    content, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save(nn.Linear(200, 200), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == content and names(tmp_path) == ["a.safetensors"]


def test_a_network_without_values_leaves_the_old_file(tmp_path: Path) -> None:
    """On the meta device there is nothing to save."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="the weights of Linear are not in memory"):
        save(nn.Linear(2, 2, device="meta"), path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_usual_permissions(umask: int, tmp_path: Path) -> None:
    """safetensors lets only the owner read its files, so that colleagues and web servers could not."""
    before = os.umask(umask)
    try:
        save(nn.Linear(2, 2), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask

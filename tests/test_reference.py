"""The reference data of the repository: whole, as they were made, small, and enough without any other folder."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests import gather_reference as gather
from tests import reference
from tests.reference import DATA

# Not data: what tells of them.
TEXTS = {"SHA256SUMS", "README.md", "LICENSES.md", "LICENSE.CLIP", "LICENSE.APACHE"}
FILES = sorted(path for path in DATA.rglob("*") if path.is_file())


def content(name: str) -> bytes:
    """What is stored of a file of the reference, unpacked."""
    return reference.read(gather.stored(name))


def test_every_file_holds_what_was_recorded() -> None:
    """Neither a line end nor a bit differs, nothing is missing, and nothing lies there that nobody listed."""
    assert gather.sums_now() == gather.sums()
    assert {path for path in FILES if path.name not in TEXTS} == {gather.stored(name) for name in gather.sums()}


def test_they_stay_small() -> None:
    assert sum(path.stat().st_size for path in FILES) <= 24_000_000


def test_no_path_of_a_machine() -> None:
    path = re.compile(rb"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|data)/\w|[A-Z]:\\")
    names = [name for name in gather.sums() if not name.startswith(("golden/", "tokenizers/"))]
    held = {name: content(name) for name in names}
    held |= {file.name: file.read_bytes() for file in FILES if file.name in TEXTS}
    assert not {name: found[0] for name, data in held.items() if (found := path.search(data))}


@pytest.mark.parametrize("folder", ["golden", "lora_dialects", "manifests", "tokenizers"])
def test_every_folder_tells_where_its_data_come_from(folder: str) -> None:
    """Each file, or each folder of a tokenizer, by its name."""
    text = next((DATA / folder).glob("*.md")).read_text("utf-8")
    if folder in ("golden", "tokenizers"):
        assert not [
            p.name for p in (DATA / folder).iterdir() if p.name not in TEXTS and p.name.split(".")[0] not in text
        ]
    else:  # thirty each, which tell it themselves
        names = [name for name in gather.sums() if name.startswith(f"{folder}/") and "/_" not in name]
        assert not [name for name in names if not {"source", "verified"} <= json.loads(content(name)).keys()]


def test_licences_lie_beside_the_tokenizers() -> None:
    assert "Copyright (c) 2021 OpenAI" in (DATA / "tokenizers/LICENSE.CLIP").read_text("utf-8")
    assert "Apache License" in (DATA / "tokenizers/LICENSE.APACHE").read_text("utf-8")


def test_names() -> None:
    assert {"flux1_dev", "flux2_dev", "sampling"} < reference.names("golden")
    assert "bfl-flux2-klein-4b" in reference.names("manifests") and "flux2-kohya" in reference.names("lora_dialects")
    assert not [name for name in reference.names("manifests") if name.startswith("_") or name == "README"]


def test_golden_files_can_be_told_apart_from_their_header() -> None:
    """The config of the tiny network, and blocks that can be compared one by one."""
    for name in reference.names("golden") - {"sampling"}:
        assert {"config", "base_config"} & reference.golden(name).about.keys(), name
    case = reference.golden("flux1_dev")
    assert {"output", "denoise_output", "double_0_img", "single_1"} <= case.tensors.keys()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout with nothing beside it."""
    monkeypatch.delenv("MINIFLUX_REFERENCE", raising=False)
    monkeypatch.setattr(reference, "BESIDE", tmp_path / "shared/reference")
    return tmp_path


def test_a_folder_beside_adds_files(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or not; what is in the repository comes first."""
    for folder in (alone / "shared/reference", alone / "elsewhere"):
        (folder / "manifests").mkdir(parents=True)
        for name in ("bfl-flux1-dev", "large"):
            tensors = {folder.name: {"shape": [1]}}
            (folder / f"manifests/{name}.json.gz").write_bytes(gzip.compress(json.dumps({"tensors": tensors}).encode()))
    assert reference.manifest("large") == {"reference": [1]}
    assert len(reference.manifest("bfl-flux1-dev")) == 780
    monkeypatch.setenv("MINIFLUX_REFERENCE", str(alone / "elsewhere"))
    assert reference.manifest("large") == {"elsewhere": [1]}


def test_what_is_nowhere(alone: Path) -> None:
    """Alone, the test is skipped with a reason; where the folder is, a wrong name is a fault of the test."""
    with pytest.raises(pytest.skip.Exception, match=r"no golden/large.safetensors in tests/data: set MINIFLUX_REFEREN"):
        reference.golden("large")
    (alone / "shared/reference").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no golden/large.safetensors in .*nor in"):
        reference.golden("large")


def test_gathering_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder with nothing packed to one like this, and a changed file is noticed."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("configs.json", "golden/sampling.safetensors", "manifests/te-clip-l.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content(name))
    target.mkdir()
    monkeypatch.setattr(gather, "DATA", target)
    gather.gather(source)
    assert gather.sums() == gather.sums_of(source) and len(gather.sums()) == 3
    assert gather.stored("manifests/te-clip-l.json") == target / "manifests/te-clip-l.json.gz"
    assert content("manifests/te-clip-l.json") == (source / "manifests/te-clip-l.json").read_bytes()
    (source / "configs.json").write_text("{}")
    assert gather.sums() != gather.sums_of(source)

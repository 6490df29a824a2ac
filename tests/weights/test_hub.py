"""Fetching from a Hub: whole, checked, gone on with after a cut, and where other programs find it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import miniflux
from miniflux.apps.cli import main
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.errors import FetchError, InputError, MissingExtraError, WeightsNotFoundError
from miniflux.variants import VARIANTS, Download, Variant
from miniflux.weights import hub as hubs
from miniflux.weights.finding import BUNDLED, find, needed
from tests.weights.hubserver import COMMIT, Hub, serve

# The bundled model as if it were an official one.
FILES = {
    "transformer": ("flux1-nano-dev.safetensors",),
    "autoencoder": ("ae.safetensors",),
    "clip": ("text_encoder/config.json", "text_encoder/model.safetensors"),
    "t5": ("text_encoder_2/config.json", "text_encoder_2/model.safetensors"),
    "clip_tokenizer": ("tokenizer/vocab.json", "tokenizer/merges.txt"),
    "t5_tokenizer": ("tokenizer_2/spiece.model",),
}
TINY = replace(
    VARIANTS["nano-dev"],
    name="tiny",
    repository="lab/tiny",
    licence="Licence of the lab",
    gated=True,
    bundled=False,
    downloads=tuple(Download(part, files, 1_000_000) for part, files in FILES.items()),
)
PATHS = [path for files in FILES.values() for path in files]
BIG = "text_encoder_2/model.safetensors"  # not the largest, but large enough to be cut


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine that may use the network, and a token that has access."""
    for name in ("MINIFLUX_WEIGHTS", "HF_HOME", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(VARIANTS, "tiny", TINY)
    monkeypatch.setattr(hubs.time, "sleep", lambda seconds: None)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the repository lab/tiny."""
    files = {path: (BUNDLED / path).read_bytes() for path in PATHS} | {"README.md": b"not wanted"}
    made = Hub("lab/tiny", files, {path for path in files if path.endswith((".safetensors", ".model"))})
    server = serve(made)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield made
    server.shutdown()
    server.server_close()


def left_over(cache: Path) -> list[str]:
    """Files in the cache that are neither whole blobs, links, refs nor locks."""
    files = [path for path in cache.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return sorted(path.name for path in files if path.suffix in (".incomplete", ".part"))


def test_a_variant_is_fetched_whole_and_loads(cache: Path, hub: Hub) -> None:
    plan = hubs.plan(TINY)
    assert [file.path for file in plan.wanted] == sorted(PATHS, key=lambda path: len(hub.files[path]))
    assert plan.bytes == sum(len(hub.files[path]) for path in PATHS) and plan.begun == 0
    arrived: list[int] = []
    folder = hubs.fetch(plan, arrived.append)
    assert sum(arrived) == plan.bytes + sum(arrived) - sum(arrived) or sum(arrived) == sum(
        len(hub.files[p]) for p in PATHS
    )
    assert folder == cache / "models--lab--tiny" / "snapshots" / COMMIT
    assert sorted(hub.asked) == sorted((path, 0) for path in PATHS)
    assert not left_over(cache)
    for path in PATHS:
        assert (folder / path).is_symlink() and (folder / path).read_bytes() == hub.files[path]
    assert find(TINY).transformer == folder / PATHS[0]
    assert miniflux.load("tiny").variant == TINY
    assert not hubs.plan(TINY).wanted and hubs.plan(TINY).bytes == 0


def test_a_cache_without_links_is_complete(cache: Path, hub: Hub) -> None:
    """As on Windows without developer mode: snapshots hold the files themselves, and nothing is fetched again."""
    folder = hubs.fetch(hubs.plan(TINY))
    for path in PATHS:
        content = (folder / path).read_bytes()
        (folder / path).unlink()
        (folder / path).write_bytes(content)
    shutil.rmtree(cache / "models--lab--tiny" / "blobs")
    hub.asked.clear()
    plan = hubs.plan(TINY)
    assert not plan.wanted and plan.bytes == 0
    assert hubs.fetch(plan) == folder and not hub.asked
    (folder / PATHS[0]).unlink()
    assert [file.path for file in hubs.plan(TINY).wanted] == [PATHS[0]]


def test_the_cache_is_that_of_huggingface_hub(cache: Path, hub: Hub) -> None:
    """Its own functions find what was fetched, and fetch nothing again; and the other way round."""
    first = huggingface_hub.hf_hub_download("lab/tiny", PATHS[1], cache_dir=cache, endpoint=hub.url)
    hub.asked.clear()
    folder = hubs.fetch(hubs.plan(TINY))
    assert PATHS[1] not in [path for path, _ in hub.asked] and first == str(folder / PATHS[1])
    hub.asked.clear()
    for path in PATHS:
        local = huggingface_hub.hf_hub_download("lab/tiny", path, cache_dir=cache, local_files_only=True)
        online = huggingface_hub.hf_hub_download("lab/tiny", path, cache_dir=cache, endpoint=hub.url)
        assert local == online == str(folder / path)
    assert not hub.asked
    (repository,) = huggingface_hub.scan_cache_dir(cache).repos
    assert repository.repo_id == "lab/tiny" and repository.nb_files == len(PATHS)
    assert [revision.refs for revision in repository.revisions] == [frozenset({"main"})]


def test_a_cut_connection_is_taken_up_again(cache: Path, hub: Hub) -> None:
    """Within one call, from the byte where it was cut."""
    hub.cut[BIG] = [1000, 0, 2000]
    arrived: list[int] = []
    folder = hubs.fetch(hubs.plan(TINY), arrived.append)
    assert [start for path, start in hub.asked if path == BIG] == [0, 1000, 1000, 3000]
    assert sum(arrived) == sum(len(hub.files[path]) for path in PATHS)
    assert (folder / BIG).read_bytes() == hub.files[BIG] and not left_over(cache)


def test_what_had_arrived_is_used_by_the_next_call(cache: Path, hub: Hub) -> None:
    """A network that stays away is an error in words; nothing of what came is lost."""
    hub.cut[BIG] = [1000] + [0] * 10
    with pytest.raises(FetchError, match="stopped answering .* what arrived is kept: check the connection"):
        hubs.fetch(hubs.plan(TINY))
    assert len(hub.asked) - len({path for path, _ in hub.asked}) == hubs.RETRIES + 1
    assert left_over(cache) == [hub.digest(BIG) + ".incomplete"]
    with pytest.raises(WeightsNotFoundError):  # half a model is none
        find(TINY)
    hub.cut.clear()
    hub.asked.clear()
    plan = hubs.plan(TINY)
    assert plan.begun == 1000 and BIG in [file.path for file in plan.wanted]
    assert (hubs.fetch(plan) / BIG).read_bytes() == hub.files[BIG]
    assert hub.asked[0] == (BIG, 1000) and not left_over(cache)


@pytest.mark.parametrize("kept", [1000, 10**9])
def test_servers_that_cannot_go_on_send_all_again(cache: Path, hub: Hub, kept: int) -> None:
    """And so it is where more is here than there should be."""
    hub.ignores_ranges = True
    partial = cache / "models--lab--tiny" / "blobs" / (hub.digest(BIG) + ".incomplete")
    partial.parent.mkdir(parents=True)
    with partial.open("wb") as file:
        file.truncate(kept)
    assert (hubs.fetch(hubs.plan(TINY)) / BIG).read_bytes() == hub.files[BIG]
    assert not left_over(cache)


@pytest.mark.parametrize("path", [BIG, "tokenizer/vocab.json"])
def test_another_content_than_announced_is_refused_and_removed(cache: Path, hub: Hub, path: str) -> None:
    """SHA-256 for large files, git's hash for small ones."""
    hub.wrong.add(path)
    with pytest.raises(FetchError, match=f"^{path}: what arrived is not what lab/tiny announced: .* run it again"):
        hubs.fetch(hubs.plan(TINY))
    assert not left_over(cache) and not (cache / "models--lab--tiny" / "blobs" / hub.digest(path)).exists()
    assert not (cache / "models--lab--tiny" / "refs" / "main").exists()
    hub.wrong.clear()
    assert (hubs.fetch(hubs.plan(TINY)) / path).read_bytes() == hub.files[path]


def test_a_damaged_partial_file_is_noticed(cache: Path, hub: Hub) -> None:
    partial = cache / "models--lab--tiny" / "blobs" / (hub.digest(BIG) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1000)
    with pytest.raises(FetchError, match="is not what lab/tiny announced"):
        hubs.fetch(hubs.plan(TINY))
    assert (hubs.fetch(hubs.plan(TINY)) / BIG).read_bytes() == hub.files[BIG]


def test_a_new_commit_takes_what_did_not_change(cache: Path, hub: Hub) -> None:
    hubs.fetch(hubs.plan(TINY))
    hub.asked.clear()
    hub.commit = "f" * 40
    hub.files["tokenizer/merges.txt"] += b"\n"
    plan = hubs.plan(TINY)
    assert [file.path for file in plan.wanted] == ["tokenizer/merges.txt"]
    folder = hubs.fetch(plan)
    assert hub.asked == [("tokenizer/merges.txt", 0)] and folder.name == "f" * 40
    assert find(TINY).t5.parent == folder


def test_parts_that_are_elsewhere_are_not_fetched(
    cache: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "text_encoder_2").symlink_to(BUNDLED / "text_encoder_2")
    (weights / "ae.safetensors").symlink_to(BUNDLED / "ae.safetensors")
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(weights))
    plan = hubs.plan(TINY)
    assert plan.here == {"autoencoder": weights / "ae.safetensors", "t5": weights / "text_encoder_2"}
    hubs.fetch(plan)
    assert not [path for path, _ in hub.asked if path in FILES["autoencoder"] + FILES["t5"]]
    assert find(TINY).t5 == weights / "text_encoder_2"


def test_parts_of_another_variant_serve_both(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders and autoencoder are the same files in every repository of FLUX.1."""
    hubs.fetch(hubs.plan(TINY))
    sister = replace(TINY, name="sister", repository="lab/sister", file="sister.safetensors")
    monkeypatch.setitem(VARIANTS, "sister", sister)
    assert set(hubs.complete_parts(sister)) == set(FILES) - {"transformer"}
    other = replace(sister, autoencoder=replace(TINY.autoencoder, ch=64))
    assert not hubs.complete_parts(other)


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        (
            "",
            0,
            "it needs an access token: accept the licence on http://127.0.0.1:.*/lab/tiny, then put .* into HF_TOKEN",
        ),
        ("other", 0, "this account has no access: accept the licence on http"),
        ("good", 401, "the Hub refuses the access token"),
        ("good", 403, "this account has no access"),
        ("good", 404, "the Hub has no such repository or file"),
        ("good", 500, "the Hub answers 500; .* try again later"),
        ("good", 429, "the Hub answers 429"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, status: int, reason: str
) -> None:
    hub.gated, hub.refuse = True, status
    monkeypatch.setenv("HF_TOKEN", token)
    plan = hubs.plan(TINY)
    with pytest.raises(FetchError, match=f"^lab/tiny: {reason}") as caught:
        hubs.fetch(plan)
    assert "\n" not in str(caught.value)


def test_no_repository_no_network_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match="^lab/gone: the Hub has no such repository"):
        hubs.plan(replace(TINY, repository="lab/gone"))
    with pytest.raises(FetchError, match="lab/tiny has no extra.bin any more"):
        hubs.plan(replace(TINY, downloads=(*TINY.downloads, Download("t5", ("extra.bin",), 1))))
    with pytest.raises(InputError, match="nano-dev is inside the package"):
        hubs.plan(VARIANTS["nano-dev"])
    for name, lie in (("about", ["../../etc/passwd"]), ("digest", "../../etc/passwd")):
        with monkeypatch.context() as patch:
            patch.setattr(hub, name, lambda *_, lie=lie: lie)
            with pytest.raises(FetchError, match="is not that of a Hugging Face Hub|states no size and checksum"):
                hubs.plan(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "commit", "../../..")
        with pytest.raises(FetchError, match=r"names no commit, but '\.\./"):
            hubs.plan(TINY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        hubs.plan(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set, so nothing is fetched"):
        hubs.plan(TINY)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'miniflux\[hub\]'"):
        hubs.plan(TINY)


def test_disks(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is told before; one that fills up keeps what arrived."""
    plan = hubs.plan(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(hubs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(FetchError, match="bytes are needed, 1,000 are free; nothing was fetched"):
            hubs.fetch(plan)
    assert not hub.asked

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() >= 500:
                raise OSError(28, "No space left on device")
            return super().write(bytes(data[:500]))

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda path, mode="r", *rest, **more: Full(path, mode) if "incomplete" in path.name
            and mode != "rb" else opened(path, mode, *rest, **more)
        )  # fmt: skip
        with pytest.raises(FetchError, match="the disk is full; what arrived is kept: make room, then run it again"):
            hubs.fetch(plan)
    assert left_over(cache)
    hubs.fetch(hubs.plan(TINY))
    assert not left_over(cache)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be written to here")
def test_a_cache_that_cannot_be_written_to(cache: Path, hub: Hub) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(FetchError, match="Permission denied"):
        hubs.fetch(hubs.plan(TINY))


def test_the_command_asks_for_the_licence(
    cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "lab/tiny at 0123456789ab, Licence of the lab" in said and str(cache / "models--lab--tiny") in said
    for path in PATHS:
        assert f"{len(hub.files[path]):,}  {path}" in said
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert main(["fetch", "tiny"]) == 2  # nobody there to ask
    assert "run this again with --accept-licence" in capsys.readouterr().err
    for answer in ("n\n", "", "maybe\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        assert main(["fetch", "tiny"]) == 2
        assert "the licence was not accepted: nothing was fetched" in capsys.readouterr().err
    assert not hub.asked
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["fetch", "tiny"]) == 0
    assert "tiny: complete" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["fetch", "tiny"]) == 0  # nothing to take, nothing to ask
    assert "0 files, 0 bytes to fetch" in capsys.readouterr().out
    assert main(["fetch", "banana"]) == 2


def test_variants_are_listed(cache: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    def row() -> dict[str, Any]:
        assert main(["variants", "--json"]) == 0
        return {about["name"]: about for about in json.loads(capsys.readouterr().out)}["tiny"]

    assert row()["here"] == {} and set(row()["missing"]) == set(FILES) and row()["bytes"] == 6_000_000
    assert main(["variants"]) == 0
    said = capsys.readouterr().out
    assert re.search("flux1-schnell +33.89  no        Apache-2.0", said) and re.search("nano-dev +-  bundled", said)
    folder = hubs.fetch(hubs.plan(TINY))
    (folder / BIG).unlink()
    assert list(row()["missing"]) == ["t5"] and row()["here"]["clip"] == str(folder / "text_encoder")
    assert main(["variants"]) == 0
    said = capsys.readouterr().out
    assert "in part" in said and "missing   t5 (0.00 GB)" in said
    hubs.fetch(hubs.plan(TINY))
    assert row()["missing"] == {} and row()["licence"] == "Licence of the lab" and row()["gated"] is True


def test_half_the_shards_are_no_part(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(tmp_path))
    (tmp_path / "text_encoder_2").mkdir()
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "text_encoder_2" / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (tmp_path / "text_encoder_2" / "a.safetensors").touch()
    assert "t5" not in hubs.complete_parts(TINY)
    (tmp_path / "text_encoder_2" / "b.safetensors").touch()
    assert "t5" in hubs.complete_parts(TINY)


def test_the_environment_is_honoured(tmp_path: Path, hub: Hub) -> None:
    """HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE, in a process of its own."""
    hub.gated = True
    hub.repository = "black-forest-labs/FLUX.1-schnell"
    hub.files = {path: path.encode() for download in VARIANTS["flux1-schnell"].downloads for path in download.files}
    hub.large = {path for path in hub.files if path.endswith(".safetensors")}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HUB_CACHE": str(tmp_path / "mine")}
    command = [sys.executable, "-m", "miniflux", "fetch", "flux1-schnell"]
    environment["HF_HUB_OFFLINE"] = "0"
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "mine" / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / COMMIT
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(hub.files)


BYTES = {"transformer": 2, "autoencoder": 4, "clip": 2, "t5": 2, "lm": 2}  # of a number


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.downloads], ids=lambda v: v.name)
def test_the_registry_states_true_sizes(variant: Variant) -> None:
    """Parameters times bytes per number, and the files in which `find` looks for the part. Of a language model all of
    its layers are fetched, however many are read."""
    assert [download.part for download in variant.downloads] == list(needed(variant))
    for download in variant.downloads:
        assert {path.split("/")[0] for path in download.files} <= set(needed(variant)[download.part])
        if download.part in BYTES:
            config = getattr(variant, download.part)
            whole = replace(config, layers_read=None) if download.part == "lm" else config
            with torch.device("meta"):
                state = BY_CONFIG[type(config)].kind(whole).state_dict()
            wide = {True: BYTES[download.part], False: 8}  # floats, and the count of FLUX.2's autoencoder
            assert download.bytes == sum(t.numel() * wide[t.is_floating_point()] for t in state.values())

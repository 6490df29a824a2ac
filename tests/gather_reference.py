"""Brings reference data into `tests/data`: `python -m tests.gather_reference FOLDER`; with `--check` it only compares.

FOLDER has the layout of `tests/data`, nothing packed. Contents are taken byte for byte; key lists and tokenizer files
are packed with gzip. `SHA256SUMS` lists what the files hold, unpacked: `tests/test_reference.py` holds them to it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from pathlib import Path

from tests.reference import DATA, read

WANTED = ["*.json", "golden/*.safetensors", "manifests/*.json", "lora_dialects/*.json", "tokenizers/*/*"]
LEFT_OUT = {"tokenizers/openai_clip/bpe_simple_vocab_16e6.txt.gz"}  # the merges of clip_l/merges.txt in another form


def stored(name: str) -> Path:
    """Where a file of the reference lies: random weights do not compress, and people read the lists at the top."""
    plain = "/" not in name or name.startswith("golden/")
    return DATA / (name if plain else f"{name}.gz")


def sums() -> dict[str, str]:
    """Every file of the reference that is in `tests/data`, and the SHA-256 of what it holds."""
    lines = (DATA / "SHA256SUMS").read_text("utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def sums_now() -> dict[str, str]:
    """The same of what the files hold now."""
    return {name: hashlib.sha256(read(stored(name))).hexdigest() for name in sums()}


def sums_of(folder: Path) -> dict[str, str]:
    """The same of a folder that nothing is packed in."""
    found = {path.relative_to(folder).as_posix() for pattern in WANTED for path in folder.glob(pattern)}
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(found - LEFT_OUT)}


def gather(folder: Path) -> None:
    """Takes over what is wanted of a folder."""
    found = sums_of(folder)
    for name in found:
        data, target = (folder / name).read_bytes(), stored(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)
    lines = [f"{digest}  {name}\n" for name, digest in found.items()]
    (DATA / "SHA256SUMS").write_text("".join(lines), "utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that differ")
    arguments = parser.parse_args()
    if not arguments.check:
        gather(arguments.folder)
    elif parted := sorted(dict(sums().items() ^ sums_of(arguments.folder).items())):
        raise SystemExit("\n".join(["these differ:", *parted]))

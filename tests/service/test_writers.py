"""Language models that can write, told from headers; the page's tests have them write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from miniflux.errors import InputError
from miniflux.service.catalogue import Catalogue
from miniflux.service.writers import Writers
from tests.small_models import model


def test_what_can_write_is_listed(tmp_path: Path) -> None:
    """Text encoders of models, and language models by themselves; what is gone or not whole says so."""
    shelf = tmp_path / "shelf"
    model(shelf / "reads", "flux2-klein-4b", writes=False)
    alone = model(tmp_path / "whole", "flux2-dev")
    shutil.copytree(alone / "text_encoder", shelf / "deep" / "mistral")
    shutil.copy(alone / "tokenizer" / "tokenizer.json", shelf / "deep" / "mistral")
    catalogue = Catalogue(folder=shelf)
    assert catalogue.scan()
    writers = Writers(catalogue, device="cpu")
    found, unable = writers.listed()
    assert found == {"mistral": shelf / "deep" / "mistral"}
    ((name, reason),) = unable.items()
    assert name.startswith("text encoder of flux-2-klein-4b") and "12 missing, such as" in reason
    (shelf / "deep" / "mistral" / "tokenizer.json").unlink()
    assert writers.listed()[0] == {} and "a tokenizer" in writers.listed()[1]["mistral"]
    with pytest.raises(InputError, match="language model 'mistral' is not here; there are none"):
        writers.write("mistral", "a cat", None)


def test_a_short_answer(tmp_path: Path) -> None:
    whole = model(tmp_path / "shelf" / "whole", "flux2-dev")
    catalogue = Catalogue(folder=tmp_path / "shelf")
    catalogue.scan()
    writers = Writers(catalogue, device="cpu")
    ((name, place),) = writers.listed()[0].items()
    assert place == whole / "text_encoder"
    with pytest.warns(UserWarning, match="cut off after 4"):
        written = writers.write(name, "a cat", "Say more.", 0.5, max_new_tokens=4)
    assert (written.prompt, written.model, written.temperature) == ("a cat", name, 0.5)

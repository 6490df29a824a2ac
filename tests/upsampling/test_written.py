"""What is kept of a prompt that a language model wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from miniflux.settings.record import UPSAMPLED
from miniflux.upsampling import Upsampler, Written, load_upsampler, write
from miniflux.upsampling.rewriting import SYSTEM
from tests.small_models import model

pytestmark = pytest.mark.filterwarnings("ignore:the answer was cut off")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Upsampler:
    return load_upsampler(model(tmp_path_factory.mktemp("dev") / "m", "flux2-dev") / "text_encoder", device="cpu")


def test_all_that_made_it_is_kept(mistral: Upsampler, tmp_path: Path) -> None:
    """By default the release's temperature and words of ours; what is kept makes the text again."""
    written = write(mistral, "a cat", "text_encoder", seed=3, max_new_tokens=20)
    assert written.temperature == 0.15 and written.system == hashlib.sha256(SYSTEM.encode()).hexdigest()
    options = {"temperature": written.temperature, "seed": written.seed, "max_new_tokens": written.max_new_tokens}
    assert written.text == mistral.rewrite("a cat", system=SYSTEM, **options)
    told = tmp_path / "told.txt"
    told.write_text("Say more.\n")
    other = write(mistral, "a cat", "x", system=told, temperature=0, max_new_tokens=20)
    assert other.system == hashlib.sha256(b"Say more.").hexdigest() and other.text != written.text
    assert write(mistral, "a cat", "x", system=None, max_new_tokens=20).system is None


def test_settings_know_the_names() -> None:
    written = Written("long", "short", "lm", None, 0.0, 0, 512)
    assert tuple(written.described()) == UPSAMPLED

"""Messages for people elsewhere."""

from __future__ import annotations

import pytest

from miniflux.checks import without_folders


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("LoRA /srv/loras/x.safetensors: damaged", "LoRA x.safetensors: damaged"),
        ("'/srv/a.b/c-d/x y': no such file", "'x y': no such file"),
        (r"C:\models\x.gguf: damaged", "x.gguf: damaged"),
        ("https://host/folder/picture.png: no picture", "https://host/folder/picture.png: no picture"),
        ("width must be 16/32/64, got 3", "width must be 16/32/64, got 3"),
        ("text_encoder/model.safetensors is missing", "text_encoder/model.safetensors is missing"),
    ],
)
def test_only_the_last_name_of_a_path_is_told(text: str, told: str) -> None:
    assert without_folders(text) == told

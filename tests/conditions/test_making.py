"""Edges and depth maps made here: what OpenCV and transformers find, at the size that is drawn; or refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from miniflux.conditions.making import canny, depth
from miniflux.errors import InputError, MissingExtraError


def test_edges() -> None:
    """A white box has an edge of one pixel all around, and none inside."""
    picture = Image.new("RGB", (96, 64))
    ImageDraw.Draw(picture).rectangle((20, 16, 59, 47), fill="white")
    found = np.asarray(canny(picture))
    assert found.shape == (64, 96, 3) and set(np.unique(found)) == {0, 255}
    ys, xs = np.nonzero(found[..., 0])
    assert (xs.min() in (19, 20), xs.max() in (59, 60), ys.min() in (15, 16), ys.max() in (47, 48)) == (True,) * 4
    assert not found[24:40, 30:50].any()
    assert canny(picture, size=(48, 32)).size == (48, 32)
    assert not np.asarray(canny(Image.new("RGB", (32, 32), "red"))).any()
    with pytest.raises(InputError, match="low must be"):
        canny(picture, low=-1)


def test_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a tiny random estimator in a folder: the same numbers as by hand."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 42}
    backbone = transformers.Dinov2Config(**sizes, out_indices=[1, 2], apply_layernorm=True, reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=24, reassemble_factors=[2, 1], neck_hidden_sizes=[8, 12],
        fusion_hidden_size=8, head_hidden_size=4, patch_size=14,
    )  # fmt: skip
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    transformers.DPTImageProcessor(size={"height": 42, "width": 42}, ensure_multiple_of=14).save_pretrained(tmp_path)
    estimator = transformers.DepthAnythingForDepthEstimation.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.uniform_(0.0, 0.3, generator=generator)  # positive, so that no ReLU ends in zeros
        depths = estimator(torch.randn(1, 3, 42, 42, generator=generator)).predicted_depth
        last = estimator.head.conv3
        last.weight *= 200 / (depths.max() - depths.min())  # so that they spread over the greys
        last.bias.zero_()
    estimator.save_pretrained(tmp_path)
    photo = Image.effect_noise((50, 40), 80).convert("RGB")
    found = np.asarray(depth(photo, tmp_path, size=(64, 48)))
    seen = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        photo.resize((64, 48), Image.Resampling.LANCZOS), return_tensors="pt"
    )
    with torch.no_grad():
        told = estimator(**seen).predicted_depth[:, None]
    told = torch.nn.functional.interpolate(told, (48, 64), mode="bicubic", antialias=True)[0, 0]
    expected = told.clamp(0, 255).round().byte().numpy()
    assert len(np.unique(expected)) > 20 and all(np.array_equal(found[..., channel], expected) for channel in range(3))
    assert ("those above 255 are all white" in caplog.text) == (float(told.max()) > 255)
    with pytest.raises(InputError, match="no folder of a depth estimator"):
        depth(Image.new("RGB", (8, 8)), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no depth estimator"):
        depth(Image.new("RGB", (8, 8)), tmp_path / "empty")


@pytest.mark.parametrize(("module", "extra"), [("cv2", "edges"), ("transformers", "depth")])
def test_without_the_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'miniflux\[{extra}\]'"):
        canny(Image.new("RGB", (8, 8))) if extra == "edges" else depth(Image.new("RGB", (8, 8)), tmp_path)

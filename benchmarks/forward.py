"""One forward pass of the transformer against diffusers', same weights and inputs, taking turns in one process."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from timing import median_times

from miniflux.checkpoints import to_layout
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.sampling import image_ids, text_ids


@torch.inference_mode()
def main() -> None:
    print(f"{'hidden':>6} {'tokens':>6} {'miniflux ms':>12} {'diffusers ms':>13} {'ratio':>6}")
    for hidden, side in ((192, 8), (512, 16), (1024, 16)):
        heads = hidden // 64 if hidden > 192 else 6
        head = hidden // heads
        axes = (head // 8 * 2, head // 8 * 3, head // 8 * 3)
        config = Flux1Config(
            in_channels=64,
            out_channels=64,
            vec_in_dim=64,
            context_in_dim=128,
            hidden_size=hidden,
            num_heads=heads,
            depth=2,
            depth_single_blocks=4,
            axes_dim=axes,
            guidance_embed=True,
        )
        ours = Flux1(config).eval()
        theirs = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=axes,
        ).eval()
        theirs.load_state_dict(to_layout(ours, ours.state_dict(), "diffusers"))
        img, txt, vec = torch.randn(1, side * side, 64), torch.randn(1, 64, 128), torch.randn(1, 64)
        ids, sigma, strength = image_ids(1, side, side), torch.tensor([0.5]), torch.tensor([3.5])

        def mine() -> torch.Tensor:
            return ours(img, ids, txt, text_ids(1, 64), sigma, vec, strength)  # noqa: B023

        def peer() -> torch.Tensor:
            return theirs(img, txt, vec, sigma, ids[0], text_ids(1, 64)[0], strength, return_dict=False)[0]  # noqa: B023

        assert (mine() - peer()).abs().max() < 1e-4
        a, b = median_times(mine, peer)
        print(f"{hidden:6d} {side * side + 64:6d} {1000 * a:12.1f} {1000 * b:13.1f} {a / b:6.2f}")


if __name__ == "__main__":
    main()

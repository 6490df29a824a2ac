"""Tables of numbers that were measured on a model: latents as colours for previews, and how much a step changes."""

from __future__ import annotations

# What each latent channel of the official autoencoder adds to red, green and blue, and a constant
# (`latent_rgb_factors` and `latent_rgb_factors_bias` of the class Flux in ComfyUI's `comfy/latent_formats.py`).
FLUX1_PREVIEW = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)
# What each latent channel of nano's autoencoder adds to red, green and blue, and a constant (`nano/recipe/preview.py`).
NANO_PREVIEW = (
    (-0.1242, 0.0709, -0.0025),
    (0.0204, -0.0566, 0.0165),
    (0.2632, 0.2502, -0.0776),
    (-0.0076, -0.0632, -0.0623),
    (-0.0067, -0.0433, -0.0411),
    (0.0060, -0.1541, -0.1257),
    (0.2028, -0.1698, -0.0174),
    (-0.0051, -0.0860, -0.3967),
    (-0.0089, -0.0733, -0.0346),
    (0.0733, -0.0417, 0.0309),
    (-0.1130, 0.1249, 0.1197),
    (-0.0112, 0.0084, 0.0089),
    (-0.0150, 0.0491, 0.0536),
    (0.0014, 0.0046, -0.0190),
    (-0.0456, -0.0449, -0.0016),
    (-0.0111, -0.0484, -0.0588),
    (0.0915, 0.0095, -0.0754),
)

# By how much what the blocks add to the image tokens grows from each of 28 steps to the next (the authors of MagCache,
# arXiv 2506.09045, by way of diffusers' `hooks/mag_cache.py`).
FLUX1_MAG_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)
# The same for nano-dev: the mean of six prompts (the cache `measure`, 28 steps).
NANO_MAG_RATIOS = (
    *(1.0, 0.9646, 1.016, 0.9937, 0.9742, 0.9719, 0.9668, 0.9708, 0.9846, 0.9749, 0.9687, 0.9626, 0.9683, 0.9428),
    *(0.9345, 0.9602, 0.948, 0.9138, 0.9513, 0.915, 0.9201, 0.9072, 0.8415, 0.8434, 0.8292, 0.8095, 0.725, 0.8497),
)

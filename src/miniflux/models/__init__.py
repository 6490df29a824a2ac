"""The networks. Torch and einops only; attribute names are the keys of the official checkpoints."""

"""Training: what the nano models, and later adapters, are made with."""

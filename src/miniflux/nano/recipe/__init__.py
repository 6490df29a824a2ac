"""How the nano models were made: tokenizers, autoencoder, teacher, guidance distillation, step distillation."""

"""Where two networks part: both on the same input, block by block."""

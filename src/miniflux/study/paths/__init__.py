"""The way from noise to a picture: what steps and blocks point to, and how straight it is."""

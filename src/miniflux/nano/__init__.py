"""The bundled nano models: their files in the official layouts, and the recipe that made them."""

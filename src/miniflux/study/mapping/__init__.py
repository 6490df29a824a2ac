"""Maps: where words, patches and concepts are in a picture, drawn and scored."""

"""From prompts to embeddings: tokenizers, the two encoders at work, the prompt cache."""

from miniflux.text.encoding import Padding, Text, TextEmbedding, check_padding
from miniflux.text.tokenizers import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = [
    "Padding",
    "Text",
    "TextEmbedding",
    "TextTokenizer",
    "check_padding",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
]

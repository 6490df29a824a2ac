"""From prompts to embeddings: tokenizers, the two encoders at work, the prompt cache."""

from miniflux.text.encoding import Padding, Text, TextEmbedding
from miniflux.text.tokenizers import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = ["Padding", "Text", "TextEmbedding", "TextTokenizer", "load_clip_tokenizer", "load_t5_tokenizer"]

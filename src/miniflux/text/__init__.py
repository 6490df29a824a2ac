"""From prompts to embeddings: tokenizers, text encoders at work, the prompt cache."""

from miniflux.text.chat import ChatForm, ChatText, ChatTokenizer, load_chat_tokenizer
from miniflux.text.encoding import Padding, Text, TextEmbedding, TextReader, check_padding
from miniflux.text.tokenizers import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = [
    "ChatForm",
    "ChatText",
    "ChatTokenizer",
    "Padding",
    "Text",
    "TextEmbedding",
    "TextReader",
    "TextTokenizer",
    "check_padding",
    "load_chat_tokenizer",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
]

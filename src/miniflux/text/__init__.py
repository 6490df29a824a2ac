"""From prompts to embeddings: tokenizers, text encoders at work, the prompt cache."""

from miniflux.text.boxes import Layout, Row
from miniflux.text.chat import ChatForm, ChatText, ChatTokenizer, load_chat_tokenizer
from miniflux.text.encoding import Padding, Text, TextEmbedding, TextReader, check_padding
from miniflux.text.tokenizers import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer
from miniflux.text.upsampling import Upsampler

__all__ = [
    "ChatForm",
    "ChatText",
    "ChatTokenizer",
    "Layout",
    "Padding",
    "Row",
    "Text",
    "TextEmbedding",
    "TextReader",
    "TextTokenizer",
    "Upsampler",
    "check_padding",
    "load_chat_tokenizer",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
]

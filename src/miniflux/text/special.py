"""The special tokens of both tokenizers, in a file that imports nothing, since whoever writes tokenizers needs them."""

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"

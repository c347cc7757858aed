"""Lossless tokenizers in the `tokenizer.json` format of Hugging Face `tokenizers`."""

"""The embedded demo model: a small chat model that serves when no other base is named."""

from pathlib import Path


def path() -> Path:
    """The Hugging Face folder of the embedded model: config, tokenizer, weights."""
    return Path(__file__).resolve().parent / "weights"

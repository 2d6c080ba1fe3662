"""A small trained model and its corpus, inside the package: enough to try everything without a network."""

from pathlib import Path

from eckart.data.builtin.corpus import builtin_texts

__all__ = ["builtin_model_path", "builtin_texts"]


def builtin_model_path() -> Path:
    """The folder of the built-in checkpoint, as `AutoModelForCausalLM.from_pretrained` takes it.

    A Llama of 4.5 million parameters (grouped queries, tied embeddings, windows of up to 1024 tokens), stored
    in float16: pass `dtype=torch.float32` to compute in more.
    """
    return Path(__file__).parent / "model"

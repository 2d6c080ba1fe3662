"""What is not served in a form is refused by name, whether or not the packages for that form are installed."""

from __future__ import annotations

import pytest

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.families import UnsupportedModelError
from eckart.serving.onnx_graph import signature_of
from tiny import ENCODER_DECODER_CONFIGS, MIXTURE_CONFIGS, tiny_model


@pytest.mark.parametrize("model_type", [*ENCODER_DECODER_CONFIGS, "whisper"])
def test_onnx_refuses_encoder_decoders(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder models are not exported to ONNX"):
        signature_of(tiny_model(model_type))


@pytest.mark.parametrize("model_type", MIXTURE_CONFIGS)
def test_onnx_refuses_experts_that_are_open(model_type: str) -> None:
    model = tiny_model(model_type)
    compress(model, "svd", plan(model, 0.6, include=["experts"]))
    with pytest.raises(UnsupportedModelError, match="is a mixture of experts"):
        signature_of(model)

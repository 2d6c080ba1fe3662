"""Plain weights: the ordinary numbers of weights that are stored in few bits."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from eckart.models.families import UnsupportedModelError
from eckart.models.refusals import quantised_by
from eckart.models.registration import QUANT_METHOD


def numbers_of(weight: Tensor) -> Tensor:
    """A weight as ordinary numbers.

    Raises:
        NotImplementedError, AttributeError, RuntimeError: as a tensor in few bits that does not give them back here.
    """
    return weight.dequantize().detach() if is_traceable_wrapper_subclass(weight) else weight.detach()


def multiply_out(model: PreTrainedModel, path: str | Path) -> None:
    """Make a model of torchao's a plain one, in place and in its type; any other that is not quantised stays.

    Args:
        path: names it in the message.

    Raises:
        UnsupportedModelError: it is quantised by another package.
    """
    method = quantised_by(model.config)
    if method is None or method == QUANT_METHOD:
        return
    if method != "torchao":
        raise UnsupportedModelError(
            f"{path} is quantised by {method}: what is added to its weights would be rounded away. Put the adapter on "
            "it with PEFT, and measure that"
        )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_traceable_wrapper_subclass(parameter):
                setattr(module, name, nn.Parameter(numbers_of(parameter).to(model.dtype), requires_grad=False))
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)

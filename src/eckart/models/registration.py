"""Registration: stock `from_pretrained` and `from_config` find what reads our checkpoints.

Importing this imports neither torch nor transformers, so that `import eckart` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import wrapt

from eckart.support.quiet import TORCHAO, quiet

# transformers' name of a kind of stored weights, in `quantization_config` of config.json.
QUANT_METHOD = "eckart"
READERS = "eckart.models.checkpoint"


def register() -> None:
    """Enter our checkpoints into transformers' tables and auto classes: at once where it has imported them, otherwise
    when it does.

    The entries are proxies, which import their class when the first compressed checkpoint is loaded. To import it with
    the tables would be a circle: much of eckart is in the middle of its own import then, and so is transformers.
    """
    hushed = ExitStack()
    # Where torchao is installed, transformers imports it with these tables.
    hushed.enter_context(quiet(*TORCHAO))

    @wrapt.when_imported("transformers.quantizers.auto")
    def enter(tables: ModuleType) -> None:
        hushed.close()
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = wrapt.lazy_import(READERS, "LowRankConfig")
        tables.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = wrapt.lazy_import(READERS, "LowRankQuantizer")

    @wrapt.when_imported("transformers.models.auto.modeling_auto")
    def build(classes: ModuleType) -> None:
        # A model of a configuration alone is built without a look at `quantization_config`, and would be dense.
        for auto in [each for each in vars(classes).values() if isinstance(each, type)]:
            if "from_config" in vars(auto):
                wrapt.wrap_function_wrapper(auto, "from_config", _build_as_described)


def _build_as_described(build: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an auto class's `from_config` gives, with low-rank linears where the configuration describes some."""
    model = build(*args, **kwargs)
    section = getattr(model.config, "quantization_config", None)
    method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", None)
    if method != QUANT_METHOD:
        return model
    from eckart.models.checkpoint import build_as_described  # not above: it imports torch and transformers

    return build_as_described(model)

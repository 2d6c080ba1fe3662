"""Registration: stock `from_pretrained` finds what reads our checkpoints. Importing this imports neither torch nor
transformers, so that `import eckart` is quick."""

from __future__ import annotations

from contextlib import ExitStack
from types import ModuleType

import wrapt

from eckart.support.quiet import TORCHAO, quiet

# transformers' name of a kind of stored weights, in `quantization_config` of config.json.
QUANT_METHOD = "eckart"
READERS = "eckart.models.checkpoint"


def register() -> None:
    """Enter our checkpoints into transformers' tables: at once where it has imported them, otherwise when it does.

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

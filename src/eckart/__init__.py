"""eckart: low-rank compression of Hugging Face language models.

    recipe = eckart.parse_recipe({"model": "DIR", "keep": 0.7})            # method best: everything that helps
    eckart.make_checkpoint(recipe, Path("out"), eckart.How())

    plan = eckart.plan(model, keep=0.7)                                    # or one method, step by step
    stats = eckart.calibrate(model, tokens, eckart.build_method("nsvd-i"))
    eckart.compress(model, "nsvd-i", plan, stats)                          # in place
    eckart.save(model, "out/", tokenizer)

Importing it also teaches stock `from_pretrained` to read compressed checkpoints. It touches no GPU and no network, and
it is quick: a name, they stand in `__init__.pyi`, is imported when it is used, and torch and transformers with it.
"""

import lazy_loader

from eckart.models.registration import register as _register

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_register()

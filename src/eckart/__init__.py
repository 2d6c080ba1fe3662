"""eckart: low-rank compression of Hugging Face language models.

    plan = eckart.plan(model, keep=0.7)
    stats = eckart.calibrate(model, tokens, eckart.build_method("nsvd-i"))
    eckart.compress(model, "nsvd-i", plan, stats)
    eckart.save(model, "out/", tokenizer)

Importing it also teaches stock `from_pretrained` to read compressed checkpoints. It touches no GPU and no network.
"""

"""`eckart export`: a compressed checkpoint, a GGUF file or an adapter in a form that needs no eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import Dtype, Force, TrustRemoteCode
from eckart.cli.terminal import console, megabytes
from eckart.models.dense import export_dense
from eckart.models.loading import load_model, load_tokenizer, plain_folder, save
from eckart.models.sites import low_rank_modules
from eckart.support.files import check_replaceable, claimed
from eckart.support.sizes import num_bytes, num_params


def command(
    model: Annotated[
        Path,
        typer.Argument(help="A compressed checkpoint, a .gguf file, or an adapter's directory"),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the exported model")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors back: an ordinary model of full size")
    ] = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Write a model as an ordinary checkpoint. --dense is for people and programs without eckart."""
    if not dense:
        raise ValueError("say which form: --dense multiplies the factors back into an ordinary model")
    check_replaceable(out, force=force, reads=[model])
    with claimed(out):
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        if not low_rank_modules(loaded) and plain_folder(model) is not None:
            raise ValueError(f"{model} holds no low-rank linear: it is dense already")
        save(export_dense(loaded), out, load_tokenizer(model, trust_remote_code=trust_remote_code), force=force)
    console.print(f"{out}: {num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))}, loads without eckart")

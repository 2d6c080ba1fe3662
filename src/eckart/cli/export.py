"""`eckart export`: a compressed checkpoint in a form that needs no eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import Force, TrustRemoteCode
from eckart.cli.terminal import console, megabytes
from eckart.models.dense import export_dense
from eckart.models.loading import load_model, load_tokenizer, save
from eckart.models.sites import low_rank_modules
from eckart.support.files import check_replaceable, claimed
from eckart.support.sizes import num_bytes, num_params


def command(
    model: Annotated[Path, typer.Argument(help="A compressed checkpoint")],
    out: Annotated[Path, typer.Argument(help="Directory for the exported model")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors back: an ordinary model of full size")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Write a compressed model in another form. --dense is for people and programs without eckart."""
    if not dense:
        raise ValueError("say which form: --dense multiplies the factors back into an ordinary model")
    check_replaceable(out, force=force, reads=[model])
    with claimed(out):
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        if not low_rank_modules(loaded):
            raise ValueError(f"{model} holds no low-rank linear: it is dense already")
        save(export_dense(loaded), out, load_tokenizer(model, trust_remote_code=trust_remote_code), force=force)
    console.print(f"{out}: {num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))}, loads without eckart")

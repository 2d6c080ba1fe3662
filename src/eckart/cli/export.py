"""`eckart export`: a compressed checkpoint, a GGUF file or an adapter in a form that needs no eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from eckart.cli.options import Dtype, Force, RemoteCode, TrustRemoteCode
from eckart.cli.terminal import console, megabytes
from eckart.models.dense import export_dense
from eckart.models.loading import load_model, load_tokenizer, plain_folder, read_processor, save
from eckart.models.remote_code import FILE
from eckart.models.sites import low_rank_modules
from eckart.runs.card import REMOTE_CODE
from eckart.runs.facts import FACTS
from eckart.serving.onnx import export_onnx
from eckart.support.files import check_replaceable, claimed
from eckart.support.sizes import num_bytes, num_params

CARD = "README.md"
# What comes with a compressed model besides its weights and its tokenizer.
COMPANIONS = (CARD, "plan.json", "recipe.yaml", "allocation.json", FACTS)


def command(
    model: Annotated[
        Path,
        typer.Argument(help="A compressed checkpoint, a .gguf file, or an adapter's directory"),
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the exported model")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors back: an ordinary model of full size")
    ] = False,
    remote_code: RemoteCode = False,
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="For ONNX Runtime, dense or not: with a cache, factors as two products"),
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="With --onnx: weights in 8 bits, factors too")] = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Write a model for programs without eckart: an ordinary checkpoint, one with code that loads it, or ONNX."""
    if dense + remote_code + onnx != 1:
        raise ValueError(
            "say which form, one of them: --dense multiplies the factors back into an ordinary model; --remote-code "
            "keeps them, with code that trust_remote_code=True runs; --onnx writes a graph for ONNX Runtime"
        )
    if int8 and not onnx:
        raise ValueError("--int8 is for --onnx")
    check_replaceable(out, force=force, reads=[model])
    with claimed(out):
        if onnx:
            _write_onnx(model, out, int8=int8, dtype=dtype, trust_remote_code=trust_remote_code, force=force)
            return
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        if remote_code:
            _save_with_code(loaded, out, model, trust_remote_code=trust_remote_code, force=force)
            return
        if not low_rank_modules(loaded) and plain_folder(model) is not None:
            raise ValueError(f"{model} holds no low-rank linear: it is dense already")
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        save(export_dense(loaded), out, tokenizer, files=read_processor(loaded), force=force)
    console.print(f"{out}: {num_params(loaded):,} parameters, {megabytes(num_bytes(loaded))}, loads without eckart")


def _save_with_code(model: PreTrainedModel, out: Path, source: Path, *, trust_remote_code: bool, force: bool) -> None:
    """Write a compressed model, what came with it, and code that loads it."""
    texts = {name: (source / name).read_text(encoding="utf-8") for name in COMPANIONS if (source / name).is_file()}
    if CARD in texts and REMOTE_CODE not in texts[CARD]:
        texts[CARD] += f"\n## Loading it without eckart\n\n{REMOTE_CODE}\n"
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    save(model, out, tokenizer, files=texts, remote_code=True, force=force)
    console.print(f"{out}: loads without eckart by trust_remote_code=True, which runs {FILE} in it")


def _write_onnx(model: Path, out: Path, *, int8: bool, dtype: str, trust_remote_code: bool, force: bool) -> None:
    """Write the graph, and say what it is; `auto` is float32, what ONNX Runtime computes in on a processor."""
    loaded = load_model(model, dtype="float32" if dtype == "auto" else dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    written = export_onnx(loaded, out, tokenizer, int8=int8, force=force)
    if written.multiplied_out:
        console.print(
            f"{written.multiplied_out} linears of few bits became numbers in {'8 bits' if int8 else 'full'}: ONNX "
            "Runtime has no products of such codes"
        )
    if int8:
        console.print(f"logits on random tokens differ by up to {written.difference:.0%} of the largest: measure it")
    cache = "with a cache of keys and values" if written.cached else "one pass, without a cache"
    console.print(f"{out}: {megabytes(written.num_bytes)}, {cache}, runs in ONNX Runtime without eckart")

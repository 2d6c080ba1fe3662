"""`eckart finetune`: a model and labelled texts to a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import Data, Device, Force, TrustRemoteCode
from eckart.cli.terminal import TerminalTrack, console, number, table
from eckart.compression.tuning.finetuning import FineTuning, fine_tune
from eckart.support.files import GRADIENTS


def command(
    model: Annotated[str, typer.Argument(help="An encoder or a decoder: Hugging Face directory, hub name, or builtin")],
    out: Annotated[Path, typer.Argument(help="Directory for the fine-tuned checkpoint")],
    task: Annotated[str, typer.Option(help="cola, sst2, a .jsonl, .csv or .tsv file, or a hub data set")],
    epochs: Annotated[int, typer.Option(help="Passes over the rows")] = FineTuning.epochs,
    batch: Annotated[int, typer.Option(help="Rows in a step")] = FineTuning.batch,
    rate: Annotated[float, typer.Option(help="AdamW's largest learning rate")] = FineTuning.rate,
    warm_up: Annotated[float, typer.Option(help="Share of the steps in which it rises")] = FineTuning.warm_up,
    weight_decay: Annotated[float, typer.Option(help="AdamW's")] = FineTuning.weight_decay,
    seed: Annotated[int, typer.Option(help="Of the new head, the order and dropout")] = FineTuning.seed,
    limit: Annotated[int | None, typer.Option(help="Rows at most, drawn at random")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text read at most; default the model's limit")] = None,
    data: Data = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Fine-tune a model into a classifier, and record its squared gradients for FWSVD on the way.

    A killed run goes on after its last whole epoch when it is started again.

    \b
    eckart finetune MODEL OUT --task cola --data DIR
    eckart compress OUT SMALL --method fwsvd --fisher recorded --keep 0.5 --include intermediate.dense
    eckart eval SMALL --task classification:cola --data DIR
    """
    settings = FineTuning(task, epochs, batch, rate, warm_up, weight_decay, seed, limit, length)
    facts = fine_tune(
        model,
        out,
        settings,
        data=data,
        device=device,
        force=force,
        trust_remote_code=trust_remote_code,
        track=TerminalTrack(console),
    )
    rows = [[f"loss, epoch {epoch}", number(loss)] for epoch, loss in enumerate(facts["losses"], 1)]
    dev = facts["dev"]
    if dev is not None:
        rows += [[f"{name}, {dev['n']:,} dev rows", number(dev[name])] for name in ("mcc", "accuracy", "f1")]
    title = f"{out}: {facts['rows']:,} rows of {task}, {facts['steps']:,} steps, {facts['seconds']:.0f} s"
    console.print(table(title, ["", "value"], rows))
    console.print(f"{out / GRADIENTS}: squared gradients of every step")

"""Corrections of a quantised model: what is left of the loss of int4 or int8 beside a LoRA adapter of ours, by rank.

    python benchmarks/corrections.py --model smollm2 --data DIR [--ranks 8 16] [--methods asvd-i kfac]
        [--orders one-shot anchored] [--allocations uniform global] [--out runs/corrections.jsonl]

The model is quantised by torchao (int4: groups along the inputs, codes with a zero point, as eckart's baseline `int4`),
saved as transformers saves it, corrected by what `eckart correct` runs, and loaded through PEFT over the quantised
checkpoint. Printed are nats a token over the dense model, with standard errors over windows, on the calibration's
corpus and others, and what the adapter adds. Rows are appended to --out as they come, and what is there is not computed
again. All runs in float32: half precision is slow on a processor without units for it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from losing import Texts, spread
from measuring import append_line, read_lines
from real_models import add_model_option
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from torchao.quantization.quant_primitives import MappingType
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import eckart
from eckart.models.loading import locate
from eckart.models.quantised import load_quantised
from eckart.runs.correction import make_correction, parse_correction
from eckart.runs.how import How

TYPES = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]  # no stub has int4


def write_quantised(model: str, bits: int, group: int, folder: Path) -> None:
    """The model's checkpoint with weights of `bits` in groups."""
    scheme = IntxWeightOnlyConfig(TYPES[bits], PerGroup(group), MappingType.ASYMMETRIC)
    settings = TorchAoConfig(quant_type=scheme)
    AutoModelForCausalLM.from_pretrained(
        locate(model), dtype=torch.float32, quantization_config=settings
    ).save_pretrained(folder)
    eckart.load_tokenizer(model).save_pretrained(folder)


class Comparison:
    """One quantised model, the texts, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace, quantised: Path) -> None:
        self.arguments, self.quantised = arguments, quantised
        self.rows: list[dict[str, Any]] = read_lines(arguments.out)
        self.texts = Texts(
            eckart.load_model(arguments.model, dtype="float32"),
            eckart.load_tokenizer(arguments.model),
            arguments.texts,
            arguments.data,
            windows=arguments.windows,
            length=arguments.length,
        )

    def run(self) -> None:
        given = self.arguments
        columns = ["", *self.texts.rows, "added to a weight, in all, time"]
        print("| " + " | ".join(columns) + " |\n" + "|" + "---|" * len(columns), flush=True)
        self.row(["none"])
        variants = itertools.product(given.ranks, given.methods, given.orders, given.allocations)
        for rank, method, order, allocation in variants:
            self.row([rank, method, order, allocation])

    def key(self, variant: list[Any]) -> list[Any]:
        """What a row is of."""
        given = self.arguments
        setting = [str(given.model), given.bits, given.group, given.calibration, given.samples, given.length]
        return [*setting, given.windows, "+".join(self.texts.rows), *variant]

    def row(self, variant: list[Any]) -> None:
        """The row of a variant: [rank, method, order, allocation], or ["none"] for the quantised model alone."""
        given, key = self.arguments, self.key(variant)
        row = next((row for row in self.rows if row["key"] == key), None)
        if row is None:
            with TemporaryDirectory() as folder:
                model, facts = load_quantised(self.quantised).model, dict[str, Any]()
                if variant != ["none"]:
                    model, facts = self.corrected(model, variant, Path(folder) / "adapter")
                row = {"key": key, **facts, **self.texts.compare(model)}
            self.rows.append(row)
            append_line(given.out, row)
        cells = [spread(row["nats"][corpus]) for corpus in self.texts.rows]
        added = f"{row['bits']:.3f} bits, {row['bytes']:,} bytes, {row['seconds']:.0f} s" if "bits" in row else ""
        print("| " + " | ".join([", ".join(map(str, variant)), *cells, added]) + " |", flush=True)

    def corrected(
        self, model: PreTrainedModel, variant: list[Any], out: Path
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The quantised model with its adapter, and what that adds."""
        given, start = self.arguments, time.perf_counter()
        rank, method, order, allocation = variant
        calibration = {"corpus": given.calibration, "samples": given.samples, "length": given.length}
        recipe = {
            "quantised": str(self.quantised),
            "model": str(given.model),
            "rank": rank,
            "method": method,
            "order": order,
            "allocation": allocation,
            "calibration": calibration,
        }
        outcome = make_correction(parse_correction(recipe), out, How(cache=given.cache, data=given.data))
        facts = {
            "bits": outcome.correction.bits_a_weight,
            "bytes": outcome.file_bytes,
            "seconds": time.perf_counter() - start,
        }
        return peft.PeftModel.from_pretrained(model, str(out)).eval(), facts  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--data", type=Path, help="folder with local copies of corpora")
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "c4", "cmrc2018"])
    parser.add_argument("--calibration", default="wikitext2", help="text or mixture")
    parser.add_argument("--bits", type=int, choices=TYPES, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--methods", nargs="+", default=["asvd-i"])
    parser.add_argument("--orders", nargs="+", default=["one-shot", "anchored"])
    parser.add_argument("--allocations", nargs="+", default=["uniform"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="windows read of each corpus")
    parser.add_argument("--cache", type=Path, help="folder for moments, shared by the variants")
    parser.add_argument("--out", type=Path, help="JSON lines; a stopped run goes on from it")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        quantised = Path(folder) / "quantised"
        write_quantised(str(arguments.model), arguments.bits, arguments.group, quantised)
        Comparison(arguments, quantised).run()


if __name__ == "__main__":
    main()

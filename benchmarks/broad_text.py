"""A broad calibration text out of local corpora that have no train split, disjoint from what benchmarks evaluate on.

    quality.py bytes --calibration "$(python benchmarks/broad_text.py --data DATA --out runs/broad)" ...

Evaluations read the first windows of a test split. Of corpora that have nothing else, the second half of the rows is
written to --out as a file each, and the mixture of those files with WikiText-2 train, instructions, stories and code is
printed, as a name that every `--corpus` and `--calibration` takes. Its weights add up to 32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eckart.data.corpora import read_text
from eckart.support.files import write_whole

# {corpus with a test split alone: its weight}; the second half of its rows is for calibration.
HALVED = {"c4": 8, "cmrc2018": 4, "japanese": 4, "tinystories": 2}
# What nothing evaluates.
WHOLE = {"wikitext2": 8, "builtin/code": 2}
INSTRUCTIONS, WEIGHT = Path("alpaca") / "seed_tasks.jsonl", 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with local copies")
    parser.add_argument("--out", type=Path, required=True, help="folder for the halves")
    arguments = parser.parse_args()
    terms = {**WHOLE, str(arguments.data / INSTRUCTIONS): WEIGHT}
    for name, weight in HALVED.items():
        documents = read_text(name, split="test", data=arguments.data).documents
        file = arguments.out / f"{name}.jsonl"
        rows = [json.dumps({"text": document}, ensure_ascii=False) for document in documents[len(documents) // 2 :]]
        write_whole(file, "\n".join(rows) + "\n")
        terms[str(file)] = weight
    print("+".join(f"{name}*{weight}" for name, weight in terms.items()))


if __name__ == "__main__":
    main()

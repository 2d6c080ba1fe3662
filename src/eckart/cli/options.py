"""Options that several commands share, each written once, and the run settings that they make up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eckart.cli.terminal import TerminalTrack, console, print_line
from eckart.runs.engine.choose import DEFAULT, describe_engines, open_engine
from eckart.support.files import claimed

if TYPE_CHECKING:
    from eckart.runs.how import How

# The model, and how it is loaded
NAMES = "a Hugging Face directory, a hub name, a .gguf file, an adapter's directory, or builtin"
AnyModel = Annotated[str, typer.Argument(help=f"Dense or compressed: {NAMES}")]
DenseModel = Annotated[str, typer.Argument(help=f"Dense: {NAMES}")]
Dtype = Annotated[str, typer.Option(help="auto (as stored; quantised GGUF: float32), float32, bfloat16, float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a model's files; read it before")
]
RemoteCode = Annotated[
    bool,
    typer.Option("--remote-code", help="The checkpoint carries code: trust_remote_code=True loads it without eckart"),
]

# Its linears, and their ranks
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", help="Setting of the method, NAME=VALUE (repeatable)")
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Only these sites: a part (mlp), a role (q_proj) or a pattern (repeatable)"),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Not these sites (repeatable)")]
Blocks = Annotated[str | None, typer.Option(help="Only these blocks: 'last 12', 'first 4', '8-19', '0,5,7'")]
RankMultiple = Annotated[int, typer.Option(min=1, help="Ranks are multiples of this; 32 is fast in bfloat16")]

# The calibration text
CalibrationText = Annotated[
    str | None,
    typer.Option(
        help="Corpus name, 'builtin', hub data set owner/name, a file of text, JSON, CSV or parquet, or a mixture: "
        "'wikitext2*2+c4', broad (default; of the model builtin its own text)"
    ),
]
CalibrationSplit = Annotated[str, typer.Option(help="Split of the calibration corpus")]
CalibrationSeed = Annotated[int, typer.Option(help="Which calibration windows are drawn")]
TextColumn = Annotated[str | None, typer.Option(help="Field that holds the text")]
TargetColumn = Annotated[
    str | None,
    typer.Option(help="Of an encoder-decoder: field with the target; default: texts are halved into source and target"),
]

# Where it runs, how fast, and what is kept
Data = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder with local copies of known corpora; default: ask the hub"),
]
Batch = Annotated[int, typer.Option(min=1, max=1_000_000, help="Calibration rows at a time: memory and speed only")]
CORES = os.cpu_count() or 1
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Probes trained at a time, or workers of a cluster; default every core: speed only"),
]
ENGINE = DEFAULT
EngineName = Annotated[
    str,
    typer.Option("--engine", help=f"Where work runs: {describe_engines()}"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Head of a cluster, HOST:PORT, or auto; default: a cluster of this machine's own cores"),
]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "eckart"
Cache = Annotated[Path, typer.Option(help="Folder for calibration moments, reused by content; safe to delete")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no moments on disk")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout; see docs/commands.md")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there, once the new one is complete")]


@contextmanager
def open_run(
    engine: str,
    *,
    address: str | None,
    workers: int | None,
    device: str,
    batch_size: int,
    data: Path | None,
    cache: Path | None = None,
    no_cache: bool = False,
    trust_remote_code: bool = False,
    remote_code: bool = False,
    claims: Path | None = None,
) -> Iterator[How]:
    """The options of where and how fast as the `How` of a run; its engine is open for the `with` block.

    Args:
        claims: the place that the command writes, which is nobody else's from before a cluster is started.

    Raises:
        ValueError: no such engine, a cluster that cannot be had, or another command that writes there.
    """
    # Not above: torch takes seconds, and some commands that have options of this file do without it.
    from eckart.runs.how import How

    own = nullcontext() if claims is None else claimed(claims)
    with own, open_engine(engine, address=address, workers=workers) as opened:
        kept = None if no_cache else cache
        yield How(
            device,
            batch_size,
            kept,
            data,
            TerminalTrack(console),
            workers or CORES,
            opened,
            say=print_line,
            trust_remote_code=trust_remote_code,
            remote_code=remote_code,
        )


def parse_options(method: str, pairs: list[str]) -> dict[str, object]:
    """{"alpha": 1.0} out of ["alpha=1"]: values become numbers where the method's default is one.

    Raises:
        ValueError: not NAME=VALUE, or not a number where one is needed.
    """
    from eckart.compression.baselines import BASELINES, baseline_options
    from eckart.runs.composition import composition_options

    defaults = baseline_options(method) if method in BASELINES else composition_options(method)
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} is not NAME=VALUE")
        if key in options:
            raise ValueError(f"--option {key} is given twice")
        if isinstance(defaults.get(key), bool):
            if value not in ("true", "false"):
                raise ValueError(f"--option {key}: {value!r} is neither true nor false")
            options[key] = value == "true"
            continue
        try:
            options[key] = float(value) if isinstance(defaults.get(key), float) else value
        except ValueError as error:
            raise ValueError(f"--option {key}: {value!r} is not a number") from error
    return options

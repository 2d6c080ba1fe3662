"""Moments: tokens through the model, block by block, into the moments of every input group.

At no time are there moments of more than one block, nor hidden states of more than one layer: see `walk.Walk`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.calibration.cache import Store, read_gradients
from eckart.calibration.gradients import collect_gradients, read_as_it_is
from eckart.calibration.routes import mean_gradients, mean_of_experts
from eckart.calibration.unfinished import UNFINISHED
from eckart.calibration.walk import Walk
from eckart.calibration.weights import Weights, group_weights
from eckart.data.encoding import check_vocabulary
from eckart.data.pairs import check_sides
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, InputMoments, Method
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.moments import GRADIENT_STATISTICS, TOKEN_WEIGHTS
from eckart.models.experts import layer_role
from eckart.models.sites import Site, default_sites, find_sites, first_readers
from eckart.support.files import GRADIENTS
from eckart.support.fingerprint import describe_architecture, hash_weights
from eckart.support.html import html_table
from eckart.support.progress import Track, silent

# Number of this layout and of the way moments are taken; part of every digest, so that a change reuses nothing.
FORMAT = 4
# Bytes of input moments of all blocks at once. Within them, and only then, they come from the passes that gradients are
# gathered in, which saves a forward pass.
IN_ONE_PASS = 4 * 2**30
# Rows, as a share of an expert's width, of which its statistics get as many more that are distributed as those of all
# experts of its layer: of an expert with many tokens they change nothing, and one without any has the layer's mean.
PRIOR = 0.25

# The moments of a dense model's blocks that are in memory: {block: {input group: moments}}.
Memory = dict[int, dict[str, InputMoments]]


@dataclass(frozen=True)
class BlockCalibration:
    """The moments of one block, or of a part of it: {input group: InputMoments} and {site name: GradientMoments}.

    Attributes:
        held_out: {input group: InputMoments} of the tokens held out, for refits and passes that are tested on them.
        means: {role of every expert of a layer, see `layer_role`: InputMoments of all of them together}; of a part
            that has the inputs of all of them, they are made of these. gradient_means: the same of gradients.
    """

    block: int
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gradients: Mapping[str, GradientMoments] = field(default_factory=dict)
    held_out: dict[str, InputMoments] = field(default_factory=dict)
    means: dict[str, InputMoments] = field(default_factory=dict)
    gradient_means: dict[str, GradientMoments] = field(default_factory=dict)

    def inputs_of(self, group: str) -> InputMoments | None:
        """The moments of an input group; an expert's, shrunk towards the mean of its layer.

        Of the role of a layer's experts: of all their tokens together.
        """
        own, layer = self.inputs.get(group), layer_role(group)
        if own is None and (experts := self._experts(group)):
            return mean_of_experts(experts)
        if own is None or layer is None:
            return own
        return own.shrunk(self._mean_inputs(layer), PRIOR * own.d_in)

    def gradients_of(self, name: str) -> GradientMoments | None:
        """The gradient statistics of a site; an expert's, shrunk towards the mean of its layer."""
        own, layer = self.gradients.get(name), layer_role(name)
        if own is None or layer is None:
            return own
        mean = self._mean_gradients(layer)
        return own.shrunk(mean, PRIOR * mean.d_out)

    def part_of(self, groups: Collection[str], names: Collection[str]) -> BlockCalibration:
        """The moments of some input groups and of some sites alone, with the means that theirs are shrunk towards."""
        read, written = ({role for name in some if (role := layer_role(name))} for some in (groups, names))
        return replace(
            self,
            inputs={group: moments for group, moments in self.inputs.items() if group in groups},
            gradients={name: self.gradients[name] for name in self.gradients if name in names},
            held_out={group: moments for group, moments in self.held_out.items() if group in groups},
            means={layer: self._mean_inputs(layer) for layer in read if self._experts(layer)},
            gradient_means={layer: self._mean_gradients(layer) for layer in written if self.gradients},
        )

    def _experts(self, layer: str) -> list[InputMoments]:
        return [moments for group, moments in self.inputs.items() if layer_role(group) == layer]

    def _mean_inputs(self, layer: str) -> InputMoments:
        if layer not in self.means:
            self.means[layer] = mean_of_experts(self._experts(layer))
        return self.means[layer]

    def _mean_gradients(self, layer: str) -> GradientMoments:
        if layer not in self.gradient_means:
            self.gradient_means.update(mean_gradients(self.gradients, [layer]))
        return self.gradient_means[layer]

    def __repr__(self) -> str:
        return f"BlockCalibration(block {self.block}: {len(self.inputs)} inputs, {len(self.gradients)} gradients)"


@dataclass(frozen=True)
class Calibration:
    """Every block's moments, held in memory, and where they came from. Iterating gives the blocks in order.

    A 7B model's second moments are about 22 GB in float32; use `calibrate_by_block` for such a one.
    """

    blocks: tuple[BlockCalibration, ...]
    source: dict[str, Any]

    def __iter__(self) -> Iterator[BlockCalibration]:
        return iter(self.blocks)

    def __repr__(self) -> str:
        source = self.source
        of = f"{len(source['parts'])} texts" if "parts" in source else source.get("corpus")
        return f"Calibration({len(self.blocks)} blocks, {source.get('tokens', 0):,} tokens of {of})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a line for each input that the blocks have, and each linear with gradients."""
        kinds: dict[str, list[object]] = {}
        for block in self.blocks:
            for name, moments in (*block.inputs.items(), *block.gradients.items()):
                kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(moments)
        rows = [[name, len(moments), moments[0]] for name, moments in kinds.items()]
        return html_table(repr(self), ["of what", "blocks", "moments"], rows)


def calibrate(
    model: PreTrainedModel,
    tokens: Tokens,
    method: Method,
    *,
    batch_size: int = 8,
    track: Track = silent,
) -> Calibration:
    """The moments that `method` needs, of every site of the model, held in memory.

    Raises and cost: see `calibrate_by_block`.
    """
    blocks = tuple(calibrate_by_block(model, tokens, method, batch_size=batch_size, track=track))
    return Calibration(blocks, {**tokens.source, "tokens": tokens.count})


def calibrate_by_block(
    model: PreTrainedModel,
    tokens: Tokens,
    method: Method,
    *,
    sites: Sequence[Site] | None = None,
    cache: Path | None = None,
    gradients: dict[str, GradientMoments] | None = None,
    weights: Weights | None = None,
    memory: Memory | None = None,
    batch_size: int = 8,
    track: Track = silent,
) -> Iterator[BlockCalibration]:
    """The moments of one block after another. A block may be replaced as soon as its moments were yielded.

    Args:
        tokens: padding is left out of every statistic.
        method: only what it needs is collected; a method that needs nothing yields empty blocks at once.
        sites: only these; default all.
        cache: folder for moments. A calibration is kept in `cache/<digest>`, a file a block, where the digest is of
            the model's weights and configuration, the token ids and mask, the statistics and the sites. Blocks that
            are there already are read, not computed, so a killed run resumes where it was.
        gradients: of these sites, if they were gathered before (see `gather_gradients`).
        weights: what tokens weigh in each input group, where that is known without the gradients.
        memory: blocks of this model, text and method that `gather_gradients` left there; they are read, not computed.
        batch_size: rows at a time; it changes memory and speed only.

    Raises:
        ValueError: an input or gradient that is not finite (names the group), a token outside the vocabulary, samples
            longer than the model reads, a model in training mode, one that does not call its blocks once each in
            order, or an anchored method.

    Cost: one forward pass, and n d_in^2 operations for each input group; with gradient statistics also a forward and a
    backward pass of each sample, and where `gather_gradients` gives both in one pass, only these.
    """
    sites = default_sites(model) if sites is None else sites
    needs = method.needs
    if "cross_moment" in needs:
        raise ValueError(f"{method.name} is anchored and reads the compressed model too: give SequentialCalibration")
    if needs:
        check_readable(model, tokens)
    known = {} if memory is None else memory
    if gradients is None:
        gradients = gather_gradients(model, tokens, method, sites=sites, cache=cache, memory=known, track=track)
    statistics = needs & INPUT_STATISTICS
    store = input_store(model, tokens, method, sites, cache, gradients)
    numbers = sorted({site.block for site in sites})
    groups = {number: first_readers(site for site in sites if site.block == number) for number in numbers}
    held = {number for number in numbers if groups[number].keys() <= known.get(number, {}).keys()}
    missing = [n for n in numbers if statistics and n not in held and not (store and store.holds(n))]
    walk = Walk(model, tokens.rows(batch_size), track) if missing else None
    if walk and weights is None:
        weights = group_weights(gradients, weighing_readers(model, method), tokens)
    for number in numbers:
        inputs: dict[str, InputMoments] = {}
        if walk and number in missing:
            inputs = walk.moments(number, groups[number], statistics, weights)
            if store:
                store.write(number, inputs)
        elif statistics:
            if number in held:
                inputs = {group: known[number][group] for group in groups[number]}
                if memory is None:
                    del known[number]
            elif store:
                inputs = store.read(number)
            if walk and number < missing[-1]:
                walk.skip(number)  # now, with the dense block: the caller may replace it
        names = [site.name for site in sites if site.block == number]
        yield BlockCalibration(number, inputs, {name: gradients[name] for name in names if name in gradients})


def gather_gradients(
    model: PreTrainedModel,
    tokens: Tokens,
    method: Method,
    *,
    sites: Sequence[Site] | None = None,
    cache: Path | None = None,
    memory: Memory | None = None,
    collect: Callable[..., dict[str, GradientMoments]] | None = None,
    track: Track = silent,
) -> dict[str, GradientMoments]:
    """{site name: gradient statistics that `method` needs}; empty for a method that needs none.

    Args:
        sites, cache: as in `calibrate_by_block`.
        memory: gets the moments of the inputs that `method` needs, where the same passes give these too and gradients
            are not in the cache; or the cache gets them, where there is one. So it is where all of them together take
            no more than IN_ONE_PASS bytes, and the model reads the text as it is. They are summed in float32.
        collect: what gathers those that are not in the cache, in place of `collect_gradients`; the memory stays empty.

    With a cache the sums so far are written there now and then, see `Unfinished`: a run that was killed goes on from
    them, with the same result. They are removed in the end.

    Raises and cost: see `collect_gradients`.
    """
    needs = method.needs & GRADIENT_STATISTICS
    if not needs:
        return {}
    sites = default_sites(model) if sites is None else sites
    check_readable(model, tokens)
    store = None if cache is None else Store(cache / calibration_digest(model, tokens, needs, sites))
    unfinished = None if store is None else store.folder / UNFINISHED
    gradients = store.read_gradients() if store else None
    if gradients is None:
        inputs: Memory = {}
        if collect is not None:
            gradients = collect(model, tokens, sites, needs, track=track)
        else:
            kept = input_store(model, tokens, method, sites, cache, [site.name for site in sites])
            if memory is not None:
                inputs = _blank_inputs(model, method.needs & INPUT_STATISTICS, sites, kept)
            sums = {group: blank for block in inputs.values() for group, blank in block.items()}
            gradients = collect_gradients(model, tokens, sites, needs, inputs=sums, unfinished=unfinished, track=track)
            del sums
            for number in list(inputs):
                block = {group: moments.compact() for group, moments in inputs.pop(number).items()}
                if any(moments.count and not moments.total for moments in block.values()):
                    continue  # no token weighs anything, so that all are to weigh alike
                if kept:
                    kept.write(number, block)
                elif memory is not None:
                    memory[number] = block
        if store:
            store.write_gradients(gradients)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return gradients


def kept_inputs(
    model: PreTrainedModel,
    tokens: Tokens,
    method: Method,
    sites: Sequence[Site],
    cache: Path | None,
    gradients: Mapping[str, GradientMoments],
) -> Callable[[int], dict[str, InputMoments]]:
    """From a block's number to {input group: moments}, as `calibrate_by_block` has put them in the cache; else empty.

    Cost: one read of the model's weights now, and of a block's moments at each call.
    """
    store = input_store(model, tokens, method, sites, cache, gradients)
    return lambda number: store.read(number) if store is not None and store.holds(number) else {}


def weighing_readers(model: PreTrainedModel, method: Method) -> Sequence[Site]:
    """The linears whose gradients say what tokens weigh, where the method asks for it."""
    return find_sites(model) if TOKEN_WEIGHTS in method.needs else ()


def input_store(
    model: PreTrainedModel,
    tokens: Tokens,
    method: Method,
    sites: Sequence[Site],
    cache: Path | None,
    weighed_by: Iterable[str] = (),
) -> Store | None:
    """Where the moments of these sites' inputs are kept; None without a cache, or where there are none to keep.

    Args:
        weighed_by: the linears whose gradients are known, which may say what tokens weigh.
    """
    statistics = method.needs & (INPUT_STATISTICS | {TOKEN_WEIGHTS})
    if cache is None or not statistics & INPUT_STATISTICS:
        return None
    weighing = sorted(weighed_by) if TOKEN_WEIGHTS in statistics else []
    return Store(cache / calibration_digest(model, tokens, statistics, sites, weighing))


def _blank_inputs(
    model: PreTrainedModel, statistics: frozenset[str], sites: Sequence[Site], store: Store | None
) -> Memory:
    """Moments without a token, to be added to by the passes for gradients; empty where those are not to: see `memory`.

    Of the blocks that are not in the store.
    """
    if not statistics or "cross_moment" in statistics or not read_as_it_is(model):
        return {}
    numbers = [number for number in sorted({site.block for site in sites}) if not (store and store.holds(number))]
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    groups = first_readers(site for site in sites if site.block in numbers)
    size = sum(site.d_in**2 for site in groups.values()) if "second_moment" in statistics else 0
    if size * torch.finfo(dtype).bits // 8 > IN_ONE_PASS:
        return {}
    return {
        number: {
            group: InputMoments(site.d_in, statistics, device=model.device, dtype=dtype)
            for group, site in groups.items()
            if site.block == number
        }
        for number in numbers
    }


def recorded_gradients(model: str | Path, sites: Iterable[Site]) -> dict[str, GradientMoments]:
    """{site name: Fisher sums} that were recorded while the model was fine-tuned, from the file in its directory.

    Args:
        model: its directory.

    Raises:
        ValueError: there is no such file, it lacks a site, or a sum in it is of another shape.
    """
    path = Path(model) / GRADIENTS
    if not path.is_file():
        raise ValueError(
            f"fisher: recorded, and there is no {path}: fine-tune the model with `eckart finetune`, or gather the "
            "Fisher sums on the calibration text (fisher: gathered)"
        )
    recorded = read_gradients(path)
    for site in sites:
        if site.name not in recorded:
            raise ValueError(f"{path} has nothing of {site.name}: was it recorded with another model?")
        sums = recorded[site.name].sums
        shape = (len(sums["fisher_out"]), len(sums["fisher_in"]))
        if shape != (site.d_out, site.d_in):
            raise ValueError(
                f"{site.name}: {path} has the sums of a weight of shape {shape}, this one's is "
                f"{(site.d_out, site.d_in)}: was it recorded with another model?"
            )
    return {site.name: recorded[site.name] for site in sites}


def check_readable(model: PreTrainedModel, tokens: Tokens) -> None:
    """Raises ValueError where the model cannot read the samples, or would read them differently every time."""
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, its dropout would be in the moments: call model.eval() first"
        )
    check_sides(model, tokens, "calibration length")
    check_vocabulary(model, tokens.ids)


def calibration_digest(
    model: PreTrainedModel,
    tokens: Tokens,
    needs: frozenset[str],
    sites: Sequence[Site],
    weighed_by: Sequence[str] = (),
) -> str:
    """A name for the moments: a digest of all that they depend on, by content and not by name.

    Args:
        weighed_by: the linears whose gradients say what tokens weigh.

    Cost: one read of the model's weights.
    """
    state = hashlib.sha256()
    header = {
        "format": FORMAT,
        **describe_architecture(model),
        "tokens": tokens.digest,
        "needs": sorted(needs),
        "sites": [site.name for site in sites],
        **({"weighed by": [*weighed_by]} if weighed_by else {}),
    }
    state.update(json.dumps(header, sort_keys=True, default=str).encode())
    hash_weights(state.update, model)
    return state.hexdigest()[:32]

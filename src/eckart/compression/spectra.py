"""Spectra: of each unit of a model, one at a time, computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from transformers import PreTrainedModel

from eckart.calibration.moments import BlockCalibration
from eckart.compression.cuts import FactorRequest, factor_unit, moments_of
from eckart.lowrank import DecompositionError, Factored, Method
from eckart.lowrank.method import Prepared
from eckart.models.sites import find_sites, low_rank_modules
from eckart.models.units import units_of


def spectra_on_demand(
    model: PreTrainedModel,
    method: Method,
    blocks: Iterable[BlockCalibration] | Mapping[int, BlockCalibration] = (),
    *,
    joint: Collection[str] = (),
) -> Callable[[str], Factored]:
    """A function from a `Unit.name` to its spectrum, computed when asked for and not kept.

    The root of the last input group is kept, so that asking for q, k and v one after the other computes it once.

    Args:
        model: dense; a weight is read when it is asked for, and must be dense still.
        blocks: a `Calibration`, held in memory, or a mapping by block, which may fetch each when it is asked for;
            nothing for a method that needs none.
        joint: input groups whose linears are factored as one stack.

    Raises:
        ValueError: the method needs statistics and there are no blocks. The function raises ValueError and
            DecompositionError as the method does, with the name, and on an unknown name, a block without moments,
            or a linear that is low-rank by now.

    Cost: of a call, one factorisation, and the root of a group that is not the last call's.
    """
    units = {unit.name: unit for unit in units_of(find_sites(model), joint)}
    parts = blocks if isinstance(blocks, Mapping) else {block.block: block for block in blocks}
    if method.needs and not parts:
        raise ValueError(f"{method.name} needs {', '.join(sorted(method.needs))}: calibrate first")
    last: tuple[str, Prepared] | None = None

    def spectrum(name: str) -> Factored:
        nonlocal last
        if name not in units:
            raise ValueError(f"{name} is no site of this model, nor the name of a joint unit")
        unit = units[name]
        replaced = low_rank_modules(model)
        if any(site.name in replaced for site in unit.sites):
            raise ValueError(f"{name} is low-rank already; its dense weight is needed")
        block, group = unit.sites[0].block, unit.group
        if method.needs and block not in parts:
            raise ValueError(f"{name}: the calibration has no moments of block {block}")
        weight = unit.weight(model)
        part = parts[block] if block in parts else BlockCalibration(block)
        request = FactorRequest(method, [unit], part, lambda _: weight)
        moments = moments_of(unit, part, weight.device)
        try:
            if last is None or last[0] != group or not last[1].is_shared:
                last = None
                last = (group, method.prepare(moments))
            return factor_unit(request, unit, weight, moments, last[1])
        except (ValueError, DecompositionError) as error:
            raise type(error)(f"{name}: {error}") from error

    return spectrum

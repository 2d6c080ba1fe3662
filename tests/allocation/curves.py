"""Loss curves and linears for the tests of allocations, made up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eckart.allocation import Curve
from eckart.models.sites import Site


def site(d_out: int, d_in: int, name: str = "a.0.w", group: str | None = None, part: str = "mlp") -> Site:
    return Site(name, name.split(".", 2)[-1], part, int(name.split(".")[1]), group or name, d_in, d_out, False)


def curve(sites: Site | Sequence[Site], seed: int = 0, weight: float = 1.0) -> Curve:
    """A curve with falling energies, some of them steeply."""
    sites = (sites,) if isinstance(sites, Site) else tuple(sites)
    rng = np.random.default_rng(seed)
    limit = min(sum(s.d_out for s in sites), sites[0].d_in)
    energies = np.sort(rng.gamma(2, size=limit))[::-1] * np.arange(1, limit + 1) ** -rng.uniform(0.2, 2)
    return Curve(sites, np.append(energies[::-1].cumsum()[::-1], 0.0), weight)


def block(number: int = 0) -> list[Site]:
    """The linears of a small block: q, k and v read one tensor, k and v are narrow."""
    group = f"a.{number}.q"
    return [
        site(16, 16, f"a.{number}.q", group, "attention"),
        site(8, 16, f"a.{number}.k", group, "attention"),
        site(8, 16, f"a.{number}.v", group, "attention"),
        site(16, 16, f"a.{number}.o", part="attention"),
        site(24, 16, f"a.{number}.up"),
        site(16, 24, f"a.{number}.down"),
    ]

"""Bundles: what is sent to a worker is all that its units need."""

from __future__ import annotations

import torch

from eckart.calibration.moments import calibrate
from eckart.compression.cuts import FactorRequest, moments_of
from eckart.lowrank import build_method
from eckart.models.sites import find_sites
from eckart.models.units import units_of
from eckart.runs.engine.on_cluster import _bundles
from eckart.runs.ranks import joint_groups
from tiny import tiny_model, tiny_tokens


def test_a_bundle_has_the_moments_of_its_units() -> None:
    """Experts' are shrunk towards the mean of all, of which a bundle has some."""
    model, method = tiny_model("mixtral"), build_method("kfac")
    part = calibrate(model, tiny_tokens(4, 12), method).blocks[1]
    sites = [site for site in find_sites(model) if site.block == 1]
    for joint in ((), joint_groups(sites, sites)):
        units = units_of(sites, joint)
        whole = FactorRequest(method, units, part, lambda unit: unit.weight(model))
        sent = [(unit, bundle.part) for bundle in _bundles(whole) for unit in bundle.units]
        assert [unit for unit, _ in sent] == list(units)
        for unit, own in sent:
            ours, theirs = moments_of(unit, part), moments_of(unit, own)
            torch.testing.assert_close(theirs.inputs.second_moment, ours.inputs.second_moment, rtol=0, atol=0)
            for site in unit.sites:
                one, other = part.inputs_of(site.input_group), own.inputs_of(site.input_group)
                torch.testing.assert_close(one.second_moment, other.second_moment, rtol=0, atol=0)
                one, other = part.gradients_of(site.name), own.gradients_of(site.name)
                torch.testing.assert_close(one.gradient_covariance, other.gradient_covariance, rtol=0, atol=0)

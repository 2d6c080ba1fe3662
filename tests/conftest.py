"""Hooks the shape types of `eckart.lowrank`, so that its tests can have them checked at run time.

A hook has to be in place before the first import, and this file is read before any test module of any
folder. The checks are off until a test asks for them (tests/lowrank/conftest.py): everybody else meets the
package as its users do.
"""

import sys

import torch
from jaxtyping import config, install_import_hook

assert "eckart.lowrank" not in sys.modules, "imported too early: its shape types can no longer be hooked"
install_import_hook("eckart.lowrank", "beartype.beartype")
config.update("jaxtyping_disable", True)

# Tiny matrices gain nothing from two threads, and two threads that wait for each other on a busy machine lose minutes.
torch.set_num_threads(1)

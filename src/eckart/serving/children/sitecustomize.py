"""Imported by Python when a process starts that `eckart exec` has among its ancestors: such a process imports eckart.

Python imports one module of this name: the environment's own, if it has one, is imported from here.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]
_own = PathFinder.find_spec("sitecustomize")
if _own is not None and _own.loader is not None:
    sys.modules["sitecustomize"] = module_from_spec(_own)
    _own.loader.exec_module(sys.modules["sitecustomize"])
try:
    import eckart.models.registration  # noqa: F401 (of which importing eckart is the part that counts)
except ModuleNotFoundError as error:
    if error.name != "eckart":  # a Python without eckart is none of ours
        raise

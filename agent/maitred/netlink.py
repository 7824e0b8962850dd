"""The part of pyroute2 that maitred uses, without the rest: importing the package as a whole loads
every netlink protocol it knows, which is twice the work while a VM starts and its host waits.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

if "pyroute2" not in sys.modules and (_found := PathFinder.find_spec("pyroute2")):
    # The package, to be found by its modules, its own __init__ not executed.
    sys.modules["pyroute2"] = module_from_spec(_found)

from pyroute2.iproute.linux import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["AsyncIPRoute", "NetlinkError"]

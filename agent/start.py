"""Runs one of the agent's programs in the guest: `python3 -IS start.py agent.maitred WORD...`. As
`-m` does, but without runpy and site: 0.3 s of an emulated boot.
"""

from __future__ import annotations

import sys

# Where the agent is, the libraries are; of Debian's own only PID 1 needs one (see its init).
sys.path.append(__file__.removesuffix("/agent/start.py"))
_MODULE = f"{sys.argv[1]}.__main__"
__import__(_MODULE)
sys.exit(sys.modules[_MODULE].main(sys.argv[2:]))

"""pylxd without what it imports for other LXDs than ours: X.509 for those behind https, the reading
of its own version, the guessing of encodings. That is 1.4 of the 2.5 s that its import takes in an
emulated guest (-X importtime), just when LXD itself starts.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["pylxd", "requests"]

_FOR_HTTPS: dict[str, dict[str, Any]] = {
    "cryptography": {"x509": None},
    "cryptography.hazmat": {},
    "cryptography.hazmat.primitives": {"hashes": None},
}
_ITS_VERSION: dict[str, dict[str, Any]] = {
    "importlib.metadata": {"version": lambda _distribution: "unknown"}
}
_ABSENT = ("chardet", "charset_normalizer")
"""requests itself does without: it takes text for UTF-8 then."""


def _stand_in(name: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


_stand_ins: dict[str, ModuleType | None] = {
    name: _stand_in(name, content) for name, content in (_FOR_HTTPS | _ITS_VERSION).items()
}
_stand_ins |= dict.fromkeys(_ABSENT)
_put = {name: module for name, module in _stand_ins.items() if name not in sys.modules}
sys.modules.update(_put)  # type: ignore[arg-type]  # None makes an import fail
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # requests complains of what it cannot find
        import pylxd
        import pylxd.exceptions
        import requests
finally:
    for _name in _put:
        del sys.modules[_name]

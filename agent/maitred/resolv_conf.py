"""Name servers and search domains: checks them and replaces resolv.conf(5) atomically."""

from __future__ import annotations

import ipaddress
import os
import re

from agent import atomic_file
from agent.maitred.errors import BadRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import vm_guest_pb2

# RFC 1123, 2.1, and underscores, which zones in use have.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\Z")
_NAME_MAX = 253
_COUNT_MAX = 64


def content(config: vm_guest_pb2.ResolvConfig) -> str:
    """The text of resolv.conf(5) for a request. Raises BadRequest."""
    what = "cannot set the name servers"
    if len(config.nameservers) > _COUNT_MAX or len(config.search_domains) > _COUNT_MAX:
        raise BadRequest(f"{what}: more than {_COUNT_MAX} of them")
    lines = []
    for text in config.nameservers:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            raise BadRequest(f"{what}: {text!r} is not an IP address") from None
        if not text.isprintable() or " " in text:  # a zone after % can be anything
            raise BadRequest(f"{what}: {text!r} is not an IP address")
        lines.append(f"nameserver {text}\n")
    for text in config.search_domains:
        name = text.removesuffix(".")
        if len(name) > _NAME_MAX or not all(map(_LABEL.match, name.split("."))):
            raise BadRequest(f"{what}: {text!r} is not a domain name")
    if config.search_domains:
        lines.append(f"search {' '.join(config.search_domains)}\n")
    return "".join(lines)


def replace(path: str, text: str) -> None:
    """Makes text the content of the file at path: readers see the old one or the new one.

    When path is a symbolic link, the file it points to is replaced. Raises OSError.
    """
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    atomic_file.replace(path, text)

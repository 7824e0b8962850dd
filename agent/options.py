"""Options, spelled `maitred.KEY=VALUE` and `tremplin.KEY=VALUE` on the kernel command line and as
arguments, and the addresses in them. Imports next to nothing: PID 1 reads options too.
"""

from __future__ import annotations

import sys

from agent.console import write_line
from agent.prepared import guest_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

HOST_CID = 2
"""The host's context id, VMADDR_CID_HOST of vsock(7)."""

_SUN_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, the last one is the NUL


class OptionError(ValueError):
    """An option that cannot be used; str() is one line for the person who wrote it."""


class UnixAddress:
    """A unix socket at an absolute path."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"unix:{self.path}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnixAddress) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)


class VsockAddress:
    """A vsock port; cid is None for an address to listen on."""

    __slots__ = ("cid", "port")

    def __init__(self, port: int, cid: int | None = None) -> None:
        self.port = port
        self.cid = cid

    def __repr__(self) -> str:
        return f"vsock:{self.port}" if self.cid is None else f"vsock:{self.cid}:{self.port}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VsockAddress) and (other.cid, other.port) == (self.cid, self.port)

    def __hash__(self) -> int:
        return hash((self.cid, self.port))


Address = UnixAddress | VsockAddress


def _number(text: str, *, what: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise OptionError(f"{what} is not a number from {low} to {high}: {text!r}")
    return int(text)


def parse_port(text: str) -> int:
    """A vsock port from 1 to 2^32-2 (2^32-1 is VMADDR_PORT_ANY). Raises OptionError."""
    return _number(text, what="port", low=1, high=2**32 - 2)


def parse_listen_address(text: str) -> Address:
    """`vsock:PORT` or `unix:/path`, to listen on. Raises OptionError."""
    scheme, _, rest = text.partition(":")
    if scheme == "vsock":
        return VsockAddress(parse_port(rest))
    return _parse_unix(text, form="vsock:PORT or unix:/path")


def parse_dial_address(text: str) -> Address:
    """`vsock:CID:PORT` or `unix:/path`, to connect to. Raises OptionError."""
    scheme, _, rest = text.partition(":")
    if scheme == "vsock":
        cid, colon, port = rest.partition(":")
        if not colon:
            raise OptionError(f"not an address of the form vsock:CID:PORT or unix:/path: {text!r}")
        return VsockAddress(
            parse_port(port), _number(cid, what="context id", low=0, high=2**32 - 2)
        )
    return _parse_unix(text, form="vsock:CID:PORT or unix:/path")


def _parse_unix(text: str, *, form: str) -> UnixAddress:
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path.startswith("/"):
        raise OptionError(f"not an address of the form {form}: {text!r}")
    if len(path.encode()) > _SUN_PATH_MAX or "\0" in path:
        raise OptionError(f"path of the socket is longer than {_SUN_PATH_MAX} bytes: {text!r}")
    return UnixAddress(path)


def parse_path(text: str) -> str:
    """An absolute path. Raises OptionError."""
    if not text.startswith("/") or "\0" in text:
        raise OptionError(f"not an absolute path: {text!r}")
    return text.rstrip("/") or "/"


def parse_flag(text: str) -> bool:
    """A yes or a no, also spelled true/false, on/off, 1/0, or nothing at all for yes."""
    if text in {"", "yes", "true", "on", "1"}:
        return True
    if text in {"no", "false", "off", "0"}:
        return False
    raise OptionError(f"neither yes nor no: {text!r}")


class Option:
    """One option of a program.

    key: its full spelling, `maitred.listen`.
    parse: text to value; raises OptionError.
    default: the text that stands when the option is not given; None for no value.
    help: one line for --help.
    """

    __slots__ = ("default", "help", "key", "parse")

    def __init__(
        self,
        key: str,
        parse: Callable[[str], Any],
        default: str | None,
        help: str,  # noqa: A002
    ) -> None:
        self.key = key
        self.parse = parse
        self.default = default
        self.help = help


PREFIXES = ("maitred.", "tremplin.")


def from_kernel_command_line(text: str) -> list[str]:
    """The words of a kernel command line that are options of ours, in order.

    text: the content of /proc/cmdline.
    """
    return [word for word in text.split() if word.startswith(PREFIXES)]


class Options:
    """Parsed options: `options["maitred.listen"]` is the value, given or default."""

    __slots__ = ("_values", "given")

    def __init__(self, values: Mapping[str, Any], given: Mapping[str, str]) -> None:
        self._values = values
        self.given = given
        """The text of those that were given, by key: what a program passes on to its children."""

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def words(self) -> list[str]:
        """The given options as arguments for another program."""
        return [f"{key}={text}" for key, text in self.given.items()]

    def host_address(self, key: str, *, listen: str) -> Address | None:
        """The host endpoint under key, or None when it is off.

        An endpoint that was not given has its vsock default only while the program itself
        listens on vsock, so that nothing outside a VM ever opens AF_VSOCK.
        """
        if key not in self.given and isinstance(self[listen], UnixAddress):
            return None
        value: Address | None = self[key]
        return value


def parse(
    words: Sequence[str],
    table: Iterable[Option],
    *,
    on_error: Callable[[OptionError], None] | None = None,
) -> Options:
    """Reads options.

    words: `maitred.KEY=VALUE` or `tremplin.KEY=VALUE` each; of a repeated key the last one counts.
    table: the options there are.
    on_error: told of each word that cannot be used, which then is passed over; for PID 1, that
        must come up whatever the kernel command line says. Without it the first error is raised.
    Raises OptionError.
    """
    known = {option.key: option for option in table}
    values: dict[str, Any] = {
        key: None if option.default is None else option.parse(option.default)
        for key, option in known.items()
    }
    given: dict[str, str] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            if key not in known:
                raise OptionError(f"cannot use option {key!r}: there is no such option")
            try:
                values[key] = known[key].parse(text)
            except OptionError as error:
                raise OptionError(f"cannot use option {key}: {error}") from None
            given[key] = text
        except OptionError as error:
            if on_error is None:
                raise
            on_error(error)
    return Options(values, given)


def from_arguments(
    words: Sequence[str], table: Sequence[Option], *, module: str, name: str, summary: str
) -> Options | int:
    """A program's options, or the exit code it ends with at once: 0 after --help, which prints what
    there is, 2 after an option that cannot be used, which is said on the console.

    words: the arguments, as parse() takes them. module: how the program is called; name: how it
    calls itself on the console; summary: a line on what it does.
    """
    if "--help" in words or "-h" in words:
        sys.stdout.write(usage(f"python -m {module}", summary, table) + "\n")
        return 0
    try:
        return parse(words, table)
    except OptionError as error:
        write_line(name, str(error))
        return 2


def usage(program: str, summary: str, table: Iterable[Option]) -> str:
    """The text of --help.

    program: how the program is called; summary: a line on what it does.
    """
    rows = [(f"{option.key}=", option.default, option.help) for option in table]
    width = max(len(row[0]) for row in rows)
    lines = [f"usage: {program} [OPTION=VALUE ...]", "", summary, "", "options:"]
    for key, default, text in rows:
        lines.append(f"  {key:<{width}}  {text}" + (f" [{default}]" if default else ""))
    return "\n".join(lines)


def program(module: str, words: Sequence[str]) -> list[str]:
    """The argv of another program of this agent, run by the same interpreter in the same way.

    words: its options.
    """
    if sys.flags.isolated and sys.flags.no_site:
        return [*guest_command(module), *words]
    isolated = ["-I"] if sys.flags.isolated else []
    return [sys.executable, *isolated, "-m", module, *words]

"""PID 1's control protocol, version 1: what both ends say. One JSON object per line each way over a
unix stream socket; for how to call it see client.py, for how it is served control.py.

Request  {"v": 1, "id": N, "op": "...", ...}
Answer   {"id": N, "ok": true, ...}
         {"id": N, "ok": false, "code": "ENOENT", "error": "cannot launch: why"}
Event    {"id": N, "event": "...", "key": "...", ...}, N being the id of the `events` request

Any number of requests may be in flight; answers come in the order in which they are ready.

    launch    argv, and the fields of ProcessSpec; wait     -> key, pid, state, existing
                                                               with wait also status, code at exit
    wait      key: its next exit, the last one when ended   -> key, status, code
    signal    key, signal (name)                            -> pid
    stop      key: end it, do not respawn it                -> key, state, when it has ended
    start     key: again, when it has ended                 -> key, pid, state
    output    key, offset                                   -> offset, end, data (base64)
    list      key (one of them), after (serial of the last) -> processes, more, supervisor
    events    output: with what processes print             -> and then events
    cancel    request: the id of a wait or launch           -> (that one gets no answer)
    upgrade                                                 -> when PID 1 is about to execute anew
    shutdown  reason                                        -> at once, then the power-off
"""

from __future__ import annotations

import os

from agent.lean_stdlib import dumps, loads, signal_names
from agent.options import parse_listen_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

VERSION = 1
SOCKET_NAME = "supervisor.sock"
MAX_LINE = 65536
"""Bytes in a line, line feed included."""

SIGNALS = signal_names()
STOP_STAGES = ("first", "normal", "last")
RLIMITS = (
    *("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc"),
    *("rtprio", "rttime", "sigpending", "stack"),
)
DEFAULT_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
"""Where argv[0] is looked up, and PATH of a process that was given none."""

MAX_LISTEN = 16
"""Addresses that one process can have PID 1 listen on."""

_NAME_MAX = 200
_TIMEOUT_MAX = 3600.0


class ProtocolError(Exception):
    """A request that cannot be served: code is the name of an errno, str() one line."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def socket_path(run_dir: str) -> str:
    """Where PID 1 listens, below maitred.run_dir."""
    return f"{run_dir}/{SOCKET_NAME}"


def encode(message: Mapping[str, Any]) -> bytes:
    """One line. Raises ProtocolError (E2BIG) when it is longer than MAX_LINE."""
    line = (dumps(message) + "\n").encode()
    if len(line) > MAX_LINE:
        raise ProtocolError("E2BIG", f"message of {len(line)} bytes is longer than {MAX_LINE}")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """The object in one line. Raises ProtocolError (EINVAL) when there is none."""
    try:
        message = loads(line.decode())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ProtocolError("EINVAL", f"cannot read the message: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("EINVAL", "cannot read the message: not a JSON object")
    return message


class ProcessSpec:
    """What to run and how; two specs are equal when every field is.

    argv: argv[0] is an absolute path, or a name to look up in DEFAULT_PATH.
    env: the environment, besides PATH when it has none.
    name: unique name; "" for a process known by a made-up key.
    respawn: start it again whenever it ends, until it was started more than 10 times in 30 s.
    backoff: wait between starts, 0.5 s doubling to 30 s with jitter, instead of that limit.
    console: stdio is /dev/console instead of nothing.
    once: with a name, started once per boot; launching it again returns the first one.
    listen: addresses, vsock:PORT or unix:/path, that PID 1 listens on for it from before its first
    start on, whether it runs or not; how it gets the sockets: agent/listening.py. Needs a name.
    stop_signal, stop_timeout (s), stop_stage: how and when it is stopped, SIGKILL after that.
    user, group: whom it runs as, with the supplementary groups of user; "" for root.
    no_new_privs: as in prctl(2). capabilities: names that stay in its bounding set, None for all.
    rlimits: [soft, hard] by name without RLIMIT_, in small letters; -1 for no limit.
    memory_max (bytes), pids_max: limits of a cgroup of its own; 0 for none.
    """

    __slots__ = (
        "argv",
        "backoff",
        "capabilities",
        "console",
        "env",
        "group",
        "listen",
        "memory_max",
        "name",
        "no_new_privs",
        "once",
        "pids_max",
        "respawn",
        "rlimits",
        "stop_signal",
        "stop_stage",
        "stop_timeout",
        "user",
    )

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        name: str = "",
        respawn: bool = False,
        backoff: bool = False,
        console: bool = False,
        once: bool = False,
        listen: Sequence[str] = (),
        stop_signal: str = "SIGTERM",
        stop_timeout: float = 10.0,
        stop_stage: str = "normal",
        user: str = "",
        group: str = "",
        no_new_privs: bool = False,
        capabilities: Sequence[str] | None = None,
        rlimits: Mapping[str, Sequence[int]] | None = None,
        memory_max: int = 0,
        pids_max: int = 0,
    ) -> None:
        self.argv = list(argv)
        self.env = dict(env or {})
        self.name = name
        self.respawn = respawn
        self.backoff = backoff
        self.console = console
        self.once = once
        self.listen = list(listen)
        self.stop_signal = stop_signal
        self.stop_timeout = stop_timeout
        self.stop_stage = stop_stage
        self.user = user
        self.group = group
        self.no_new_privs = no_new_privs
        self.capabilities = None if capabilities is None else list(capabilities)
        self.rlimits = {name: list(pair) for name, pair in (rlimits or {}).items()}
        self.memory_max = memory_max
        self.pids_max = pids_max

    def confined(self) -> bool:
        """Whether it is to run with less than full root."""
        return bool(
            self.user
            or self.group
            or self.no_new_privs
            or self.capabilities is not None
            or self.rlimits
            or self.memory_max
            or self.pids_max
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessSpec) and other.to_wire() == self.to_wire()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def to_wire(self) -> dict[str, Any]:
        """The fields that are not their default, as they stand in a launch request."""
        wire = {}
        for field in self.__slots__:
            value = getattr(self, field)
            if value != _DEFAULTS.get(field):
                wire[field] = value
        return wire

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> ProcessSpec:
        """The spec in a launch request. Raises ProtocolError (EINVAL) for a bad field."""
        for field, value in fields.items():
            check = _CHECKS.get(field)
            if check is None:
                raise ProtocolError("EINVAL", f"there is no field {field!r}")
            if not check(value):
                shown = f": {value!r:.200}" if isinstance(value, str | int | float) else ""
                raise ProtocolError("EINVAL", f"{field} is not valid{shown}")
        if "argv" not in fields:
            raise ProtocolError("EINVAL", "argv is missing")
        spec = cls(**fields)
        try:
            addresses = set(map(parse_listen_address, spec.listen))
        except ValueError as error:  # OptionError, UnicodeEncodeError
            raise ProtocolError("EINVAL", f"listen: {error}") from None
        if len(addresses) < len(spec.listen):
            raise ProtocolError("EINVAL", "listen has an address twice")
        if spec.once and not spec.name:
            raise ProtocolError("EINVAL", "once needs a name")
        if spec.backoff and not spec.respawn:
            raise ProtocolError("EINVAL", "backoff needs respawn")
        if spec.listen and not spec.name:
            raise ProtocolError("EINVAL", "listen needs a name")
        return spec


_DEFAULTS: dict[str, Any] = {
    field: getattr(ProcessSpec([""]), field) for field in ProcessSpec.__slots__ if field != "argv"
}


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_argv(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and bool(value and value[0])


def _is_env(value: object) -> bool:
    return isinstance(value, dict) and all(
        key and "=" not in key and _is_text(key) and _is_text(text) for key, text in value.items()
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _NAME_MAX and value.isprintable()


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_account(value: object) -> bool:
    return _is_name(value) and not set(str(value)) & set(":/,")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_listen(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LISTEN and all(map(_is_text, value))


def _is_rlimits(value: object) -> bool:
    return isinstance(value, dict) and all(
        name in RLIMITS
        and isinstance(pair, list)
        and len(pair) == 2
        and all(type(limit) is int and -1 <= limit < 2**63 for limit in pair)
        for name, pair in value.items()
    )


def _is_amount(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_signal(value: object) -> bool:
    return isinstance(value, str) and value in SIGNALS


def _is_timeout(value: object) -> bool:
    return type(value) in {int, float} and 0 <= value <= _TIMEOUT_MAX  # type: ignore[operator]


_CHECKS = {
    "argv": _is_argv,
    "backoff": _is_flag,
    "capabilities": _is_names,
    "console": _is_flag,
    "env": _is_env,
    "group": _is_account,
    "listen": _is_listen,
    "memory_max": _is_amount,
    "name": _is_name,
    "no_new_privs": _is_flag,
    "once": _is_flag,
    "pids_max": _is_amount,
    "respawn": _is_flag,
    "rlimits": _is_rlimits,
    "stop_signal": _is_signal,
    "stop_stage": STOP_STAGES.__contains__,
    "stop_timeout": _is_timeout,
    "user": _is_account,
}

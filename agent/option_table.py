"""Every option there is, with its default. PID 1 checks and hands on all of them; maitred and
tremplin each read the ones they need.
"""

from __future__ import annotations

from agent.options import (
    Option,
    OptionError,
    parse_dial_address,
    parse_flag,
    parse_listen_address,
    parse_path,
    parse_port,
)


def _text(text: str) -> str:
    if not text:
        raise OptionError("is empty")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:  # inf and nan, too, are floats
        raise OptionError(f"not a number of seconds above 0: {text!r}")
    return seconds


def _interface(text: str) -> str:
    # dev_valid_name() of the kernel, IFNAMSIZ 16 with the NUL.
    if not 0 < len(text) < 16 or text in {".", ".."} or "/" in text or not text.isprintable():
        raise OptionError(f"not the name of a network interface: {text!r}")
    return text


MAITRED = (
    Option(
        "maitred.listen", parse_listen_address, "vsock:8888", "where the Maitred service listens"
    ),
    Option(
        "maitred.startup_listener", parse_dial_address, "vsock:2:7777", "the host's StartupListener"
    ),
    Option(
        "maitred.listen_port",
        parse_port,
        None,
        "port of the host's StartupListener, when only the port differs",
    ),
    Option(
        "maitred.crash_listener", parse_dial_address, "vsock:2:7779", "the host's CrashListener"
    ),
    Option("maitred.log_collector", parse_dial_address, "vsock:2:9999", "the host's LogCollector"),
    Option("maitred.syslog", parse_path, "/dev/log", "where programs of the VM log to, syslog(3)"),
    Option("maitred.kernel_log", parse_path, "/dev/kmsg", "where the kernel's log is read"),
    Option(
        "maitred.shell_listen", parse_listen_address, "vsock:9001", "where the remote shell listens"
    ),
    Option("maitred.run_dir", parse_path, "/run/maitred", "sockets and state of this boot"),
    Option(
        "maitred.setup",
        parse_flag,
        "yes",
        "set up the machine (mounts, sysctls, console, power-off); no: leave it alone",
    ),
    Option(
        "maitred.command",
        parse_path,
        None,
        "program that PID 1 runs in maitred's place, given the options as arguments",
    ),
    Option("maitred.no_startup_processes", parse_flag, "no", "do not launch the startup files"),
    Option("maitred.startup_dir", parse_path, "/etc/maitred", "the startup files, *.textproto"),
    Option("maitred.interface", _interface, "eth0", "the interface ConfigureNetwork sets up"),
    Option("maitred.resolv_conf", parse_path, "/run/resolv.conf", "where name servers are written"),
    Option(
        "maitred.stateful_dir", parse_path, "/mnt/stateful", "where the stateful disk is mounted"
    ),
)

TREMPLIN = (
    Option(
        "tremplin.listen", parse_listen_address, "vsock:8890", "where the Tremplin service listens"
    ),
    Option("tremplin.listener", parse_dial_address, "vsock:2:7778", "the host's TremplinListener"),
    Option("tremplin.lxd_dir", parse_path, "/mnt/stateful/lxd", "LXD's directory (LXD_DIR)"),
    Option(
        "tremplin.lxd_conf", parse_path, "/mnt/stateful/lxd_conf", "the lxc command's directory"
    ),
    Option("tremplin.lxd_subnet", _text, None, "address of LXD's bridge, a.b.c.d/n"),
    Option(
        "tremplin.run_dir",
        parse_path,
        "/run/maitred",
        "sockets of this boot; PID 1's control socket",
    ),
    Option("tremplin.token_dir", parse_path, "/run/tokens", "container tokens"),
    Option(
        "tremplin.resolv_conf", parse_path, "/run/resolv.conf", "name servers for the containers"
    ),
    Option(
        "tremplin.shared_dir", parse_path, "/mnt/shared", "shown in the containers as /mnt/chromeos"
    ),
    Option(
        "tremplin.allow_privileged",
        parse_flag,
        "no",
        "whether LXD may run privileged containers (StartTermina says so)",
    ),
    Option(
        "tremplin.download_timeout",
        _seconds,
        "60",
        "seconds without a byte until a download is given up",
    ),
    Option(
        "tremplin.start_heartbeat",
        _seconds,
        "30",
        "seconds between the reports of a container that is still starting",
    ),
    Option(
        "tremplin.image_certificate",
        parse_path,
        None,
        "certificate that https image servers are verified against, PEM; else LXD's own",
    ),
    Option(
        "tremplin.command",
        parse_path,
        None,
        "program that maitred runs in tremplin's place, given the options as arguments",
    ),
)

ALL = MAITRED + TREMPLIN

"""Options and addresses."""

from __future__ import annotations

import pytest

from agent import option_table, options
from agent.options import OptionError, UnixAddress, VsockAddress


def parse(*words: str) -> options.Options:
    return options.parse(words, option_table.ALL)


def test_defaults_are_the_ports_of_the_contract() -> None:
    parsed = parse()
    assert parsed["maitred.listen"] == VsockAddress(8888)
    assert parsed["maitred.startup_listener"] == VsockAddress(7777, 2)
    assert parsed["tremplin.listen"] == VsockAddress(8890)
    assert parsed["tremplin.listener"] == VsockAddress(7778, 2)
    assert parsed["maitred.run_dir"] == "/run/maitred"
    assert parsed["maitred.setup"] is True
    assert parsed["maitred.no_startup_processes"] is False


def test_a_flag_without_a_value_is_set() -> None:
    assert parse("maitred.no_startup_processes")["maitred.no_startup_processes"] is True


def test_the_last_of_a_repeated_option_counts() -> None:
    parsed = parse("maitred.listen=unix:/a", "maitred.listen=unix:/b")
    assert parsed["maitred.listen"] == UnixAddress("/b")
    assert parsed.words() == ["maitred.listen=unix:/b"]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("maitred.lisen=vsock:1", "no such option"),
        ("listen=vsock:1", "no such option"),
        ("maitred.listen=vsock:x", "not a number"),
        ("maitred.listen=vsock:0", "not a number"),
        ("maitred.listen=vsock:4294967295", "not a number"),
        ("maitred.listen=vsock:٣", "not a number"),
        ("maitred.listen=tcp:1", "not an address"),
        ("maitred.listen=unix:relative", "not an address"),
        ("maitred.listen=unix:/" + "x" * 107, "longer than 107 bytes"),
        ("maitred.startup_listener=vsock:7777", "not an address of the form vsock:CID:PORT"),
        ("maitred.startup_listener=", "not an address"),
        ("maitred.setup=maybe", "neither yes nor no"),
        ("maitred.run_dir=run", "not an absolute path"),
        ("maitred.interface=averyveryverylongname", "network interface"),
    ],
)
def test_what_cannot_be_used_says_why(word: str, why: str) -> None:
    with pytest.raises(OptionError, match="cannot use option") as caught:
        parse(word)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lenient_reader_passes_over_the_bad_ones_and_is_told() -> None:
    told: list[str] = []
    parsed = options.parse(
        ["maitred.bad=1", "maitred.listen=vsock:9", "tremplin.listen=nonsense"],
        option_table.ALL,
        on_error=lambda error: told.append(str(error)),
    )
    assert parsed["maitred.listen"] == VsockAddress(9)
    assert parsed["tremplin.listen"] == VsockAddress(8890)
    assert len(told) == 2


def test_only_our_words_of_the_kernel_command_line_are_options() -> None:
    text = "console=ttyS0 maitred.listen_port=7 quiet tremplin.lxd_dir=/x -- foo\n"
    assert options.from_kernel_command_line(text) == [
        "maitred.listen_port=7",
        "tremplin.lxd_dir=/x",
    ]


def test_host_endpoints_are_off_with_unix_addresses() -> None:
    parsed = parse("maitred.listen=unix:/s")
    assert parsed.host_address("maitred.startup_listener", listen="maitred.listen") is None
    parsed = parse("maitred.listen=unix:/s", "maitred.startup_listener=unix:/h")
    assert parsed.host_address(
        "maitred.startup_listener", listen="maitred.listen"
    ) == UnixAddress("/h")  # fmt: skip
    assert parse().host_address(
        "maitred.crash_listener", listen="maitred.listen"
    ) == VsockAddress(7779, 2)  # fmt: skip


def test_usage_names_every_option_with_its_default() -> None:
    text = options.usage("maitred", "Serves the Maitred API.", option_table.MAITRED)
    for option in option_table.MAITRED:
        assert f"{option.key}=" in text
        assert option.default is None or f"[{option.default}]" in text

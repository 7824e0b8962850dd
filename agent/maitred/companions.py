"""The programs that run beside maitred as processes of PID 1: log forwarder and remote shell."""

from __future__ import annotations

from agent.options import VsockAddress, program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.maitred.supervisor_connection import SupervisorConnection
    from agent.options import Options

_LOG_FORWARDER_STOP_SECONDS = 5.0
"""It gives its last records 2 s, and in an emulated guest takes over one to end after that."""


async def launch(options: Options, supervisor: SupervisorConnection) -> None:
    """Launches those that have an endpoint; does nothing when they run. Raises SupervisorError."""
    client = await supervisor.client()
    words = [word for word in options.words() if word.startswith("maitred.")]
    if options.host_address("maitred.log_collector", listen="maitred.listen") is not None:
        await client.launch(
            program("agent.log_forwarder", words),
            name="log-forwarder",
            respawn=True,
            backoff=True,
            stop_timeout=_LOG_FORWARDER_STOP_SECONDS,
            stop_stage="last",
        )
    shell_is_on = isinstance(options["maitred.listen"], VsockAddress)
    if shell_is_on or "maitred.shell_listen" in options.given:
        await client.launch(
            program("agent.shell", words),
            name="shell",
            respawn=True,
            backoff=True,
            listen=[str(options["maitred.shell_listen"])],
        )

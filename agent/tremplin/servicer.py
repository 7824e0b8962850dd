"""The service Tremplin: its RPCs, put together. Each one checks what it was given, hands it on, and
says what came of it.

Failures go into the status and the failure_reason, with gRPC's own status OK.
"""

from __future__ import annotations

from agent.tremplin.container_calls import ContainerCalls
from agent.tremplin.operation_calls import OperationCalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session


class Servicer(OperationCalls, ContainerCalls):
    """Tremplin, for one session."""

    def __init__(self, session: Session) -> None:
        for calls in (OperationCalls, ContainerCalls):
            calls.__init__(self, session)

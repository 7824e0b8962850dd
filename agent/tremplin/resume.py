"""Carries on what a tremplin that was killed had begun: every operation that is in the journal."""

from __future__ import annotations

import logging

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.create import Create
from agent.tremplin.export import Export
from agent.tremplin.imports import Import
from agent.tremplin.remove import Delete
from agent.tremplin.start import Start
from agent.tremplin.start_lxd import StartLxd
from agent.tremplin.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.message import Message

    from agent.tremplin.operation import Operation
    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)


def resume(session: Session) -> None:
    """Carries on what a tremplin that was killed had begun."""
    kinds: dict[str, tuple[type[Operation], type[Message]]] = {
        Create.method: (Create, pb.CreateContainerRequest),
        Delete.method: (Delete, pb.DeleteContainerRequest),
        Export.method: (Export, pb.ExportContainerRequest),
        Import.method: (Import, pb.ImportContainerRequest),
        Start.method: (Start, pb.StartContainerRequest),
        StartLxd.method: (StartLxd, pb.StartLxdRequest),
        Stop.method: (Stop, pb.StopContainerRequest),
    }
    for method, request, notes in session.journal.left_over():
        if method in kinds:
            operation, message = kinds[method]
            begun = operation(session, message.FromString(request))
            _log.info("carrying on to %s %s", begun.verb, begun.subject)
            begun.resume(notes)

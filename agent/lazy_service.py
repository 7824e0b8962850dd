"""A gRPC service whose code is imported when the first call comes, so that a program that has just
started can listen, and say so, before protobuf is there.
"""

from __future__ import annotations

import grpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Handlers = Sequence[grpc.GenericRpcHandler]


class Registrar:
    """Stands in for the server where generated code, `add_XServicer_to_server`, wants one."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Handlers) -> None:
        """Keeps the handlers of a service."""
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, object]) -> None:
        """The same handlers once more, for servers that look them up by name: not needed."""


class LazyService(grpc.GenericRpcHandler):
    """For server.add_generic_rpc_handlers()."""

    def __init__(self, service: str, load: Callable[[Registrar], None]) -> None:
        """service: its full name; load: imports and adds it, called once, in the event loop."""
        self._prefix = f"/{service}/"
        self._load = load
        self._registrar: Registrar | None = None

    def load(self) -> None:
        """Loads now, when it has not been done yet."""
        if self._registrar is None:
            registrar = Registrar()
            self._load(registrar)
            self._registrar = registrar

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a method, None when the service does not have it."""
        if not handler_call_details.method.startswith(self._prefix):
            return None
        self.load()
        assert self._registrar is not None
        for handler in self._registrar.handlers:
            if (method := handler.service(handler_call_details)) is not None:
                return method
        return None

"""The services that every gRPC server of ours has beside its own: health checks and reflection.
Each is imported when it is first called.
"""

from __future__ import annotations

from agent.lazy_service import LazyService

TYPE_CHECKING = False
if TYPE_CHECKING:
    import grpc.aio

    from agent.lazy_service import Registrar

_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


def add_to(server: grpc.aio.Server, service: str) -> None:
    """Adds health checks and reflection.

    service: full name of the server's own service, whose descriptor is loaded when it is called.
    """
    server.add_generic_rpc_handlers(
        (
            LazyService(_HEALTH, lambda registrar: _add_health(registrar, service)),
            LazyService(_REFLECTION, lambda registrar: _add_reflection(registrar, service)),
        )
    )


def _add_health(registrar: Registrar, service: str) -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.aio.HealthServicer()
    # set() is a coroutine that only tells watchers, of which there are none yet.
    servicer._server_status[service] = health_pb2.HealthCheckResponse.SERVING
    health_pb2_grpc.add_HealthServicer_to_server(servicer, registrar)


def _add_reflection(registrar: Registrar, service: str) -> None:
    from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

    from agent.pb import tremplin_pb2, vm_guest_pb2

    del tremplin_pb2, vm_guest_pb2  # imported for their descriptors, which are in the pool now
    servicer = reflection.aio.ReflectionServicer((service, _HEALTH, _REFLECTION))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, registrar)

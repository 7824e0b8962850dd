"""Health checks and reflection, as their own clients see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.namespace.vm_in_namespaces import Vm, in_vm, refusal

if TYPE_CHECKING:
    from pathlib import Path


def test_health(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        stub = health_pb2_grpc.HealthStub(vm.channel)
        for service in ("", "vm_tools.Maitred"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        code, _ = await refusal(stub.Check(health_pb2.HealthCheckRequest(service="other")))
        assert code is grpc.StatusCode.NOT_FOUND

    in_vm(tmp_path, scenario)


def test_reflection(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(vm.channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="vm_tools.Maitred"),
        ]
        answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
        names = [one.name for one in answers[0].list_services_response.service]
        assert "vm_tools.Maitred" in names
        assert "grpc.health.v1.Health" in names
        texts = answers[1].file_descriptor_response.file_descriptor_proto
        files = [FileDescriptorProto.FromString(text) for text in texts]
        methods = [one.name for file in files for service in file.service for one in service.method]
        assert "SetUpUser" in methods

    in_vm(tmp_path, scenario)


def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        for path in ("/vm_tools.Maitred/NoSuch", "/other.Service/Method"):
            call: Any = vm.channel.unary_unary(path)
            code, _ = await refusal(call(b""))
            assert code is grpc.StatusCode.UNIMPLEMENTED

    in_vm(tmp_path, scenario)

"""The wire does not move: names and numbers of every message, enum and service, as they were agreed
on with hosts that nobody compiles anew. A difference here breaks those hosts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agent.pb import common_pb2, tremplin_pb2, vm_crash_pb2, vm_guest_pb2, vm_host_pb2, vsh_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

GOLDEN = Path(__file__).with_name("wire.txt")


def _type(field: FieldDescriptor) -> str:
    if field.message_type:
        return str(field.message_type.full_name)
    if field.enum_type:
        return str(field.enum_type.full_name)
    return f"scalar {field.type}"


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    for value in enum.values:
        yield f"enum {enum.full_name} {value.name}={value.number}"


def _message(message: Descriptor) -> Iterator[str]:
    yield f"message {message.full_name}"
    for field in message.fields:
        label = "repeated " if field.is_repeated else "optional " if field.has_presence else ""
        yield f"field {field.full_name}={field.number} {label}{_type(field)}"
    for enum in message.enum_types:
        yield from _enum(enum)
    for nested in message.nested_types:
        yield from _message(nested)


def _wire() -> Iterator[str]:
    for module in (common_pb2, vm_guest_pb2, vm_host_pb2, vm_crash_pb2, tremplin_pb2, vsh_pb2):
        file = module.DESCRIPTOR
        for enum in file.enum_types_by_name.values():
            yield from _enum(enum)
        for message in file.message_types_by_name.values():
            yield from _message(message)
        for service in file.services_by_name.values():
            for method in service.methods:
                yield (
                    f"rpc /{service.full_name}/{method.name} "
                    f"{method.input_type.full_name} {method.output_type.full_name}"
                )


def test_the_wire_is_what_was_agreed() -> None:
    assert list(_wire()) == GOLDEN.read_text().splitlines()

"""The gRPC contract: the committed code is generated from the proto file, and no published field, number or type changes."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from server.http.schemas.generate import GenerateRequest
from server.rpc.pb.tidegate.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
PROTO = "protos/tidegate/v1/inference.proto"
LOCK = Path(__file__).with_name("inference.proto.lock")
MADE_BY = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", Path(inference_pb2_grpc.__file__).read_text()).group(1)
TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in vars(FieldDescriptor).items() if name.startswith("TYPE_")}


def protoc(*outputs: object) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "server/rpc/pb=protos", *map(str, outputs), PROTO]
    subprocess.run(command, cwd=ROOT, check=True)


def test_committed_code_has_the_descriptors_of_the_proto(tmp_path):
    protoc(f"--descriptor_set_out={tmp_path / 'set'}")
    (made,) = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    for message in made.message_type:
        for part in (message, *message.nested_type):
            for field in part.field:
                field.ClearField("json_name")  # generated code does not have it
    committed = FileDescriptorProto.FromString(inference_pb2.DESCRIPTOR.serialized_pb)
    assert committed == made, "server/rpc/pb is out of date: run `make proto`"


@pytest.mark.skipif(
    version("grpcio-tools") != MADE_BY,
    reason=f"other versions than {MADE_BY} generate other code",
)
def test_committed_code_is_what_make_proto_writes(tmp_path):
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert len(made) == 3
    for path in made:
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is out of date: run `make proto`"


def fields(message: Descriptor) -> Iterator[str]:
    for field in message.fields:
        label = "repeated " if field.is_repeated else ""
        kind = field.message_type.name if field.message_type else TYPES[field.type]
        presence = f" in {field.containing_oneof.name}" if field.containing_oneof else ""
        yield f"{message.full_name.removeprefix('tidegate.v1.')}.{field.name} = {field.number} {label}{kind}{presence}"
    for nested in message.nested_types:
        yield from fields(nested)


def contract() -> list[str]:
    file = inference_pb2.DESCRIPTOR
    lines = [line for message in file.message_types_by_name.values() for line in fields(message)]
    for service in file.services_by_name.values():
        for method in service.methods:
            stream = "stream " if method.server_streaming else ""
            lines.append(f"{service.full_name}.{method.name}({method.input_type.name}) -> {stream}{method.output_type.name}")
    return lines


def test_no_published_field_has_changed():
    missing = [line for line in LOCK.read_text().splitlines() if line not in contract()]
    assert not missing, "clients rely on these; add new fields instead:\n" + "\n".join(missing)


def test_every_field_is_locked():
    locked = LOCK.read_text().splitlines()
    new = [line for line in contract() if line not in locked]
    assert not new, f"add to {LOCK.name}:\n" + "\n".join(new)


def test_generate_takes_the_fields_of_http():
    """Generate has all fields of HTTP but `stream`, since its answer is always a stream."""
    assert set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name) == set(GenerateRequest.model_fields) - {"stream"}


def test_every_field_and_method_is_commented():
    lines = (ROOT / PROTO).read_text().splitlines()
    bare = [
        line.strip()
        for before, line in itertools.pairwise(lines)
        if re.match(r"\s+(rpc |[\w<>, .]+ = \d+;)", line) and not before.lstrip().startswith("//")
    ]
    assert not bare

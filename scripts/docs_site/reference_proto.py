"""The page about the messages, from proto/ with its comments."""

import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
HEAD = """# Messages and services

What daemons, operators and guests say to each other; [protocol](../protocol.md) is about the use of it.
"""
# Numbers of the fields of descriptor.proto, of which the paths of comments are made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, ENUM_VALUE, SERVICE_METHOD = 2, 2, 2
FILE_SYNTAX = 12

Place = tuple[int, ...]
Field = FieldDescriptorProto


class _Page:
    """One file's part of the page."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self._comments = {
            tuple(location.path): location for location in file.source_code_info.location if location.path
        }

    def comment(self, place: Place) -> str:
        """What is said above an element, or behind it, as one line of Markdown."""
        location = self._comments.get(place)
        if location is None:
            return ""
        text = location.leading_comments or location.trailing_comments
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    def lines(self) -> Iterator[str]:
        """All of it."""
        yield f"## {Path(self.file.name).name}\n"
        yield self.comment((FILE_SYNTAX,)) + "\n"
        for index, service in enumerate(self.file.service):
            yield from self._service(service, (FILE_SERVICE, index))
        for index, message in enumerate(self.file.message_type):
            yield from self._message(message, (FILE_MESSAGE, index))
        for index, enum in enumerate(self.file.enum_type):
            yield from self._enum(enum, (FILE_ENUM, index))

    def _service(self, service: ServiceDescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {service.name}\n\n{self.comment(place)}\n"
        yield "| Call | Request | Response | Meaning |\n|---|---|---|---|"
        for index, method in enumerate(service.method):
            request = ("stream " if method.client_streaming else "") + _link(method.input_type)
            response = ("stream " if method.server_streaming else "") + _link(method.output_type)
            yield f"| `{method.name}` | {request} | {response} | {self.comment((*place, SERVICE_METHOD, index))} |"
        yield ""

    def _message(self, message: DescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {message.name}\n\n{self.comment(place)}\n"
        if not message.field:
            yield "No fields.\n"
            return
        yield "| Number | Field | Type | Meaning |\n|--:|---|---|---|"
        for index, field in enumerate(message.field):
            meaning = self.comment((*place, MESSAGE_FIELD, index))
            if field.HasField("oneof_index") and not field.proto3_optional:
                meaning = f"one of `{message.oneof_decl[field.oneof_index].name}`. {meaning}"
            yield f"| {field.number} | `{field.name}` | {_type(field)} | {meaning} |"
        yield ""

    def _enum(self, enum: EnumDescriptorProto, place: Place) -> Iterator[str]:
        yield f"### {enum.name}\n\n{self.comment(place)}\n"
        yield "| Number | Value | Meaning |\n|--:|---|---|"
        for index, value in enumerate(enum.value):
            yield f"| {value.number} | `{value.name}` | {self.comment((*place, ENUM_VALUE, index))} |"
        yield ""


def render() -> str:
    """The whole page."""
    descriptors = _compile()
    return "\n".join([HEAD, *(line for file in descriptors.file for line in _Page(file).lines())])


def _compile() -> FileDescriptorSet:
    protos = sorted((PROTO / "migrate" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "descriptors"
        command = ["protoc", f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}", "--include_source_info"]
        if protoc.main([*command, f"--descriptor_set_out={out}", *map(str, protos)]) != 0:
            raise SystemExit("protoc failed")
        return FileDescriptorSet.FromString(out.read_bytes())


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _type(field: Field) -> str:
    repeated = "repeated " if field.label == Field.LABEL_REPEATED else ""
    if field.type_name:
        return repeated + _link(field.type_name)
    return repeated + Field.Type.Name(field.type).removeprefix("TYPE_").lower()

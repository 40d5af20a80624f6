"""Messages of any content that their fields allow, and bytes that nearly are messages."""

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

_DEPTH_MAX = 3
_WORDS = ["", "m", "g", "precopy", "follow", "127.0.0.1:1", "[::1]:7400", ":", "nowhere", "\x00", "../x", "a" * 300]
_NUMBERS = {
    FieldDescriptor.CPPTYPE_UINT32: st.sampled_from([0, 1, 2, 255, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from([0, 1, 4096, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 12),
}


def messages(cls, depth=0):
    """Any message of a class."""

    @st.composite
    def build(draw):
        message = cls()
        for field in cls.DESCRIPTOR.fields:
            if draw(st.integers(0, 2)):
                _fill(draw, message, field, depth)
        return message

    return build()


@st.composite
def mutated(draw, of):
    """The bytes of a message, some of them changed, lost or added; or any bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=256))
    data = bytearray(draw(of).SerializeToString())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


def _fill(draw, message, field, depth):
    count = draw(st.integers(0, 3)) if field.is_repeated else 1
    for _ in range(count):
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            if depth < _DEPTH_MAX:
                part = draw(messages(field.message_type._concrete_class, depth + 1))
                target = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
                target.CopyFrom(part)
            continue
        value = draw(_values(field))
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


def _values(field):
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(_WORDS) | st.text(max_size=16).filter(_is_utf8)
    return _NUMBERS[field.cpp_type]


def _is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""The error tree: names that travel, statuses that exist, words for operators."""

import errno

import grpc
import pytest

from migrate import errors
from migrate.errors import ConfigError, GuestHolder, MigrateError, NativeError, UffdError, error_class
from migrate.v1 import types_pb2


def all_errors():
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MigrateError)]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_class_is_found_by_its_wire_name(cls):
    assert error_class(cls.__name__) is cls


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_class_has_a_grpc_status(cls):
    assert cls.grpc_status in grpc.StatusCode.__members__
    assert cls.grpc_status != "OK"


def test_unknown_wire_name_is_the_root():
    assert error_class("ErrorOfTheFuture") is MigrateError


def test_holders_equal_those_of_the_wire():
    on_the_wire = {name.removeprefix("GUEST_HOLDER_"): number for name, number in types_pb2.GuestHolder.items()}

    assert {holder.name: holder.value for holder in GuestHolder} == on_the_wire


@pytest.mark.parametrize("holder", GuestHolder)
def test_every_holder_has_words(holder):
    assert holder.describe()


def test_text_is_message_holder_remedy():
    error = MigrateError("it broke", holder=GuestHolder.SPLIT, remedy="mend it")

    assert str(error) == "it broke; the guest is split: vCPUs at the destination, pages on both hosts; mend it"


def test_text_leaves_out_what_is_not_known():
    assert str(ConfigError("makes no sense")) == "makes no sense"


def test_holder_defaults_to_that_of_the_class():
    assert errors.PostcopyPausedError("x").holder is GuestHolder.SPLIT
    assert errors.GuestLostError("x").holder is GuestHolder.NONE
    assert errors.GuestLostError("x", holder=GuestHolder.SOURCE).holder is GuestHolder.SOURCE


def test_native_error_keeps_operation_and_errno():
    error = UffdError("UFFDIO_COPY", errno.ENOENT)

    assert isinstance(error, NativeError)
    assert (error.operation, error.errno) == ("UFFDIO_COPY", errno.ENOENT)
    assert error.message == "UFFDIO_COPY: No such file or directory"

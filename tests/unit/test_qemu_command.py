"""QEMU's command line: what is refused of it, what another host makes of it."""

import itertools
from pathlib import Path

import pytest

from migrate.errors import ConfigError, PermissionDeniedError
from migrate.guest.qemu.command import (
    check_arriving_options,
    check_options,
    check_qemu_spec,
    command_line,
    format_options,
    options_of_process,
    parse_options,
)
from migrate.v1 import types_pb2 as types


def spec(*options, **fields):
    qemu = types.QemuSpec(options=options, ram_id=fields.pop("ram_id", ""))
    fields = {"name": "g", "kind": types.GUEST_KIND_QEMU, "memory_bytes": 64 << 20, "vcpus": 2, **fields}
    return types.GuestSpec(qemu=qemu, **fields)


def line(*options, **fields):
    machine_type = fields.pop("machine_type", "")
    return command_line(
        spec(*options, **fields),
        program="qemu",
        ram_fd=7,
        monitor_fd=8,
        directory=Path("/run/g.d"),
        machine_type=machine_type,
    )


def pairs(words):
    return list(itertools.pairwise(words))


def test_options_are_taken_apart_and_put_together():
    words = ["-nodefaults", "-m", "1G", "--accel", "tcg", "-append", "-v root=/dev/sda", "-snapshot"]
    options = parse_options(words)
    assert options == [
        ("nodefaults", None),
        ("m", "1G"),
        ("accel", "tcg"),
        ("append", "-v root=/dev/sda"),
        ("snapshot", None),
    ]
    assert parse_options(format_options(options)) == options


@pytest.mark.parametrize("words", [["disk.img"], ["-m", "1G", "disk.img"], ["-"], [""], ["-nodefaults", "x"]])
def test_word_that_is_no_option_is_refused(words):
    with pytest.raises(ConfigError, match="is no option of QEMU"):
        parse_options(words)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "1G"],
        ["--m", "1G"],
        ["-smp", "2"],
        ["-incoming", "defer"],
        ["-S"],
        ["-daemonize"],
        ["-mem-path", "/x"],
        ["-loadvm", "x"],
        ["-object", "memory-backend-ram,id=x,size=1G"],
        ["-machine", "pc,memory-backend=x"],
        ["-M", "pc,memory-backend=x"],
    ],
)
def test_what_is_ours_is_not_for_creators(words):
    with pytest.raises(ConfigError, match="not for you to say"):
        check_options(words)


def test_options_without_end_are_refused():
    with pytest.raises(ConfigError, match="at most 512 words"):
        check_options(["-nodefaults"] * 513)
    with pytest.raises(ConfigError, match="at most 4096 bytes"):
        check_options(["-append", "x" * 4097])


@pytest.mark.parametrize("changed", [{"vcpus": 0}, {"vcpus": 256}, {"ram_id": "a,share=off"}, {"ram_id": "1"}])
def test_spec_that_makes_no_sense_is_refused(changed):
    with pytest.raises(ConfigError):
        check_qemu_spec(spec(**changed))


def test_command_has_ram_monitor_and_sandbox():
    words = line("-nodefaults", "-serial", "file:{dir}/console")

    assert ("-serial", "file:/run/g.d/console") in pairs(words)
    assert ("-m", f"{64 << 20}B") in pairs(words)
    assert ("-smp", "2") in pairs(words)
    ram = f"memory-backend-file,id=migrate-ram,size={64 << 20},mem-path=/proc/self/fd/7,share=on"
    assert ("-object", ram) in pairs(words)
    assert ("-machine", "memory-backend=migrate-ram") in pairs(words)
    assert any("fd=8" in word for word in words)
    assert any(name == "-sandbox" and "spawn=deny" in value for name, value in pairs(words))
    assert "-incoming" not in words


def test_arriving_guest_has_the_machine_and_the_ram_of_its_source():
    words = line("-machine", "pc", ram_id="pc.ram", machine_type="pc-i440fx-7.2")

    assert words.index("type=pc-i440fx-7.2") > words.index("pc")
    assert ("-incoming", "defer") in pairs(words)
    assert any("id=pc.ram," in word for word in words)


def test_sandbox_of_the_creator_is_left_alone():
    assert line("-sandbox", "off").count("-sandbox") == 1


def test_foreign_command_line_loses_what_belongs_to_its_process():
    words = [
        *(
            "-name",
            "old",
            "-m",
            "1G",
            "-smp",
            "2",
            "-object",
            "memory-backend-file,id=ram,size=1G,mem-path=/x,share=on",
        ),
        *("-machine", "pc,memory-backend=ram", "-machine", "memory-backend=ram", "-qmp", "unix:/x", "-S", "-daemonize"),
        *("-pidfile", "/x", "-object", "rng-random,id=r", "-cpu", "max", "-incoming", "defer", "-monitor", "none"),
    ]

    kept = options_of_process(words, "ram")

    assert kept == ["-machine", "pc", "-object", "rng-random,id=r", "-cpu", "max"]
    check_options(kept)


# ---- who brings them ----


def test_arriving_guest_uses_files_that_are_meant_for_guests(tmp_path):
    disks = tmp_path / "disks"
    disks.mkdir()
    words = [
        *("-drive", f"file={disks}/a.img,if=virtio", "-kernel", str(disks / "vmlinuz"), "-append", "root=/dev/sda"),
        *("-serial", "unix:{dir}/console,server=on", "-blockdev", f'{{"driver":"file","filename":"{disks}/b"}}'),
        *("-drive", "file=local.img", "-cpu", "max", "-device", "e1000"),
    ]

    check_arriving_options(words, [disks])
    with pytest.raises(PermissionDeniedError, match="--qemu-dir"):
        check_arriving_options(words, [])


@pytest.mark.parametrize(
    "words",
    [
        ["-drive", "file=/etc/shadow"],
        ["-drive", "file={disks}/../key.pem"],
        ["-drive", "file={disks}/link"],
        ["-drive", "file=../../key.pem"],
        ["-drive", "file={dir}/../../key.pem"],
        ["-drive", "file={disks}/a,,/../../../../etc/shadow"],
        ["-blockdev", '{"driver": "file", "filename": "/etc/shadow"}'],
        ["-drive", "file=nbd://10.0.0.1/x"],
        ["-drive", "file=ssh://host/etc/shadow"],
        ["-kernel", "/boot/vmlinuz"],
        ["-serial", "unix:/run/x"],
        ["-chardev", "file,id=x,path=/etc/cron.d/x"],
        ["-object", "secret,id=x,file=/etc/shadow"],
        ["-fw_cfg", "name=opt/x,file=/etc/shadow"],
        ["-netdev", "tap,id=n,script=/tmp/x"],
    ],
)
def test_arriving_guest_does_not_reach_what_is_not_for_guests(tmp_path, words):
    disks = tmp_path / "disks"
    disks.mkdir()
    (disks / "link").symlink_to("/etc/shadow")
    with pytest.raises(PermissionDeniedError, match="may not"):
        check_arriving_options([word.replace("{disks}", str(disks)) for word in words], [disks])


@pytest.mark.parametrize("name", ["monitor", "qmp", "gdb", "fsdev", "sandbox", "trace", "plugin", "D", "readconfig"])
def test_arriving_guest_brings_nothing_that_opens_a_door(tmp_path, name):
    with pytest.raises(PermissionDeniedError, match=f"may not bring -{name}"):
        check_arriving_options([f"-{name}", "x"], [tmp_path])

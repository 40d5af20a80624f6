"""The judge of the Linux guest's console finds what it is there to find."""

import pytest

from tests.harness.linux_guest import LinuxConsole, judge

BOOT = "<4>[    0.533884] mtrr: your CPUs had inconsistent MTRRdefType settings\r\nclocksource hpet\n"
READY = "ready data_mib=256 versions_mib=16 uptime=4.04\n"
LATE = "<4>[    5.314485] clocksource: Long readout interval, skipping watchdog check:"
GOOD = BOOT + READY + "tick 1\nversions ok 1 writes=0\ntick 2\nsum ok 1\ntick 3\nversions ok 2 writes=4096\n"


def test_a_good_console_has_no_faults():
    report = judge(GOOD)

    assert report.faults == []
    assert (report.ready, report.ticks, report.sums_ok, report.versions_ok) == (True, 3, 1, 2)


def test_a_line_without_its_end_does_not_count():
    report = judge(GOOD + "tick 4")

    assert (report.ticks, report.faults) == (3, [])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("tick 5", "tick 5 came after 3"),
        ("tick 3", "tick 3 came after 3"),
        ("tick 1", "tick 1 came after 3"),
        ("ti", "not expected: ti"),
        ("sum ok 3", "sum ok 3 came after 1"),
        ("versions ok 4 writes=9000", "versions ok 4 came after 2"),
        ("sum BAD 1: abc instead of def", None),
        ("versions BAD: block 1 version 2 word 3 is 4 instead of 5", None),
        ("sh: can't fork: Cannot allocate memory", "not expected: sh: can't fork: Cannot allocate memory"),
        ("<4>[   12.000000] something new", "not expected: <4>[   12.000000] something new"),
        ("<0>[   30.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [md5sum:99]", None),
        ("<3>[   30.1] INFO: task md5sum:99 blocked for more than 10 seconds.", None),
        ("<3>[   30.1] rcu: INFO: rcu_preempt self-detected stall on CPU", None),
        ("<3>[   30.1] rcu: rcu_preempt kthread starved for 2500 jiffies!", None),
        ("<4>[   30.1] clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable", None),
        (f"{LATE} cs_nsec: 1108799625 wd_nsec: 608799330", None),
        (f"{LATE} cs_nsec: 1108799625 wd_nsec: 1108799330 and more", None),
        ("<4>[   30.1] WARNING: CPU: 0 PID: 1 at kernel/time/timekeeping.c:1", None),
        ("<6>[   30.1] md5sum[99]: segfault at 0 ip 0 sp 0 error 4", None),
        ("<1>[   30.1] BUG: Bad page state in process md5sum", None),
        ("<0>[   30.1] Kernel panic - not syncing: Attempted to kill init!", None),
        ("tick <3>[   30.1] rcu: INFO: rcu_sched detected stalls on CPUs/tasks", None),
    ],
)
def test_a_bad_line_is_a_fault(line, fault):
    report = judge(GOOD + line + "\n")

    assert report.faults == [fault or line]


def test_a_complaint_is_one_before_the_guest_is_ready_too():
    assert judge("<3>[    1.0] BUG: unable to handle page fault\n").faults != []


@pytest.mark.parametrize(
    "line",
    [
        "<6>[   30.1] random: crng init done",
        "<4>[ 1.2] hrtimer: interrupt took 9 ns",
        f"{LATE} cs_nsec: 1108799625 wd_nsec: 1108799330",
    ],
)
def test_a_harmless_line_is_none(line):
    assert judge(GOOD + line + "\n").faults == judge(BOOT + line + "\n" + READY).faults == []


def test_a_line_that_a_move_cut_in_two_is_one_line(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_text(GOOD + "tick ")
    console = LinuxConsole(source)
    before = console.report.ticks
    destination.write_text("4\ntick 5\n")
    console.add(destination)

    assert (before, console.report.ticks, console.report.faults) == (3, 5, [])


def test_a_source_that_runs_on_after_the_move_is_a_fault(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_text(GOOD)
    destination.write_text("tick 4\n")
    console = LinuxConsole(source, destination)
    before = console.report.faults
    with source.open("a") as more:
        more.write("tick 4\n")

    assert before == []
    assert console.report.faults == ["tick 4 came after 4"]
    with pytest.raises(AssertionError):
        console.check()
    with pytest.raises(AssertionError):
        console.wait_for_more(ticks=1)

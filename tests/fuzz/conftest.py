"""Says at the end how much the fuzzers did, where fuzzing was asked for."""

from tests.fuzz.fuzzing import FUZZ_S, done


def pytest_terminal_summary(terminalreporter):
    if not FUZZ_S:
        return
    for name, examples, took_s in done:
        terminalreporter.write_line(f"fuzz: {name}: {examples:,} examples in {took_s:.0f} s")

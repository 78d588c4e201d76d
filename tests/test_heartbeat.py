"""The sign of life of long tests."""

from helpers.heartbeat import SECONDS, Heartbeat


def test_a_test_that_runs_long_is_named() -> None:
    now = 100.0
    lines: list[str] = []
    heartbeat = Heartbeat(lines.append, clock=lambda: now)
    now += SECONDS
    heartbeat.beat()
    assert lines.pop() == f"collecting the tests runs for {SECONDS:.0f} s"
    heartbeat.pytest_runtest_logstart("one")
    now += SECONDS - 1
    heartbeat.beat()
    assert lines == []
    heartbeat.pytest_runtest_logstart("two")
    now += 1
    heartbeat.beat()
    assert lines == [f"one runs for {SECONDS:.0f} s, two runs for 1 s"]
    heartbeat.beat()
    heartbeat.pytest_runtest_logfinish("one")
    heartbeat.pytest_runtest_logfinish("two")
    now += 10 * SECONDS
    heartbeat.beat()
    assert len(lines) == 1

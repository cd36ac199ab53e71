"""What benchmarks/execution.py concludes from its rows."""

from benchmarks.execution import jumps_more


def test_real_time_chunking_is_held_to_the_naive_executor_of_its_policy_and_delay():
    def row(kind, jump, policy="a", delay=2):
        return {"kind": kind, "policy": policy, "delay": delay, "switch_jump": jump}

    rows = [row("async", 1.0), row("async", 3.0, delay=4), row("async", 9.0, policy="b")]
    for kind in ("rtc", "rtc_prefix", "rtc_short"):
        assert not jumps_more(row(kind, 0.9), rows)
        assert jumps_more(row(kind, 1.0), rows) and jumps_more(row(kind, 2.0), rows)
        assert not jumps_more(row(kind, 2.0, delay=4), rows) and jumps_more(row(kind, 3.5, delay=4), rows)
        assert not jumps_more(row(kind, 8.0, policy="b"), rows)
        assert not jumps_more(row(kind, 99.0, delay=1), rows)  # nothing to compare with
    assert not any(jumps_more(row(kind, 99.0), rows) for kind in ("async", "ensemble", "receding"))

"""The server around a stand-in: batching, limits, errors, and what a client may not do to others."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from tests.serve.server.harness import SPEC, Echo, eventually, observe, serving
from vla_jax.serve.client import ServerError
from vla_jax.serve.server import codec
from vla_jax.serve.server.errors import Failed, Refused
from vla_jax.serve.server.metrics import Metrics


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_first_frame_says_what_is_expected():
    with serving(Echo()) as server, server.client() as client:
        assert client.metadata["observation"] == {
            "observation/top": {"shape": [4, 4, 3], "dtype": "uint8"},
            "observation/state": {"shape": [2], "dtype": "float32"},
            "prompt": {"shape": [], "dtype": "str"},
        }
        assert client.metadata["actions"] == {"shape": [3, 2], "dtype": "float32"}
        assert (client.metadata["horizon"], client.metadata["control_hz"]) == (3, 10.0)


def test_replies_have_the_protocols_keys():
    with serving(Echo()) as server, server.client() as client:
        first, second = client.infer(observe(1.0), seed=5), client.infer(observe(2.0))
    np.testing.assert_array_equal(first["actions"], [[1, -1], [2, 0], [3, 1]])
    assert first["actions"].dtype == np.float32 and (first["seed"], first["bucket"]) == (5, 1)
    assert first["policy_timing"].keys() == {"infer_ms"}
    assert first["server_timing"].keys() == {"infer_ms", "queue_ms"}
    assert second["server_timing"].keys() == {"infer_ms", "queue_ms", "prev_total_ms"}


def test_rows_of_many_clients_share_calls_and_nobody_gets_anothers():
    engine = Echo()
    with serving(engine) as server:
        with server.client() as blocker, ThreadPoolExecutor(9) as pool:
            blocked = pool.submit(blocker.infer, observe(0, "wait"))
            engine.running.wait(20)

            def ask(number: int) -> np.ndarray:
                with server.client() as client:
                    return client.infer(observe(number))["actions"][0, 0]

            answers = [pool.submit(ask, number) for number in range(8)]
            eventually(lambda: server.app.metrics.value("vla_queued_rows") == 8)
            engine.gate.set()
            assert [answer.result() for answer in answers] == list(range(8))
            blocked.result()
        assert engine.calls == [1, 4, 4]
        assert server.app.metrics.value("vla_batch_rows_sum") == 9


def test_programs_are_not_mixed_in_a_call():
    engine = Echo()
    with serving(engine) as server, server.client() as blocker, ThreadPoolExecutor(5) as pool:
        pool.submit(blocker.infer, observe(0, "wait"))
        engine.running.wait(20)

        def ask(samples: int) -> None:
            with server.client() as client:
                client.infer(observe(), samples=samples)

        waiting = [pool.submit(ask, samples) for samples in (1, 2, 1, 2)]
        eventually(lambda: server.app.metrics.value("vla_queued_rows") == 4)
        engine.gate.set()
        [each.result() for each in waiting]
    assert engine.calls == [1, 2, 2]


def test_one_robot_alone_does_not_wait_for_others():
    with serving(Echo(), max_wait_ms=2000) as server, server.client() as client:
        began = time.monotonic()
        client.infer(observe())
        assert time.monotonic() - began < 1.5


def test_a_client_may_write_to_the_actions_that_it_got():
    with serving(Echo()) as server, server.client() as client:
        for actions in (client.infer(observe())["actions"], client.infer_batch([observe()])[0]["actions"]):
            actions[:, 0] = 7


def test_a_batch_in_one_message_keeps_its_order_and_seeds():
    with serving(Echo()) as server, server.client() as client:
        replies = client.infer_batch([observe(x) for x in (3, 1, 2)], [{"seed": 7}, {}, {"seed": 9}])
        assert [reply["actions"][0, 0] for reply in replies] == [3, 1, 2]
        assert [replies[0]["seed"], replies[2]["seed"]] == [7, 9]
        with pytest.raises(Refused, match=r"batch\[1\]: observation/state is float32\[1\]"):
            client.infer_batch([observe(), {**observe(), "observation/state": np.zeros(1, np.float32)}])
        wrong = {**observe(), "observation/state": np.zeros(1, np.float32)}
        assert server.ask({"batch": [observe(), wrong]}).startswith(
            "invalid: batch[1]: observation/state is float32[1]"
        )
        with pytest.raises(Refused, match="1 to 4 requests"):
            client.infer_batch([observe()] * 5)
        assert client.infer(observe(4.0))["actions"][0, 0] == 4


def test_an_exception_reaches_its_client_only_and_closes_as_openpi_does():
    engine = Echo()
    with serving(engine) as server, server.client() as blocker, ThreadPoolExecutor(4) as pool:
        blocked = pool.submit(blocker.infer, observe(0, "wait"))
        engine.running.wait(20)

        def ask(prompt: str) -> float:
            with server.client() as client:
                return client.infer(observe(8, prompt))["actions"][0, 0]

        bad = server.raw()
        bad.send(codec.encode(observe(0, "raise")))
        good, poisoned = pool.submit(ask, "go"), pool.submit(ask, "nan")
        eventually(lambda: server.app.metrics.value("vla_queued_rows") == 3)
        engine.gate.set()
        text = bad.recv()
        assert text.startswith("Traceback") and "ArithmeticError: the arm has fallen off" in text
        with pytest.raises(ConnectionClosedError) as closed:
            bad.recv()
        assert closed.value.rcvd.code == 1011
        assert closed.value.rcvd.reason == "Internal server error. Traceback included in previous frame."
        assert good.result() == 8
        with pytest.raises(ServerError, match="not finite"):
            poisoned.result()
        blocked.result()
        assert ask("go") == 8
        assert server.app.metrics.value("vla_requests_total", outcome="error") == 2
        assert server.app.metrics.value("vla_batch_split_total") == 1


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("No such file: '/srv/runs/secret/step 7/x.npz' (os)", "No such file: '[path] [path]' (os)"),
        (r"cannot read C:\Users\robot\key.pem", "cannot read C:[path]"),
        (
            'at runs/x/params, line 3\n  File "/opt/lib/a.py", line 4',
            'at [path], line 3 File "[path]", line 4',
        ),
        ("observation/state has 7/8 parts; x / y", "observation/state has [path] parts; x / y"),
    ],
)
def test_no_path_of_the_server_leaves_it(message, said):
    class Fails(Echo):
        def run(self, rows):
            raise OSError(message)

    with serving(Fails()) as server, server.client() as client, pytest.raises(ServerError) as failed:
        client.infer(observe())
    assert str(failed.value) == f"Traceback (where it happened is in the server's log):\nOSError: {said}\n"


def test_overload_is_said_and_the_connection_goes_on():
    engine = Echo()
    with serving(engine, max_queue=2) as server, ThreadPoolExecutor(2) as pool:
        clients = [server.client() for _ in range(3)]
        running = pool.submit(clients[0].infer, observe(0, "wait"))
        engine.running.wait(20)
        waiting = pool.submit(clients[1].infer, observe(1))
        eventually(lambda: server.app.metrics.value("vla_pending_rows") == 2)
        with pytest.raises(
            Refused, match="overloaded: 2 requests are being served, 2 is the limit"
        ) as refusal:
            clients[2].infer(observe(2))
        assert refusal.value.code == "overloaded"
        engine.gate.set()
        running.result(), waiting.result()
        assert clients[2].infer(observe(2))["actions"][0, 0] == 2
        [client.close() for client in clients]


@pytest.mark.parametrize("prompt", ["wait", "go"])
def test_deadlines_hold_while_waiting_and_while_computing(prompt):
    engine = Echo()
    with serving(engine) as server, server.client() as first, server.client() as second:
        second.infer(observe())  # what happens once, such as imports, is behind it
        engine.calls.clear(), engine.running.clear()
        thread = threading.Thread(target=first.infer, args=(observe(0, "wait"),))
        if prompt == "go":  # the second one has to wait for the first
            thread.start()
            engine.running.wait(20)
        with pytest.raises(Refused, match="deadline") as refusal:
            second.infer(observe(0, prompt), deadline_ms=400)
        assert refusal.value.code == "deadline"
        engine.gate.set()
        if prompt == "go":
            thread.join()
        assert second.infer(observe(3))["actions"][0, 0] == 3
    assert len(engine.calls) == 2, "what is past its deadline is not computed"


def test_the_servers_own_deadline_is_the_longest():
    engine = Echo()
    with serving(engine, deadline_ms=80) as server, server.client() as client:
        with pytest.raises(Refused, match="deadline"):
            client.infer(observe(0, "wait"), deadline_ms=60_000)
        engine.gate.set()


def test_rows_of_clients_that_have_gone_are_not_computed():
    engine = Echo()
    with serving(engine) as server, server.client() as blocker, ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(blocker.infer, observe(0, "wait"))
        engine.running.wait(20)
        goner = server.raw()
        goner.send(codec.encode(observe(1)))
        eventually(lambda: server.app.metrics.value("vla_queued_rows") == 1)
        goner.close()
        eventually(lambda: server.app.metrics.value("vla_queued_rows") == 0)
        engine.gate.set()
        blocked.result()
        eventually(lambda: server.app.metrics.value("vla_pending_rows") == 0)
    assert engine.calls == [1]


def test_health_is_answered_while_the_policy_computes():
    engine = Echo()
    with serving(engine) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.infer, observe(0, "wait"))
        engine.running.wait(20)
        http = server.url.replace("ws", "http")
        assert get(f"{http}/healthz") == (200, "OK\n")
        status, text = get(f"{http}/metrics")
        assert status == 200 and "vla_pending_rows 1.0" in text and "# TYPE vla_batch_rows histogram" in text
        assert get(f"{http}/secrets")[0] == 404
        engine.gate.set()
        busy.result()


def test_a_token_is_needed_for_all_but_health():
    with serving(Echo(), token="correct-horse") as server:
        http = server.url.replace("ws", "http")
        for token in (None, "wrong-horse", "correct-hors\xe9"):
            with pytest.raises(InvalidStatus) as refused:
                server.client(token=token)
            assert refused.value.response.status_code == 401
        assert get(f"{http}/healthz")[0] == 200
        assert get(f"{http}/metrics")[0] == 401
        assert get(f"{http}/metrics", Authorization="Api-Key correct-horse")[0] == 200
        with server.client(token="correct-horse") as client:
            assert client.infer(observe(1))["actions"][0, 0] == 1


def test_web_pages_may_not_connect():
    with serving(Echo()) as server, pytest.raises(InvalidStatus) as refused:
        server.raw(origin="https://example.org")
    assert refused.value.response.status_code == 403


def test_connections_are_bounded():
    with serving(Echo(), max_connections=1) as server:
        with server.client() as client:
            with pytest.raises(InvalidStatus) as refused:
                server.client()
            assert refused.value.response.status_code == 503
            client.infer(observe())
        with server.client(wait_s=20) as client:
            client.infer(observe())


def test_draining_answers_what_was_accepted_and_then_says_goodbye():
    engine = Echo()
    with serving(engine) as server:
        busy, idle = server.raw(), server.raw()
        busy.send(codec.encode(observe(5, "wait")))
        engine.running.wait(20)
        server.app.stop()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv()
        assert closed.value.rcvd.code == 1001
        with pytest.raises(ConnectionRefusedError):
            server.raw()
        engine.gate.set()
        assert codec.decode(busy.recv())["actions"][0, 0] == 5
        with pytest.raises(ConnectionClosed) as closed:
            busy.recv()
        assert closed.value.rcvd.code == 1001
        assert server.stop() is True


def test_a_call_that_hangs_does_not_keep_the_server_from_stopping():
    engine = Echo()
    with serving(engine, drain_s=0.1) as server:
        hanging = server.raw()
        hanging.send(codec.encode(observe(0, "wait")))
        engine.running.wait(20)
        assert server.stop() is False
        with pytest.raises(ConnectionClosed) as closed:
            hanging.recv()
        assert closed.value.rcvd.code == 1001
        engine.gate.set()


def test_a_reply_that_comes_late_is_nobodys():
    """After a timeout the connection is of no more use: the next request would be answered with the last one's."""
    engine = Echo()
    with serving(engine) as server:
        with server.client(timeout_s=0.2) as late:
            with pytest.raises(TimeoutError):
                late.infer(observe(1, "wait"))
            engine.gate.set()
            with pytest.raises(ConnectionClosed):
                late.infer(observe(2))
        with server.client() as client:
            assert client.infer(observe(3))["actions"][0, 0] == 3


def test_keys_can_be_renamed_and_nested():
    with serving(Echo(), rename=("images/cam=observation/top", "state=observation/state")) as server:
        message = {
            "images": {"cam": np.zeros((4, 4, 3), np.uint8)},
            "state": np.array([6.0, 0]),
            "prompt": "go",
        }
        with server.client() as client:
            assert client.infer(message)["actions"][0, 0] == 6
            with pytest.raises(Refused, match="unknown key 'images/can'"):
                client.infer({**message, "images": {"can": message["images"]["cam"]}})


def test_logs_are_json_and_do_not_flood(capsys):
    import io

    from vla_jax.serve.server import logs

    stream = io.StringIO()
    logs.write_to(stream)
    ours = logs.Logs()
    for number in range(1000):
        ours.warning("refused", number=number)
    ours.error("failed", ArithmeticError("x"), connection=3)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert 6 <= len(lines) <= 20 and lines[0]["event"] == "refused" and lines[0]["level"] == "warning"
    assert lines[-1]["connection"] == 3 and "ArithmeticError: x" in lines[-1]["traceback"]
    try:
        raise ArithmeticError("y")
    except ArithmeticError as error:
        ours.error("failed", Failed.of(error).trace, connection=4)
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert last["connection"] == 4 and __file__ in last["traceback"], "the log has all of it"


def test_servers_count_for_themselves():
    assert SPEC.options == ("seed", "samples", "deadline_ms")
    one, other = Metrics(), Metrics()
    one.rows.inc(3)
    assert (one.value("vla_rows_total"), other.value("vla_rows_total")) == (3, 0)

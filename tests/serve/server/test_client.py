"""The client refuses what the server would, before anything is sent, and goes on after every refusal."""

import numpy as np
import pytest

from tests.serve.server.harness import SPEC, Echo, observe, serving
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.spec import Spec

RESIZING = Spec(
    **{field: getattr(SPEC, field) for field in SPEC.__dataclass_fields__} | {"max_pixels": 480 * 640}
)


def with_image(image) -> dict:
    return observe() | {"observation/top": image}


WRONG = {
    "image size is over 307200 pixels": with_image(np.zeros((720, 1280, 3), np.uint8)),
    "image size is over 307200 pixels (": with_image(np.zeros((481, 640, 3), np.uint8)),
    r"observation/top is uint8\[3, 4, 4\]; .*channels last": with_image(np.zeros((3, 4, 4), np.uint8)),
    r"observation/top is float32\[4, 4, 3\]": with_image(np.zeros((4, 4, 3), np.float32)),
    r"observation/state is float32\[3\]; float32\[2\]": observe() | {"observation/state": np.zeros(3, np.float32)},
    "finite numbers are expected": observe() | {"observation/state": np.array([0, np.nan])},
    "prompt is a text of 0 characters": observe(prompt=""),
    "unknown key 'observation/tpo'": observe() | {"observation/tpo": np.zeros(3)},
    "options.seed": observe() | {"options": {"seed": -1}},
    "the server reads": observe() | {"mask": np.zeros((1000, 1000, 3), np.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG, ids=range(len(WRONG)))
def test_a_client_can_be_used_after_every_refusal(message):
    with serving(Echo(spec=RESIZING)) as server, server.client() as client:
        match = message.replace(" (", r" \(")
        for ask in (client.infer, lambda wrong: client.infer_batch([observe(), wrong])):
            with pytest.raises(Refused, match=f"invalid: .*{match}"):
                ask(WRONG[message])
            assert client.infer(observe(2))["actions"][0, 0] == 2
        with pytest.raises(Refused, match="deadline"):
            client.infer(observe(0, "wait"), deadline_ms=100)
        server.app._engine.gate.set()
        assert client.infer(observe(3))["actions"][0, 0] == 3


@pytest.mark.parametrize("what", [object(), np.zeros(2, np.complex64), {1, 2}])
def test_what_has_no_form_on_the_wire_leaves_the_client_usable(what):
    with serving(Echo()) as server, server.client() as client:
        with pytest.raises((TypeError, ValueError)):
            client.infer(observe() | {"observation/extra": what})
        assert client.infer(observe(2))["actions"][0, 0] == 2


def test_frames_of_a_usual_camera_fit_into_a_message_and_others_are_named():
    """Of a policy of small images; without our client's checks, as openpi's has none."""
    frame = np.zeros((480, 640, 3), np.uint8)
    with serving(Echo(spec=RESIZING)) as server:
        assert server.ask(with_image(frame))["actions"].shape == (3, 2)
        assert "image size is over" in server.ask(with_image(np.zeros((480, 641, 3), np.uint8)))
    with serving(Echo()) as server, server.client() as client:  # a server that refuses other sizes
        said = r"observation/top is uint8\[480, 640, 3\]; uint8\[4, 4, 3\] is expected .*resize it"
        with pytest.raises(Refused, match=said):
            client.infer(with_image(frame))
        assert client.infer(observe(2))["actions"][0, 0] == 2


def test_a_message_that_is_too_long_is_closed_with_a_reason_that_says_so():
    from websockets.exceptions import ConnectionClosed

    with serving(Echo()) as server, pytest.raises(ConnectionClosed) as closed:
        server.ask(bytes(SPEC.max_bytes + 1))
    assert closed.value.rcvd.code == 1009
    assert f"over {SPEC.max_bytes} bytes: check image size" in closed.value.rcvd.reason

"""What a process can no longer say itself: a helper process says it after its sudden end.

Where process 0 dies, JAX's runtime aborts all others at once with a C++ stack trace; a process that ran out of
memory is killed without any word. So each process leaves a sentence with a tiny helper, which waits for the end
of a pipe: taken back before an orderly exit, printed otherwise.
"""

import subprocess
import sys

_HELPER = """
import signal, socket, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
name, address = sys.argv[1:]
if sys.stdin.read():  # until the pipe ends; anything in it means an orderly exit
    sys.exit()
host, port = address.rsplit(":", 1)
gone = 0
for _ in range(3):  # a coordinator that is about to die may still answer once
    time.sleep(0.5)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        gone += 1
if gone > 1:
    reason = f"process 0, the coordinator at {address}, is gone"
else:
    reason = "it was killed or it crashed; if nothing is said above, the machine may have run out of memory"
print(f"error: [{name}] ended suddenly: {reason}; start all processes again to continue", file=sys.stderr)
"""

_helper: subprocess.Popen | None = None


def leave(name: str, coordinator: str) -> None:
    """From now on a sudden end of this process is reported under `name`."""
    global _helper
    command = [sys.executable, "-I", "-S", "-c", _HELPER, name, coordinator]
    _helper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )


def take_back() -> None:
    """Call it before an orderly exit."""
    global _helper
    if _helper is None or _helper.stdin is None:
        return
    try:
        _helper.stdin.write(b"orderly")
        _helper.stdin.close()
        _helper.wait(timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        _helper.kill()
    _helper = None

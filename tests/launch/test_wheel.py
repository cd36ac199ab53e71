"""What is installed: `vla_jax` and nothing else at the top level, and a command that works from any directory.

The wheel is built by the environment's own setuptools and unpacked into a folder that comes first on the path; nothing
is downloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("vla_jax", "configs", "launch")
FILES = ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip has put a copy of the project."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in FOLDERS:  # a build leaves files where the project is
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target", target)
    install = [sys.executable, "-m", "pip", "install", "--quiet", *options, source]
    done = subprocess.run(list(map(str, install)), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return target


def run(command, folder: Path, *path: Path) -> subprocess.CompletedProcess:
    """Runs in `folder`, with `path` before the environment's own packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )


def test_only_vla_jax_is_installed(installed):
    """launch is ROS 2's name, configs and tests are anybody's."""
    assert {path.name for path in installed.iterdir()} == {"vla_jax", "vla_jax-0.1.0.dist-info", "bin"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["vla-jax"]

    def sources(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}

    configs = {f"configs/{name}" for name in sources(ROOT / "configs")}
    assert configs and sources(installed / "vla_jax") == sources(ROOT / "vla_jax") | configs


def test_the_command_runs_elsewhere_with_a_config_by_name(installed, tmp_path):
    """As far as the data set, which is not there; what it says is what its user can type."""
    options = ("--config", "tabletop_tokens", "--run-dir", "run", "--data.path", "nothing")
    done = run([installed / "bin/vla-jax", "train", *options], tmp_path, installed)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("; make one with vla-jax collect --out nothing")


def test_configs_are_the_installed_ones(installed, tmp_path):
    """Even where the package's neighbour is a folder `configs`, of another package; one's own folder comes first."""
    (installed / "configs").mkdir()
    (installed / "configs/tabletop.py").write_text("def get_config(): return 'foreign'\n")
    code = (
        "from vla_jax.cli.config_file import find_config, load_config\n"
        "print(find_config('tabletop').resolve(), find_config('images/shapes').resolve())\n"
        "print(load_config('tabletop_tokens').model.expert.kind)"
    )
    done = run([sys.executable, "-c", code], tmp_path, installed)
    shutil.rmtree(installed / "configs")
    folder = installed.resolve() / "vla_jax/configs"
    assert done.stdout.split() == [f"{folder}/tabletop.py", f"{folder}/images/shapes.py", "tokens"], (
        done.stderr
    )
    own = tmp_path / "configs/tabletop.py"
    own.parent.mkdir()
    own.write_text("def get_config(): return 'own'\n")
    done = run([sys.executable, "-c", code], tmp_path, installed)
    assert done.stdout.split()[0] == str(own.resolve()), done.stderr


def test_another_package_of_the_name_launch_stays(installed, tmp_path):
    """With ours before it on the path, and after it."""
    foreign = tmp_path / "foreign"
    (foreign / "launch").mkdir(parents=True)
    (foreign / "launch/__init__.py").write_text("whose = 'ROS 2'\n")
    code = "import vla_jax.cli.entry, launch; print(launch.whose)"
    for path in ((installed, foreign), (foreign, installed)):
        done = run([sys.executable, "-c", code], tmp_path, *path)
        assert done.stdout == "ROS 2\n", done.stderr

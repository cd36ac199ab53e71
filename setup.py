"""Which packages a wheel has: `vla_jax` alone. pyproject.toml has everything else.

`configs` goes into it as `vla_jax.configs`, so that the installed commands find experiments by name: pyproject.toml
cannot put a package elsewhere and find the others by itself. `launch` stays out: ROS 2 has one.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vla_jax", "vla_jax.*"]),
        *(f"vla_jax.{name}" for name in find_packages(include=["configs", "configs.*"])),
    ],
    package_dir={"vla_jax.configs": "configs"},
)

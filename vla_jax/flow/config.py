"""What a process and a solver can be told, checked where it is written down."""

import dataclasses
from typing import Literal, get_args

PathName = Literal["cond_ot", "polynomial", "vp", "linear_vp", "cosine"]
TimeName = Literal["uniform", "beta", "logit_normal"]
Method = Literal["euler", "midpoint", "heun", "rk4"]

STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
INFINITE_END = ("vp", "linear_vp")  # sigma ~ sqrt(1 - t): the velocity of one sample is infinite at t = 1


def require(value: str, allowed: object, where: str) -> None:
    """ValueError unless `value` is one of the strings of the Literal `allowed`."""
    if value not in get_args(allowed):
        raise ValueError(f"{where} is {value!r}; use one of {', '.join(get_args(allowed))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What noise means: how a chunk is corrupted in training and what the network predicts."""

    kind: Literal["flow", "regression"] = "flow"
    """flow: predict the velocity from noise to data. regression: predict the actions at once, from zeros."""
    loss: Literal["mse", "l1"] = "mse"
    """How prediction and target are compared, element by element."""
    path: PathName = "cond_ot"
    """flow: the way from noise (t = 0) to data (t = 1). cond_ot is the straight line."""
    power: float = 2.0
    """flow, path polynomial: alpha = t^power."""
    time: TimeName = "beta"
    """flow: the law of t in training. beta is pi0's, with more mass on noisy times."""
    beta: float = 1.5
    """flow, time beta: t = t_max (1 - B) with B ~ Beta(beta, 1); 1 is uniform, larger is noisier."""
    logit_mean: float = 0.0
    """flow, time logit_normal: mean of logit(t); larger is closer to data."""
    logit_std: float = 1.0
    """flow, time logit_normal: standard deviation of logit(t)."""
    t_min: float = 0.0
    """flow: smallest time trained on (0 is pure noise)."""
    t_max: float = 0.999
    """flow: largest time trained on; 0.999 is pi0's. Sampling always ends at 1."""
    stratified: bool = False
    """flow: draw one t from each of b equal slices of the law, in random order, instead of b free ones."""

    def __post_init__(self):
        require(self.kind, Literal["flow", "regression"], "process.kind")
        require(self.loss, Literal["mse", "l1"], "process.loss")
        require(self.path, PathName, "process.path")
        require(self.time, TimeName, "process.time")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"process.t_min {self.t_min}, t_max {self.t_max}: need 0 <= t_min < t_max <= 1")
        if self.power < 1:
            raise ValueError(f"process.power {self.power} has an infinite velocity at t = 0; use 1 or more")
        if self.beta <= 0 or self.logit_std <= 0:
            raise ValueError(f"process.beta {self.beta} and logit_std {self.logit_std} must be positive")
        if self.kind == "flow" and self.path in INFINITE_END and self.t_max == 1:
            raise ValueError(
                f"process.path {self.path} has an infinite velocity at t = 1; use process.t_max=0.999"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How noise is turned into data by a trained field."""

    method: Method = "euler"
    """Explicit Runge-Kutta method: euler (order 1), midpoint and heun (2), rk4 (4)."""
    num_steps: int = 10
    """Steps from t = 0 to t = 1; each costs 1, 2, 2 or 4 evaluations of the network."""
    grid: Literal["uniform", "edm"] = "uniform"
    """Where the steps end: equally spaced, or Karras et al.'s spacing (rho = 7), denser near data."""
    unroll: int = 1
    """Steps per iteration of the compiled loop; more compiles longer and may run faster."""

    def __post_init__(self):
        require(self.method, Method, "solver.method")
        require(self.grid, Literal["uniform", "edm"], "solver.grid")
        if self.num_steps < 1 or self.unroll < 1:
            raise ValueError(f"solver.num_steps {self.num_steps} and unroll {self.unroll} must be at least 1")

    @property
    def nfe(self) -> int:
        """Evaluations of the field in one solve."""
        return self.num_steps * STAGES[self.method]

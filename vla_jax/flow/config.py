"""What a process and a solver can be told, checked where it is written down."""

import dataclasses
from typing import Literal, get_args

from vla_jax.finite import finite

Kind = Literal["flow", "ddpm", "regression"]
PathName = Literal["cond_ot", "polynomial", "vp", "linear_vp", "cosine", "ddpm_linear", "ddpm_cosine"]
TimeName = Literal["uniform", "beta", "logit_normal"]
PredictionName = Literal["eps", "x1", "v", "score"]
Method = Literal[
    "euler", "midpoint", "heun", "heun3", "rk4", "rk38", "dopri5", "tsit5", "ddim", "ancestral", "sde"
]  # fmt: skip

STAGES = {
    "euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "rk38": 4, "ddim": 1, "ancestral": 1, "sde": 1,
}  # fmt: skip
ADAPTIVE = ("dopri5", "tsit5")
FIXED = ("euler", "midpoint", "heun", "heun3", "rk4", "rk38")
ASK_THE_END = (*ADAPTIVE, "heun", "rk4", "rk38")  # a stage of the last step stands at t = 1
STOCHASTIC = ("ddim", "ancestral", "sde")
INFINITE_END = ("vp", "linear_vp")  # sigma ~ sqrt(1 - t): the velocity of one sample is infinite at t = 1
STEPPED = ("ddpm_linear", "ddpm_cosine")


def require(value: str, allowed: object, where: str) -> None:
    """ValueError unless `value` is one of the strings of the Literal `allowed`."""
    if value not in get_args(allowed):
        raise ValueError(f"{where} is {value!r}; use one of {', '.join(get_args(allowed))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("process.")
class ProcessConfig:
    """What noise means: how a chunk is corrupted in training and what the network predicts."""

    kind: Kind = "flow"
    """flow: predict the velocity from noise to data. ddpm: predict noise, data or a mixture of both.
    regression: predict the actions at once, from zeros."""
    loss: Literal["mse", "l1"] = "mse"
    """How prediction and target are compared, element by element."""
    path: PathName = "cond_ot"
    """flow, ddpm: the way from noise (t = 0) to data (t = 1). cond_ot is the straight line; ddpm_linear and
    ddpm_cosine are tables of diffusion steps, for ddpm only."""
    power: float = 2.0
    """path polynomial: alpha = t^power."""
    diffusion_steps: int = 1000
    """path ddpm_linear, ddpm_cosine: length of the table."""
    prediction: PredictionName = "eps"
    """ddpm: what the network predicts. score is sigma times the score, which is -eps."""
    clip: float | None = None
    """ddpm: bound on the predicted data while sampling, e.g. 1 for actions normalised to [-1, 1]."""
    time: TimeName = "beta"
    """flow, ddpm: the law of t in training. beta is pi0's, with more mass on noisy times; DDPM's own is uniform
    with t_max 1."""
    beta: float = 1.5
    """time beta: t = t_max (1 - B) with B ~ Beta(beta, 1); 1 is uniform, larger is noisier."""
    logit_mean: float = 0.0
    """time logit_normal: mean of logit(t); larger is closer to data."""
    logit_std: float = 1.0
    """time logit_normal: standard deviation of logit(t)."""
    t_min: float = 0.0
    """flow, ddpm: smallest time trained on (0 is pure noise)."""
    t_max: float = 0.999
    """flow, ddpm: largest time trained on; 0.999 is pi0's. Sampling always ends at 1."""
    stratified: bool = False
    """flow, ddpm: draw one t from each of b equal slices of the law, in random order, instead of b free ones."""
    coupling: Literal["independent", "sinkhorn"] = "independent"
    """flow: which noise goes with which chunk. sinkhorn pairs near ones within the batch (optimal transport);
    this biases models with a condition and gains little beyond a few dimensions: docs/flow.md."""

    def __post_init__(self):
        require(self.kind, Kind, "process.kind")
        require(self.loss, Literal["mse", "l1"], "process.loss")
        require(self.path, PathName, "process.path")
        require(self.prediction, PredictionName, "process.prediction")
        require(self.time, TimeName, "process.time")
        require(self.coupling, Literal["independent", "sinkhorn"], "process.coupling")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"process.t_min {self.t_min}, t_max {self.t_max}: need 0 <= t_min < t_max <= 1")
        if self.power <= 1:
            raise ValueError(f"process.power {self.power} must be above 1; use path=cond_ot for 1")
        if self.beta <= 0 or self.logit_std <= 0:
            raise ValueError(f"process.beta {self.beta} and logit_std {self.logit_std} must be positive")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"process.clip {self.clip} must be positive, or None for no bound")
        if self.kind != "ddpm":
            ignored = {"prediction": self.prediction != "eps", "clip": self.clip is not None}
            for name in [name for name, given in ignored.items() if given]:
                raise ValueError(
                    f"process.{name} {getattr(self, name)} does nothing with kind={self.kind}; use kind=ddpm, or leave "
                    "it out"
                )
        if self.kind == "flow":
            if self.path in STEPPED:
                raise ValueError(
                    f"process.path {self.path} is a table of diffusion steps; use kind=ddpm or path=vp"
                )
            if self.path in INFINITE_END and self.t_max == 1:
                raise ValueError(
                    f"process.path {self.path} has an infinite velocity at t = 1; use t_max=0.999"
                )
        elif self.coupling != "independent":
            raise ValueError(f"process.coupling {self.coupling} is for kind=flow; use coupling=independent")
        if self.kind == "ddpm" and self.prediction in ("eps", "score") and self.path not in (*STEPPED, "vp"):
            raise ValueError(
                f"process.prediction {self.prediction} says nothing of the data at t = 0 on path {self.path};"
                " use prediction=v, or path=ddpm_cosine"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("solver.")
class SolverConfig:
    """How noise is turned into data by a trained field."""

    method: Method = "euler"
    """Fixed steps: euler (order 1), midpoint and heun (2), heun3 (3), rk4 and rk38 (4; the 3/8 rule is what
    torchdiffeq calls rk4). Adaptive: dopri5, tsit5 (need diffrax). ddpm only: ddim, ancestral, sde
    (Euler-Maruyama on the reverse SDE)."""
    num_steps: int = 10
    """Steps from t = 0 to t = 1, of 1 (euler) to 4 (rk4) evaluations of the network each. Adaptive methods choose
    their own and use this only for where intermediate points are reported."""
    grid: Literal["uniform", "edm"] = "uniform"
    """Where the steps end: equally spaced, or Karras et al.'s spacing (rho = 7), denser near data."""
    eta: float = 0.0
    """ddim: noise put back at each step; 0 is deterministic, 1 is ancestral sampling."""
    rtol: float = 1e-5
    """Adaptive methods: relative error of a step."""
    atol: float = 1e-5
    """Adaptive methods: absolute error of a step."""
    temperature: float = 0.0
    """Chunks as tokens (model.expert.kind=tokens) only: 0 takes the likeliest token each time, 1 samples the learned
    distribution."""
    unroll: int = 1
    """Steps per iteration of the compiled loop; more compiles longer and may run faster."""

    def __post_init__(self):
        require(self.method, Method, "solver.method")
        require(self.grid, Literal["uniform", "edm"], "solver.grid")
        if self.num_steps < 1 or self.unroll < 1:
            raise ValueError(f"solver.num_steps {self.num_steps} and unroll {self.unroll} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"solver.temperature {self.temperature} must not be negative; 0 is greedy")
        if self.eta < 0 or self.rtol <= 0 or self.atol <= 0:
            raise ValueError(
                f"solver.eta {self.eta}, rtol {self.rtol}, atol {self.atol} must not be negative"
            )
        if self.eta and self.method != "ddim":
            raise ValueError(f"solver.eta {self.eta} is for method ddim, not {self.method}; use eta=0")

    @property
    def nfe(self) -> int | None:
        """Evaluations of the field in one solve; None for adaptive methods, which count them while solving."""
        return None if self.method in ADAPTIVE else self.num_steps * STAGES[self.method]


def check(process: ProcessConfig, solver: SolverConfig) -> None:
    """ValueError, in one line, if this solver can't sample this process."""
    if process.kind == "flow" and solver.method in STOCHASTIC:
        raise ValueError(
            f"solver.method {solver.method} samples a ddpm process, not flow; use euler or midpoint"
        )
    if process.kind == "ddpm":
        check_diffusion(process.prediction, process.path == "vp" or process.path in STEPPED, solver)


def check_diffusion(prediction: str, noisy_start: bool, solver: SolverConfig) -> None:
    """The same for a diffusion process; noisy_start: alpha(0) > 0, data is never quite gone."""
    if solver.method in ADAPTIVE or (prediction == "x1" and solver.method in ASK_THE_END):
        raise ValueError(
            f"solver.method {solver.method} asks a ddpm process with prediction {prediction} about t = 1, where it"
            " knows nothing of the noise; use ddim, euler or midpoint"
        )
    if solver.method == "sde" and not noisy_start:
        raise ValueError(
            "solver.method sde needs a path whose noise is never pure; use path=vp or ddpm_cosine"
        )

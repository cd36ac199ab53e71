"""The peers' side of `peers`: flow_matching, diffusers and torchcfm on our weights. Run by `benchmarks.peers`."""

import json
import os
import sys
from importlib.metadata import version

import numpy as np
import torch
from diffusers import DDIMScheduler
from flow_matching.solver import ODESolver
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.optimal_transport import OTPlanSampler

from benchmarks._peer_cases import CASES, LIKELIHOOD_STEPS, TABLE, TOLERANCE, Case, inputs, milliseconds

NAMES = {"heun3": "heun3", "rk38": "rk4"}
"""Their names of our methods, where they differ."""
PEERS = ("torch", "flow_matching", "diffusers", "torchcfm", "torchdiffeq")


class Network(torch.nn.Module):
    """The network of `_peer_ours`, called as ODESolver calls: (x=, t=scalar, **extras)."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        tensor = {k: torch.from_numpy(v) for k, v in weights.items()}
        self.observed = torch.nn.Parameter(tensor["observed"])
        self.chunk = torch.nn.Parameter(tensor["chunk"])
        self.time = torch.nn.Parameter(tensor["time"])
        self.hidden = torch.nn.ModuleList()
        for i, kernel in enumerate(("kernel1", "kernel2", "out"), 1):
            layer = torch.nn.Linear(*tensor[kernel].shape)
            layer.weight = torch.nn.Parameter(tensor[kernel].T.contiguous())
            layer.bias = torch.nn.Parameter(tensor[f"bias{i}"])
            self.hidden.append(layer)
        self.bias = torch.nn.Parameter(tensor["bias0"])
        self.calls = 0

    def encode(self, observed):
        """What does not change over the steps."""
        return torch.addmm(self.bias, observed, self.observed)

    def forward(self, x, t, encoded):
        """The velocity."""
        self.calls += 1
        h = torch.addmm(
            torch.addmm(encoded, t.reshape(1, 1).expand(x.shape[0], 1), self.time), x.flatten(1), self.chunk
        )
        h = torch.nn.functional.silu(h)
        for layer in self.hidden[:-1]:
            h = torch.nn.functional.silu(layer(h))
        return self.hidden[-1](h).reshape(x.shape)


def sampler(case: Case, model: Network):
    """A function of nothing that samples a batch."""
    noise, observed = map(torch.from_numpy, inputs(case.batch))
    if case.peer == "flow_matching":
        solver = ODESolver(model)
        step = 1 / case.steps if case.steps else None
        method = NAMES.get(case.method, case.method)
        return lambda: solver.sample(
            noise, step, method=method, rtol=TOLERANCE, atol=TOLERANCE, encoded=model.encode(observed)
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=TABLE, beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="sample",
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(case.steps)

    def run():
        x, encoded = noise, model.encode(observed)
        for i in scheduler.timesteps:
            x = scheduler.step(model(x, 1 - (i + 1) / TABLE, encoded), i, x).prev_sample
        return x

    return run


def likelihood(model: Network, flat: bool) -> str:
    """Exact log-likelihood of four chunks, or what it raises."""
    x, observed = map(torch.from_numpy, inputs(4))

    def log_p0(x):
        return -0.5 * (x.flatten(1) ** 2).sum(1) - 0.5 * x[0].numel() * np.log(2 * np.pi)

    try:
        _, value = ODESolver(model).compute_likelihood(
            x.flatten(1) if flat else x, log_p0, 1 / LIKELIHOOD_STEPS, method="midpoint", exact_divergence=True,
            encoded=model.encode(observed),
        )  # fmt: skip
    except IndexError as error:
        return f"raises IndexError ({error})"
    return f"{float(value.detach().mean()):.4f}"


def couplings() -> dict:
    """torchcfm's exact plan and its straight path."""
    noise, data = (
        torch.from_numpy(inputs(256)[0]),
        torch.from_numpy(np.cumsum(inputs(257)[0][:256], axis=1) / 4),
    )
    plan = OTPlanSampler(method="exact").get_map(noise, data)
    flow = ConditionalFlowMatcher(sigma=0.0)
    t, x_t, u_t = flow.sample_location_and_conditional_flow(noise, data)
    wide = t[:, None, None]
    gap = max((x_t - (1 - wide) * noise - wide * data).abs().max(), (u_t - data + noise).abs().max())
    distance = torch.cdist(noise.flatten(1), data.flatten(1)).double() ** 2
    np.random.seed(0)
    used = OTPlanSampler(method="exact").sample_map(plan, 256)[0]
    cost = float((torch.from_numpy(plan) * distance).sum()) * 256
    return {"cost": cost, "used": len(set(used.tolist())), "path_gap": float(gap)}


def measure(weights: str, repeats: int, out: str) -> dict:
    """Times, evaluations, samples, likelihood of chunks, couplings."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Network(dict(np.load(weights)))
    ms, nfe, samples = {}, {}, {}
    with torch.no_grad():
        for case in CASES:
            call, model.calls = sampler(case, model), 0
            samples[case.key] = call().numpy()
            nfe[case.key] = model.calls
            ms[case.key] = milliseconds(call, repeats)
    np.savez(out, **samples)
    return {
        "ms": ms,
        "nfe": nfe,
        "likelihood_of_chunks": likelihood(model, flat=False),
        "likelihood_of_vectors": likelihood(model, flat=True),
        "couplings": couplings(),
        "versions": {
            name: version(name) for name in ("torch", "flow_matching", "diffusers", "torchcfm", "torchdiffeq")
        },
    }


if __name__ == "__main__":
    _, weights, repeats, out = sys.argv[1:]
    print(json.dumps(measure(weights, int(repeats), out)))

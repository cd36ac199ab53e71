"""Trains a FAST tokenizer on a data set's chunks: DCT, rounding, BPE (arXiv:2501.09747).

python -m launch.train_fast --config configs/tabletop.py --data.path data/tabletop --out runs/fast

Chunks are those that training with this configuration would see: its horizon, its normalisation, its training episodes;
`--data.fast.vocab_size` and `--data.fast.scale` say how. Train with it by `--data.fast.path runs/fast`; without that a
run trains the same one for itself. What is printed is measured on the held-out episodes, in normalised units.
"""

import dataclasses
import json
from pathlib import Path

from vla_jax.cli.command import cli_with_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFastArgs:
    """Where to."""

    out: Path
    """Directory of tokenizer.json and processor_config.json, the layout of physical-intelligence/fast."""
    json: Path | None = None
    """File for what was measured."""


def main() -> None:
    """Parses the command line, trains, writes, measures."""
    args, config = cli_with_config(TrainFastArgs, description=__doc__)
    from vla_jax.data.bundle import prepare  # after parsing: --help need not wait
    from vla_jax.data.fast.dataset import draw_chunks, report
    from vla_jax.data.index import index_dataset, split_episodes
    from vla_jax.data.sources.source import EpisodeSource

    if not config.data.path:
        raise ValueError("data.path is not set; give --data.path DIR, a data set of launch.collect")
    if config.data.fast.path:
        raise ValueError("--data.fast.path names a tokenizer that exists; leave it out to train one")
    horizon = config.model.expert.horizon
    bundle = prepare(config.data, horizon=horizon, action_tokens="instead")
    print("".join(f"note: {line}\n" for line in bundle.constant_dims), end="")
    actions = bundle.tokenize_actions
    assert actions is not None  # `prepare` was told to make them
    actions.fast.save(args.out)
    source = EpisodeSource(config.data.path)
    train, held_out = split_episodes(index_dataset(source), config.data)
    chosen, which = (held_out, "held-out") if len(held_out) else (train, "training")
    chunks = draw_chunks(source, chosen, bundle.normalize, horizon, config.data.fast.chunks, bundle.units)
    measured = report(actions.fast, chunks) | {"longest": actions.longest}
    print(
        f"wrote {args.out}: {measured['vocab_size']} tokens, scale {measured['scale']:g}\n"
        f"{measured['chunks']} {which} chunks of {horizon} x {measured['action_dim']}: "
        f"{measured['tokens_mean']:.1f} tokens (99 %: {measured['tokens_p99']:.0f}, longest of all "
        f"{measured['longest']}), error {measured['rmse']:.4f} (RMS), {measured['max_error']:.3f} (largest), "
        f"{100 * measured['clipped_share']:.3f} % of the coefficients clipped"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")

"""Chunks as tokens: written tokens are what teacher forcing predicts, every chunk is whole, no expert sees them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from tests.objectives.found import losses_of
from vla_jax.flow.base import Corrupted
from vla_jax.flow.processes import Flow
from vla_jax.models.action_tokens import ActionGrammar, generate_actions
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.objective import Objective
from vla_jax.objectives.terms.tokens import at_targets, of_action_tokens
from vla_jax.types import Given

TOTAL = 15  # horizon 5 of 3 dimensions
COEFFICIENTS = np.zeros(small.VOCAB, np.int32)
COEFFICIENTS[20:30], COEFFICIENTS[30:35], COEFFICIENTS[35] = 1, 3, 7
GRAMMAR = ActionGrammar(
    begin=np.asarray([5, 6], np.int32),
    end=np.int32(small.EOS),
    coefficients=COEFFICIENTS,
    total=np.int32(TOTAL),
)
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def with_action_tokens(data, b=3, length=9, seed=0):
    """[begin begin tokens end padding] of 3 to 6 tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((b, length), np.int32)
    counts = rng.integers(3, 7, b)
    for row, n in enumerate(counts):
        tokens[row, : n + 3] = [5, 6, *rng.integers(20, 36, n), small.EOS]
    index = np.arange(length)[None]
    mask = index < counts[:, None] + 3
    return data.replace(
        action_tokens=jnp.asarray(tokens),
        action_token_mask=jnp.asarray(mask),
        action_token_loss=jnp.asarray(mask & (index >= 2)),
    )


@pytest.fixture(scope="module")
def setup():
    cfg = small.config(kind="tokens")
    data = small.batch(cfg)
    model, params = small.init(cfg, data)
    assert set(params) == {"backbone"}
    return cfg, data, model, params


@pytest.fixture(scope="module")
def programs(setup):
    """prefill, extend with logits, and writing, each compiled once."""
    _, _, model, params = setup

    @jax.jit
    def prefill(data, visible):
        return model.apply({"params": params}, data, visible, method="prefill")[0]

    @jax.jit
    def extend(cache, tokens, mask):
        hidden = model.apply({"params": params}, cache, tokens, mask, method="extend")
        return model.apply({"params": params}, hidden, method="logits")

    @jax.jit
    def write(cache, grammar, keys, temperature):
        return generate_actions(
            model, params, cache, grammar, keys, max_tokens=TOTAL, temperature=temperature
        )

    return prefill, extend, write


KEYS = jax.random.split(jax.random.key(0), 3)
VISIBLE = jnp.asarray([True, False, True])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_chunk_is_whole(setup, programs, temperature):
    """Random parameters want anything; the tokens stand for exactly k·a coefficients all the same."""
    _, data, _, _ = setup
    prefill, _, write = programs
    out = write(prefill(data, VISIBLE), GRAMMAR, KEYS, temperature)
    written = np.where(out.mask, COEFFICIENTS[out.tokens], 0)
    np.testing.assert_array_equal(written.sum(1), TOTAL)
    assert ((written > 0) == np.asarray(out.mask)).all()
    assert (np.asarray(out.tokens)[~np.asarray(out.mask)] == 0).all()


def test_greedy_tokens_are_what_teacher_forcing_predicts(setup, programs):
    """`extend` over what was written: at each place the likeliest token that fits. Plans visible or not."""
    _, data, _, _ = setup
    prefill, extend, write = programs
    cache = prefill(data, VISIBLE)
    out = jax.tree.map(np.asarray, write(cache, GRAMMAR, KEYS, 0.0))
    rows = np.concatenate([np.tile(GRAMMAR.begin, (3, 1)), out.tokens], axis=1)
    mask = np.concatenate([np.ones((3, 2), bool), out.mask], axis=1)
    logits = np.asarray(extend(cache, rows, mask))[:, 1:]
    for row in range(3):
        left = TOTAL
        for i in range(out.mask[row].sum()):
            fits = (COEFFICIENTS > 0) & (left >= COEFFICIENTS)
            assert out.tokens[row, i] == np.where(fits, logits[row, i], -np.inf).argmax()
            left -= COEFFICIENTS[out.tokens[row, i]]


def test_samples_follow_the_softmax(setup, programs):
    """The first token of many samples at temperature 1 against its probabilities."""
    _, data, model, params = setup
    prefill, extend, _ = programs
    cache = jax.tree.map(lambda x: x, prefill(data, VISIBLE))
    one = cache.replace(
        kv=jax.tree.map(lambda x: x[:, :1], cache.kv),
        **{name: getattr(cache, name)[:1] for name in ("mask", "visible", "positions")},
    )
    logits = extend(cache, np.tile(GRAMMAR.begin, (3, 1)), np.ones((3, 2), bool))[0, 1]
    want = jax.nn.softmax(jnp.where(COEFFICIENTS > 0, logits, -jnp.inf))
    n = 400
    many = one.repeat(n)
    keys = jax.random.split(jax.random.key(1), n)
    first = generate_actions(model, params, many, GRAMMAR, keys, max_tokens=1, temperature=1.0).tokens[:, 0]
    found = np.bincount(first, minlength=small.VOCAB) / n
    assert 0.5 * np.abs(found - want).sum() < 0.15  # total variation; sampling alone gives about .06


def test_a_row_depends_on_its_own_key_alone(setup, programs):
    _, data, _, _ = setup
    prefill, _, write = programs
    cache = prefill(data, VISIBLE)
    want = write(cache, GRAMMAR, KEYS, 1.0)
    other = write(cache, GRAMMAR, KEYS.at[0].set(jax.random.key(99)), 1.0)
    np.testing.assert_array_equal(want.tokens[1:], other.tokens[1:])
    assert (np.asarray(want.tokens[0]) != np.asarray(other.tokens[0])).any()


def test_without_counts_the_end_token_ends(setup, programs):
    """A tokenizer of pieces of coefficients: anything goes until the end is written, and the end is left out."""
    _, data, _, _ = setup
    prefill, _, write = programs
    cache = prefill(data, VISIBLE)
    pieces = GRAMMAR._replace(total=np.int32(0), coefficients=np.minimum(COEFFICIENTS, 1))
    out = jax.tree.map(np.asarray, write(cache, pieces, KEYS, 20.0))  # nearly uniform: some row ends
    assert (COEFFICIENTS[out.tokens[out.mask]] > 0).all()
    assert out.mask.sum() < out.mask.size
    assert (np.diff(out.mask.astype(int), axis=1) <= 0).all()


def test_tokens_see_what_an_expert_sees(setup, programs):
    """The text target counts where it is visible and does not exist elsewhere, positions included."""
    _, data, _, _ = setup
    prefill, extend, _ = programs
    data = with_action_tokens(data)
    tokens, mask = data.action_tokens, data.action_token_mask
    blind = extend(prefill(data, jnp.zeros(3, bool)), tokens, mask)
    without = extend(prefill(small.without_target(data), jnp.zeros(3, bool)), tokens, mask)
    seeing = extend(prefill(data, jnp.ones(3, bool)), tokens, mask)
    np.testing.assert_allclose(np.asarray(blind)[mask], np.asarray(without)[mask], **TOLERANCE)
    assert np.abs(np.asarray(seeing - blind)[mask]).max() > 1e-2
    later = tokens.at[:, 4:].set(21)  # causal: what comes later changes nothing before it
    np.testing.assert_array_equal(
        extend(prefill(data, VISIBLE), later, mask)[:, :4],
        extend(prefill(data, VISIBLE), tokens, mask)[:, :4],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Still(Flow):
    """A process without noise: what is drawn does not matter here."""

    def corrupt(self, key, a):
        return Corrupted(0.3 * a, jnp.full(a.shape[:1], 0.3), a, a)


def objective_of(model, **objective):
    config = ObjectiveConfig(plan_visible=1.0, **objective)
    return Objective(model=model, process=Still(), config=config)


def losses(model, params, data, **options):
    objective = objective_of(model, **options)
    drawn = objective.draw(jax.random.key(0), data)
    return losses_of(objective, params, data, drawn, objective.counts(data, drawn))


def test_tokens_instead_of_actions_are_the_action_loss(setup):
    """λ multiplies their mean cross-entropy; without λ they are not computed."""
    _, data, model, params = setup
    data = with_action_tokens(data).replace(actions=None, action_mask=None)
    found = jax.jit(lambda p: losses(model, p, data, action_weight=3.0))(params)
    cache, _ = model.apply({"params": params}, data, jnp.ones(3, bool), method="prefill")
    hidden_tokens = model.apply(
        {"params": params}, cache, data.action_tokens, data.action_token_mask, method="extend"
    )
    log_p = jax.nn.log_softmax(model.apply({"params": params}, hidden_tokens, method="logits"))
    chosen = jnp.take_along_axis(log_p[:, :-1], data.action_tokens[:, 1:, None], axis=2)[..., 0]
    want = -chosen[np.asarray(data.action_token_loss[:, 1:])].mean()
    np.testing.assert_allclose(found.action, want, rtol=1e-5)
    np.testing.assert_allclose(found.total, found.text + 3 * found.action, rtol=1e-6)
    assert found.time_histogram is None
    objective = objective_of(model, action_reduction="sum")
    sizes = np.asarray(data.action_token_loss).sum(1)
    np.testing.assert_allclose(objective.scales(data)["action"], sizes.mean())


@pytest.fixture(scope="module")
def insulated():
    """A flow expert beside action tokens."""
    cfg = small.config()
    data = with_action_tokens(small.batch(cfg))
    model, params = small.init(cfg, data)
    return data, model, params, jax.jit(lambda p, d: losses(model, p, d, insulation=0.0))


def test_tokens_beside_actions_are_text(insulated):
    data, model, params, run = insulated
    found = run(params, data)
    objective = objective_of(model)
    drawn = objective.draw(jax.random.key(0), data)
    reading = objective.read(params, data, drawn)
    plan = at_targets(reading, reading.hidden, data.tokens, data.token_loss, None).loss
    tokens = of_action_tokens(reading).loss
    number = data.token_loss.sum() + data.action_token_loss.sum()
    np.testing.assert_allclose(found.text, (plan + tokens) / number, rtol=1e-5)
    np.testing.assert_allclose(objective.counts(data, drawn)["text"], number)


def test_discrete_and_continuous_actions_do_not_see_each_other(insulated):
    """Bit for bit: other action tokens leave the expert's error, other noisy actions the tokens' loss."""
    data, _, params, run = insulated
    want = run(params, data)
    tokens = jnp.where(data.action_tokens >= 20, 55 - data.action_tokens, data.action_tokens)
    other_tokens = run(params, data.replace(action_tokens=tokens))
    np.testing.assert_array_equal(other_tokens.action, want.action)
    assert other_tokens.text != want.text
    other_actions = run(params, data.replace(actions=data.actions + 1))
    np.testing.assert_array_equal(other_actions.text, want.text)
    assert other_actions.action != want.action


def test_the_backbone_learns_from_tokens_alone(insulated):
    """At κ = 0 the action loss's gradient ends at the cache; that of the action tokens does not."""
    data, model, params, _ = insulated

    @jax.jit
    def gradients(params):
        action = jax.grad(lambda p: losses(model, p, data, insulation=0.0).action)(params)
        text = jax.grad(lambda p: losses(model, p, data, insulation=0.0).text)(params)
        return action, text

    action, text = gradients(params)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(action["backbone"]))
    assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(action["expert"]))
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(text["backbone"]["llm"]))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(text["expert"]))


def test_there_is_nothing_to_denoise_with(setup):
    cfg, data, _, params = setup
    with pytest.raises(ValueError, match=r"expert\.kind=tokens has no expert"):
        VLA(cfg).apply({"params": params}, None, Given.of(data), data.actions, jnp.zeros(3), method="denoise")

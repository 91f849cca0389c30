"""Rectified flow: against the official numbers, and against targets whose velocity is known in
closed form.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch.nn.functional import linear, silu

from clear_nb.core import torch_rng
from clear_nb.flow import (
    RENORMS,
    Guidance,
    clean_estimate,
    euler_step,
    guided_velocity,
    interpolate,
    sample_time,
    score,
    shift_time,
    solve,
    time_grid,
    timestep_embedding,
    transition,
    transition_logp,
    velocity_target,
)

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'


@pytest.fixture(scope='module')
def golden():
    "Weights, training batch and sampling runs of the official code."
    return {
        k: load_file(GOLDEN / f'{k}.safetensors')
        for k in ('model', 'train_inputs', 'train_outputs', 'infer_inputs', 'infer_outputs')
    }


def close(a, b, rtol=1e-4):
    "Relative error of the whole tensor."
    assert ((a - b).norm() / b.norm()).item() < rtol


# the official numbers


@pytest.mark.parametrize('run', ['plain', 'cfg_global', 'cfg_channel', 'cfg_text_channel'])
def test_grid_and_euler_steps_match_the_official_sampler(golden, run):
    "Fed with the recorded velocities, `euler_step` reproduces the official latent."
    meta, out = (
        json.loads((GOLDEN / 'infer_meta.json').read_text(encoding='utf-8'))['image_runs'][run],
        golden['infer_outputs'],
    )
    grid = time_grid(meta['num_timesteps'], meta['timestep_shift'])
    assert grid[:-1].tolist() == pytest.approx(meta['timesteps'], abs=1e-7) and grid[-1] == 0
    x = golden['infer_inputs']['packed_init_noises']
    for v, t, t_next in zip(out[f'image.{run}.v'], grid[:-1], grid[1:]):
        x = euler_step(x, v, t, t_next)
    close(x, out[f'image.{run}.latent'], 1e-6)


def test_time_embedding_matches_the_official_code(golden):
    "Drawn times with shift 2, their sinusoids, and the model's own MLP on top."
    m, t = golden['model'], sample_time(golden['train_inputs']['packed_timesteps'], 2.0)
    w = [m[f'time_embedder.mlp.{i}.{p}'] for i in (0, 2) for p in ('weight', 'bias')]
    close(
        linear(silu(linear(timestep_embedding(t), *w[:2])), *w[2:]),
        golden['train_outputs']['time_embed'],
    )
    assert t[golden['train_inputs']['packed_timesteps'].isneginf()].eq(0).all()


def test_velocity_target_matches_the_official_loss(golden):
    """Squared error of the official prediction against our target, on the tokens that carry the
    loss.
    """
    m, i, o = (golden[k] for k in ('model', 'train_inputs', 'train_outputs'))
    t = sample_time(i['packed_timesteps'], 2.0)
    x_t = torch.linalg.lstsq(
        m['vae2llm.weight'], (o['vae2llm_out'] - m['vae2llm.bias']).T
    ).solution.T  # invert the square projection
    eps = i['flow_noise']
    x0 = (x_t - t[:, None] * eps) / (1 - t[:, None])
    pred = linear(
        o['last_hidden_state'][i['mse_loss_indexes']], m['llm2vae.weight'], m['llm2vae.bias']
    )
    close((pred - velocity_target(x0, eps)[t > 0]) ** 2, o['mse'], 1e-3)


def test_grid_ends_are_exact():
    "t = 1 and t = 0 are hit exactly and the grid falls strictly, for any shift."
    for k in range(1, 1000, 7):
        grid = time_grid(50, k / 50)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


# a mixture with known velocity

MEANS, STDS, WEIGHTS = (
    torch.tensor([-1.2, 0.3, 1.0]),
    torch.tensor([0.2, 0.4, 0.15]),
    torch.tensor([0.3, 0.5, 0.2]),
)


def mixture_velocity(x, t):
    "E[eps - x0 | x_t = x] of a one-dimensional Gaussian mixture; x is (B, 1), t is (B,)."
    t = t[:, None].to(x)
    mu, var = (1 - t) * MEANS.to(x), (1 - t) ** 2 * STDS.to(x) ** 2 + t**2
    post = torch.softmax(WEIGHTS.to(x).log() - var.log() / 2 - (x - mu) ** 2 / (2 * var), 1)
    v = (t - (1 - t) * STDS.to(x) ** 2) / var * (x - mu) - MEANS.to(x)
    return (post * v).sum(1, keepdim=True)


def mixture_sample(n, g):
    "Draws from the mixture, (n, 1)."
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    return (MEANS[k] + STDS[k] * torch.randn(n, generator=g))[:, None]


def test_score_equals_autograd():
    "Score from the velocity = gradient of the exact log-marginal."
    for t in (0.05, 0.4, 1.0):
        x = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None].requires_grad_()
        var = (1 - t) ** 2 * STDS.double() ** 2 + t**2
        logp = torch.logsumexp(
            WEIGHTS.double().log()
            - var.log() / 2
            - (x - (1 - t) * MEANS.double()) ** 2 / (2 * var),
            1,
        ).sum()
        (exact,) = torch.autograd.grad(logp, x)
        torch.testing.assert_close(
            score(x, mixture_velocity(x, torch.full((25,), t)), t), exact, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize('n,shift', [(120, 1.0), (200, 3.0)])
@pytest.mark.parametrize('sigma', [0.0, 0.3, 0.7, 1.0])
def test_sde_keeps_every_marginal(n, shift, sigma):
    """At several times the states of ODE and SDE are distributed like exact draws of x_t
    (Kolmogorov-Smirnov).
    """
    g, size = torch_rng('test', 'marginal', n, int(10 * sigma)), 4000
    grid = time_grid(n, shift)
    states = solve(mixture_velocity, torch.randn(size, 1, generator=g), grid, sigma, g)
    for i in (n // 4, n // 2, 3 * n // 4, n - 1):
        exact = interpolate(mixture_sample(size, g), torch.randn(size, 1, generator=g), grid[i])
        assert stats.ks_2samp(states[i][:, 0].numpy(), exact[:, 0].numpy()).pvalue > 1e-3


def test_a_wrong_drift_would_be_noticed():
    """Control for the test above: noise without the score correction changes the marginal beyond
    doubt.
    """
    g, grid = torch_rng('test', 'control'), time_grid(120)
    x = torch.randn(4000, 1, generator=g)
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, _ = transition(x, mixture_velocity(x, t.expand(4000)), t, t_next)
        x = mean + 0.7 * (t - t_next).sqrt() * torch.randn(4000, 1, generator=g)
    assert stats.ks_2samp(x[:, 0].numpy(), mixture_sample(4000, g)[:, 0].numpy()).pvalue < 1e-6


@pytest.mark.parametrize('sigma', [0.0, 0.3, 0.7, 1.0])
def test_gaussian_moments_converge_at_first_order(sigma):
    "Moments of the chain, propagated exactly through `transition`, approach the target like 1/N."
    m, c = 0.8, 0.5

    def moments(n):
        mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        grid = shift_time(torch.linspace(1, 0, n, dtype=torch.float64), 3.0)
        for t, u in zip(grid[:-1], grid[1:]):
            x = torch.stack([torch.zeros_like(mean), torch.ones_like(mean)])
            v = (t - (1 - t) * c**2) / ((1 - t) ** 2 * c**2 + t**2) * (x - (1 - t) * m) - m
            (b, ab), s = transition(x, v, t, u, sigma)
            mean, var = b + (ab - b) * mean, (ab - b) ** 2 * var + s.flatten() ** 2
        return abs(mean.item() - m), abs(var.item() ** 0.5 - c)

    coarse, fine = moments(50), moments(800)
    assert max(fine) < 0.006 and all(f < c / 8 or f < 1e-4 for f, c in zip(fine, coarse))


# one transition for sampler and loss


@pytest.mark.parametrize('n', [5, 20, 30, 50])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_recomputed_mean_equals_the_samplers_mean(n, dtype):
    """For every step of the grid, from stored x and v, per-sample times: bit-equal mean and std,
    log-ratio 0.
    """
    g, grid, velocities = torch_rng('test', 'recompute', n), time_grid(n, 3.0), []

    def velocity(x, t):
        velocities.append((torch.tanh(2 * x) - t[:, None, None] * x).to(dtype))
        return velocities[-1]

    states = solve(velocity, torch.randn(2, 6, 4, generator=g), grid, 0.3, g)
    idx = torch.arange(n - 1)
    x, v, x_next = (
        torch.stack([s[0] for s in seq]) for seq in (states[:-1], velocities, states[1:])
    )
    mean, std = transition(
        x, v, grid[idx], grid[idx + 1], 0.3
    )  # all steps as one batch, as in the loss
    for i in range(n - 1):
        ref, ref_std = transition(states[i], velocities[i], grid[i], grid[i + 1], 0.3)
        assert torch.equal(mean[i], ref[0]) and torch.equal(std[i].flatten(), ref_std.flatten())
    logp = transition_logp(x_next, mean, std)
    assert torch.isfinite(logp).all() and mean.dtype == torch.float32
    z = (x_next - mean) / std
    torch.testing.assert_close(logp, -z.square().sum((1, 2)) / 2)


def test_log_ratio_scale():
    """A shift of 0.1 std in D dimensions: sum moves by D*0.005, mean by 0.005 (hazard: the mean
    can never reach a clip of 0.2).
    """
    for d in (64, 4096):
        z = torch.randn(400, d, generator=torch_rng('test', 'ratio', d))
        ratio = {
            r: transition_logp(z, torch.full_like(z, 0.1), torch.ones(1, 1), r)
            - transition_logp(z, torch.zeros_like(z), torch.ones(1, 1), r)
            for r in ('sum', 'mean')
        }
        assert abs(ratio['sum'].mean() + 0.005 * d) < 4 * 0.1 * (d / 400) ** 0.5 and torch.allclose(
            ratio['sum'], d * ratio['mean'], atol=1e-2
        )
        assert abs(ratio['sum'].std() / (0.1 * d**0.5) - 1) < 0.15


def test_logp_is_the_normal_density_and_its_constant_cancels():
    "With the constant it equals torch's Normal; ratios agree with and without."
    g = torch_rng('test', 'density')
    x, a, b = (torch.randn(3, 5, 2, generator=g, dtype=torch.float64) for _ in range(3))
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)[:, None, None]
    full, short = ([transition_logp(x, m, std, constant=k) for m in (a, b)] for k in (True, False))
    torch.testing.assert_close(full[0], torch.distributions.Normal(a, std).log_prob(x).sum((1, 2)))
    torch.testing.assert_close(full[0] - full[1], short[0] - short[1])


def test_gradient_reaches_the_velocity():
    "d logp / d v has the sign that moves the mean towards the drawn state."
    x, v = torch.zeros(1, 4), torch.zeros(1, 4, requires_grad=True)
    mean, std = transition(x, v, 0.5, 0.4, 0.3)
    transition_logp(torch.ones(1, 4), mean, std).sum().backward()
    assert (v.grad < 0).all()  # a smaller velocity moves the state up, towards 1


# shapes, types, errors


def test_times_broadcast_per_sample_and_per_token():
    "Scalars, (B,) and (T,) times give the same step."
    g = torch_rng('test', 'broadcast')
    x, v = torch.randn(4, 3, 2, generator=g), torch.randn(4, 3, 2, generator=g)
    ref = transition(x, v, 0.6, 0.5, 0.3)[0]
    assert torch.allclose(
        transition(x, v, torch.full((4,), 0.6), torch.full((4,), 0.5), 0.3)[0], ref
    )
    assert torch.allclose(transition(x[0], v[0], torch.full((3,), 0.6), 0.5, 0.3)[0], ref[0])
    assert torch.allclose(interpolate(x, v, torch.full((4,), 0.25)), 0.75 * x + 0.25 * v)
    assert torch.allclose(
        clean_estimate(interpolate(x, v, 0.3), velocity_target(x, v), 0.3), x, atol=1e-6
    )


@pytest.mark.parametrize(
    't,t_next', [(0.0, 0.0), (0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1), (float('nan'), 0.0)]
)
@pytest.mark.parametrize('sigma', [0.0, 0.3])
def test_times_out_of_range_raise(t, t_next, sigma):
    "No clamp: a step that does not go down inside [0, 1] is an error, also inside a batch."
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match='t_next < t'):
        transition(x, x, t, t_next, sigma)
    with pytest.raises(ValueError, match='t_next < t'):
        transition(x, x, torch.tensor([0.5, t]), torch.tensor([0.25, t_next]), sigma)


def test_bad_arguments_raise():
    """Missing noise, ODE density, unknown reduction, negative sigma, odd embedding, short grid,
    shift 0.
    """
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match='noise'):
        euler_step(x, x, 1.0, 0.5, 0.3)
    with pytest.raises(ValueError, match='generator'):
        solve(lambda x, t: x, x, time_grid(3), 0.3)
    with pytest.raises(ValueError, match='no density'):
        transition_logp(x, *transition(x, x, 1.0, 0.5))
    with pytest.raises(ValueError, match='reduction'):
        transition_logp(x, x, torch.ones(1, 1), 'max')
    with pytest.raises(ValueError, match='sigma'):
        transition(x, x, 1.0, 0.5, -0.1)
    with pytest.raises(ValueError, match='sigma'):
        transition(x, x, 1.0, 0.5, float('nan'))
    with pytest.raises(ValueError, match='even'):
        timestep_embedding(torch.zeros(1), 5)
    with pytest.raises(ValueError, match='at least 2'):
        time_grid(1)
    with pytest.raises(ValueError, match='positive'):
        shift_time(0.5, 0.0)


# guidance


@pytest.mark.parametrize('renorm', RENORMS)
@pytest.mark.parametrize(
    'text, image, floor', [(4.0, 2.0, 0.0), (1.2, 1.0, 0.5), (0.5, 3.0, 0.9), (2.0, 0.5, 0.0)]
)
def test_guided_velocity_token_by_token(renorm, text, image, floor):
    """Against the formulas written out; lengths below and above that of v both occur, so the
    factor meets its floor and 1.
    """
    g = Guidance(text, image, renorm=renorm, renorm_min=floor)
    scale = torch.exp(torch.randn(3, 2, 6, 1, generator=torch_rng('scale')) * 2)
    v, v_text, v_image = torch.randn(3, 2, 6, 4, generator=torch_rng('v')) * scale
    ours = guided_velocity(v, v_text, v_image if image > 1 else None, g)

    def factor(w, v):
        return min(max((v.square().sum().sqrt() / w.square().sum().sqrt()).item(), floor), 1.0)

    seen = []
    for k in range(2):
        u, w = v_text[k] + text * (v[k] - v_text[k]), None
        if renorm == 'text_channel':
            seen += (fs := [factor(a, b) for a, b in zip(u, v[k])])
            u = u * torch.tensor(fs)[:, None]
        w = v_image[k] + image * (u - v_image[k]) if image > 1 else u
        if renorm == 'channel':
            seen += (fs := [factor(a, b) for a, b in zip(w, v[k])])
            w = w * torch.tensor(fs)[:, None]
        if renorm == 'global':
            seen.append(factor(w, v[k]))
            w = w * seen[-1]
        close(ours[k], w, 1e-5)
    if renorm != 'global' and floor == 0.5:
        assert {1.0, floor} < set(seen)


def test_guided_interval():
    "Strictly above lo, up to hi, by the shifted time."
    grid = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert Guidance(interval=(0.4, 0.8)).at(grid) == [False, True, True, False, False]
    assert (
        Guidance(interval=(0.0, 1.0)).at(grid) == [True] * 5
        and Guidance(text=1.0).at(grid) == [False] * 5
    )
    for bad in (dict(renorm='both'), dict(interval=(0.5, 0.4)), dict(renorm_min=-1.0)):
        with pytest.raises(ValueError, match='Guidance'):
            Guidance(**bad)

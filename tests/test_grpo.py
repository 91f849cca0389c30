"""Stage 3: rollouts are scored in the context they were made in, and the update points where it
should.
"""

import math
import re
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace as Space

import numpy as np
import pytest
import torch
from fake_server import FakeServer, Status

import clear_nb.decode
import clear_nb.generate
from clear_nb import flow, grpo
from clear_nb.base import new_model
from clear_nb.core import torch_rng
from clear_nb.data import all_pairs, labelled_items, make_picture_set, prompts
from clear_nb.decode import Noise
from clear_nb.generate import generate
from clear_nb.grpo import (
    GrpoRun,
    Objective,
    ObjectiveVariant,
    accumulate_gradients,
    advantages,
    cache_bytes,
    choose_pairs,
    choose_steps,
    flow_logp,
    forbidden,
    grpo_loss,
    grpo_step,
    joint_loss,
    old_flow_logp,
    recorded_logp,
    reference,
    rollout_batch,
    rollout_bytes,
    rollout_sampling,
    rollout_segments,
    score_trajectories,
    text_logp,
    train_grpo,
)
from clear_nb.judge import OPTION_TASK, LLMJudge
from clear_nb.model import freeze
from clear_nb.mot import KVCache
from clear_nb.presets import load_preset
from clear_nb.ranks import ranks_of
from clear_nb.reward import AnswerScore, Outage
from clear_nb.server import Refused
from clear_nb.traces import encode_text
from clear_nb.train import accelerator, fit, optimizer
from clear_nb.trajectory import MARKER, LatentSegment, TextSegment, pack

LONG = '<think>' + 'x ' * 12 + '</think><answer>red</answer>'  # longer than max_new_tokens
DECODER = ('vae.', 'vit_model.', 'connector.')


def preset(**changes):
    """Smoke numbers with groups and steps worth testing."""
    values = dict(
        denoise_steps=5, prompts=4, group=4, max_new_tokens=12, lr=5e-4, beta=0.0, lambda_flow=0.3
    )
    return load_preset('smoke', **{f'grpo.{k}': v for k, v in {**values, **changes}.items()})


def taught(model, toys, steps=60):
    """Teach traces without, with one and with two restorations, and one that is too long; the
    generator's last layer gets weights.
    """
    tok, g = model.tokenizer, torch_rng('teach')

    def say(s):
        return [TextSegment(encode_text(tok, s), loss=True)]

    def seen():
        return [
            *say(f'<think>x</think>{MARKER}'),
            LatentSegment(torch.randn(toys.seen_z.shape[1:], generator=g)),
        ]

    def end(a):
        return say(f'<think>x</think><answer>{a}</answer>')

    shapes = [
        lambda: end('red'),
        lambda: end('3'),
        lambda: seen() + end('red'),
        lambda: seen() + end('3'),
        lambda: seen() + seen() + end('3'),
        lambda: say(LONG),
    ]
    rows = [p + f() for p in prompts(tok, toys, all_pairs(toys)[:6]) for f in shapes]
    torch.nn.init.normal_(model.llm2vae.weight, std=0.05, generator=g)
    opt, batch = optimizer(freeze(model, 'vae.', 'vit_model.'), 1e-2), pack(rows, model.shape)
    for _ in range(steps):
        loss = model.ce_terms(model(batch)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return freeze(model.eval(), *DECODER)


@pytest.fixture(scope='module')
def start():
    """A taught toy model and its weights, its questions, the numbers of stage 3."""
    p = preset()
    model = new_model(p, 0, 50)
    toys = make_picture_set(model, labelled_items(0, 8, 2, 'rl'))
    taught(model, toys)
    return model, {k: v.clone() for k, v in model.state_dict().items()}, toys


@pytest.fixture
def toy(start):
    """The taught model, fresh in every test."""
    model, state, toys = start
    model.load_state_dict(state)
    model.zero_grad()
    freeze(model.eval(), *DECODER)
    return Space(model=model, pool=toys, cfg=preset().grpo, pairs=all_pairs(toys)[:4])


@pytest.fixture
def rolled(toy):
    """Rollouts of one step, chosen denoising steps, rewards that tell red and restorations from the
    rest.
    """
    toy.rolls = rollout_batch(toy.model, toy.pool, toy.pairs, toy.cfg, 0, 0)
    toy.steps = choose_steps(toy.rolls, torch_rng('steps'))
    toy.pay = torch.tensor(
        [float('red' in r.texts[-1]) + 0.5 * len(r.restorations) for r in toy.rolls]
    ).view(4, 4)
    toy.patch, toy.noise = toy.model.shape.latent_patch, Noise('grpo', 0, 0)
    toy.o = ObjectiveVariant()
    toy.samples = lambda pay=toy.pay, **o: score_trajectories(
        toy.rolls, pay, toy.noise, torch_rng('steps'), replace(toy.o, **o), toy.patch
    )[0]
    return toy


def hidden(model, rolls, steps):
    return model(pack([rollout_segments(r, s) for r, s in zip(rolls, steps)], model.shape))


def flat_gradient(model, loss):
    """All gradients in one vector, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [
            torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def with_restorations(toy, n, max_restores=2, seed=0):
    """Rollouts of a generation that may restore twice; those with `n` restorations."""
    rolls = generate(
        toy.model,
        prompts(toy.model.tokenizer, toy.pool, toy.pairs),
        replace(rollout_sampling(toy.cfg), max_restores=max_restores),
        Noise('grpo', seed, 0),
        8,
    )
    return rolls, [i for i, r in enumerate(rolls) if len(r.restorations) == n]


# ---------------------------------------------------------------- scoring equals sampling


def test_ratio_is_one(rolled):
    """Direct, restored and truncated trajectories in one batch: every recomputed log-probability
    equals the recorded one (fp32).
    """
    kinds = {(len(r.restorations), r.turns[-1].ended) for r in rolled.rolls}
    assert {(0, True), (1, True), (0, False)} <= kinds
    with torch.no_grad():
        h = hidden(rolled.model, rolled.rolls, rolled.steps)
    gap = (
        (text_logp(rolled.model, h, rolled.cfg.temperature) - recorded_logp(rolled.rolls))
        .abs()
        .max()
        .item()
    )
    done, chosen = (
        [d for r in rolled.rolls for d in r.restorations],
        [k for s in rolled.steps for k in s],
    )
    for how, tol in (('mean', 1e-5), ('sum', 1e-2)):
        with torch.no_grad():
            new = flow_logp(rolled.model, h, done, chosen, how)
        assert (
            new
            - torch.cat(old_flow_logp(rolled.rolls, rolled.steps, rolled.noise, rolled.patch, how))
        ).abs().max() < tol
    print(f'largest text difference {gap:.1e}')
    assert gap < 1e-4


def test_other_temperature(toy):
    """Scoring uses the temperature of sampling."""
    cfg = replace(toy.cfg, temperature=0.5)
    rolls = rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, 0)
    with torch.no_grad():
        h = hidden(toy.model, rolls, choose_steps(rolls, torch_rng(0)))
    assert (
        (text_logp(toy.model, h, 0.5) - recorded_logp(rolls)).abs().max()
        < 1e-3
        < (text_logp(toy.model, h, 1.0) - recorded_logp(rolls)).abs().max()
    )


def test_sampler_mean_at_every_step(rolled):
    """On the whole grid, the noise that the sampler drew is what separates its state from the
    recomputed mean.
    """
    row = next(i for i, r in enumerate(rolled.rolls) if r.restorations)
    d = rolled.rolls[row].restorations[0]
    z = rolled.noise.steps([row], 0, len(d.times) - 1, d.latent.shape, rolled.patch)[0]
    for k in range(len(d.times) - 1):
        with torch.no_grad():
            v = rolled.model.velocity(hidden(rolled.model, [rolled.rolls[row]], [[k]]))
        mean, std = flow.transition(d.states[k], v, d.times[k], d.times[k + 1], d.sigma)
        assert ((d.states[k + 1] - mean) / std - z[k]).abs().max() < 1e-3, k


def test_bf16(toy):
    """Under autocast the ratios stay near one, and the rollouts leave no gradient-free copies of
    weights behind.
    """
    with torch.autocast('cpu', torch.bfloat16):
        loss, logs = grpo_step(GrpoRun(toy.model, toy.pool, toy.cfg), 0)
    loss.backward()
    print(f'bf16: mean text ratio {logs["text_ratio"]:.4f}, largest {logs["text_ratio_max"]:.4f}')
    assert (
        abs(logs['text_ratio'] - 1) < 0.01
        and logs['text_ratio_max'] < 1.3
        and abs(logs['flow_ratio'] - 1) < 0.01
    )
    assert logs['trigger'] > 0 and not [
        n
        for n, p in toy.model.named_parameters()
        if p.requires_grad
        and (p.grad is None or not p.grad.any())
        and not n.endswith(('norm_moe_gen.weight', 'bias'))
    ]


def test_noisy_state_is_private(rolled):
    """Any other x_t leaves every text log-probability as it is, before and after the picture; only
    its own step changes.
    """
    with torch.no_grad():
        h = hidden(rolled.model, rolled.rolls, rolled.steps)
        text = text_logp(rolled.model, h)
        v = rolled.model.velocity(h)
        for r in rolled.rolls:
            for d in r.restorations:
                d.states = d.states * 100 + 7
        h = hidden(rolled.model, rolled.rolls, rolled.steps)
    assert (
        torch.equal(text_logp(rolled.model, h).detach(), text)
        and (rolled.model.velocity(h) - v).abs().max() > 0.01
    )


def test_end_actions(rolled):
    """One action per sampled id, one more where the end token was sampled, none for a text that was
    cut or closed by the marker.
    """
    p = pack([rollout_segments(r) for r in rolled.rolls], rolled.model.shape)
    turns = [t for r in rolled.rolls for t in r.turns]
    for k, t in enumerate(turns):
        labels = p.labels[p.ce_text == k].tolist()
        assert labels == t.ids + [rolled.model.shape.eos] * t.ended and len(labels) == len(t.logp)
    assert any(not t.ended and len(t.ids) == rolled.cfg.max_new_tokens for t in turns)


def test_two_restorations(toy):
    """A trajectory may restore twice: two chosen steps, two noisy segments, ratios of one, weights
    that share 1/B.
    """
    rolls, twice = with_restorations(toy, 2)
    assert twice
    steps = choose_steps(rolls, torch_rng('steps'))
    done, chosen = [d for r in rolls for d in r.restorations], [k for s in steps for k in s]
    patch, noise = toy.model.shape.latent_patch, Noise('grpo', 0, 0)
    with torch.no_grad():
        h = hidden(toy.model, rolls, steps)
        assert (text_logp(toy.model, h) - recorded_logp(rolls)).abs().max() < 1e-3
        assert (
            flow_logp(toy.model, h, done, chosen)
            - torch.cat(old_flow_logp(rolls, steps, noise, patch))
        ).abs().max() < 1e-5
    pay = torch.rand(4, 8, generator=torch_rng('pay'))
    samples, _ = score_trajectories(rolls, pay, noise, torch_rng('steps'), Objective(), patch)
    assert samples[twice[0]].w_flow == 1 / (2 * len(rolls)) and len(samples[twice[0]].flow_old) == 2
    loss, logs = grpo_loss(toy.model, samples, Objective())
    loss.backward()
    assert abs(logs['flow_ratio'] - 1) < 1e-4 and toy.model.llm2vae.weight.grad.any()


def test_chunks_and_resampling(toy):
    """Rollouts depend on seed, step and row only."""

    def texts(*a, **k):
        return [r.texts for r in rollout_batch(toy.model, toy.pool, toy.pairs, toy.cfg, *a, **k)]

    assert (
        texts(0, 0) == texts(0, 0, chunk=1) == texts(0, 0, chunk=3)
        and texts(0, 0) != texts(0, 1)
        and texts(0, 0) != texts(1, 0)
    )
    assert (
        choose_pairs(toy.pool, 4, 0, 0)
        == choose_pairs(toy.pool, 4, 0, 0)
        != choose_pairs(toy.pool, 4, 0, 1)
    )
    assert (
        len(set(choose_pairs(toy.pool, 8, 0, 0))) == 8
        and len(choose_pairs(toy.pool, 20, 0, 0)) == 20
    )


def test_chunks_of_mixed_kinds(toy):
    """The same with none, one and two decoded and re-read restorations: texts, states and recorded
    pixels.
    """
    cfg = replace(toy.cfg, mode='reencode', max_restores=2)
    want, *others = (
        rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, 0, chunk=c) for c in (None, 1, 3)
    )
    assert {len(r.restorations) for r in want} == {0, 1, 2}
    for rolls in others:
        for a, b in zip(want, rolls):
            assert a.texts == b.texts and len(a.restorations) == len(b.restorations)
            for d, e in zip(a.restorations, b.restorations):
                assert (
                    torch.allclose(d.states, e.states, atol=1e-4)
                    and (d.segments[1].image - e.segments[1].image).abs().max() < 2.1 / 127.5
                )


def test_pieces_of_mixed_kinds(toy):
    """One update over trajectories of all modes and policies: pieces of any size give one gradient,
    and every ratio is 1.
    """
    o, samples = Objective(), []
    for n, option in enumerate(
        (
            dict(),
            dict(mode='reencode', max_restores=2),
            dict(policy='never'),
            dict(mode='both', policy='always'),
        )
    ):
        rolls = rollout_batch(toy.model, toy.pool, toy.pairs[:2], replace(toy.cfg, **option), 0, n)
        pay = torch.rand(2, 4, generator=torch_rng('pay', n))
        samples += score_trajectories(
            rolls, pay, Noise('grpo', 0, n), torch_rng('steps', n), o, toy.model.shape.latent_patch
        )[0]
    whole, logs = grpo_loss(toy.model, samples, o)
    assert abs(logs['text_ratio_max'] - 1) < 1e-4 and abs(logs['flow_ratio_max'] - 1) < 1e-4
    want = flat_gradient(toy.model, whole)
    for micro in (1, 5):
        assert torch.allclose(
            flat_gradient(toy.model, accumulate_gradients(toy.model, samples, o, micro=micro)[0]),
            want,
            atol=1e-5 * want.abs().max().item(),
        )


def test_memory_formula(toy, monkeypatch):
    """The caches that live at the same time stay below the stated bound, reach its first two terms,
    and grow linearly with the group.
    """
    live, peak = weakref.WeakSet(), []

    def held(c):
        return sum(t.nbytes for t in [*c.k, *c.v, *vars(c.layout).values(), c.lens, c.rope])

    def book(make):
        def made(*a, **k):
            cache = make(*a, **k)
            live.add(cache)
            peak.append(sum(map(held, live)))
            return cache

        return made

    assert held(KVCache(toy.model.mot.cfg, 3, 17)) == cache_bytes(toy.model, 3, 17)
    for room, name in (
        ('generate', 'KVCache'),
        ('generate', 'select_rows'),
        ('decode', 'select_rows'),
    ):
        module = getattr(clear_nb, room)
        monkeypatch.setattr(module, name, book(getattr(module, name)))
    tops, ask = [], prompts(toy.model.tokenizer, toy.pool, toy.pairs)
    for G in (2, 4, 8):
        cfg, _ = replace(toy.cfg, group=G, max_restores=2), peak.clear()
        rolls = rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, 0, chunk=2)
        need = rollout_bytes(toy.model, ask, cfg, 2)
        assert need['caches'] * (1 + G) / (1 + 2 * G) <= max(peak) <= need['caches']
        assert sum(d.states.nbytes for r in rolls for d in r.restorations) <= need['states']
        tops.append(need['caches'])
    assert tops[2] - tops[1] == 2 * (tops[1] - tops[0])


# ---------------------------------------------------------------- sums and weights


def test_batch_is_a_sum(rolled):
    """The loss of two members is the sum of the losses of each."""
    samples = rolled.samples()
    pick = [
        next(s for s in samples if len(s.rollout.restorations) == n and s.advantage) for n in (0, 1)
    ]
    o = replace(rolled.o, beta=0.04)
    ref = reference(rolled.model)
    both = flat_gradient(rolled.model, joint_loss(rolled.model, pick, o, ref)[0])
    each = [flat_gradient(rolled.model, joint_loss(rolled.model, [s], o, ref)[0]) for s in pick]
    assert (
        torch.allclose(both, sum(each), atol=1e-6)
        and both.any()
        and not torch.allclose(each[0], each[1], atol=1e-3)
    )
    twice = flat_gradient(rolled.model, joint_loss(rolled.model, [pick[1]] * 2, o, ref)[0])
    assert torch.allclose(twice, 2 * each[1], atol=1e-6)


@pytest.mark.parametrize('micro', [None, 6])
@pytest.mark.parametrize('budget', [1, 150, 10_000], ids=['longest', 'some', 'all'])
def test_shared_rows(rolled, budget, micro):
    """Trajectories that share rows: the log-probabilities of all tokens and denoising steps, in
    their order, and the gradient are those of one row each.
    """
    found, samples, ref = [], rolled.samples(), reference(rolled.model)
    with torch.no_grad():
        for m in rolled.model.parameters():
            m.add_(
                torch.randn(m.shape, generator=torch_rng('moved', m.numel())),
                alpha=1e-3 * m.requires_grad,
            )
    for rolled.model.row_tokens in (0, budget):
        value, details = accumulate_gradients(
            rolled.model, samples, replace(rolled.o, beta=0.04), ref, micro
        )
        found.append(
            [
                flat_gradient(rolled.model, value),
                *(torch.cat([d[k] for d in details if k in d]) for k in ('text', 'flow', 'kl')),
            ]
        )
    rolled.model.row_tokens = 0
    size = (
        recorded_logp(rolled.rolls).abs().max().item()
    )  # log-ratios are differences of numbers of this size
    for a, b in zip(*found, strict=True):
        assert a.norm() > 1e-5 and (a - b).abs().max() < 1e-6 * max(size, a.abs().max())


@pytest.mark.parametrize('norm', ['grpo', 'dr_grpo', 'bnpo'])
def test_pieces(rolled, norm):
    """Any piece size gives the gradient of the whole batch, in any order of members, for every
    normalisation.
    """
    o = replace(rolled.o, norm=norm, beta=0.04)
    samples, ref = rolled.samples(norm=norm), reference(rolled.model)
    whole, logs = grpo_loss(rolled.model, samples, o, ref)
    value, want = whole.item(), flat_gradient(rolled.model, whole)
    for micro in (None, 1, 3, 5):
        loss, details = accumulate_gradients(rolled.model, samples[::-1], o, ref, micro)
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert torch.allclose(
            flat_gradient(rolled.model, loss), want, atol=1e-5 * want.abs().max().item()
        )
        assert grpo.log_summary(details) == pytest.approx(logs, abs=1e-5)


def test_normalisations(rolled):
    """grpo is the mean over trajectories of the mean over tokens, bnpo the mean over tokens,
    dr_grpo a sum over a constant.
    """
    A, rolls = advantages(rolled.pay)[0].flatten(), rolled.rolls
    n = torch.tensor([float(sum(len(t.logp) for t in r.turns)) for r in rolls])

    def gradient(norm):
        samples = rolled.samples(norm=norm, lambda_flow=0.0)
        return flat_gradient(
            rolled.model,
            grpo_loss(rolled.model, samples, replace(rolled.o, norm=norm, lambda_flow=0.0))[0],
        )

    def naive(w):
        h = rolled.model(pack([rollout_segments(r) for r in rolls], rolled.model.shape))
        own = torch.repeat_interleave(torch.arange(len(rolls)), n.long())
        return flat_gradient(rolled.model, -(w[own] * A[own] * text_logp(rolled.model, h)).sum())

    for norm, w in dict(
        grpo=1 / (len(rolls) * n),
        bnpo=1 / n.sum().expand(len(rolls)),
        dr_grpo=torch.full((len(rolls),), 1 / (len(rolls) * rolled.o.length)),
    ).items():
        assert torch.allclose(gradient(norm), naive(w), atol=1e-5 * naive(w).abs().max().item()), (
            norm
        )
    with pytest.raises(ValueError, match='unknown norm'):
        gradient('mean')


def test_flow_gradient(rolled):
    """The flow loss has the gradient of −Â log p of the chosen steps, averaged over all
    trajectories.
    """
    samples = [s for s in rolled.samples() if s.rollout.restorations]
    h = hidden(rolled.model, [s.rollout for s in samples], [s.steps for s in samples])
    logp = flow_logp(
        rolled.model, h, [s.rollout.restorations[0] for s in samples], [s.steps[0] for s in samples]
    )
    A = torch.tensor([s.advantage for s in samples])
    want = flat_gradient(rolled.model, -(A * logp).sum() / len(rolled.rolls))
    h = hidden(rolled.model, [s.rollout for s in samples], [s.steps for s in samples])
    got = flat_gradient(rolled.model, grpo.flow_terms(rolled.model, h, samples, rolled.o)[0])
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item()) and want.any()


# ---------------------------------------------------------------- who gets a gradient


def test_equal_rewards_teach_nothing(rolled):
    """Groups without spread have zero gradient, and are counted."""
    samples, flat = score_trajectories(
        rolled.rolls,
        torch.full((4, 4), 0.4),
        rolled.noise,
        torch_rng('steps'),
        rolled.o,
        rolled.patch,
    )
    assert (
        flat == 4
        and not flat_gradient(
            rolled.model, accumulate_gradients(rolled.model, samples, rolled.o)[0]
        ).any()
    )


def test_outage_is_not_zero(rolled):
    """A member without a reward changes neither the statistics of its group nor the gradient; a
    reward of 0 would.
    """
    missing, zero = rolled.pay.clone(), rolled.pay.clone()
    best = int(rolled.pay.flatten().argmax())
    missing.view(-1)[best], zero.view(-1)[best] = float('nan'), 0.0
    samples = rolled.samples(missing)
    assert len(samples) == 15 and all(s.rollout is not rolled.rolls[best] for s in samples)
    group = missing[best // 4]
    rest = group[~group.isnan()]
    assert torch.allclose(
        advantages(missing)[0][best // 4][~group.isnan()], advantages(rest[None])[0][0]
    )
    g = [
        flat_gradient(
            rolled.model, accumulate_gradients(rolled.model, rolled.samples(m), rolled.o)[0]
        )
        for m in (missing, zero)
    ]
    assert not torch.allclose(g[0], g[1], atol=1e-3 * g[1].abs().max().item())


def test_judge_outage_in_a_step(toy):
    """Some failures are masked and counted; when nothing can be scored the step stops."""
    calls = iter(range(10**6))

    def flaky(q, said):
        return Outage('timeout') if next(calls) % 3 == 0 else AnswerScore(float(said == 'red'))

    loss, logs = grpo_step(GrpoRun(toy.model, toy.pool, toy.cfg, judge=flaky), 0)
    assert 0 < logs['missing'] < 16 and torch.isfinite(loss)

    def down(q, said):
        return Outage('401')

    with pytest.raises(RuntimeError, match='401'):
        grpo.reward_table([down(None, 'x')] * 4, 2)


def test_judge_behind_a_server(toy, monkeypatch):
    """A language model as judge, several answers at a time: an outage and an unreadable reply are
    left out, by kind, with a warning; a refused key stops.
    """
    monkeypatch.setenv('OPENAI_API_KEY', 'any')
    replies = ['0.5', Status(500), 'no idea', '1']
    rolls, step = (
        rollout_batch(toy.model, toy.pool, toy.pairs, toy.cfg, 0, 0),
        lambda judge: grpo_step(GrpoRun(toy.model, toy.pool, toy.cfg, judge=judge, workers=4), 0),
    )
    with FakeServer(default=lambda request: replies[len(request.text) % 4]) as server:
        judge = LLMJudge('toy', server.url, tries=1)
        asked = [Space(prompt=f'{i}' + '.' * i, answer='x', options=()) for i in range(16)]
        parallel, one = (
            grpo.rewards_of_rollouts(rolls, asked, LLMJudge('toy', server.url, tries=1), workers=n)
            for n in (4, 1)
        )
        assert parallel == one and server.most <= 4
        with pytest.warns(UserWarning, match='answers have no reward and are left out'):
            table, logs = grpo.reward_table(parallel, 4)
        assert logs['outages'] > 0 < logs['unparsable'] and logs['missing'] == logs[
            'outages'
        ] + logs['unparsable'] == int(table.isnan().sum())
        server.default = lambda request: (
            'A'
            if OPTION_TASK.rule in request.text
            else '1'
            if '"answer": "red"' in request.text
            else '0'
        )
        loss, logs = step(judge)
        assert torch.isfinite(loss) and logs['missing'] == 0 and 0 < logs['acc'] < 1
        server.default = Status(401)
        with pytest.raises(Refused, match='refused the key'):
            step(LLMJudge('toy', server.url))


def test_answers_are_judged_side_by_side():
    """With four workers four answers are with the judge at the same time (each waits for the
    others), and outcomes keep their order.
    """
    meet, rolls = (
        threading.Barrier(4),
        [Space(parsed=Space(answer=f'{i}', valid=True), restorations=[]) for i in range(8)],
    )

    def judge(question, said):
        meet.wait(10)
        return AnswerScore(int(said) / 10)

    assert [r.acc for r in grpo.rewards_of_rollouts(rolls, [None] * 8, judge, workers=4)] == [
        i / 10 for i in range(8)
    ]
    with pytest.raises(threading.BrokenBarrierError):
        meet.abort()
        grpo.rewards_of_rollouts(rolls, [None] * 8, judge, workers=4)


def test_reward_weights_reach_the_step(toy):
    """w_dec = 0 leaves the decision out of reward and advantage; w_cost takes its share off every
    restoration.
    """

    def step(**o):
        return grpo_step(GrpoRun(toy.model, toy.pool, replace(toy.cfg, **o), judge=likes_red), 0)[1]

    plain, blind, dear = step(), step(w_dec=0.0), step(w_cost=0.2)
    assert (
        plain['reward']
        == pytest.approx(0.75 * plain['acc'] + 0.1 * plain['fmt'] + 0.15 * plain['dec'])
        and plain['cost'] == 0 < plain['trigger'] < 1
    )
    assert (
        blind['reward'] == pytest.approx(0.75 * blind['acc'] + 0.1 * blind['fmt'])
        and blind['dec'] == plain['dec'] != 0
    )
    assert dear['reward'] == pytest.approx(plain['reward'] - 0.2 * plain['trigger']) and dear[
        'cost'
    ] == pytest.approx(0.2 * plain['trigger'])
    assert len({plain['loss_flow'], blind['loss_flow'], dear['loss_flow']}) == 3


def test_progress_bar(toy, capsys, monkeypatch):
    """Beside the bar: reward, trigger rate, seconds per phase, nothing else."""
    monkeypatch.setattr('clear_nb.core._bar_file', lambda: sys.stderr)
    train_grpo(toy.model, toy.pool, preset(steps=1), acc=accelerator('no'), judge=likes_red)
    shown = re.findall(r'(\w+)=', capsys.readouterr().err.split('grpo:')[-1])
    assert shown == ['reward', 'trigger', 's_rollout', 's_reward', 's_update']


def test_lambda_zero(rolled):
    """Without the flow loss nothing flows through the velocity head; with it something does. The
    bridge learns either way.
    """
    for lam in (0.0, 0.3):
        rolled.model.zero_grad()
        accumulate_gradients(
            rolled.model, rolled.samples(lambda_flow=lam), replace(rolled.o, lambda_flow=lam)
        )[0].backward()
        grads = {n: p.grad for n, p in rolled.model.named_parameters()}
        assert (grads['llm2vae.weight'] is None) == (lam == 0) and grads['vae2llm.weight'].any()
        assert all(grads[n] is None for n in grads if n.startswith(DECODER))


def test_answer_reaches_the_restored_latent(rolled):
    """The log-probability of the answer has a gradient at the restored latent: there is no decoding
    in between (§3.3).
    """
    r = next(r for r in rolled.rolls if r.restorations)
    segments = rollout_segments(r)
    k = max(i for i, s in enumerate(segments) if isinstance(s, LatentSegment))
    z = segments[k].latent.clone().requires_grad_()
    segments[k] = LatentSegment(z)
    logp = text_logp(rolled.model, rolled.model(pack([segments], rolled.model.shape)))
    (after,) = torch.autograd.grad(logp[len(r.turns[0].logp) :].sum(), z, retain_graph=True)
    (before,) = torch.autograd.grad(logp[: len(r.turns[0].logp)].sum(), z)
    assert after.any() and not before.any()


EXPERT = ('_moe_gen', 'vae2llm', 'llm2vae', 'time_embedder')


def answer_gradient(toy, mode, inputs, k):
    """Gradient norms of the answer's log-probability, by name of the generation expert's
    parameters.
    """
    ask, s = (
        prompts(toy.model.tokenizer, toy.pool, toy.pairs, inputs),
        replace(rollout_sampling(toy.cfg), mode=mode, policy='always'),
    )
    rolls = generate(toy.model, ask, s, Noise('bridge'), 4, tuple(toy.pool.seen_z.shape[1:]))
    r = next(r for r in rolls if r.restorations)
    logp = text_logp(
        toy.model, hidden(toy.model, [r], [k and [k]]), banned=forbidden(toy.model, [r])
    )
    assert (logp - recorded_logp([r])).abs().max() < 1e-4
    named = {
        n: p
        for n, p in toy.model.named_parameters()
        if p.requires_grad and any(e in n for e in EXPERT)
    }
    grads = torch.autograd.grad(
        logp[len(r.turns[0].logp) :].sum(), named.values(), allow_unused=True
    )
    return {n: 0.0 if g is None else float(g.norm()) for n, g in zip(named, grads)}


@pytest.mark.parametrize('k', [None, 1])
def test_bridge_gradient(toy, k):
    """With the bridge the answer reaches the generation expert in every layer; with decode-reencode
    exactly nothing does (§3.3).
    """
    bridge, coded = (answer_gradient(toy, mode, 'vit', k) for mode in ('bridge', 'reencode'))
    for layer in range(len(toy.model.mot.layers)):
        mine = {
            n: v
            for n, v in bridge.items()
            if f'layers.{layer}.' in n
            and 'k_proj' in n
            or f'layers.{layer}.' in n
            and 'v_proj' in n
        }
        assert mine and all(v > 0 for n, v in mine.items() if n.endswith('weight'))
    assert bridge['vae2llm.weight'] > 0 and bridge['llm2vae.weight'] == 0
    assert len(coded) == len(bridge) and set(coded.values()) == {0.0}


def test_degraded_latent_has_a_gradient_of_its_own(toy):
    """A latent in the prompt is read by the generation expert in either mode: that part is no
    credit for restoring.
    """
    assert answer_gradient(toy, 'reencode', 'both', 1)['vae2llm.weight'] > 0


def test_reference(rolled):
    """KL to the reference is 0 before and positive after an update; the reference stays as it was
    and has no gradients.
    """
    o = replace(rolled.o, beta=0.04)
    ref = reference(rolled.model)
    frozen = {k: v.clone() for k, v in ref.state_dict().items()}
    opt = optimizer(rolled.model, 1e-3)
    loss, logs = grpo_loss(rolled.model, rolled.samples(), o, ref)
    assert logs['kl'] == 0
    loss.backward()
    opt.step()
    loss, logs = grpo_loss(rolled.model, rolled.samples(), o, ref)
    loss.backward()
    assert logs['kl'] > 0 and all(torch.equal(v, frozen[k]) for k, v in ref.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in ref.mot.parameters())
    assert ref.vae is rolled.model.vae and ref.mot is not rolled.model.mot


def test_kl_pulls_back(rolled):
    """With all advantages at zero, the KL term alone pulls a disturbed model to the reference."""
    o, ref = replace(rolled.o, beta=1.0), reference(rolled.model)
    samples = rolled.samples(torch.zeros(4, 4))
    with torch.no_grad():
        for n, p in rolled.model.named_parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch_rng(n))
    opt, kl = optimizer(rolled.model, 1e-3), []
    for _ in range(15):
        loss, logs = grpo_loss(rolled.model, samples, o, ref)
        opt.zero_grad()
        loss.backward()
        opt.step()
        kl.append(logs['kl'])
    print(f'kl {kl[0]:.3f} -> {kl[-1]:.3f}')
    assert kl[-1] < 0.5 * kl[0]


def test_clip_holds(rolled):
    """Many updates on one batch: ratios leave the range, the clip is seen, and a fully clipped
    batch has no gradient.
    """
    samples = rolled.samples(lambda_flow=0.0)
    o = replace(rolled.o, lambda_flow=0.0)
    opt = optimizer(rolled.model, 3e-3)
    for _ in range(24):
        loss, logs = grpo_loss(rolled.model, samples, o)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert logs['text_clip'] > 0.1 and logs['text_ratio_max'] > 1.2
    d, A = (
        torch.tensor([0.5, -0.5, 80.0, -200.0], requires_grad=True),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
    )
    assert not torch.autograd.grad(grpo.clipped_policy_loss(d, A, 0.2).sum(), d)[0].any()


def test_not_a_number_stops(rolled):
    """A value that is not finite ends the run with the name of its trajectory (steps: see
    test_hazards.py).
    """
    samples = rolled.samples()
    samples[2].advantage = float('nan')
    with pytest.raises(
        FloatingPointError, match=r'because of trajectory 2 \(.*: its record is not finite\)$'
    ):
        fit(
            rolled.model,
            lambda step: (accumulate_gradients(rolled.model, samples, rolled.o)[0], {}),
            1,
            1e-3,
            ranks=ranks_of(accelerator('no')),
        )


def test_bad_values(rolled):
    """Mistakes are named."""
    with pytest.raises(ValueError, match='temperature'):
        Objective(temperature=0.0)
    with pytest.raises(ValueError, match='reference'):
        joint_loss(rolled.model, rolled.samples(), Objective(beta=0.1))
    with pytest.raises(ValueError, match='scale'):
        advantages(torch.zeros(1, 2), 'mean')
    done = [d for r in rolled.rolls for d in r.restorations]
    h, chosen = (
        hidden(rolled.model, rolled.rolls, rolled.steps),
        [k for s in rolled.steps for k in s],
    )
    for d in done:
        d.sigma = 0.0
    with pytest.raises(ValueError, match='sigma > 0'):
        flow_logp(rolled.model, h, done, chosen)
    done[0].sigma = 0.3
    with pytest.raises(ValueError, match='mixes'):
        flow_logp(rolled.model, h, done, chosen)


# ---------------------------------------------------------------- does the reward rise?


def test_predicted_rise_of_text(toy):
    """One token, two habits, one pays: after a small step the exact expected reward rises by what
    the gradient says (20 %).
    """
    tok, ask = toy.model.tokenizer, prompts(toy.model.tokenizer, toy.pool, toy.pairs)
    red, three = (encode_text(tok, w)[:1] for w in ('red', '3'))
    lesson, opt = (
        pack([p + [TextSegment(w, loss=True)] for p in ask for w in (red, three)], toy.model.shape),
        optimizer(toy.model, 1e-2),
    )
    for _ in range(30):
        loss = toy.model.ce_terms(toy.model(lesson)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    @torch.no_grad()
    def expected():
        p = pack([q + [TextSegment(red, loss=True, eos_loss=False)] for q in ask], toy.model.shape)
        return float(text_logp(toy.model, toy.model(p)).exp().mean())

    G, cfg = 64, replace(toy.cfg, group=64, max_new_tokens=1)
    o, before = (
        ObjectiveVariant(scale='none', norm='dr_grpo', length=1, lambda_flow=0.0),
        expected(),
    )
    rolls = rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, 0)
    pay = torch.tensor([float(r.turns[0].ids[:1] == list(red)) for r in rolls]).view(4, G)
    samples, _ = score_trajectories(
        rolls, pay, Noise('grpo', 0, 0), torch_rng(0), o, toy.model.shape.latent_patch
    )
    g = flat_gradient(toy.model, accumulate_gradients(toy.model, samples, o)[0])
    eta = 0.01 / float(g.square().sum())
    with torch.no_grad():
        params = [p for p in toy.model.parameters() if p.requires_grad]
        for p, d in zip(params, g.split([p.numel() for p in params])):
            p -= eta * d.view_as(p)
    promised, rise = 0.01 * G / (G - 1), expected() - before
    print(f'expected reward {before:.3f}: promised {promised:.4f}, came {rise:.4f}')
    assert 0.2 < before < 0.8 and abs(rise / promised - 1) < 0.2


def test_predicted_rise_of_denoising(toy):
    """The same for L_Flow: the reward is the mean of the restored latent, the step moves the
    velocity's bias (20 %).
    """
    cfg, o = (
        replace(toy.cfg, group=64, sigma=1.0, denoise_steps=4),
        ObjectiveVariant(lambda_flow=1.0, reduction='sum', scale='none'),
    )

    def rolled():
        return rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, 0)

    def earned(rolls):
        return torch.tensor(
            [float(r.restorations[0].latent.mean()) if r.restorations else math.nan for r in rolls]
        )

    rolls, noise, slope = rolled(), Noise('grpo', 0, 0), 0.0
    pay, patch = earned(rolls), toy.model.shape.latent_patch
    samples, _ = score_trajectories(rolls, pay[None], noise, torch_rng(0), o, patch)
    n = len(samples)
    for k in range(
        cfg.denoise_steps - 1
    ):  # the drawn step is uniform, so the sum over all is N − 1 times its expectation
        for s in samples:
            s.steps = [k]
            s.flow_old = old_flow_logp(
                rolls[s.row : s.row + 1], [[k]], Noise('grpo', 0, 0, first=s.row), patch, 'sum'
            )[0]
        h = hidden(toy.model, [s.rollout for s in samples], [s.steps for s in samples])
        (g,) = torch.autograd.grad(
            grpo.flow_terms(toy.model, h, samples, o)[0], toy.model.llm2vae.bias
        )
        slope -= float(g.sum()) * n / (n - 1)
    size = 0.01 * math.copysign(1.0, slope)
    with torch.no_grad():
        toy.model.llm2vae.bias += size
    rise = float((earned(rolled()) - pay).nanmean())
    print(f'{n} restorations: promised {size * slope:.5f}, came {rise:.5f}')
    assert n > 100 and rise > 0 and abs(rise / (size * slope) - 1) < 0.2


# ---------------------------------------------------------------- training


def likes_red(question, said):
    return AnswerScore(float(said == 'red'))


def test_reward_goes_up(toy):
    """One fixed answer is paid, on 8 questions: the mean reward rises."""
    history = train_grpo(
        toy.model, toy.pool, preset(steps=20, prompts=8), acc=accelerator('no'), judge=likes_red
    )

    def mean(key, rows):
        return float(np.mean([h[key] for h in rows]))

    print(
        'reward {:.2f} -> {:.2f}, accuracy {:.2f} -> {:.2f}'.format(
            *(mean(k, r) for k in ('reward', 'acc') for r in (history[:3], history[-3:]))
        )
    )
    assert mean('reward', history[-3:]) > mean('reward', history[:3]) + 0.25
    assert {
        'trigger',
        'text_ratio',
        'flow_ratio',
        'kl',
        'flat_groups',
        's_rollout',
        's_update',
    } <= set(history[0])
    assert all(abs(h['text_ratio'] - 1) < 1e-3 and abs(h['flow_ratio'] - 1) < 1e-3 for h in history)


ABLATIONS = dict(
    full={},
    reencode=dict(mode='reencode'),
    text_only=dict(policy='never'),
    no_flow=dict(lambda_flow=0.0),
    no_decision=dict(w_dec=0.0),
    always=dict(policy='always'),
    cost=dict(w_cost=0.3),
    reference=dict(beta=0.04),
    release=dict(rules='release', norm='dr_grpo', scale='none', max_restores=2),
)


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_train(toy, name):
    """Every ablation is the same function with other values: ratios of 1, the decoder moves, and
    the velocity head only where a flow loss reaches it.
    """
    o = ABLATIONS[name]
    before = {k: v.clone() for k, v in toy.model.state_dict().items()}
    history = train_grpo(
        toy.model, toy.pool, preset(steps=2, **o), acc=accelerator('no'), judge=likes_red
    )
    moved = {k for k, v in toy.model.state_dict().items() if not torch.equal(v, before[k])}
    assert (
        all(abs(h['text_ratio_max'] - 1) < 1e-3 for h in history)
        and 'language_model.lm_head.weight' in moved
    )
    assert not any(k.startswith((*DECODER, 'latent_pos_embed')) for k in moved)
    assert (history[0]['trigger'] > 0) == (name != 'text_only')
    flows = name not in ('text_only', 'no_flow')
    assert (
        ('llm2vae.weight' in moved)
        == flows
        == all('flow_ratio' in h and abs(h['flow_ratio'] - 1) < 1e-3 for h in history)
    )
    assert (history[0]['kl'], history[1]['kl'] > 0) == (0, name == 'reference')


def test_flow_loss_alone_moves_the_latent(toy):
    """The reward looks at the restored latent only and no text term is used: L_Flow makes the
    latents earn more.
    """
    cfg, o, values = (
        replace(toy.cfg, group=8, sigma=1.0, denoise_steps=4),
        ObjectiveVariant(lambda_flow=1.0, reduction='sum', epsilon=0.2),
        [],
    )
    opt = optimizer(toy.model, 2e-3)
    for step in range(20):
        rolls = rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, step)
        pay = torch.tensor(
            [
                float(r.restorations[0].latent.mean()) if r.restorations else float('nan')
                for r in rolls
            ]
        ).view(4, 8)
        values.append(float(pay.nanmean()))
        samples, _ = score_trajectories(
            rolls,
            pay,
            Noise('grpo', 0, step),
            torch_rng('steps', step),
            o,
            toy.model.shape.latent_patch,
        )
        h = hidden(toy.model, [s.rollout for s in samples], [s.steps for s in samples])
        loss, _ = grpo.flow_terms(toy.model, h, samples, o)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(toy.model.parameters(), 1.0)
        opt.step()
    print(
        'mean of the restored latent {:.3f} -> {:.3f}'.format(
            np.mean(values[:3]), np.mean(values[-3:])
        )
    )
    assert np.mean(values[-3:]) > np.mean(values[:3]) + 0.1


def test_resume(toy, monkeypatch, tmp_path):
    """A run that was killed and continued ends at the same weights, reference included."""
    p, o = preset(steps=4, prompts=2, beta=0.04), dict(acc=accelerator('no'), judge=likes_red)
    monkeypatch.setattr(grpo, 'fit', partial(fit, save_seconds=0.0))
    begin = {k: v.clone() for k, v in toy.model.state_dict().items()}
    train_grpo(toy.model, toy.pool, p, **o)
    want = {k: v.clone() for k, v in toy.model.state_dict().items()}
    step = grpo.grpo_step

    def killed(run, k):
        if k == 2:
            raise KeyboardInterrupt
        return step(run, k)

    toy.model.load_state_dict(begin)
    monkeypatch.setattr(grpo, 'grpo_step', killed)
    with pytest.raises(KeyboardInterrupt):
        train_grpo(toy.model, toy.pool, p, state=tmp_path / 'state.pt', **o)
    monkeypatch.setattr(grpo, 'grpo_step', step)
    toy.model.load_state_dict(begin)
    history = train_grpo(toy.model, toy.pool, p, state=tmp_path / 'state.pt', **o)
    assert [h['step'] for h in history] == [0, 1, 2, 3] and all(
        torch.equal(v, want[k]) for k, v in toy.model.state_dict().items()
    )

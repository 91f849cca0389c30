"""The published stage 3 has eighteen known faults. One test each, named after its number, that
fails when ours has it too.
"""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace as Space

import pytest
import torch
from test_grpo import flat_gradient, hidden, preset, rolled, start, toy  # noqa: F401 (fixtures)

from clear_nb import flow, grpo, reward
from clear_nb.core import torch_rng
from clear_nb.decode import Noise, feed_token, prefill
from clear_nb.generate import token_budget
from clear_nb.grpo import (
    GrpoRun,
    Objective,
    ObjectiveVariant,
    accumulate_gradients,
    advantages,
    choose_steps,
    flow_logp,
    forbidden,
    grpo_step,
    joint_loss,
    old_flow_logp,
    recorded_logp,
    reference,
    reward_table,
    rollout_batch,
    rollout_sampling,
    rollout_segments,
    score_trajectories,
    text_logp,
    train_grpo,
)
from clear_nb.mot import SPLIT_NOISE, KVCache, visible
from clear_nb.restore import reinject
from clear_nb.reward import AnswerScore, Outage, Reward, Unparsable, read_score, score_rollout
from clear_nb.train import accelerator, optimizer
from clear_nb.trajectory import (
    MARKER,
    LatentSegment,
    TextSegment,
    pack,
    parse,
    token_count,
)

MODES, POLICIES = ('bridge', 'reencode', 'both'), ('adaptive', 'never', 'direct', 'always')


def spoken(toy, step=0, **options):
    """Rollouts of one step under other options of stage 3, and the options."""
    cfg = replace(toy.cfg, **options)
    return rollout_batch(toy.model, toy.pool, toy.pairs, cfg, 0, step), cfg


@torch.no_grad()
def rescored(model, rolls, cfg, k=None):
    """Log-probabilities of a new forward pass, of texts and of step `k` of every restoration
    (None: drawn).
    """
    steps = (
        choose_steps(rolls, torch_rng('again'))
        if k is None
        else [[k] * len(r.restorations) for r in rolls]
    )
    h, done = hidden(model, rolls, steps), [d for r in rolls for d in r.restorations]
    image = {how: flow_logp(model, h, done, sum(steps, []), how) for how in ('mean', 'sum') if done}
    old = {
        how: torch.cat(
            old_flow_logp(rolls, steps, Noise('grpo', 0, 0), model.shape.latent_patch, how)
        )
        for how in image
    }
    return text_logp(model, h, cfg.temperature, forbidden(model, rolls)), image, old


def ratio_gap(new, old):
    return float(((new - old).double().exp() - 1).abs().max())


def kinds(rolls):
    return {len(r.restorations): r for r in rolls}


# ---------------------------------------------------------------- 1 to 3: one context


@torch.no_grad()
def cache_saw(model, segments, monkeypatch):
    """What each token saw during generation: given pieces at once, generated texts token by
    token.
    """
    rows, total, plain = [], token_count(segments, model.shape), type(model.mot).mask

    def spy(q, k):
        rows.extend(
            torch.nn.functional.pad(m, (0, total - len(m))) for m in plain(model.mot, q, k)[0]
        )
        return plain(model.mot, q, k)

    with monkeypatch.context() as m:
        m.setattr(model.mot, 'mask', spy)
        cache = KVCache(model.mot.cfg, 1, total)
        for s in segments:
            if not isinstance(s, TextSegment) or not s.loss:
                prefill(model, cache, [[s]])
                continue
            for i in (model.shape.bos, *s.ids, model.shape.eos):
                feed_token(model, cache, torch.tensor([i]), torch.tensor([True]))
            cache.splits += 1
    return torch.stack(rows)


@pytest.mark.parametrize('mode', MODES)
def test_hazard_01_mask(toy, mode, monkeypatch):
    """Direct, with one and with two restorations: every row sees itself and exactly what the
    cache saw; each split has one mode.
    """
    found = kinds(spoken(toy, mode=mode, max_restores=2)[0])
    assert set(found) == {0, 1, 2}
    for r in found.values():
        segments = rollout_segments(r, [1] * len(r.restorations))
        p = pack([segments], toy.model.shape)
        mask, noise, split = (
            visible(p.layout, p.layout)[0],
            p.layout.mode[0] == SPLIT_NOISE,
            p.layout.split[0],
        )
        assert mask.diagonal().all() and p.splits == sum(
            token_count([s], toy.model.shape) > 0 for s in segments
        ) == len(split.unique())
        assert all(len(p.layout.mode[0, split == k].unique()) == 1 for k in range(p.splits))
        assert torch.equal(
            mask[~noise][:, ~noise], cache_saw(toy.model, rollout_segments(r), monkeypatch)
        )
        same = split[:, None] == split[None]
        assert not (mask & ~same)[:, noise].any()  # nobody else sees a noised state
        before = (torch.arange(len(split))[None] < torch.arange(len(split))[:, None]) & ~noise[None]
        assert torch.equal(mask[noise], (before | same)[noise])  # which sees all that came before


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('mode', MODES)
def test_hazard_02_context(toy, mode, policy):
    """Training context = rollout context: text and denoising ratios are 1 ± 1e-4; the context
    of another mode is noticed.
    """
    rolls, cfg = spoken(toy, mode=mode, policy=policy, max_restores=2)
    text, image, old = rescored(toy.model, rolls, cfg)
    assert ratio_gap(text, recorded_logp(rolls)) < 1e-4 and (
        not image or ratio_gap(image['mean'], old['mean']) < 1e-4
    )
    if policy in ('never', 'direct'):
        return
    for r in rolls:
        for d in r.restorations:
            d.segments = reinject(toy.model, [d.latent], MODES[MODES.index(mode) - 1])[0]
    assert ratio_gap(rescored(toy.model, rolls, cfg)[0], recorded_logp(rolls)) > 1e-2


def test_hazard_03_noisy_state(rolled):
    """Another x_t leaves every text log-probability as it is, before and after the picture."""
    with torch.no_grad():
        h = hidden(rolled.model, rolled.rolls, rolled.steps)
        for r in rolled.rolls:
            for d in r.restorations:
                d.states = d.states * 100 + 7
        other = hidden(rolled.model, rolled.rolls, rolled.steps)
    assert torch.equal(text_logp(rolled.model, h), text_logp(rolled.model, other))
    assert not torch.allclose(rolled.model.velocity(h), rolled.model.velocity(other), atol=0.01)


# ---------------------------------------------------------------- 4 to 7: whose probability of what


def test_hazard_04_reference(rolled):
    """Old and reference policy are two things: after an update the ratio and the KL to the
    reference both move; the reference does not.
    """
    o, ref, samples = replace(rolled.o, beta=0.04), reference(rolled.model), rolled.samples()
    before = {k: v.clone() for k, v in ref.state_dict().items()}
    opt = optimizer(rolled.model, 1e-3)
    for step in range(2):
        loss, (logs,) = accumulate_gradients(rolled.model, samples, o, ref)
        assert (logs['kl'].max() > 1e-6) == (logs['text'].abs().max() > 1e-3) == (step > 0)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in ref.state_dict().items()) and all(
        p.grad is None for p in ref.mot.parameters()
    )


def test_hazard_05_sampled_ids(rolled):
    """Ids that no tokenizer would choose are scored as they are; one action per id, an end
    action only where it was sampled.
    """
    tok, r = rolled.model.tokenizer, kinds(rolled.rolls)[0]
    letters = tok.convert_tokens_to_ids(list('red'))
    assert tok.encode(tok.decode(letters), add_special_tokens=False) != letters
    for ended in (True, False):
        turn = replace(r.turns[0], ids=letters, ended=ended)
        p = pack([rollout_segments(replace(r, turns=[turn]))], rolled.model.shape)
        assert p.labels.tolist() == letters + [rolled.model.shape.eos] * ended
    assert all(len(t.logp) == len(t.ids) + t.ended for r in rolled.rolls for t in r.turns)
    assert any(
        len(t.ids) == rolled.cfg.max_new_tokens and not t.ended
        for r in rolled.rolls
        for t in r.turns
    )


def test_hazard_06_vocabulary(toy, monkeypatch):
    """A cut vocabulary and a ban hold for sampling and scoring alike, and the softmax is fp32
    under autocast.
    """
    head, cut = (
        toy.model.language_model.lm_head,
        toy.model.tokenizer.convert_tokens_to_ids(MARKER),
    )  # the last id
    assert toy.model.shape.eos < cut < head.weight.shape[0]
    monkeypatch.setattr(head, 'ids', cut)
    rolls, cfg = spoken(toy)
    assert (
        not any(r.restorations for r in rolls)
        and ratio_gap(rescored(toy.model, rolls, cfg)[0], recorded_logp(rolls)) < 1e-4
    )
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        h = hidden(toy.model, rolls, [None] * len(rolls))
        assert (
            toy.model.logits(h, h.packed.ce_at).shape[-1] == cut
            and text_logp(toy.model, h).dtype == torch.float32
        )
    monkeypatch.setattr(head, 'ids', None)
    assert (
        ratio_gap(rescored(toy.model, rolls, cfg)[0], recorded_logp(rolls)) > 0.1
    )  # the whole vocabulary is another policy
    rolls, cfg = spoken(toy, policy='never')
    with torch.no_grad():
        free = text_logp(toy.model, hidden(toy.model, rolls, [None] * len(rolls)), cfg.temperature)
    assert (
        ratio_gap(free, recorded_logp(rolls))
        > 0.1
        > 1e-4
        > ratio_gap(rescored(toy.model, rolls, cfg)[0], recorded_logp(rolls))
    )


def test_hazard_07_scale():
    """A shift of 0.1 σ in all D numbers: the mean's log-ratio is −0.005 and never clipped, the
    sum's is D times that and always.
    """
    D, z = 64 * 16, torch.randn(200, 64 * 16, generator=torch_rng('scale'))
    for how, expected, clipped in (('mean', -0.005, 0.0), ('sum', -0.005 * D, 1.0)):
        d = flow.transition_logp(
            z, torch.full_like(z, 0.1), torch.ones(1), how
        ) - flow.transition_logp(z, torch.zeros_like(z), torch.ones(1), how)
        assert abs(d.mean() / expected - 1) < 0.1
        outside = ((d.exp() - 1).abs() > 0.2).float().mean()
        assert abs(outside - clipped) < 0.1
    assert (
        ObjectiveVariant(norm='dr_grpo', length=16384).token_weights([10, 20])
        == [1 / (2 * 16384)] * 2
    )
    with pytest.raises(ValueError, match='reduction'):
        flow.transition_logp(z, z, torch.ones(1), 'median')


# ---------------------------------------------------------------- 8 to 11: denoising and batches


def test_hazard_08_transition(toy):
    """At every step of the grid, the last included, text and denoising ratios are 1 ± 1e-4 (sum
    over all numbers: 1e-3); every step is drawn.
    """
    rolls, cfg = spoken(toy)
    for k in range(cfg.denoise_steps - 1):
        text, image, old = rescored(toy.model, rolls, cfg, k)
        gaps = {how: ratio_gap(image[how], old[how]) for how in image}
        print(f'step {k}: largest |ratio - 1|', gaps)
        assert (
            gaps['mean'] < 1e-4
            and gaps['sum'] < 1e-3
            and ratio_gap(text, recorded_logp(rolls)) < 1e-4
        )
    drawn = {k for n in range(40) for s in choose_steps(rolls, torch_rng('all', n)) for k in s}
    assert drawn == set(range(cfg.denoise_steps - 1))


@pytest.mark.parametrize('sigma', [0.0, 0.3, 1.0])
def test_hazard_08_marginals(sigma):
    """For Gaussian data the velocity is known: ODE and SDE have the exact mean and spread at
    every time.
    """
    m, s = 0.5, 0.7

    def spread(t):
        return ((1 - t) ** 2 * s**2 + t**2) ** 0.5

    def velocity(x, t):
        t = t[:, None]
        return -m + (t - (1 - t) * s**2) / spread(t) ** 2 * (x - (1 - t) * m)

    x, grid = torch.randn(20000, 1, generator=torch_rng('x')).double(), flow.time_grid(201).double()
    states = flow.solve(velocity, x, grid, sigma, torch_rng('w'))
    for k in (50, 100, 150, 190, 200):
        t = float(grid[k])
        assert (
            abs(states[k].mean() - (1 - t) * m) < 0.02
            and abs(states[k].std() / spread(t) - 1) < 0.03
        ), (k, t)


def test_hazard_09_other_restorations(toy):
    """Two restorations: both ratios are 1, and the second is scored beside the first picture,
    not beside zeros.
    """
    rolls, cfg = spoken(toy, max_restores=2)
    r = kinds(rolls)[2]
    steps = [[0, 1]]
    with torch.no_grad():
        h = hidden(toy.model, [r], steps)
    segments = rollout_segments(r, steps[0])
    first = [i for i, s in enumerate(segments) if isinstance(s, LatentSegment) and not s.noised][
        1
    ]  # behind the degraded picture
    assert (
        torch.equal(segments[first].latent, r.restorations[0].latent)
        and r.restorations[0].latent.any()
    )
    segments[first] = LatentSegment(torch.zeros_like(r.restorations[0].latent))
    with torch.no_grad():
        empty = toy.model(pack([segments], toy.model.shape))
    v, blank = (toy.model.velocity(x).chunk(2) for x in (h, empty))
    assert torch.equal(v[0], blank[0]) and not torch.allclose(v[1], blank[1], atol=1e-3)
    text, image, old = rescored(toy.model, rolls, cfg)
    assert (
        len(old['mean']) == sum(len(r.restorations) for r in rolls)
        and ratio_gap(image['mean'], old['mean']) < 1e-4
    )


def test_hazard_10_batch(rolled):
    """A batch of two is two batches of one, in value and gradient, for a direct and a restored
    trajectory.
    """
    pair = [
        next(s for s in rolled.samples() if len(s.rollout.restorations) == n and s.advantage)
        for n in (0, 1)
    ]
    both, each = (
        joint_loss(rolled.model, pair, rolled.o),
        [joint_loss(rolled.model, [s], rolled.o) for s in pair],
    )
    assert torch.allclose(both[0], each[0][0] + each[1][0], atol=1e-6)
    assert torch.equal(both[1]['text_clip'], torch.cat([d['text_clip'] for _, d in each]))
    g = flat_gradient(rolled.model, both[0])
    assert torch.allclose(
        g,
        sum(flat_gradient(rolled.model, joint_loss(rolled.model, [s], rolled.o)[0]) for s in pair),
        atol=1e-6,
    )


def test_hazard_11_latents(rolled):
    """A picture encoded alone and among others of any size has the same latent, twice; rollout
    and update read the same tensor.
    """
    vae, images = (
        rolled.model.vae,
        [rolled.pool.image('seen', 0), torch.zeros(3, 32, 48), rolled.pool.image('seen', 1)],
    )
    with torch.no_grad():
        alone, packed = vae.encode(images[:1])[0], vae.encode(images)
    assert torch.allclose(alone, packed[0], atol=1e-5) and torch.equal(
        vae.encode(images[:1])[0], alone
    )
    for r, (i, _) in zip(rolled.rolls[::4], rolled.pairs):
        assert (
            torch.equal(r.prompt[0].latent, rolled.pool.seen_z[i])
            and rollout_segments(r)[0] is r.prompt[0]
        )


# ---------------------------------------------------------------- 12 to 14: the update


def spoil(rolls, row):
    """A value that is not a number in what was recorded of one trajectory."""
    r = rolls[row]
    if r.restorations:
        r.restorations[0].states[1:] = float('nan')
    else:
        r.turns[0].logp[0] = float('nan')
    return rolls


def test_hazard_12_nan(toy, monkeypatch):
    """A value that is not finite stops the run before the update and names step and trajectory;
    a broken model names all of them.
    """
    rolls, _ = spoken(toy)
    pick = {len(r.restorations): i for i, r in enumerate(rolls)}
    state = {k: v.clone() for k, v in toy.model.state_dict().items()}
    plain = grpo.rollout_batch
    for kind in (0, 1):

        def broken(model, pool, pairs, cfg, seed, step, chunk=None, first=0):
            out = plain(model, pool, pairs, cfg, seed, step, chunk, first)
            return spoil(out, next(i for i, r in enumerate(out) if len(r.restorations) == kind))

        monkeypatch.setattr(grpo, 'rollout_batch', broken)
        with pytest.raises(
            FloatingPointError,
            match=r'grpo, step 0: .* of trajectory \d+ \(.*its record is not finite\)$',
        ):
            train_grpo(toy.model, toy.pool, preset(), acc=accelerator('no'), micro=4)
        assert all(torch.equal(v, state[k]) for k, v in toy.model.state_dict().items())
    samples, _ = score_trajectories(
        spoil(rolls, pick[1]),
        torch.arange(16.0).view(4, 4),
        Noise('grpo', 0, 0),
        torch_rng('x'),
        Objective(),
        toy.model.shape.latent_patch,
    )
    with pytest.raises(FloatingPointError, match=rf'because of trajectory {pick[1]} \('):
        accumulate_gradients(toy.model, samples, Objective(), micro=5)
    with torch.no_grad():
        toy.model.language_model.lm_head.weight[0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='the model is not.* and 12 more'):
        accumulate_gradients(toy.model, samples, Objective())


def test_hazard_13_training_flag(rolled):
    """The same forward in either mode of the module; a step switches no flag and thaws nothing."""
    samples, flags = (
        rolled.samples(),
        lambda: [(n, m.training) for n, m in rolled.model.named_modules()],
    )
    with torch.no_grad():
        value = joint_loss(rolled.model.eval(), samples, rolled.o)[0]
    for set_mode in (rolled.model.train, rolled.model.eval):
        set_mode()
        before = flags()
        with torch.no_grad():
            assert torch.equal(joint_loss(rolled.model, samples, rolled.o)[0], value)
        assert [r.texts for r in spoken(rolled)[0]] == [
            r.texts for r in rolled.rolls
        ] and flags() == before
    grpo_step(GrpoRun(rolled.model, rolled.pool, rolled.cfg), 0)
    assert not any(
        p.requires_grad
        for n, p in rolled.model.named_parameters()
        if n.startswith(('vae.', 'vit_model.', 'connector.'))
    )


def test_hazard_14_engine(rolled):
    """The update goes through the module's own call, once per piece; lengths are bounded, and
    too long is an error.
    """
    calls, samples = [], rolled.samples()
    hook = rolled.model.register_forward_hook(lambda *a: calls.append(1))
    accumulate_gradients(rolled.model, samples, rolled.o, micro=4)
    hook.remove()
    assert len(calls) == -(-len(samples) // 4)
    s = rollout_sampling(rolled.cfg)
    for r in rolled.rolls:
        assert all(len(t.ids) <= s.max_new for t in r.turns)
        assert token_count(rollout_segments(r), rolled.model.shape) <= token_budget(
            rolled.model, r.prompt, tuple(r.prompt[0].latent.shape), s
        )
    r = kinds(rolled.rolls)[1]
    with pytest.raises(ValueError, match='exceeds the 20 slots'):
        prefill(rolled.model, KVCache(rolled.model.mot.cfg, 1, 20), [rollout_segments(r)])


# ---------------------------------------------------------------- 15 to 18: rewards

REPLIES = {
    '0.85': 0.85,
    '0.85.': 0.85,
    'Score: 1': 1.0,
    'maybe': None,
    '': None,
    '85': None,
    TimeoutError('30 s'): None,
    PermissionError('401'): None,
}


def remote(reply):
    """A judge behind a connection; `reply` is what the service says or how its client fails."""

    def judge(question, said):
        return Outage(repr(reply)) if isinstance(reply, Exception) else read_score(reply)

    return judge


def test_hazard_15_outage(rolled):
    """Time-outs, refused keys and garbage are masked, never 0 and never 0.5; the rest of the
    group is judged as if alone.
    """
    restored = next(r for r in rolled.rolls if r.parsed.answer)
    question = Space(prompt='which', answer='red', options=())
    got = {k: score_rollout(restored, question, remote(k)) for k in REPLIES}
    for reply, value in REPLIES.items():
        assert (
            (got[reply].acc == value)
            if value is not None
            else isinstance(got[reply], (Unparsable, Outage))
        ), reply
    fine = [got['0.85'], got['Score: 1']]
    bad = [g for k, g in got.items() if REPLIES[k] is None]
    for failure in bad:
        table, logs = reward_table([*fine, failure, fine[0]], 4)
        A, _ = advantages(table)
        assert (
            table.isnan().tolist() == [[False, False, True, False]]
            and logs['missing'] == 1
            and A[0, 2] == 0
        )
        assert torch.allclose(A[0, [0, 1, 3]], advantages(table[:, [0, 1, 3]])[0][0]) and logs[
            'acc'
        ] == pytest.approx((0.85 * 2 + 1) / 3)
    with pytest.raises(RuntimeError, match='none of 4'):
        reward_table([bad[-1]] * 4, 4)
    calls = iter(range(99))

    def judge(q, said):
        return [*bad, AnswerScore(float(said == 'red'))][next(calls) % 6]

    loss, logs = grpo_step(GrpoRun(rolled.model, rolled.pool, rolled.cfg, judge=judge), 0)
    assert 0 < logs['missing'] < 16 and torch.isfinite(loss)


def test_hazard_16_order(rolled):
    """Rewards are a function of one trajectory: any order, any company, either set of rules,
    and nothing is remembered.
    """
    question, judge = (
        Space(prompt='which', answer='red', options=()),
        lambda q, said: AnswerScore(float(said == q.answer)),
    )
    state = repr({k: v for k, v in vars(reward).items() if isinstance(v, (dict, list, set))})
    for name in reward.RULES_BY_NAME:

        def score(r):
            return score_rollout(r, question, judge, rules=name)

        alone = [score(r) for r in rolled.rolls]
        for seed in range(5):
            order = torch.randperm(16, generator=torch_rng('order', seed)).tolist()
            assert [score(rolled.rolls[i]) for i in order] == [alone[i] for i in order]
    assert (
        repr({k: v for k, v in vars(reward).items() if isinstance(v, (dict, list, set))}) == state
    )
    with pytest.raises(ValueError, match='unknown rules'):
        score_rollout(rolled.rolls[0], question, rules='mine')


T, A = '<think>x</think>', '<answer>red</answer>'
TABLE = [  # texts, executed restorations, format, decision for a right answer 'red'
    ([T + A], 0, 1, 0),
    ([T + MARKER, T + A], 1, 1, 1),
    ([f'<think>{MARKER}</think>' + A], 0, 0, 0),
    ([T + A + MARKER], 0, 0, 0),
    (['so ' + T + A], 0, 0, 0),
    ([T + A * 2], 0, 0, 0),
    ([T + MARKER, A], 1, 0, 1),
    ([A + T], 0, 0, 0),
    ([T + MARKER], 0, 0, -1),
    ([''], 0, 0, -1),
    ([T + f'<answer>{MARKER}</answer>'], 0, 0, -1),
]


@pytest.mark.parametrize('texts,executed,fmt,dec', TABLE)
def test_hazard_17_restored(texts, executed, fmt, dec):
    """Format pays the grammar only; the decision reads what was carried out, not what was
    written.
    """
    r = Space(texts=texts, parsed=parse(texts), restorations=[None] * executed)
    got = score_rollout(r, Space(prompt='which', answer='red', options=()))
    assert (got.fmt, got.dec) == (fmt, dec)


def test_hazard_17_executed(toy):
    """A model that writes the marker where none is carried out has answered directly."""
    rolls, _ = spoken(toy, max_restores=0)
    assert any(MARKER in r.texts[-1] for r in rolls) and not any(r.restorations for r in rolls)
    judged = [score_rollout(r, Space(prompt='which', answer='red', options=())) for r in rolls]
    assert all(g.dec == g.acc - 1 for g in judged)
    assert grpo.behaviour_summary(rolls)['trigger'] == 0


def test_hazard_18_picture(rolled):
    """No term looks at the picture: another latent, another size or none at all earns the same;
    a fault in a judge is raised.
    """
    question = Space(prompt='which', answer='red', options=())
    for r in rolled.rolls:
        earned = score_rollout(r, question)
        other = deepcopy(r)
        for d in other.restorations:
            d.latent, d.states, d.segments = torch.full((1, 2, 3), float('nan')), None, None
        assert isinstance(earned, Reward) and score_rollout(other, question) == earned

    def faulty(q, said):
        raise KeyError('answer')

    with pytest.raises(KeyError):
        [score_rollout(r, question, faulty) for r in rolled.rolls]

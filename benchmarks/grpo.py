"""Measure one update of stage 3: rollouts, the flow term, and memory.

    .venv/bin/python benchmarks/grpo.py --shapes tiny 100m --out grpo.json

Three things are compared: rollouts in one batch against one by one, the loss with its flow term
against the loss without, and memory against the size of a group.

The weights are random. What is compared runs in turns in one process; on a CPU one thread and
processor seconds are counted. Only ratios and memory carry over to other machines.

Two loops stand for rollouts one by one. Both make exactly the trajectories of the batch, which is
asserted. `Rebuilt` makes its cache anew for every token, by a pass over the whole context, and once
for every restoration. `Copied` keeps its cache and copies all of it for every token; a finished
text is thrown away and prefilled again. The published code works like `Copied`; it further fills
two contexts for guidance that it then does not use, which are left out here.
Denoising itself costs both loops the same work as the batch, so on a processor that is busy with
one row the second ratio is bounded by the share of denoising.

Both loops run on a few trajectories. The seconds of all members are the mean over the direct and
over the restoring ones, weighted by how often each occurred.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from generation import SHAPES, build, in_turns, prompt, ratio
from scipy.stats import linregress
from torch import nn

from clear_nb.core import torch_rng
from clear_nb.decode import Noise, Turn, cached_phrase, draw_tokens, feed_token, prefill
from clear_nb.generate import Rollout, Sampling, generate
from clear_nb.grpo import Objective, joint_loss, rollout_segments, score_trajectories
from clear_nb.model import freeze
from clear_nb.mot import KVCache, select_rows
from clear_nb.restore import restore
from clear_nb.trajectory import MARKER, Gap, LatentSegment, TextSegment, VitSegment, token_count

ASK = 4  # the token that asks for a restoration
SEED = Noise('benchmark')


class Words:
    "A vocabulary of numbered words, one of which is the marker"

    def __init__(self, n):
        self.names = [MARKER if i == ASK else f'w{i}' for i in range(n)]

    def get_vocab(self):
        return {w: i for i, w in enumerate(self.names)}

    def decode(self, ids):
        return ' '.join(self.names[i] for i in ids)


class Leaning(nn.Module):
    """A text head that leans towards some tokens; `forced` lists the token of every call to come,
    None where it may choose
    """

    def __init__(self, head, lean):
        super().__init__()
        self.head, self.ids, self.lean, self.forced = head, head.ids, lean, []

    def forward(self, h):
        logits, token = self.head(h), self.forced.pop(0) if self.forced else None
        for i, more in self.lean.items():
            logits[:, i] = logits[:, i] + more
        return (
            logits
            if token is None
            else torch.full_like(logits, -1e9).index_fill(
                1, torch.tensor([token], device=h.device), 0.0
            )
        )


def world(name, device='cpu', chance=0.025):
    """A model that asks for a restoration, or ends its text, with this chance at every token; the
    latent of its pictures
    """
    model, z = build(name, device)
    V = model.cfg.llm['vocab_size']
    more = (
        float(torch.tensor(chance * V * 1.65).log()) if chance else -1e9
    )  # logits are about normal, and e^½ = 1.65
    model.tokenizer = Words(V)
    model.language_model.lm_head = Leaning(
        model.language_model.lm_head, {ASK: more, model.shape.eos: more}
    )
    return model, z


def questions(model, z, n, text=40):
    """Contexts as in stage 3: latent and picture of the degraded image, a question; as many ViT as
    latent tokens
    """
    px = z.shape[-1] // model.cfg.latent_patch * model.cfg.vit.patch

    def image(i):
        return torch.rand(3, px, px, generator=torch_rng('image', i)) * 2 - 1

    def latent(i):
        return torch.randn(z.shape, generator=torch_rng('latent', i))

    return [
        [LatentSegment(latent(i)), VitSegment(image(i)), *prompt(model, text, i)] for i in range(n)
    ]


def sampling(a, **changes):
    """Stage 3's sampling (params/tiny.yaml): temperature 1, SDE, at most one restoration, through
    the bridge
    """
    return Sampling(
        **{
            **dict(
                max_new=a.tokens,
                temperature=1.0,
                steps=a.steps,
                shift=1.0,
                sigma=0.3,
                max_restores=1,
                record=True,
            ),
            **changes,
        }
    )


class Rebuilt:
    "One context whose cache is made anew for every token and for every restoration"

    def __init__(self, model, segments, slots):
        self.model, self.trail, self.slots = model, list(segments), slots

    def fill(self, more=()):
        cache = KVCache(self.model.mot.cfg, 1, self.slots, self.model.device)
        return cache, prefill(self.model, cache, [[*self.trail, *more]])

    def logits(self, ids):
        _, h = self.fill([TextSegment(tuple(ids))])
        return self.model.logits(h, h.packed.text_at[-2:-1])  # the place before eos

    def close(self, ids):
        self.trail.append(TextSegment(tuple(ids)))

    def see(self, latent):
        self.trail += [LatentSegment(latent.cpu()), Gap()]

    def restore(self, z, w, s):
        return restore(
            self.model, self.fill()[0], z[None], s.steps, s.shift, s.sigma, w[None], record=True
        )[0]


class Copied:
    "One context with a cache that is copied for every token"

    def __init__(self, model, segments, slots):
        self.model, self.kept = model, KVCache(model.mot.cfg, 1, slots, model.device)
        prefill(model, self.kept, [segments])

    def logits(self, ids):
        self.now = select_rows(self.now if ids else self.kept, torch.tensor([0]))
        token = torch.tensor([ids[-1] if ids else self.model.shape.bos])
        return self.model.language_model.lm_head(
            feed_token(self.model, self.now, token, torch.tensor([True]))
        ).float()

    def close(self, ids):
        prefill(self.model, self.kept, [[TextSegment(tuple(ids))]])

    def see(self, latent):
        prefill(self.model, self.kept, [[LatentSegment(latent), Gap()]])

    def restore(self, z, w, s):
        return restore(
            self.model, self.kept, z[None], s.steps, s.shift, s.sigma, w[None], record=True
        )[0]


def spell(context, u, s, eos, stop):
    """One text, token by token; `u` holds one uniform number per token and one for the question
    whether it ends there
    """
    turn = Turn()
    for k in range(len(u)):
        token, logp = (
            t.item() for t in draw_tokens(context.logits(turn.ids), u[k : k + 1], s.temperature)
        )
        turn.ended = token == eos
        if not turn.ended and len(turn.ids) == s.max_new:
            return turn
        turn.logp.append(logp)
        if turn.ended:
            return turn
        turn.ids.append(token)
        if stop.ends(turn.ids):
            return turn


@torch.no_grad()
def alone(make, model, segments, s, row):
    "Trajectory number `row` of a run, by itself"
    shape, stop, out = (
        segments[0].latent.shape,
        cached_phrase(model.tokenizer, MARKER),
        Rollout(segments),
    )
    context = make(
        model,
        segments,
        token_count([*segments, *2 * [LatentSegment(torch.empty(shape))]], model.shape)
        + 2 * (s.max_new + 2),
    )
    for n in range(s.max_restores + 1):
        out.turns.append(
            turn := spell(
                context, SEED.uniform([row], n, s.max_new + 1)[0], s, model.shape.eos, stop
            )
        )
        context.close(turn.ids)
        if n == s.max_restores or not stop.ends(turn.ids):
            return out
        out.restorations.append(
            context.restore(
                SEED.normal([row], n, shape)[0],
                SEED.steps([row], n, s.steps - 1, shape, model.shape.latent_patch)[0],
                s,
            )
        )
        context.see(out.restorations[-1].latent)


def same(a, b):
    "The same tokens, the same restored latents"

    def close(x, y):
        return torch.allclose(x.latent, y.latent, atol=1e-3)

    return (
        [t.ids for t in a.turns] == [t.ids for t in b.turns]
        and len(a.restorations) == len(b.restorations)
        and all(map(close, a.restorations, b.restorations))
    )


def check(model, z, a):
    """Both loops against the batch on a small case: sampled, and greedy with and without a
    restoration
    """
    ask, lean, head = (
        questions(model, z, 2),
        model.language_model.lm_head.lean,
        model.language_model.lm_head,
    )
    for temperature, more in ((1.0, lean), (0.0, {ASK: 1e9}), (0.0, {ASK: -1e9})):
        head.lean, s = (
            more,
            sampling(a, temperature=temperature, sigma=0.3 * temperature, max_new=min(4, a.tokens)),
        )
        for i, r in enumerate(generate(model, ask, s, SEED, 2)):
            assert all(same(r, alone(make, model, r.prompt, s, i)) for make in (Rebuilt, Copied)), (
                f'trajectory {i} differs at temperature {temperature}'
            )
    head.lean = lean


def spoken(r):
    return sum(len(t.logp) for t in r.turns)


def typical(rolls, few):
    "Per kind, direct and restoring: how many there are, and `few` of median length"
    kinds = [[i for i, r in enumerate(rolls) if bool(r.restorations) == k] for k in (False, True)]

    def middle(k):
        return sorted(
            k, key=lambda i: abs(spoken(rolls[i]) - statistics.median(spoken(rolls[j]) for j in k))
        )

    return [(len(k), middle(k)[:few]) for k in kinds if k]


def rollouts(model, z, a):
    "All trajectories of a step in one batch against one by one"
    s, ask = sampling(a), questions(model, z, a.prompts)

    def batch():
        return generate(model, ask, s, SEED, a.group)

    rolls = batch()
    kinds = typical(rolls, a.few)
    for make in (Rebuilt, Copied):
        assert all(
            same(rolls[i], alone(make, model, rolls[i].prompt, s, i))
            for _, some in kinds
            for i in some[:1]
        )

    def one(make, some):
        return lambda: lambda: [alone(make, model, rolls[i].prompt, s, i) for i in some]

    jobs = {
        (make.__name__.lower(), k): one(make, some)
        for make in (Rebuilt, Copied)
        for k, (_, some) in enumerate(kinds)
    }
    t = in_turns({'batch': lambda: batch, **jobs}, a.repeats, a.device)
    for name in ('rebuilt', 'copied'):
        t[name] = [
            sum(n * x / len(some) for (n, some), x in zip(kinds, xs))
            for xs in zip(*(t[name, k] for k in range(len(kinds))))
        ]
    return rolls, dict(
        {k: ratio(t, k, 'batch') for k in ('rebuilt', 'copied')},
        restored=sum(bool(r.restorations) for r in rolls) / len(rolls),
        tokens=statistics.mean(map(spoken, rolls)),
        trajectories=len(rolls),
        timed_alone=sum(len(some) for _, some in kinds),
        per_second={
            k: len(rolls) / statistics.median(t[k]) for k in ('batch', 'rebuilt', 'copied')
        },
    )


def samples(model, rolls, o):
    "Scored rollouts; rewards at random, for they do not change the work"
    pay = torch.rand(1, len(rolls), generator=torch_rng('pay'))
    return score_trajectories(rolls, pay, SEED, torch_rng('choice'), o, model.shape.latent_patch)[0]


def update(model, rolls, **o):
    "A job: joint loss and backward of some trajectories"

    def run():
        model.zero_grad()
        joint_loss(model, made, objective)[0].backward()

    objective = Objective(**o)
    made = samples(model, rolls, objective)
    return lambda: run


def training(model, rolls, a):
    "Seconds of loss and backward with the flow term over those of text alone"
    kinds = [[r for r in rolls if bool(r.restorations) == k] for k in (False, True)]
    share = max(1, round(a.train * len(kinds[1]) / len(rolls)))
    sets = {
        'mixed': kinds[0][: a.train - share] + kinds[1][:share],
        'restoring': kinds[1][: a.train],
    }
    freeze(model, 'vae.', 'vit_model.', 'connector.')
    jobs = {
        (k, flow): update(model, some, lambda_flow=flow)
        for k, some in sets.items()
        if some
        for flow in (0.3, 0.0)
    }
    t = in_turns(jobs, a.train_repeats, a.device)

    def tokens(r, steps):
        return token_count(rollout_segments(r, steps), model.shape)

    return {
        k: dict(
            ratio(t, (k, 0.3), (k, 0.0)),
            trajectories=len(some),
            restored=sum(bool(r.restorations) for r in some) / len(some),
            tokens=sum(tokens(r, [0] * len(r.restorations)) for r in some)
            / sum(tokens(r, None) for r in some),
        )
        for k, some in sets.items()
        if some
    }


def high_water(reset=False):
    "Largest memory this process has held since the last reset, MiB (Linux)"
    if reset:
        Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')
    line = next(
        l
        for l in Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
        if l.startswith('VmHWM')
    )
    return int(line.split()[1]) / 1024


def child(name, group, a):
    """Peak memory of rollouts and of one undivided update for one question; every member speaks the
    full length and restores once
    """
    model, z = world(name, chance=0.0)
    s = sampling(a)
    model.language_model.lm_head.forced = (
        [None] * (s.max_new - 1) + [ASK] + [None] * (s.max_new + 1)
    )
    start = high_water(reset=True)
    rolls = generate(model, questions(model, z, 1), s, SEED, group)
    made = high_water()
    assert all(spoken(r) == 2 * s.max_new and len(r.restorations) == 1 for r in rolls)
    high_water(reset=True)
    freeze(model, 'vae.', 'vit_model.', 'connector.')
    update(model, rolls, lambda_flow=0.3)()()
    slots = token_count([*rolls[0].prompt, *2 * [LatentSegment(z)]], model.shape) + 2 * (
        s.max_new + 2
    )
    c = model.mot.cfg
    per = (
        2
        * c.num_hidden_layers
        * c.num_key_value_heads
        * (c.hidden_size // c.num_attention_heads)
        * 4
        * slots
        / 2**20
    )
    return dict(start=start, rollouts=made, update=high_water(), cache_mib_per_member=per)


def memory(name, a):
    "Child processes of different group sizes, and the line through their peaks"
    env = dict(
        os.environ, MALLOC_MMAP_THRESHOLD_='65536', MALLOC_ARENA_MAX='1', OMP_NUM_THREADS='1'
    )  # freed memory goes back at once
    command = [
        sys.executable,
        __file__,
        '--child',
        name,
        '--tokens',
        str(a.memory_tokens),
        '--steps',
        str(a.memory_steps),
    ]
    runs = [
        json.loads(
            subprocess.run(
                [*command, '--group', str(g)],
                env=env,
                check=True,
                capture_output=True,
                encoding='utf-8',
            ).stdout
        )
        for g in a.groups
    ]

    def line(k):
        return linregress(a.groups, [r[k] for r in runs])

    fit = {
        k: dict(mib_per_member=line(k).slope, intercept=line(k).intercept, r2=line(k).rvalue ** 2)
        for k in ('rollouts', 'update')
    }
    return dict(groups=a.groups, peaks=runs, **fit)


def say(name, what, r, goal=''):
    print(
        f'{name:5} {what:66} {r["median"]:6.2f}  ({r["min"]:.2f} to {r["max"]:.2f})  {goal}',
        flush=True,
    )


def report(name, a, r, out):
    "Print the numbers of a shape"
    n, per = r['trajectories'], r['per_second']
    print(
        f'{name:5} {a.prompts} x {a.group} members: {100 * r["restored"]:.0f} % restored, '
        f'{r["tokens"]:.1f} tokens each; trajectories/s: '
        + ', '.join(f'{k} {v:.3g}' for k, v in per.items())
        + f' (one by one: {r["timed_alone"]} timed, scaled to {n})'
    )
    say(
        name,
        'trajectories/s, batch / one by one, cache rebuilt per token',
        r['rebuilt'],
        'goal >= 8',
    )
    say(
        name, 'trajectories/s, batch / one by one, cache copied per token', r['copied'], 'goal >= 8'
    )
    for k, m in out['training'].items():
        say(
            name,
            f'loss + backward, with / without flow term, {100 * m["restored"]:.0f} % restored',
            m,
            f'goal <= 1.35 ({m["tokens"]:.2f} x tokens)',
        )


def measure(name, a):
    "All numbers of one shape"
    model, z = world(name, a.device)
    print(
        f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, '
        f'{a.device}, {torch.get_num_threads()} thread(s)',
        flush=True,
    )
    check(model, z, a)
    rolls, r = rollouts(model, z, a)
    out = dict(rollouts=r, training=training(model, rolls, a))
    report(name, a, r, out)
    if a.groups:
        m = out['memory'] = memory(name, a)
        for k in ('rollouts', 'update'):
            print(
                f'{name:5} peak of {k} for G = {m["groups"]}: '
                f'{", ".join(f"{p[k]:.0f}" for p in m["peaks"])} MiB; '
                f'{m[k]["mib_per_member"]:.2f} MiB per member, R² {m[k]["r2"]:.4f}'
            )
        print(
            f'{name:5} of which key-value cache: '
            f'{m["peaks"][0]["cache_mib_per_member"]:.2f} MiB per member',
            flush=True,
        )
    return out


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    p.add_argument('--device', default='cpu')
    p.add_argument('--prompts', type=int, default=8)
    p.add_argument('--group', type=int, default=8, help='members per prompt')
    p.add_argument('--tokens', type=int, default=32, help='tokens per text, at most')
    p.add_argument('--steps', type=int, default=8, help='grid points of denoising')
    p.add_argument(
        '--few', type=int, default=1, help='trajectories of each kind that run one by one'
    )
    p.add_argument('--train', type=int, default=4, help='trajectories of a training step')
    p.add_argument(
        '--groups',
        type=int,
        nargs='*',
        default=[2, 4, 8, 16],
        help='group sizes whose memory is measured; none: skip',
    )
    p.add_argument('--memory-tokens', type=int, default=16)
    p.add_argument('--memory-steps', type=int, default=3)
    p.add_argument('--repeats', type=int, default=3, help='rounds of rollouts')
    p.add_argument('--train-repeats', type=int, default=9, help='rounds of training steps')
    p.add_argument(
        '--out', type=Path, help='JSON file for the numbers; without it nothing is written'
    )
    p.add_argument('--child', choices=list(SHAPES), help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv=None):
    a = arguments(argv)
    if a.device == 'cpu':
        torch.set_num_threads(1)
    if a.child:
        return print(json.dumps(child(a.child, a.group, a)))
    out = {name: measure(name, a) for name in a.shapes}
    if a.out:
        a.out.write_text(
            json.dumps(dict(settings={**vars(a), 'out': str(a.out)}, **out), indent=1),
            encoding='utf-8',
        )
    return out


if __name__ == '__main__':
    main()

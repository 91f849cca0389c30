"""Compare ways to decode and denoise.

Decoding with the cache against whole passes, long against short contexts, batches against rows,
guided against plain denoising.

    .venv/bin/python benchmarks/generation.py --shapes tiny 100m --out generation.json

Random weights. What is compared runs in turns in one process;
on a CPU one thread and processor seconds are counted. Only ratios carry over to other machines.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from clear_nb.core import torch_rng
from clear_nb.decode import TokenSequence, decode_text, prefill
from clear_nb.flow import Guidance
from clear_nb.model import ClearConfig, ClearModel, init_weights
from clear_nb.mot import KVCache
from clear_nb.restore import prefill_guidance, restore
from clear_nb.trajectory import LatentSegment, TextSegment, pack
from clear_nb.vae import VaeConfig
from clear_nb.vit import VitConfig

# hidden, intermediate, layers, heads, key heads, vocabulary, side of a picture in tokens
SHAPES = {'tiny': (192, 512, 6, 6, 2, 1024, 4), '100m': (640, 1728, 10, 10, 2, 8192, 8)}


def small_config(name):
    "Configuration of a shape, with small encoders"
    D, inner, layers, heads, kv, vocab, side = SHAPES[name]
    llm = dict(
        vocab_size=vocab,
        hidden_size=D,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        rope_theta=1e6,
    )
    return ClearConfig(
        llm,
        VitConfig(64, 1, 2, 128, patch=8, side=16),
        VaeConfig(ch=8, ch_mult=(1, 2), blocks=1, z=16, groups=4),
        latent_patch=2,
        latent_side=16,
        bos=0,
        eos=1,
        soi=2,
        eoi=3,
    )


def build(name, device='cpu'):
    "A model of the shape with random weights"
    cfg, D, side = small_config(name), SHAPES[name][0], SHAPES[name][-1]
    model = (
        init_weights(ClearModel(cfg), torch_rng('benchmark'))
        .eval()
        .requires_grad_(False)
        .to(device)
    )
    torch.nn.init.normal_(model.llm2vae.weight, std=D**-0.5)
    return model, torch.zeros(16, 2 * side, 2 * side)


def prompt(model, n, row=0):
    "A text of n places, bos and eos counted"
    return [
        TextSegment(
            tuple(
                torch.randint(
                    4, model.cfg.llm['vocab_size'], (n - 2,), generator=torch_rng('prompt', n, row)
                ).tolist()
            )
        )
    ]


def seconds(f, device):
    "Seconds of one call: processor time, or wall time of an accelerator"
    clock = (
        time.process_time
        if device == 'cpu'
        else lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
    )
    start = clock()
    f()
    return clock() - start


def in_turns(jobs, repeats, device):
    "Seconds of every job in every round after a first one, which does not count: {name: [..]}"
    rounds = [{k: seconds(make(), device) for k, make in jobs.items()} for _ in range(repeats + 1)][
        1:
    ]
    return {k: [r[k] for r in rounds] for k in jobs}


def ratio(times, a, b, scale=1.0):
    "Median and range over the rounds of a/b"
    each = [scale * x / y for x, y in zip(times[a], times[b])]
    return dict(median=statistics.median(each), min=min(each), max=max(each))


def held(model, prompts, room):
    "A cache that holds the prompts"
    cache = KVCache(
        model.mot.cfg, len(prompts), max(len(p[0].ids) for p in prompts) + room, model.device
    )
    prefill(model, cache, prompts)
    return cache


def speaking(model, prompts, n, cache=None):
    "A job: context prefilled beforehand, then n tokens per row; the end token is banned"

    def make():
        full = cache or held(model, prompts, n + 4)
        return lambda: decode_text(
            model, full, torch.zeros(full.rows, n + 1), banned=[TokenSequence((model.shape.eos,))]
        )

    return make


@torch.no_grad()
def spell_naive(model, prompts, n):
    "Greedy tokens with all keys and values computed again for each"
    ids = [[] for _ in prompts]
    for _ in range(n):
        h = model(pack([[*p, TextSegment(tuple(i))] for p, i in zip(prompts, ids)], model.shape))
        ends = h.packed.text_at.view(len(prompts), -1)[:, -2]  # the place before eos
        logits = model.logits(h, ends)
        logits[:, model.shape.eos] = -torch.inf
        for i, t in zip(ids, logits.argmax(-1).tolist()):
            i.append(t)
    return ids


def cached_against_naive(model, rows, tokens, few, repeats, device):
    "One cached text of full length, and `few` tokens both ways"
    ask = [prompt(model, 64, r) for r in range(rows)]
    assert [t.ids for t in speaking(model, ask, few)()()] == spell_naive(model, ask, few)
    jobs = {
        'cached': speaking(model, ask, few),
        'naive': lambda: lambda: spell_naive(model, ask, few),
        'whole': speaking(model, ask, tokens),
    }
    t = in_turns(jobs, repeats, device)
    return dict(
        naive_over_cached=ratio(t, 'naive', 'cached'),
        naive_tokens=few,
        cached_tokens=tokens,
        tokens_per_second=rows * tokens / statistics.median(t['whole']),
    )


def long_context(model, tokens, repeats, device, rows=1):
    "Time per token at context 2,000 over that at 200"
    t = in_turns(
        {
            n: speaking(model, [prompt(model, n, r) for r in range(rows)], tokens)
            for n in (200, 2000)
        },
        repeats,
        device,
    )
    return dict(**ratio(t, 2000, 200), ms_at_200=1e3 * statistics.median(t[200]) / tokens)


def batching(model, tokens, repeats, device, rows=16):
    "Tokens per second of a batch over those of its rows one by one"
    ask = [prompt(model, 64, r) for r in range(rows)]

    def alone():
        return (lambda made: lambda: [f() for f in made])(
            [speaking(model, [p], tokens)() for p in ask]
        )

    return ratio(
        in_turns({'batch': speaking(model, ask, tokens), 'alone': alone}, repeats, device),
        'alone',
        'batch',
    )


def guided(model, z, steps, repeats, device, rows=8):
    "Cost of two-branch guidance over none: the default interval, and all steps"
    ask = [[LatentSegment(z), *prompt(model, 40, r)] for r in range(rows)]
    cache = KVCache(model.mot.cfg, rows, 200, model.device)
    prefill(model, cache, ask)
    noise = torch.randn(rows, *z.shape, generator=torch_rng('noise'))

    def make(g):
        return lambda: (
            lambda: restore(
                model, cache, noise, steps, guide=prefill_guidance(model, cache, ask, g)
            )
        )

    t = in_turns(
        {
            'none': make(None),
            'interval': make(Guidance()),
            'always': make(Guidance(interval=(0.0, 1.0))),
        },
        repeats,
        device,
    )
    return {k: ratio(t, k, 'none') for k in ('interval', 'always')}


def say(name, what, r, goal=''):
    print(
        f'{name:6} {what:62} {r["median"]:6.2f}  ({r["min"]:.2f} to {r["max"]:.2f})  {goal}',
        flush=True,
    )


def measure(name, a):
    "All ratios of one shape"
    model, z = build(name, a.device)
    print(
        f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, '
        f'{a.device}, {torch.get_num_threads()} thread(s)'
    )
    out = dict(parameters=sum(p.numel() for p in model.parameters()))
    for rows in a.rows:
        r = out[f'cache_{rows}'] = cached_against_naive(
            model, rows, a.tokens, a.few, a.repeats, a.device
        )
        say(
            name,
            f'whole passes / cache, batch {rows}, {a.few} tokens behind 64',
            r['naive_over_cached'],
        )
        print(
            f'{name:6} cache, batch {rows}, {a.tokens} tokens: {r["tokens_per_second"]:.0f} tokens/s'
        )
    out['long'] = long_context(model, a.turn, a.repeats, a.device)
    say(
        name,
        f'time per token, context 2000 / 200 ({out["long"]["ms_at_200"]:.2f} ms at 200)',
        out['long'],
        'goal <= 1.20',
    )
    out['batch'] = batching(model, a.turn, a.repeats, a.device)
    say(name, 'tokens/s, batch of 16 / one by one', out['batch'], 'goal >= 6')
    out['guidance'] = guided(model, z, a.steps, a.repeats, a.device)
    say(
        name,
        f'{a.steps} grid points, batch 8, two branches / none, t > 0.4',
        out['guidance']['interval'],
        'goal <= 1.90',
    )
    say(
        name,
        f'{a.steps} grid points, batch 8, two branches / none, all steps',
        out['guidance']['always'],
    )
    return out


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    p.add_argument('--device', default='cpu')
    p.add_argument(
        '--rows', type=int, nargs='*', default=[1, 16], help='batch sizes of the first comparison'
    )
    p.add_argument('--tokens', type=int, default=256, help='tokens of a long text')
    p.add_argument('--few', type=int, default=16, help='tokens of the comparison with whole passes')
    p.add_argument('--turn', type=int, default=32, help='tokens of a text in the other comparisons')
    p.add_argument('--steps', type=int, default=30, help='grid points of denoising')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument(
        '--out', type=Path, help='JSON file for the numbers; without it nothing is written'
    )
    a = p.parse_args(argv)
    if a.device == 'cpu':
        torch.set_num_threads(1)
    out = {name: measure(name, a) for name in a.shapes}
    if a.out:
        a.out.write_text(json.dumps(out, indent=1), encoding='utf-8')
    return out


if __name__ == '__main__':
    main()

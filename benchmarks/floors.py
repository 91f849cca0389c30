"""Compare prefill, decoding and denoising with what the machine allows.

Limits: bytes over memory bandwidth, operations over matrix speed.

    .venv/bin/python benchmarks/floors.py --shape 7b --device cuda --out results/h200

Random weights of the true shape. Bandwidth and matrix speed are measured in the same run,
so a ratio says how far a phase is from this very machine's limit.
"""

import argparse
import statistics
from pathlib import Path

import torch
from generation import SHAPES, in_turns, prompt, small_config, speaking

from clear_nb.core import torch_rng
from clear_nb.decode import prefill
from clear_nb.model import ClearConfig, materialise, meta_model
from clear_nb.mot import KVCache, select_rows
from clear_nb.presets import load_preset
from clear_nb.records import write_record
from clear_nb.restore import restore
from clear_nb.trajectory import LatentSegment, VitSegment, tokens_of


def config(name):
    return ClearConfig.from_dict(load_preset('paper').model) if name == '7b' else small_config(name)


@torch.no_grad()
def build(name, device, dtype):
    "A model with random weights, made on the device"
    model = meta_model(config(name), dtype=dtype)
    materialise(model, device).eval().requires_grad_(False)
    g = torch_rng('floors', device=device)
    for n, p in model.named_parameters():
        if n.endswith('pos_embed'):
            continue
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=g)
        else:
            p.fill_(float('norm' in n and 'weight' in n))
    return model


# ---------------------------------------------------------------- the machine


def repeated(f, repeats, device):
    "Median seconds of a call"
    return statistics.median(in_turns({'f': lambda: f}, repeats, device)['f'])


def machine(dtype, device, repeats, mib=None, side=None):
    """Bytes per second of reading a long vector into a sum of products, operations per second
    of a large matrix product
    """
    big = device != 'cpu'
    n = (mib or (4096 if big else 256)) * 2**20 // torch.finfo(dtype).bits * 8
    x, w = (
        torch.ones(n // 4096, 4096, dtype=dtype, device=device),
        torch.ones(4096, dtype=dtype, device=device),
    )
    read = repeated(lambda: torch.mv(x, w), repeats, device)
    m = (
        torch.ones(side or (8192 if big else 1024), dtype=dtype, device=device)
        .expand(side or (8192 if big else 1024), -1)
        .contiguous()
    )
    return dict(
        bandwidth=x.nbytes / read, matrix=2 * len(m) ** 3 / repeated(lambda: m @ m, repeats, device)
    )


# ---------------------------------------------------------------- what a phase must read and compute


def weights(model, gen):
    "Numbers in the matrices of one expert, text head of the und expert included"
    own = [
        p.numel()
        for n, p in model.mot.layers.named_parameters()
        if p.ndim > 1 and ('moe_gen' in n) == gen
    ]
    return sum(own) + (0 if gen else model.language_model.lm_head.weight.numel())


def kv_bytes(model):
    "Bytes of keys and values of one token"
    c = model.mot.cfg
    return (
        2
        * c.num_hidden_layers
        * c.num_key_value_heads
        * (c.hidden_size // c.num_attention_heads)
        * model.vae2llm.weight.itemsize
    )


def attention_flops(model, queries, keys):
    "Operations of the attention of `queries` over `keys`, all layers"
    return 4 * queries * keys * model.mot.cfg.hidden_size * model.mot.cfg.num_hidden_layers


def decode_floor(model, rows, context, m):
    "Seconds: every weight of the und expert once per step, every cached key and value once per row"
    size = weights(model, False) * model.vae2llm.weight.itemsize + rows * context * kv_bytes(model)
    return max(size / m['bandwidth'], 2 * rows * weights(model, False) / m['matrix'])


def denoise_floor(model, rows, tokens, context, m):
    "Seconds: the gen expert on all noised tokens, their attention over the context and themselves"
    flops = rows * (
        2 * tokens * weights(model, True) + attention_flops(model, tokens, context + tokens)
    )
    return max(
        flops / m['matrix'],
        (weights(model, True) * model.vae2llm.weight.itemsize + rows * context * kv_bytes(model))
        / m['bandwidth'],
    )


def prefill_floor(model, vae, und, m):
    """Seconds: each expert on its tokens, attention over half of the pairs of text and all
    pairs of pictures counted as all
    """
    heads = weights(model, False) - model.language_model.lm_head.weight.numel()
    return (
        2 * vae * weights(model, True)
        + 2 * und * heads
        + attention_flops(model, vae, vae)
        + attention_flops(model, und, vae + und)
    ) / m['matrix']


# ---------------------------------------------------------------- phases


def picture(model, side, key):
    "A random picture of about `side` pixels for both encoders: latent and ViT image"
    c, g = model.cfg, torch_rng('picture', key)

    def fit(step, table):
        return step * min(side // step, table)

    a, b = fit(c.vae.down * c.latent_patch, c.latent_side), fit(c.vit.patch, c.vit.side)
    return torch.randn(c.vae.z, a // c.vae.down, a // c.vae.down, generator=g), torch.rand(
        3, b, b, generator=g
    ) * 2 - 1


def context_of(model, a):
    "Latent, ViT image and text, held by a cache of one row"
    z, image = picture(model, a.side, 0)
    ask = [LatentSegment(z), VitSegment(image), *prompt(model, a.text)]
    n = [tokens_of(s, model.shape) for s in ask]
    slots = sum(n) + max(a.tokens + 4, n[0])

    def new():
        return KVCache(model.mot.cfg, 1, slots, model.device, model.cache_dtype)

    return z, ask, n, new


def measure(model, m, a):
    "Median seconds, floor and their ratio of each phase"
    z, ask, n, new = context_of(model, a)
    cache, out = new(), {}
    prefill(model, cache, [ask])

    def book(name, seconds, floor):
        out[name] = dict(seconds=seconds, floor=floor, ratio=seconds / floor)
        print(
            f'{name:20} {1e3 * seconds:10.3f} ms   floor {1e3 * floor:10.3f} ms   ratio {seconds / floor:6.2f}',
            flush=True,
        )

    book(
        'prefill',
        repeated(lambda: prefill(model, new(), [ask]), a.repeats, a.device),
        prefill_floor(model, n[0], sum(n[1:]), m),
    )
    for rows in a.rows:

        def job():
            return speaking(
                model, None, a.tokens, cache=select_rows(cache, torch.zeros(rows, dtype=torch.long))
            )()

        t = statistics.median(in_turns({'f': job}, a.repeats, a.device)['f']) / (a.tokens + 1)
        book(f'decode, batch {rows}', t, decode_floor(model, rows, sum(n) + a.tokens // 2, m))
        out[f'decode, batch {rows}']['tokens_per_second'] = rows / t
    noise = torch.randn(1, *z.shape, generator=torch_rng('noise'))
    t = repeated(lambda: restore(model, cache, noise, a.steps), a.repeats, a.device) / (a.steps - 1)
    book('denoising step', t, denoise_floor(model, 1, n[0], sum(n), m))
    return dict(out, tokens=dict(zip(('latent', 'vit', 'text'), n)))


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shape', default='100m', choices=[*SHAPES, '7b'])
    p.add_argument('--device', default='cpu')
    p.add_argument(
        '--dtype',
        default=None,
        choices=['float32', 'bfloat16'],
        help='default: bfloat16 on a GPU, float32 on a CPU',
    )
    p.add_argument('--side', type=int, default=1024, help='pixels of the picture')
    p.add_argument('--text', type=int, default=64, help='tokens of the question')
    p.add_argument('--tokens', type=int, default=128, help='decoded tokens')
    p.add_argument('--rows', type=int, nargs='+', default=[1, 16], help='batch sizes of decoding')
    p.add_argument('--steps', type=int, default=11, help='grid points of denoising')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--compile', action='store_true', help='torch.compile every layer first')
    p.add_argument('--out', type=Path, help='folder for the record; without it nothing is written')
    return p.parse_args(argv)


def main(argv=None):
    a = arguments(argv)
    if a.device == 'cpu':
        torch.set_num_threads(1)
    dtype = getattr(torch, a.dtype or ('float32' if a.device == 'cpu' else 'bfloat16'))
    name = torch.cuda.get_device_name() if a.device != 'cpu' else 'cpu, one thread'
    m, model = machine(dtype, a.device, a.repeats), build(a.shape, a.device, dtype)
    if a.compile:
        model.mot.compile_layers()
    print(
        f'{name}, {dtype}: {m["bandwidth"] / 1e9:.0f} GB/s, {m["matrix"] / 1e12:.2f} TFLOP/s; '
        f'{a.shape}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters'
    )
    out = dict(
        measure(model, m, a),
        machine=dict(m, name=name),
        settings={k: str(v) for k, v in vars(a).items()},
    )
    if a.out:
        print(
            write_record(
                'floors',
                out,
                load_preset('paper'),
                0,
                variant=a.shape + '-compiled' * a.compile,
                root=a.out,
            )
        )
    return out


if __name__ == '__main__':
    main()

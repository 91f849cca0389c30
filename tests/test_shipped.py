"""The four shipped models compute what they computed when round 2 began.

`python tests/test_shipped.py` writes the reference in tests/golden/shipped. It was written at commit
8417b38 and is written again only together with new checkpoints.
"""

import json
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_nb import scenes
from clear_nb.core import PATHS, rng
from clear_nb.data import Item, corrupt, make_picture_set, prompts
from clear_nb.decode import Noise
from clear_nb.generate import Sampling, generate
from clear_nb.grpo import rollout_segments
from clear_nb.model import ClearModel
from clear_nb.trajectory import pack

FOLDER = Path(__file__).parent / 'golden' / 'shipped'
STAGES = ('base', 'sft', 'bridge', 'grpo')


def machine() -> str:
    "Name what decides the last bits of a sum: processor kind, torch and its CPU kernels."
    return f'{platform.machine()} {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {torch.backends.mkldnn.is_available()}'


def pictures() -> list:
    "Six validation pictures with one question each, damaged in six ways."
    ways = (
        'lens_blur',
        'dark_illumination',
        'jpeg_compression',
        'motion_blur',
        'gaussian_noise',
        'scan_lines',
    )
    drawn = [scenes.benchmark(f, 1, 3, 'val')[0] for f in scenes.FAMILIES]
    return [
        corrupt(
            Item(b.image, b.image, [b.question]), rng('shipped', k), 'hard', ways[k % len(ways)]
        )
        for k, b in enumerate(drawn)
    ]


@torch.no_grad()
def outputs(stage: str) -> tuple:  # tensors, token ids of every turn
    """Greedy and sampled trajectories of a shipped model, their latents, and the logits of the
    packed trajectories.
    """
    torch.set_num_threads(1)
    model = ClearModel.from_pretrained(PATHS.checkpoints / 'tiny' / stage, 'cpu')
    mode = 'both' if stage in ('base', 'sft') else 'bridge'
    p = make_picture_set(model, pictures())
    ask = prompts(model.tokenizer, p, [(i, 0) for i in range(len(p))])
    ways = dict(
        greedy=Sampling(max_new=32, steps=8, mode=mode, record=True, policy='always'),
        sampled=Sampling(
            max_new=32,
            steps=8,
            mode=mode,
            record=True,
            temperature=1.0,
            sigma=0.3,
            policy='adaptive',
        ),
    )
    tensors, ids = {}, {}
    for name, how in ways.items():
        rolls = generate(
            model, ask, how, Noise('shipped', stage), group=1 if name == 'greedy' else 2
        )
        ids[name] = [[list(map(int, t.ids)) for t in r.turns] for r in rolls]
        for i, r in enumerate(rolls):
            for j, d in enumerate(r.restorations):
                tensors[f'{name}/latent/{i}/{j}'] = d.latent.float().contiguous()
        tensors[f'{name}/logp'] = torch.tensor(
            [x for r in rolls for t in r.turns for x in t.logp], dtype=torch.float64
        )
        h = model(
            pack([rollout_segments(r, [0] * len(r.restorations)) for r in rolls[:4]], model.shape)
        )
        tensors[f'{name}/logits'] = model.logits(h, h.packed.ce_at)[::7].contiguous()
        tensors[f'{name}/velocity'] = model.velocity(h)[::5].contiguous()
    return tensors, ids


def write():
    "Write the outputs of every stage."
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = {}
    for stage in STAGES:
        tensors, ids[stage] = outputs(stage)
        save_file(tensors, FOLDER / f'{stage}.safetensors')
    (FOLDER / 'ids.json').write_text(json.dumps(dict(machine=machine(), ids=ids)))


@pytest.mark.parametrize('stage', STAGES)
def test_shipped_model_is_unchanged(stage):
    """Sampled ids are equal; numbers are equal to the bit on the machine kind of the reference,
    else to 1e-4.
    """
    reference = json.loads((FOLDER / 'ids.json').read_text())
    threads = torch.get_num_threads()
    try:
        tensors, ids = outputs(stage)
    finally:
        torch.set_num_threads(threads)
    assert ids == reference['ids'][stage]
    wanted = load_file(FOLDER / f'{stage}.safetensors')
    assert tensors.keys() == wanted.keys()
    for name, t in wanted.items():
        if machine() == reference['machine']:
            assert torch.equal(tensors[name], t), name
        else:
            torch.testing.assert_close(tensors[name], t, rtol=1e-4, atol=1e-4, msg=name)


if __name__ == '__main__':
    write()

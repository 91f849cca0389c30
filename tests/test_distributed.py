"""One process and two give the same training, under DDP and FSDP 2, on a CPU with gloo."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clear_nb.core import ROOT
from clear_nb.train import accelerator
from stage_toys import smoke, train, world

STEPS = 5
FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_TRANSFORMER_CLS_TO_WRAP='Layer',
            FSDP_RESHARD_AFTER_FORWARD='true', FSDP_CPU_RAM_EFFICIENT_LOADING='false')


def preset(): return smoke(STEPS, **{'grpo.beta': .04, 'grpo.lr': 1e-4, 'sft.ema': .9})


def run(stage, out):
    """Train a stage and write history and weights."""
    p = preset()
    made, acc, kept = world(p), accelerator('no'), {}
    history = train(stage, p, made, acc=acc, done=lambda m: kept.update({k: v.clone() for k, v in m.state_dict().items()}))
    if acc.is_main_process: torch.save((history, kept), Path(out)/f'{stage}.pt')


STAGES = ('sft', 'bridge', 'grpo')

if __name__ == '__main__':
    for stage in STAGES: run(stage, sys.argv[1])


def launch(out, processes, **env):
    """The stages in a number of processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone', __file__, str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT/'tests')])
    done = subprocess.run(command, env={**os.environ, **env, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {stage: torch.load(out/f'{stage}.pt') for stage in STAGES}

"""One process and two give the same training, under DDP and FSDP 2, on a CPU with gloo; a fault on
one of them stops both.
"""

import copy
import os
import socket
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from processes import python, waited
from stage_toys import STAGES, half_restoring, smoke, train, train_by_halves, world
from torch.distributed.tensor import DTensor

from clear_nb import grpo, sft
from clear_nb.data import lazy_picture_set
from clear_nb.train import accelerator

STEPS = 5
FSDP = dict(
    ACCELERATE_USE_FSDP='true',
    FSDP_VERSION='2',
    FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP',
    FSDP_TRANSFORMER_CLS_TO_WRAP='Layer',
    FSDP_RESHARD_AFTER_FORWARD='true',
    FSDP_CPU_RAM_EFFICIENT_LOADING='false',
)
JOBS = {
    'alone': (1, {}),
    'fsdp': (2, FSDP),
    'ddp': (2, {}),
    'packed': (2, {}),
    'lazy': (2, FSDP),
}  # packed: trajectories share rows; lazy: pictures are encoded when asked for; both pass in pieces


# ---------------------------------------------------------------- what runs in the processes


def preset(**changes):
    return smoke(
        STEPS,
        **changes,
        **{
            'sft.ema': 0.9,
            'grpo.beta': 0.04,
            'grpo.lr': 1e-3,
            'grpo.prompts': 4,
            'grpo.group': 3,
            'grpo.max_new_tokens': 5,
        },
    )


def same(made, out, acc):
    """Train every stage, with images in the first half of a batch only; write what came out."""
    p = preset(
        **{
            'train.row_tokens': 2000 * (out.name == 'packed'),
            'train.micro': 3 * (out.name in ('lazy', 'packed')),
        }
    )
    for stage in STAGES:
        model, kept, pieces = copy.deepcopy(made[0]), {}, []
        if out.name == 'lazy':
            made = (made[0], lazy_picture_set(model, made[1].items, 4), *made[2:])

        def keep(m, history):
            return kept.update({k: v.clone() for k, v in m.state_dict().items()}) or pieces.append(
                isinstance(model.vae2llm.weight, DTensor)
            )

        history = train_by_halves(
            stage,
            p,
            (model, *made[1:]),
            acc=acc,
            done=keep,
            state=out / f'{acc.num_processes}_{stage}.pt',
        )
        if acc.is_main_process:
            torch.save((history, kept, pieces[0]), out / f'{stage}.pt')


def faults(made, out, acc):
    """A value that is not a number on the second process only."""
    plain = sft.sft_loss

    def spoilt_loss(*a):
        value, logs = plain(*a)
        return value * (float('nan') if acc.process_index else 1.0), logs

    def spoilt_rolls(*a, **k):
        found = half_restoring(*a, **k)
        if acc.process_index:
            found[1].turns[0].logp[0] = float('nan')
        return found

    said = []
    for stage, where, name, how in (
        ('sft', sft, 'sft_loss', spoilt_loss),
        ('grpo', grpo, 'rollout_batch', spoilt_rolls),
    ):
        with patch.object(where, name, how):
            try:
                train(stage, preset(), (copy.deepcopy(made[0]), *made[1:]), acc=acc)
            except FloatingPointError as e:
                said.append(str(e))
    (out / f'said{acc.process_index}').write_text('\n'.join(said))


def child(made, out, rank, size, env, port):
    """One process of a job."""
    os.environ.update(
        env,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU='true',
    )
    acc = accelerator('no')
    assert acc.num_processes == size
    same(made, out, acc)
    if out.name in ('fsdp', 'ddp'):
        faults(made, out, acc)
    acc.end_training()


def main(out):
    """Start all jobs in processes forked from this one, which made the model and never trains."""
    made = world(preset())
    for name, (size, env) in JOBS.items():
        (out / name).mkdir()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(size):
            if not (pid := os.fork()):
                code = 1
                try:
                    child(made, out / name, rank, size, env, port)
                    code = 0
                finally:
                    if code:
                        traceback.print_exc()
                    os._exit(code)
            pids.append(pid)
        if any(how := waited(pids)):
            sys.exit(f'{name}: the processes ended with {how}')


if __name__ == '__main__':
    main(Path(sys.argv[1]))


# ---------------------------------------------------------------- what is expected of them


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Histories, weights and messages of all jobs."""
    out = tmp_path_factory.mktemp('distributed')
    done = python(__file__, out, seconds=500)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return out


@pytest.mark.parametrize('engine', ['ddp', 'fsdp', 'packed', 'lazy'])
@pytest.mark.parametrize('stage', STAGES)
def test_one_process_is_two(results, engine, stage):
    """Loss within 1e-6 of its size at every step, weights within 1e-5 after five; one process has
    no image in its rows; also when trajectories share rows or the training model's pictures are
    encoded late.
    """
    (want, weights, _), (found, others, pieces) = (
        torch.load(results / job / f'{stage}.pt') for job in ('alone', engine)
    )
    assert pieces == (engine in ('fsdp', 'lazy'))
    for a, b in zip(want, found, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert k.startswith('s_') or b[k] == pytest.approx(
                a[k], rel=1e-6 if k == 'loss' else 1e-4, abs=1e-6
            ), k
    assert (
        stage != 'grpo'
        or {a['trigger'] for a in want} > {0.0}
        and any('flow_ratio' in a for a in want)
    )
    assert max(a['grad_norm'] for a in want) > 1e-2 and weights.keys() == others.keys()
    assert max((weights[k].float() - others[k].float()).abs().max().item() for k in weights) < 1e-5


@pytest.mark.parametrize('engine', ['ddp', 'fsdp'])
def test_a_fault_stops_all(results, engine):
    """What is not a number on one process ends both, with the same words; a trajectory is named by
    its number in the step.
    """
    first, second = ((results / engine / f'said{k}').read_text().splitlines() for k in (0, 1))
    assert first == second and first[0].startswith('SFT clear, step 0: the loss is nan')
    assert (
        'because of trajectory 7 (' in first[1]
        and 'its record is not finite' in first[1]
        and 'more' not in first[1]
    )

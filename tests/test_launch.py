"""Stages from the command line, configurations of accelerate, and the options of the preset's
section `train`.
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from stage_toys import smoke, train, world

from clear_nb import base, bridge, grpo, sft
from clear_nb import train as loop
from clear_nb.core import PATHS
from clear_nb.model import ClearModel, export_bagel
from clear_nb.mot import MotDecoder
from clear_nb.presets import load_preset
from clear_nb.ranks import Ranks
from clear_nb.records import find_stage
from clear_nb.train import (
    accelerator,
    add_lora,
    merge_lora,
    prepare_model,
    stage_arguments,
    trainable,
)

CONFIGS = sorted((PATHS.params / 'accelerate').glob('*.yaml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    """accelerate reads every file and takes it for what its name says."""
    config = load_config_from_file(str(path))
    kind = dict(
        single_gpu=DistributedType.NO, fsdp2=DistributedType.FSDP, zero3=DistributedType.DEEPSPEED
    )[path.stem]
    assert DistributedType(config.distributed_type) == kind and config.mixed_precision == 'bf16'
    if path.stem == 'fsdp2':
        assert (
            config.fsdp_config['fsdp_version'] == 2
            and config.fsdp_config['fsdp_transformer_layer_cls_to_wrap'] == 'Layer'
        )
    if path.stem == 'zero3':
        assert config.deepspeed_config['zero_stage'] == 3


def two_processes(kind):
    """The first of two processes."""
    return Ranks(SimpleNamespace(num_processes=2, process_index=0, distributed_type=kind))


def test_deepspeed_is_refused():
    """DeepSpeed ends with one sentence that names what to use."""
    ranks = two_processes(DistributedType.DEEPSPEED)
    with pytest.raises(
        ValueError, match='DeepSpeed takes the optimiser over.*use params/accelerate/fsdp2.yaml'
    ):
        ranks.wrap(torch.nn.Linear(1, 1))


def test_fsdp_1_is_refused(monkeypatch):
    """FSDP of version 1 would run and hang or be wrong."""
    for k, v in dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='1').items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='fsdp_version: 2'):
        two_processes(DistributedType.MULTI_CPU).wrap(torch.nn.Linear(1, 1))


def test_commands(monkeypatch, tmp_path, capsys):
    """The three stages in a row, each from the checkpoint of the one before, with its history;
    nothing else is left.
    """
    monkeypatch.setattr(PATHS, 'runs', tmp_path)
    monkeypatch.setattr(base, 'ROOT', tmp_path)  # for what is printed
    for stage, module in dict(sft=sft, bridge=bridge, grpo=grpo).items():
        module.main([str(PATHS.params / 'smoke.yaml'), '--seed', '1'])
        assert find_stage('smoke', 1, stage) == tmp_path / 'smoke' / 'seed1' / stage
        ClearModel.from_pretrained(find_stage('smoke', 1, stage))
        assert (
            json.loads((tmp_path / 'smoke' / 'seed1' / stage / 'history.json').read_text())[-1][
                'grad_norm'
            ]
            > 0
        )
        assert capsys.readouterr().out.rstrip().endswith(f'seed1/{stage}')
    assert {p.name for p in (tmp_path / 'smoke' / 'seed1').glob('[!.]*')} <= {
        'sft',
        'bridge',
        'grpo',
        'logs',
    }


def test_replayed_pictures(made, monkeypatch, tmp_path):
    """Stages 1 and 2 repeat what their base has seen: the pictures of its seed, where the run has
    trained one, else those of the shipped base.
    """
    monkeypatch.setattr(PATHS, 'runs', tmp_path)
    p = smoke(2, **{'sft.replay': 0.5})
    assert base.base_seed(p, 3) == 0
    (tmp_path / 'smoke' / 'seed3' / 'base').mkdir(parents=True)
    assert base.base_seed(p, 3) == 3

    def prompts(items):
        return [q.prompt for i in items for q in i.questions]

    few = replace(p, data=replace(p.data, scenes=max(1, round(sft.REPLAYED * p.data.scenes))))
    assert (
        prompts(sft.replay_pool(made[0], p, 3).items)
        == prompts(base.base_items(few, 3))
        != prompts(sft.replay_pool(made[0], p).items)
    )


@pytest.mark.parametrize(
    'params, why',
    [
        ('params/tinny.yaml', "no preset 'tinny' in params/: did you mean 'tiny'"),
        ('tinny', "did you mean 'tiny'"),
    ],
)
def test_no_such_preset(params, why, capsys):
    """One sentence and the usage; a name without a folder is one of ours."""
    with pytest.raises(SystemExit) as e:
        sft.main([params])
    assert e.value.code == 2 and why in capsys.readouterr().err
    assert stage_arguments(['smoke'], '')[0] == load_preset('smoke')


@pytest.fixture(scope='module')
def made():
    return world(smoke(2))


def weights(stage, made, **changes):
    """State of a model after two updates."""
    model = copy.deepcopy(made[0])
    train(stage, smoke(2, **changes), (model, *made[1:]), acc=accelerator('no'))
    return model.state_dict()


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_checkpointing(made, stage):
    """Layers computed twice, the same bits."""
    want, found = weights(stage, made), weights(stage, made, **{'train.checkpointing': True})
    assert all(torch.equal(v, found[k]) for k, v in want.items())


@pytest.mark.parametrize('stage', ['sft', 'bridge', 'grpo'])
def test_pieces(made, stage):
    """The preset's numbers of trajectories per pass and of questions per batch change neither
    weights nor what is logged.
    """
    passes, sampled, plain, rolls = [], [], MotDecoder.forward, grpo.generate
    found = []
    for changes in ({}, {'train.micro': 1, 'train.chunk': 1}):
        passes.clear(), sampled.clear()
        model = copy.deepcopy(made[0])
        with (
            patch.object(
                MotDecoder,
                'forward',
                lambda self, *a, **k: passes.append(1) or plain(self, *a, **k),
            ),
            patch.object(
                grpo, 'generate', lambda m, ask, *a: sampled.append(len(ask)) or rolls(m, ask, *a)
            ),
        ):
            history = train(stage, smoke(2, **changes), (model, *made[1:]), acc=accelerator('no'))
        found.append((history, model.state_dict(), len(passes), max(sampled, default=1)))
    (a, want, few, most), (b, got, many, one) = found
    assert many > few and one == 1 and (stage != 'grpo' or most > 1)
    for x, y in zip(a, b, strict=True):
        assert {k: v for k, v in x.items() if k[:2] != 's_'} == pytest.approx(
            {k: v for k, v in y.items() if k[:2] != 's_'}, rel=1e-4, abs=1e-6
        )
    assert all((v - got[k]).abs().max() < 1e-5 for k, v in want.items())


@pytest.mark.parametrize('stage', ['sft', 'bridge', 'grpo'])
def test_lora(made, stage):
    """Only the decoder's projections move, in both experts, by a matrix of the rank; the model has
    its own names again.
    """
    before, after = (
        made[0].state_dict(),
        weights(stage, made, **{'train.lora': 2, f'{stage}.lr': 1e-2}),
    )
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert (
        before.keys() == after.keys()
        and moved
        and all('layers' in k and '_proj' in k and k.endswith('.weight') for k in moved)
    )
    assert any('_moe_gen' in k for k in moved) and any('_moe_gen' not in k for k in moved)
    assert all(torch.linalg.matrix_rank(after[k] - before[k], atol=1e-5) <= 2 for k in moved)


@pytest.mark.parametrize('stage', ['sft', 'bridge', 'grpo'])
def test_published_weights_train_in_fp32(made, stage, tmp_path):
    """A folder opens in bf16, where an update of the paper's size rounds away; it trains as if it
    had been widened first.
    """
    export_bagel(made[0], tmp_path)
    p, models = (
        smoke(2, **{f'{stage}.lr': 2e-5}),
        [ClearModel.from_pretrained(tmp_path), ClearModel.from_pretrained(tmp_path).float()],
    )
    before = {k: v.clone() for k, v in models[1].named_parameters()}
    for m in models:
        train(stage, p, (m, *made[1:]), acc=accelerator('no'))
    half, whole = (dict(m.named_parameters()) for m in models)
    assert all(v.dtype == torch.float32 and torch.equal(v, whole[k]) for k, v in half.items())
    trained = trainable(models[0])
    assert sum((v != before[k]).sum().item() for k, v in trained.items()) > 0.5 * sum(
        v.numel() for v in trained.values()
    )


@pytest.mark.parametrize('stage', ['sft', 'grpo'])
def test_lora_on_published_weights(made, stage, tmp_path):
    """Adapters and their average are fp32 beside bf16 weights, and are merged into these."""
    export_bagel(made[0], tmp_path)
    model, seen = ClearModel.from_pretrained(tmp_path), set()

    def watch(m):
        return seen.update(p.dtype for p in trainable(m).values()) or merge_lora(m)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    with patch.object(loop, 'merge_lora', watch):
        train(
            stage,
            smoke(2, **{'train.lora': 2, f'{stage}.lr': 1e-2}),
            (model, *made[1:]),
            acc=accelerator('no'),
        )
    assert seen == {torch.float32}
    after = model.state_dict()
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert moved and all(after[k].dtype == torch.bfloat16 for k in moved)


def test_lora_start(made):
    """Adapters change nothing at first, are the same each time, and merge back exactly."""
    a, b = copy.deepcopy(made[0]), copy.deepcopy(made[0])
    for m in (a, b):
        add_lora(m, 4)
    assert all(torch.equal(p, trainable(b)[k]) and 'lora_' in k for k, p in trainable(a).items())
    merge_lora(a)
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in made[0].state_dict().items())


def test_lora_and_fsdp(made, monkeypatch):
    """Not together, and said before anything is changed."""
    for k, v in dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2').items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='LoRA fits one GPU'):
        prepare_model(
            made[0],
            two_processes(DistributedType.MULTI_CPU),
            smoke(**{'train.lora': 2}).train,
        )
    assert not any('lora' in k for k, _ in made[0].named_parameters())

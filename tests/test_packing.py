"""Trajectories that share rows are trained as if each had its own; the gradient goes when the
step is done.
"""

import copy

import pytest
import torch
from stage_toys import STAGES, smoke, train, world
from test_model import picture, story, tiny_model

from clear_nb.core import torch_rng
from clear_nb.model import freeze
from clear_nb.mot import visible
from clear_nb.ranks import ranks_of
from clear_nb.sft import sft_loss
from clear_nb.train import accelerator, optimizer, update
from clear_nb.trajectory import (
    Gap,
    LatentSegment,
    TextSegment,
    VitSegment,
    first_fit,
    pack,
    tokens_of,
)

BUDGETS = (1, 100, 10_000)  # the longest trajectory sets the size, some share, all share
BUDGET_IDS = ('longest', 'some', 'all')


def batch():
    """Restoring, direct and text-only trajectories, branches, noised latents and dropped
    images, of all lengths.
    """
    (z, image), z3 = picture('batch'), picture('batch', h=3, w=1)[0]

    def triple(b):
        return [
            LatentSegment(z, 0.7, z + 1, branch=b),
            LatentSegment(z - 0.1, branch=b),
            VitSegment(image, branch=b),
        ]

    def tail(b):
        return [
            TextSegment((30, 31, 32), branch=b),
            TextSegment((40, 41), loss=True, branch=b),
            *triple(b),
            TextSegment((42,), loss=True, branch=b),
        ]

    return [
        story(0),
        [VitSegment(image), TextSegment((20,)), TextSegment((21, 22), loss=True)],
        story(1, n=9, t=0.2),
        [LatentSegment(z), VitSegment(image), *tail(1), *tail(2)],
        [Gap(), Gap(), TextSegment((23,) * 7, loss=True)],
        [
            LatentSegment(z),
            Gap(),
            TextSegment((24, 25)),
            TextSegment((26,), loss=True),
            LatentSegment(z3, 0.4, z3),
            LatentSegment(z3),
            Gap(),
            TextSegment((27, 28), loss=True, eos_loss=False),
        ],
        [
            LatentSegment(z),
            VitSegment(image),
            *(LatentSegment(z, t, -z, branch=b) for b, t in enumerate((0.2, 0.9), 1)),
        ],
        [TextSegment((29,), loss=True, end_label=33)],
    ]


def outcome(budget, lambda_kl=0.1):
    """Loss, its parts, the gradient as one vector, and the terms of every label and noised
    number.
    """
    model = freeze(tiny_model(0), 'vae.', 'vit_model.')
    model.row_tokens = budget
    loss, logs = sft_loss(model, batch(), 0.5, lambda_kl)
    loss.backward()
    h = model(pack(batch(), model.shape, row_tokens=budget))
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return (
        loss.detach(),
        torch.tensor(list(logs.values())),
        grads,
        model.ce_terms(h).detach(),
        model.mse_terms(h).detach(),
        [p.grad is None for p in model.parameters()],
    )


def near(a, b, tol=1e-6):
    """Equal within `tol` of the largest number."""
    assert a.shape == b.shape and (a - b).abs().max() <= tol * max(1.0, a.abs().max()), (
        (a - b).abs().max()
    )


@pytest.mark.parametrize('budget', BUDGETS, ids=BUDGET_IDS)
def test_losses_gradients_and_terms(budget):
    """The same as one trajectory per row, in the same order."""
    *want, idle = outcome(0)
    *found, others = outcome(budget)
    for a, b in zip(want, found, strict=True):
        near(a, b)
    assert idle == others and all(v > 0 for v in want[1])


@pytest.mark.parametrize('budget', BUDGETS, ids=BUDGET_IDS)
def test_layout(budget):
    """Fewer places and rows, every token once, positions of each trajectory from 0, and no look
    at another one.
    """
    samples, shape = batch(), tiny_model(0).shape
    sizes = [sum(tokens_of(s, shape) for s in segments) for segments in samples]
    rows, (apart, shared) = (
        first_fit(sizes, budget),
        (pack(samples, shape, row_tokens=n) for n in (0, budget)),
    )
    a, b = apart.layout, shared.layout
    assert (
        sorted(sum(rows, [])) == list(range(len(samples)))
        and len(rows) < len(samples)
        and b.sample.shape == (len(rows), max(sum(sizes[k] for k in r) for r in rows))
    )
    assert b.sample.numel() < a.sample.numel() and (b.sample > 0).sum() == (
        a.sample > 0
    ).sum() == sum(sizes)
    seen = visible(b, b) & ~torch.eye(b.sample.shape[1], dtype=torch.bool)
    assert not (seen & (b.sample[:, :, None] != b.sample[:, None])).any()
    for r, row in enumerate(rows):
        for number, k in enumerate(row, 1):
            mine, alone = b.sample[r] == number, slice(0, sizes[k])
            assert all(
                torch.equal(getattr(b, f)[r, mine], getattr(a, f)[k, alone])
                for f in ('mode', 'branch', 'rope')
            )
            assert torch.equal(
                seen[r][mine][:, mine],
                (visible(a, a)[k] & ~torch.eye(a.sample.shape[1], dtype=torch.bool))[alone, alone],
            )


def test_unpacked_is_untouched():
    """Without a budget nothing moves: the rows are the samples in their order."""
    shape = tiny_model(0).shape
    plain, named = (
        pack(batch(), shape),
        pack(batch(), shape, rows=[[k] for k in range(len(batch()))]),
    )
    assert plain.layout.sample.unique().tolist() == [0, 1] and len(plain.layout.sample) == len(
        batch()
    )
    for k in ('text_at', 'vit_at', 'vae_at', 'ce_at', 'mse_at'):
        assert (
            torch.equal(getattr(plain, k), getattr(named, k)) and getattr(plain, k).diff().min() > 0
        )


# ---------------------------------------------------------------- the stages


@pytest.fixture(scope='module')
def made():
    return world(smoke())


@pytest.mark.parametrize('stage', STAGES)
def test_preset(made, stage):
    """`train.row_tokens` of the preset reaches every stage: other rows, the same training."""
    runs, counted = [], []
    for n in (0, 2000):
        model = copy.deepcopy(made[0])
        with pytest.MonkeyPatch.context() as m:
            plain = type(model).forward
            m.setattr(
                type(model),
                'forward',
                lambda self, p, cache=None, **k: (
                    cache or counted.append((n, len(p.layout.sample))),
                    plain(self, p, cache, **k),
                )[1],
            )
            history = train(
                stage,
                smoke(3, **{'train.row_tokens': n, 'grpo.max_new_tokens': 5, 'grpo.lr': 1e-3}),
                (model, *made[1:]),
                acc=accelerator('no'),
            )
        runs.append(([h['loss'] for h in history], model))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5, abs=1e-6)
    assert (
        max(
            (p - q).abs().max().item()
            for p, q in zip(runs[0][1].parameters(), runs[1][1].parameters())
        )
        < 1e-5
    )
    assert max(r for n, r in counted if n) < max(r for n, r in counted if not n)


# ---------------------------------------------------------------- memory


def test_gradient_goes_after_the_step():
    """No gradient is left for the next forward pass; the weights are those of an update that
    keeps it, bit for bit.
    """

    def steps(f):
        net = torch.nn.Linear(3, 2)
        with torch.no_grad():
            net.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
            net.bias.zero_()
        opt, x = optimizer(net, 0.1), torch.randn(4, 3, generator=torch_rng('x'))
        for _ in range(3):
            f(net, opt, net(x).square().mean())
            yield (
                [p.grad is None for p in net.parameters()],
                torch.cat([p.detach().flatten() for p in net.parameters()]).clone(),
            )

    def kept(net, opt, loss):
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()

    new, old = (
        list(steps(f))
        for f in (
            lambda net, opt, loss: update(net, opt, loss, ranks_of(accelerator('no')), 'here'),
            kept,
        )
    )
    assert all(all(gone) for gone, _ in new) and not any(any(gone) for gone, _ in old)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(new, old))

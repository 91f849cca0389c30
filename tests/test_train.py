"""The loop tells a tracker and the progress bar what happens, and only numbers that happened."""

import sys

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from torch import nn

from clear_nb import train
from clear_nb.core import torch_rng
from clear_nb.ranks import ranks_of
from clear_nb.train import accelerator, fit, tracker_name


def toy():
    """A model with one weight per input and a loss that logs two more numbers."""
    net = nn.Linear(2, 1)
    nn.init.zeros_(net.weight)

    def loss(step):
        x = torch.randn(4, 2, generator=torch_rng('toy', step))
        return (net(x) - x.sum(1, keepdim=True)).square().mean(), dict(reward=step / 8, trigger=0.5)

    return net, loss


class Listener(GeneralTracker):
    """A tracker that remembers what it was told."""

    name, requires_logging_directory, tracker, made = 'wandb', False, None, []

    def __init__(self, project, **kw):
        super().__init__()
        self.project, self.kw, self.told, self.open = project, kw, [], True
        Listener.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kw):
        self.told.append(dict(values, step=step))

    def finish(self):
        self.open = False


@pytest.fixture
def listener(monkeypatch):
    """wandb and trackio, played by the listener."""
    for name in ('wandb', 'trackio'):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Listener)
    for module in (train, tracking):
        monkeypatch.setattr(
            module, 'get_available_trackers', lambda: [LoggerType.WANDB, LoggerType.TRACKIO]
        )
    monkeypatch.setattr(Listener, 'made', [])
    return Listener


def test_tensorboard_holds_the_history(tmp_path):
    """Every number of every step can be read back from the event file."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net, loss = toy()
    acc = accelerator('no', tmp_path / 'logs' / 'grpo', 'tensorboard')
    history = fit(net, loss, 5, 0.1, ranks=ranks_of(acc))
    acc.end_training()
    events = EventAccumulator(str(tmp_path / 'logs' / 'grpo')).Reload()
    assert set(events.Tags()['scalars']) == set(history[0]) - {'step'}
    for k in ('loss', 'reward', 'lr', 'grad_norm'):
        assert [(e.step, e.value) for e in events.Scalars(k)] == [
            (h['step'], pytest.approx(h[k])) for h in history
        ]


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_other_trackers_by_name(listener, tmp_path, name):
    """The run is named after its folder, and the tracker hears what the history holds."""
    net, loss = toy()
    acc = accelerator('no', tmp_path / 'tiny' / 'seed3' / 'logs' / 'grpo', name)
    history = fit(net, loss, 4, 0.1, ranks=ranks_of(acc))
    acc.end_training()
    (made,) = listener.made
    assert made.project == 'clear_nb' and made.kw['name'] == 'tiny-seed3-grpo' and not made.open
    assert made.told == [
        {k: v for k, v in h.items() if k != 'step'} | {'step': h['step']} for h in history
    ]


def test_resumed_run_goes_on_where_it_stopped(listener, tmp_path):
    """After a kill the tracker hears the missing steps, with their numbers."""
    net, loss = toy()

    def killed(step):
        if step == 3:
            raise InterruptedError
        return loss(step)

    for f in (killed, loss):
        acc = accelerator('no', tmp_path / 'grpo', 'wandb')
        try:
            fit(net, f, 6, 0.1, ranks=ranks_of(acc), state=tmp_path / 'state.pt', save_seconds=0.0)
        except InterruptedError:
            pass
    assert [[t['step'] for t in m.told] for m in listener.made] == [[0, 1, 2], [3, 4, 5]]


def test_no_tracker(listener, tmp_path):
    """'none', or no folder for logs, opens nothing."""
    net, loss = toy()
    for acc in (
        accelerator('no', tmp_path / 'grpo', 'none'),
        accelerator('no', None, 'wandb'),
        accelerator('no'),
    ):
        fit(net, loss, 1, 0.1, ranks=ranks_of(acc))
    assert not listener.made and not (tmp_path / 'grpo').exists()


def test_refused_names(monkeypatch):
    """A name that is unknown or not installed is refused with what to do; the default is
    tensorboard where there is one.
    """
    monkeypatch.setattr(train, 'get_available_trackers', lambda: [])
    assert tracker_name() is None and tracker_name('none') is None
    with pytest.raises(
        ValueError, match='unknown tracker .weights.: use tensorboard, wandb, trackio or none'
    ):
        tracker_name('weights')
    with pytest.raises(ValueError, match='pip install trackio'):
        tracker_name('trackio')
    monkeypatch.setattr(train, 'get_available_trackers', lambda: ['wandb', 'tensorboard'])
    assert tracker_name() == 'tensorboard'


def test_progress_bar_shows_the_chosen_numbers(capsys, monkeypatch):
    """What stands beside the bar; a number that was not logged in a step is left out."""
    monkeypatch.setattr('clear_nb.core._bar_file', lambda: sys.stderr)
    net, loss = toy()
    fit(net, loss, 2, 0.1, ranks=ranks_of(accelerator('no')), show=('reward', 'seconds'))
    assert (
        'reward=' in (err := capsys.readouterr().err)
        and 'loss=' not in err
        and 'seconds=' not in err
    )
    fit(net, loss, 2, 0.1, ranks=ranks_of(accelerator('no')))
    err = capsys.readouterr().err
    assert all(f'{word}=' in err for word in ('loss', 'reward', 'trigger'))

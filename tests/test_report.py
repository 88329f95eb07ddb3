"""What a run shows: the terminal, event files, pictures."""

import functools
import io
import re

import numpy as np
import pytest
from conftest import read_events
from PIL import Image
from rich.console import Console

from flax_dlvc import data, report
from flax_dlvc.config import flatten
from flax_dlvc.errors import StorageError
from flax_dlvc.metrics import Predictions
from flax_dlvc.report import Display, TensorBoard, plot_curves
from flax_dlvc.stopping import Stopping


def make_record(epoch):
    return {
        'epoch': epoch,
        'step': 10 * epoch,
        'train_loss': 1 / epoch,
        'train_accuracy': 0.5,
        'validation_loss': 2 / epoch,
        'validation_accuracy': 0.25,
        'learning_rate': 1e-3,
        'images_per_second': 1234.5,
    }


@pytest.fixture(scope='module')
def board():
    """`board(workdir)`: a TensorBoard of a run on digits."""
    from configs import quickstart

    config = quickstart.get_config()
    config.name, config.seed = 'quickstart', 7
    return functools.partial(TensorBoard, config=config, dataset=data.load(config))


def summaries(workdir):
    """Values of all summaries, by step and tag, in the order in which they were written."""
    return [(event.step, value) for event in read_events(workdir) for value in event.summary.value]


def test_tensorboard_gets_every_scalar_at_its_epoch(tmp_path, board):
    with board(tmp_path) as tensorboard:
        for epoch in (1, 2):
            tensorboard.epoch(make_record(epoch))
    values = {(step, value.tag): value.simple_value for step, value in summaries(tmp_path)}
    assert values[1, 'train/loss'] == 1
    assert values[2, 'validation/loss'] == 1
    assert values[2, 'validation/accuracy'] == 0.25
    assert values[2, 'images_per_second'] == 1234.5
    assert len(values) == 2 * 7


def test_it_begins_with_the_hyperparameters_and_what_training_sees(tmp_path, board):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    with board(tmp_path) as tensorboard:
        tensorboard.begin()
        tensorboard.begin()  # nothing more
    (step, start), (_, grid) = summaries(tmp_path)
    assert (step, start.metadata.plugin_data.plugin_name) == (0, 'hparams')
    hparams = HParamsPluginData.FromString(start.metadata.plugin_data.content).session_start_info.hparams
    config = board.keywords['config']
    assert set(hparams) == set(flatten(config))
    assert (hparams['dropout_rate'].number_value, hparams['seed'].number_value) == (0.5, 7)
    assert hparams['augment.random_mirror'].HasField('bool_value')
    assert hparams['augment.random_resized_crop_scale'].string_value == '(0.08, 1.0)'
    assert grid.tag == 'train/images'
    data.main(['data', '--config=configs/quickstart.py', '--config.seed=7', f'--show={tmp_path}/seen.png'])
    assert grid.image.encoded_image_string == (tmp_path / 'seen.png').read_bytes()
    assert Image.open(tmp_path / 'seen.png').size == (grid.image.width, grid.image.height)


def test_it_ends_with_the_test(tmp_path, board):
    split = board.keywords['dataset'].test
    predictions = Predictions((split.labels + (np.arange(300) < 5)) % 10, np.ones(300, np.float32))
    test = {'accuracy': 295 / 300, 'cross_entropy': 0.25, 'confusion_matrix': np.diag([30] * 10).tolist()}
    with board(tmp_path) as tensorboard:
        tensorboard.end(12, test, predictions)
    written = {value.tag: value for step, value in summaries(tmp_path) if step == 12}
    assert written['test/accuracy'].simple_value == pytest.approx(295 / 300)
    assert written['test/cross_entropy'].simple_value == 0.25
    for tag, size in (('test/confusion_matrix', (750, 750)), ('test/mistakes', (8 * (128 + 12), 128 + 40))):
        image = written.pop(tag).image
        assert (image.width, image.height) == size
        assert Image.open(io.BytesIO(image.encoded_image_string)).size == size
    assert set(written) == {'test/accuracy', 'test/cross_entropy', '_hparams_/session_end_info'}


def test_a_run_that_goes_on_drops_what_it_logs_again(tmp_path, board):
    from tensorboardX.proto.event_pb2 import SessionLog

    def starts(workdir):
        return [event.step for event in read_events(workdir) if event.session_log.status == SessionLog.START]

    with board(tmp_path) as tensorboard:
        tensorboard.epoch(make_record(3))
    assert starts(tmp_path) == [3]
    (tmp_path / 'tested').mkdir()
    test = {'accuracy': 1.0, 'cross_entropy': 0.0, 'confusion_matrix': [[1]]}
    with board(tmp_path / 'tested') as tensorboard:  # stopped in the final test: no epoch is dropped
        tensorboard.end(3, test, Predictions(board.keywords['dataset'].test.labels, np.ones(300, np.float32)))
    assert starts(tmp_path / 'tested') == [4]


def test_an_event_file_that_cannot_be_written_is_a_storage_error(tmp_path, board):
    (tmp_path / 'tensorboard').write_text('')
    with board(tmp_path) as tensorboard, pytest.raises(StorageError, match='cannot write '):
        tensorboard.epoch(make_record(1))


@pytest.mark.parametrize('epochs', [1, 12])
def test_curves_are_a_picture(tmp_path, small_config, epochs):
    path = tmp_path / 'curves.png'
    history = [make_record(epoch) for epoch in range(1, epochs + 1)]
    plot_curves(small_config, history, path, best_epoch=1, stopped_early=True)
    with Image.open(path) as image:
        assert image.size == (1500, 600)
        assert len(image.convert('L').getcolors(256)) > 20  # lines and text, not an empty page
    assert [file.name for file in tmp_path.iterdir()] == ['curves.png']


def test_the_display_prints_a_line_per_epoch_without_a_terminal(capsys):
    with Display(num_epochs=12, steps_per_epoch=10, metric='validation_loss') as display:
        display.step(5, {'cross_entropy': 1.0, 'accuracy': 0.5}, 100.0)
        display.epoch(make_record(1), Stopping(0.25, 1, 0))
        display.print('[not markup]')
    out = capsys.readouterr().out
    assert out.splitlines() == [
        'epoch   1/12  train loss 1.0000 accuracy 0.5000  validation loss 2.0000 accuracy 0.2500'
        '  learning rate 1.00e-03  1,234 images/s  best loss 0.2500 (epoch 1)',
        '[not markup]',
    ]


@pytest.mark.parametrize('width', [80, 160])
def test_the_live_bar_shows_all_in_a_narrow_terminal_too(monkeypatch, capsys, width):
    terminal = functools.partial(Console, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(report, 'Console', terminal)
    with Display(num_epochs=100, steps_per_epoch=312, metric='validation_accuracy') as display:
        display.epoch(make_record(29), Stopping(0.75, 29, 0))
        for step in (29 * 312 + 1, 29 * 312 + 200):
            display.step(step, {'cross_entropy': 12.345, 'accuracy': 0.5}, 123456.0)
    *_, bar, _ = capsys.readouterr().out.splitlines()  # then the cursor comes back
    best = 'best accuracy 0.7500 (epoch 29)' if width == 160 else 'best 0.7500'
    said = rf'loss 12\.345  accuracy 0\.500  123,456 images/s  {re.escape(best)}'
    middle = r' ━.* 9248/31200 ' if width == 160 else ' '
    assert re.search(rf'epoch 30/100{middle}\d:\d\d:\d\d {said}$', bar.rstrip()), bar

"""What a run shows: the terminal, event files, pictures."""

import struct

import pytest
from PIL import Image

from flax_dlvc.errors import StorageError
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


def read_events(directory):
    """Every event in a directory's files; a record is length, its checksum, data, its checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack('<Q', content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_gets_every_scalar_at_its_epoch(tmp_path):
    with TensorBoard(tmp_path) as tensorboard:
        for epoch in (1, 2):
            tensorboard.epoch(make_record(epoch))
    values = {
        (event.step, value.tag): value.simple_value
        for event in read_events(tmp_path / 'tensorboard')
        for value in event.summary.value
    }
    assert values[1, 'train/loss'] == 1
    assert values[2, 'validation/loss'] == 1
    assert values[2, 'validation/accuracy'] == 0.25
    assert values[2, 'images_per_second'] == 1234.5
    assert len(values) == 2 * 7


def test_a_run_that_goes_on_drops_what_it_logs_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    with TensorBoard(tmp_path) as tensorboard:
        tensorboard.epoch(make_record(3))
    starts = [
        event.step for event in read_events(tmp_path / 'tensorboard') if event.session_log.status == SessionLog.START
    ]
    assert starts == [3]


def test_an_event_file_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / 'tensorboard').write_text('')
    with TensorBoard(tmp_path) as tensorboard, pytest.raises(StorageError, match='cannot write '):
        tensorboard.epoch(make_record(1))


@pytest.mark.parametrize('epochs', [1, 12])
def test_curves_are_a_picture(tmp_path, epochs):
    path = tmp_path / 'curves.png'
    history = [make_record(epoch) for epoch in range(1, epochs + 1)]
    plot_curves(history, title='cnn on digits', best_epoch=1, stopped_early=True, path=path)
    with Image.open(path) as image:
        assert image.size == (1500, 600)
        assert len(image.convert('L').getcolors(256)) > 20  # lines and text, not an empty page
    assert [file.name for file in tmp_path.iterdir()] == ['curves.png']


def test_the_display_prints_a_line_per_epoch_without_a_terminal(capsys):
    with Display(num_epochs=12, steps_per_epoch=10) as display:
        display.step(5, {'cross_entropy': 1.0, 'accuracy': 0.5}, 100.0)
        display.epoch(make_record(1), Stopping(0.25, 1, 0))
        display.print('[not markup]')
    out = capsys.readouterr().out
    assert out.splitlines() == [
        'epoch   1/12  train loss 1.0000 accuracy 0.5000  validation loss 2.0000 accuracy 0.2500'
        '  learning rate 1.00e-03  1,234 images/s  best 0.2500 (epoch 1)',
        '[not markup]',
    ]

"""Whole runs on a fifth of the digits, in this process."""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from clu.metrics import Average
from conftest import SMALL_RUN, check_same_run, read_events, read_history, restore_latest

from flax_dlvc import loop, pictures, rundir, transfer
from flax_dlvc.checkpoint import Checkpoints, Progress
from flax_dlvc.data import load
from flax_dlvc.errors import ConfigError, DivergedError, StoppedError
from flax_dlvc.evaluate import evaluate_checkpoint
from flax_dlvc.metrics import ConfusionMatrix, Sums
from flax_dlvc.setup import Setup, set_up


@pytest.fixture
def random_config():
    """The config of a small run with all randomness there is, and averaging; test_kills.py has the same programs."""
    from configs import cnn_dropout_augment

    config = cnn_dropout_augment.get_config()
    config.update_from_flattened_dict(SMALL_RUN)
    config.name, config.ema_decay = 'cnn_dropout_augment', 0.9
    return config


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory, request):
    """A run of three epochs, with its config, its directory and its result."""

    from configs import cnn_dropout

    config = cnn_dropout.get_config()
    config.update_from_flattened_dict(SMALL_RUN)
    config.name = 'cnn_dropout'
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    return config, workdir, loop.run(config, workdir)


def test_a_run_leaves_what_the_interface_promises(finished_run):
    config, workdir, result = finished_run
    assert rundir.read_config(workdir) == config
    history = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in history] == [1, 2, 3]
    assert [record['step'] for record in history] == [4, 8, 12]
    assert set(history[0]) == {
        'epoch',
        'step',
        'train_loss',
        'train_accuracy',
        'validation_loss',
        'validation_accuracy',
        'learning_rate',
        'images_per_second',
    }
    assert history[-1]['train_loss'] < history[0]['train_loss']
    assert history[-1]['validation_accuracy'] > 0.3
    assert [record['learning_rate'] for record in history] == pytest.approx([1e-3, 9e-4, 8.1e-4], rel=1e-5)
    assert all(record['images_per_second'] > 0 for record in history)
    assert json.loads((workdir / 'result.json').read_text()) == result
    assert {key: result[key] for key in ('config_name', 'dataset', 'seed', 'epochs_run', 'stopped_early')} == {
        'config_name': 'cnn_dropout',
        'dataset': 'digits',
        'seed': 0,
        'epochs_run': 3,
        'stopped_early': False,
    }
    assert result['num_parameters'] == 620_362
    assert int(restore_latest(workdir).sums.loss.count) == 4 * 64  # of the last epoch alone
    assert set(result['test']) == {
        'accuracy',
        'mean_class_accuracy',
        'cross_entropy',
        'per_class_accuracy',
        'num_examples',
    }
    assert result['test']['num_examples'] == 300
    assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert [path.name for path in workdir.glob('.*')] == ['.lock']


def test_the_best_epoch_is_that_of_the_best_validation_accuracy(finished_run):
    _, workdir, result = finished_run
    accuracies = [record['validation_accuracy'] for record in read_history(workdir)]
    assert result['best_epoch'] == 1 + int(np.argmax(accuracies))


def test_tensorboard_shows_training_images_confusion_and_mistakes(finished_run):
    config, workdir, result = finished_run
    logged = {value.tag: (event.step, value) for event in read_events(workdir) for value in event.summary.value}
    images = {tag: value.image.encoded_image_string for tag, (_, value) in logged.items() if value.HasField('image')}
    assert {tag: logged[tag][0] for tag in images} == {
        'train/images': 0, 'test/confusion_matrix': 3, 'test/mistakes': 3,
    }  # fmt: skip
    assert logged['test/accuracy'][1].simple_value == pytest.approx(result['test']['accuracy'])

    # The mistakes, by the model alone and in a plain sort.
    setup, variables = transfer.load_trained(workdir)
    test = load(config).test
    normalized = (test.images / np.float32(255) - np.float32(setup.dataset.mean)) / np.float32(setup.dataset.std)
    logits = np.asarray(setup.model.apply(variables, normalized, train=False), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidences = {
        index: probability.max()
        for index, probability in enumerate(probabilities)
        if probability.argmax() != test.labels[index]
    }
    assert len(confidences) == round(300 * (1 - result['test']['accuracy']))
    worst = sorted(confidences, key=lambda index: -confidences[index])[:32]
    labels = [f'{probabilities[i].argmax()} {confidences[i]:.2f}\nis {test.labels[i]}' for i in worst]
    expected = pictures.image_grid(test.images[worst] / np.float32(255), labels)
    assert images['test/mistakes'] == pictures.encode_png(expected)


def test_evaluate_repeats_the_result_to_the_last_digit(finished_run):
    _, workdir, result = finished_run
    metrics = evaluate_checkpoint(workdir, 'test', 'best')
    assert {key: metrics[key] for key in result['test']} == result['test']
    assert np.array(metrics['confusion_matrix']).sum() == 300
    best = read_history(workdir)[result['best_epoch'] - 1]
    metrics = evaluate_checkpoint(workdir, 'validation', 'best')
    assert metrics['cross_entropy'] == best['validation_loss']
    assert metrics['accuracy'] == best['validation_accuracy']
    assert metrics['step'] == best['step']


def test_a_finished_run_is_not_run_again(finished_run, capsys):
    config, workdir, result = finished_run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    assert loop.run(config, workdir) == result
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before
    assert f'accuracy {result["test"]["accuracy"]:.4f}' in capsys.readouterr().out


@pytest.mark.parametrize(('count', 'number', 'is_shown'), [('2', '0', True), ('2', '1', False), ('1', '1', True)])
def test_of_several_processes_one_shows_a_finished_run(finished_run, capsys, monkeypatch, count, number, is_shown):
    config, workdir, _ = finished_run
    monkeypatch.setenv('NUM_PROCESSES', count)
    monkeypatch.setenv('PROCESS_ID', number)
    loop.run(config, workdir)
    assert ('after epoch' in capsys.readouterr().out) == is_shown


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [('dropout', 0.3, "unknown field 'dropout'"), ('dropout_rate', 1.5, r'dropout_rate must be in \[0, 1\)')],
)
def test_a_config_that_is_not_valid_is_refused_before_anything_is_written(
    small_config, tmp_path, field, value, message
):
    with small_config.unlocked():
        small_config[field] = value
    with pytest.raises(ConfigError, match=message):
        loop.run(small_config, str(tmp_path / 'run'))
    assert not any(tmp_path.iterdir())


def test_another_config_is_refused_and_what_differs_is_named(finished_run):
    config, workdir, _ = finished_run
    other = config.copy_and_resolve_references()
    other.seed, other.augment.random_mirror = 5, True
    with pytest.raises(ConfigError, match=r'differs in augment\.random_mirror, seed;'):
        loop.run(other, workdir)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'dataset.json'])
def test_a_damaged_file_of_a_finished_run_is_written_anew_as_its_message_says(finished_run, tmp_path, name):
    config, finished, result = finished_run
    workdir = shutil.copytree(finished, tmp_path / 'run')
    (workdir / name).write_text('{')
    read = {'metrics.jsonl': rundir.read_history, 'dataset.json': rundir.read_dataset}[name]
    with pytest.raises(ConfigError, match=r'damaged; remove it and any result\.json, and the command that trained the'):
        read(workdir)
    (workdir / name).unlink()
    (workdir / 'result.json').unlink()
    assert loop.run(config, workdir) == result
    assert (workdir / name).read_text() == (finished / name).read_text()


def test_how_a_run_is_carried_out_may_change(finished_run):
    config, workdir, result = finished_run
    other = config.copy_and_resolve_references()
    other.num_devices, other.keep_checkpoints = 2, 3
    assert loop.run(other, workdir) == result


def test_early_stopping_ends_the_run_and_reports_the_best_epoch(small_config, tmp_path):
    small_config.learning_rate = 1e-12  # nothing ever improves after the first epoch
    small_config.num_epochs = 10
    small_config.early_stopping.patience = 2
    small_config.keep_checkpoints = 1
    result = loop.run(small_config, tmp_path)
    assert (result['best_epoch'], result['epochs_run'], result['stopped_early']) == (1, 3, True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [4, 12]
        assert (checkpoints.find('best'), checkpoints.find('latest')) == (4, 12)


@pytest.mark.parametrize(
    ('metric', 'min_delta', 'best_epoch'),
    [
        ('validation_accuracy', 0.0, 3),
        ('validation_accuracy', 0.2, 1),
        ('validation_loss', 0.0, 2),
        ('validation_loss', 0.5, 1),
    ],
)
def test_the_best_epoch_is_the_one_of_the_metric_and_the_margin_in_the_config(
    small_config, metric, min_delta, best_epoch
):
    small_config.early_stopping.metric, small_config.early_stopping.min_delta = metric, min_delta
    progress = Progress()
    for epoch, (loss, accuracy) in enumerate([(1.0, 0.5), (0.75, 0.25), (0.875, 0.625)], start=1):
        record = {'epoch': epoch, 'step': 4 * epoch, 'validation_loss': loss, 'validation_accuracy': accuracy}
        progress = loop.advance(small_config, progress, record)
    assert (progress.stopping.best_epoch, progress.best_step) == (best_epoch, 4 * best_epoch)
    assert progress.stopping.epochs_without_improvement == 3 - best_epoch


def test_a_state_that_is_not_finite_ends_the_run(small_config, tmp_path):
    setup = set_up(small_config)
    state = setup.create_state()
    state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(loop.NotFiniteError, match=r'^the state is not finite at step 0$'),
    ):
        loop.save(checkpoints, state, Progress())


def test_a_diverging_run_ends_with_the_step_and_keeps_the_last_good_checkpoint(small_config, tmp_path):
    small_config.optimizer.name = 'sgd'
    small_config.learning_rate = 1e8
    with pytest.raises(DivergedError, match=r'training loss is (nan|inf) at step [1-4] .* no checkpoint was saved yet'):
        loop.run(small_config, tmp_path / 'at once')
    assert not (tmp_path / 'at once' / 'result.json').exists()
    assert not (tmp_path / 'at once' / 'curves.png').exists()

    small_config.learning_rate = 1e-3
    small_config.num_epochs = 1
    workdir = tmp_path / 'later'
    loop.run(small_config, workdir)
    # The run goes on, now with a learning rate that it cannot survive.
    (workdir / 'result.json').unlink()
    (workdir / 'curves.png').unlink()
    small_config.num_epochs, small_config.learning_rate = 2, 1e8
    (workdir / 'config.json').unlink()
    rundir.create(workdir, small_config)
    with pytest.raises(DivergedError, match=r'the checkpoint of step 4 is kept'):
        loop.run(small_config, workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 4
    assert (workdir / 'curves.png').exists()


def test_a_run_that_diverges_with_its_last_step_and_has_no_validation_has_diverged(small_config, tmp_path, capsys):
    """Its training loss is that of before the step."""
    small_config.model.stem = 'cifar'
    small_config.splits.validation = ''
    small_config.early_stopping.patience = 0
    small_config.batch_size = 256  # one step
    small_config.num_epochs = 1
    small_config.learning_rate = 1e10
    small_config.on_divergence = 'rewind'  # which would test the same checkpoint again
    with pytest.raises(DivergedError, match=r'the test loss is (nan|inf) at step 1; .* of step 1 is kept; train in'):
        loop.run(small_config, tmp_path)
    assert '\nwithout effect here: model.stem\n' in capsys.readouterr().out
    assert not (tmp_path / 'result.json').exists()


def test_cosine_one_cycle_and_sgd_train(small_config, tmp_path):
    small_config.optimizer.name = 'sgd'
    small_config.learning_rate = 0.05
    small_config.schedule.name = 'one_cycle'
    small_config.label_smoothing = 0.1
    small_config.optimizer.gradient_clip_norm = 1.0
    loop.run(small_config, tmp_path)
    history = read_history(tmp_path)
    assert history[-1]['validation_accuracy'] > 0.2
    assert history[-1]['learning_rate'] < history[0]['learning_rate']


def test_a_batch_that_the_devices_cannot_share_is_refused(small_config, tmp_path):
    small_config.num_devices, small_config.batch_size = 2, 63
    with pytest.raises(ConfigError, match='batch_size 63 is not divisible by the 2 devices'):
        loop.run(small_config, tmp_path / 'run')
    small_config.num_devices = 3
    with pytest.raises(ConfigError, match='num_devices is 3, but there are 2 devices'):
        loop.run(small_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_two_devices_and_several_steps_per_call_give_the_same_run(small_config, tmp_path):
    """Without dropout, augmentation and batch statistics."""
    small_config.num_epochs = 2
    loop.run(small_config, tmp_path / 'one')
    small_config.num_devices, small_config.steps_per_call = 2, 3
    loop.run(small_config, tmp_path / 'two')
    for one, two in zip(read_history(tmp_path / 'one'), read_history(tmp_path / 'two'), strict=True):
        assert two['train_loss'] == pytest.approx(one['train_loss'], rel=1e-4)
        assert two['validation_loss'] == pytest.approx(one['validation_loss'], rel=1e-4)


def test_the_test_split_is_placed_once_and_last(small_config, tmp_path, monkeypatch):
    from flax_dlvc.setup import Setup

    placed = []
    place = Setup.place

    def noting_place(self, split):
        names = ('train', 'validation', 'test')
        placed.append(next(name for name in names if getattr(self.dataset, name) is split))
        return place(self, split)

    monkeypatch.setattr(Setup, 'place', noting_place)
    small_config.num_epochs = 1
    loop.run(small_config, tmp_path)
    assert placed == ['train', 'validation', 'test']


def test_the_same_seed_gives_the_same_bits_and_another_does_not(random_config, tmp_path):
    random_config.num_epochs = 1
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        random_config.seed = seed
        loop.run(random_config, tmp_path / name)
    a, b, c = (read_history(tmp_path / name) for name in 'abc')
    assert a == b
    assert a != c


def test_a_run_that_is_stopped_in_mid_epoch_ends_with_the_same_bits(random_config, tmp_path, monkeypatch):
    """The batch statistics of a ResNet would only make it slower."""
    random_config.num_epochs = 2
    loop.run(random_config, tmp_path / 'whole')

    calls = []
    train_step = Setup.train_step.fget

    def signalling_train_step(self):
        step = train_step(self)

        def call(*arguments):
            calls.append(1)
            if len(calls) in (3, 7):  # before the steps of these numbers; an epoch has four
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Setup, 'train_step', property(signalling_train_step))
        for step in (3, 7):
            with pytest.raises(StoppedError, match=f'stopped by SIGTERM, saved at step {step} ') as stopped:
                loop.run(random_config, tmp_path / 'stopped')
            assert stopped.value.exit_code == 143
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    result = loop.run(random_config, tmp_path / 'stopped')
    assert result == json.loads((tmp_path / 'whole' / 'result.json').read_text())
    check_same_run(tmp_path / 'stopped', tmp_path / 'whole')
    # Its log begins once, before the first step, though the first epoch was interrupted.
    tags = [value.tag for event in read_events(tmp_path / 'stopped') for value in event.summary.value]
    assert tags.count('train/images') == tags.count('_hparams_/session_start_info') == 1
    assert tags.count('test/mistakes') == 1


def test_a_finished_run_that_is_given_more_epochs_ends_with_the_same_bits(random_config, tmp_path):
    random_config.num_epochs = 3
    loop.run(random_config, tmp_path / 'whole')
    random_config.num_epochs = 2
    rundir.create(tmp_path / 'longer', random_config)  # as if stopped in its first epoch
    for random_config.num_epochs in (1, 3):
        result = loop.run(random_config, tmp_path / 'longer')
        assert result['epochs_run'] == random_config.num_epochs
        assert json.loads((tmp_path / 'longer' / 'config.json').read_text())['num_epochs'] == random_config.num_epochs
    assert result == json.loads((tmp_path / 'whole' / 'result.json').read_text())
    check_same_run(tmp_path / 'longer', tmp_path / 'whole')


def test_saves_within_an_epoch(small_config, tmp_path):
    small_config.num_epochs = 1
    small_config.batch_size = 32  # nine steps
    small_config.keep_checkpoints = 10
    small_config.checkpoint_every_steps = 4
    loop.run(small_config, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [4, 8, 9]


def test_the_speed_is_that_of_all_calls_but_the_first(small_config, monkeypatch):
    seconds = iter([0.0, 10.0, 10.5, 11.0])  # the first call is compiled
    monkeypatch.setattr(loop, 'time', SimpleNamespace(perf_counter=lambda: next(seconds)))
    setup = set_up(small_config)
    sums = Sums(Average(total=1.0, count=1), ConfusionMatrix(np.eye(10, dtype=np.int32)))
    monitor = loop.Monitor(setup, 0, loop.Display(num_epochs=1, steps_per_epoch=9, metric='validation_loss'))
    for step in (3, 6, 9):
        monitor.note(step, sums)
    assert monitor.finish() == (9 - 3) * 64 / (11.0 - 10.0)


def test_a_run_goes_on_without_what_it_began_with(finished_run, tmp_path):
    config, workdir, _ = finished_run
    config = config.copy_and_resolve_references()
    config.init_from, config.num_epochs = str(shutil.copytree(workdir, tmp_path / 'origin')), 1
    loop.run(config, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'origin')
    config.num_epochs = 2
    assert loop.run(config, tmp_path / 'run')['epochs_run'] == 2


def test_a_run_that_diverges_rewinds_with_half_the_learning_rate(small_config, tmp_path, capsys):
    """With plain SGD at 40 the loss explodes; halved often enough it does not."""
    small_config.optimizer.name = 'sgd'
    small_config.learning_rate = 40.0
    small_config.num_epochs = 1
    with pytest.raises(DivergedError, match=r'go on with --config.on_divergence=rewind'):
        loop.run(small_config, tmp_path / 'many')
    assert (tmp_path / 'many' / 'failure.json').exists()
    small_config.on_divergence = 'rewind'
    small_config.max_rewinds = 20
    result = loop.run(small_config, tmp_path / 'many')
    assert 1 <= result['rewinds'] <= 20
    (record,) = read_history(tmp_path / 'many')
    assert record['learning_rate'] == pytest.approx(40 / 2 ** result['rewinds'])
    assert not (tmp_path / 'many' / 'failure.json').exists()
    output = capsys.readouterr().out
    assert output.count('rewind ') == result['rewinds'] and 'go on with' not in output

    small_config.learning_rate = 1e12
    small_config.max_rewinds = 1
    with pytest.raises(DivergedError, match=r'learning rate 5e.* go on with more --config.max_rewinds'):
        loop.run(small_config, tmp_path / 'one')


def test_where_a_run_rewinds_to_does_not_depend_on_how_often_it_saves(small_config, tmp_path, capsys, monkeypatch):
    """Nor on when it is killed: at a rate that rises until the loss explodes, it goes back to the best epoch."""
    small_config.optimizer.name = 'sgd'
    small_config.learning_rate = 1.5
    small_config.schedule.name, small_config.schedule.warmup_epochs = 'constant', 3.0
    small_config.num_epochs = 3
    small_config.on_divergence, small_config.max_rewinds = 'rewind', 20
    histories = []
    for every in (0, 1):
        small_config.checkpoint_every_steps = every
        result = loop.run(small_config, tmp_path / str(every))
        assert result['rewinds'] >= 1
        output = capsys.readouterr().out
        assert re.search(
            r'rewind 1 of at most 20: .*learning rate [\d.]+\n.*\ngoing on after step \d+, [12] epochs?', output
        )
        histories.append([{**record, 'images_per_second': 0} for record in read_history(tmp_path / str(every))])
    assert histories[0] == histories[1]

    announce, announced = loop.announce, []

    def kill(*arguments):  # once it has gone back to a checkpoint, before its first step
        announced.append(arguments)
        if len(announced) == 2:
            raise KeyboardInterrupt
        announce(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, 'announce', kill)
        loop.run(small_config, tmp_path / 'killed')
    with Checkpoints(tmp_path / 'killed', read_only=True) as checkpoints:
        (step,) = checkpoints.steps
        assert checkpoints.restore(step, announced[1][2])[1].rewinds == 1
    loop.run(small_config, tmp_path / 'killed')
    assert [{**record, 'images_per_second': 0} for record in read_history(tmp_path / 'killed')] == histories[0]

    small_config.num_epochs = 4  # it goes on at the rate that it came to
    longer = loop.run(small_config, tmp_path / '0')
    assert longer['rewinds'] >= result['rewinds']
    assert read_history(tmp_path / '0')[3]['learning_rate'] == pytest.approx(1.5 / 2 ** longer['rewinds'])

    logged = {}  # as TensorBoard shows it
    for event in read_events(tmp_path / '1'):
        if event.HasField('session_log'):
            logged = {epoch: losses for epoch, losses in logged.items() if epoch < event.step}
        for value in event.summary.value:
            if value.tag == 'train/loss':
                logged.setdefault(event.step, []).append(value.simple_value)
    assert logged == {record['epoch']: [pytest.approx(record['train_loss'])] for record in histories[1]}


def test_a_run_in_a_thread_of_another_program(finished_run, tmp_path):
    """Where Python lets nobody handle signals."""
    config, workdir, _ = finished_run
    with ThreadPoolExecutor(1) as thread:
        thread.submit(loop.run, config, tmp_path / 'run').result()
    check_same_run(tmp_path / 'run', workdir)


def test_a_process_has_one_run_at_a_time(small_config, tmp_path):
    with loop.ONE_AT_A_TIME, pytest.raises(ConfigError, match='another run is under way in this process'):
        loop.run(small_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_signal_is_obeyed_where_the_state_cannot_be_saved(small_config, tmp_path, monkeypatch):
    """The next step would have shown that the run diverges, and let it rewind."""

    def not_finite(*_):
        raise FloatingPointError

    small_config.on_divergence = 'rewind'
    monkeypatch.setattr(Checkpoints, 'save', not_finite)
    monkeypatch.setattr(loop.Monitor, 'note', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match='stopped by SIGTERM, nothing saved in'):
        loop.run(small_config, tmp_path)


def test_a_run_is_not_given_fewer_epochs_than_it_has_behind_it(small_config, tmp_path):
    """By its checkpoint: a process may end between that and metrics.jsonl."""
    loop.run(small_config, tmp_path)
    (tmp_path / 'result.json').unlink()
    first, second, _ = (tmp_path / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'metrics.jsonl').write_text(first + second)
    small_config.num_epochs = 2
    with pytest.raises(ConfigError, match=r'has 3 epochs behind it; set --config\.num_epochs'):
        loop.run(small_config, tmp_path)
    assert rundir.read_config(tmp_path).num_epochs == 3


def test_the_average_of_the_parameters_is_what_is_validated(small_config, tmp_path):
    """With a decay of nearly 1 the average stays at the initial parameters, whatever is trained."""
    small_config.num_epochs = 2
    small_config.ema_decay = 0.9999999
    loop.run(small_config, tmp_path / 'still')
    first, second = read_history(tmp_path / 'still')
    assert second['validation_loss'] == pytest.approx(first['validation_loss'], rel=1e-4)
    assert second['train_loss'] < first['train_loss']

    small_config.ema_decay = 0.5
    loop.run(small_config, tmp_path / 'moving')
    state = restore_latest(tmp_path / 'moving')
    assert state.variables['params'] is state.ema['params']
    assert read_history(tmp_path / 'moving')[1]['validation_loss'] < second['validation_loss']


def test_without_validation_all_epochs_run_and_the_last_is_tested(small_config, tmp_path, capsys):
    small_config.splits.train, small_config.splits.validation = 'train[:8%]+train[20%:22%]', ''
    small_config.early_stopping.patience, small_config.num_epochs = 0, 2
    small_config.test_time_augmentation = 'mirror_translate'
    result = loop.run(small_config, tmp_path)
    output = capsys.readouterr().out
    assert '\ntest, last epoch 2: accuracy' in output and 'best' not in output
    assert result['best_epoch'] == result['epochs_run'] == 2 and not result['stopped_early']
    history = read_history(tmp_path)
    assert [record['validation_accuracy'] for record in history] == [None, None]
    assert evaluate_checkpoint(tmp_path, 'test', 'latest')['accuracy'] == result['test']['accuracy']
    with pytest.raises(ConfigError, match=r'validation split of .* is empty'):
        evaluate_checkpoint(tmp_path, 'validation', 'best')


def test_a_directory_that_another_run_made_meanwhile_is_refused(small_config, tmp_path):
    """Between the first look and the lock lies the loading of the data, in a study hours."""
    setup = loop.set_up(small_config)
    other = small_config.copy_and_resolve_references()
    other.seed = 1
    rundir.create(tmp_path / 'run', other)
    with (
        pytest.raises(ConfigError, match='another config, which differs in seed'),
        loop.claimed(tmp_path / 'run', setup),
    ):
        pytest.fail('claimed')

import dataclasses
import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import threading

import pytest

from configs import default
from flax_dlvc import config as config_module
from flax_dlvc import rundir
from flax_dlvc.config import SCHEDULE_FIELDS
from flax_dlvc.errors import ConfigError, StorageError

TEST = {'accuracy': 0.5, 'mean_class_accuracy': 0.5, 'cross_entropy': 1.5, 'per_class_accuracy': [0.5, 0.5, None]}
RECORD = {
    'epoch': 1,
    'step': 4,
    'train_loss': 1.5,
    'train_accuracy': 0.5,
    'validation_loss': None,
    'validation_accuracy': None,
    'learning_rate': 0.001,
    'images_per_second': 99.5,
}
RESULT = {
    'config_name': 'cnn',
    'dataset': 'digits',
    'best_epoch': 1,
    'epochs_run': 2,
    'stopped_early': False,
    'test': TEST,
}


@pytest.fixture
def config():
    return default.get_config()


@pytest.fixture
def workdir(tmp_path, config):
    rundir.create(tmp_path / 'run', config)
    return tmp_path / 'run'


def refused(match, call, *arguments, error=ConfigError):
    with pytest.raises(error, match=match) as caught:
        call(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_dataset_may_differ_by_rounding_alone(workdir, digits):
    rundir.write_dataset(workdir, digits)
    path = workdir / 'dataset.json'
    said = json.loads(path.read_text())
    for std, fits in ((math.nextafter(digits.std[1], 0), True), (digits.std[1] * (1 + 1e-9), False)):
        said['std'][1] = std
        path.write_text(json.dumps(said))
        if fits:
            rundir.check_dataset(workdir, digits)
        else:
            refused('digits is not what .*dataset.json says', rundir.check_dataset, workdir, digits)


def test_a_dataset_with_other_labels_is_another_one(workdir, digits):
    """Such as the same files in other classes: as many images, of the same mean."""
    rundir.write_dataset(workdir, digits)
    labels = digits.test.labels.copy()
    labels[[3, 4]] = labels[[4, 3]]
    relabelled = dataclasses.replace(digits, test=dataclasses.replace(digits.test, labels=labels))
    refused('digits is not what .*dataset.json says', rundir.check_dataset, workdir, relabelled)

    path = workdir / 'dataset.json'
    said = json.loads(path.read_text())
    del said['labels_crc32']  # as a version before wrote it
    path.write_text(json.dumps(said))
    rundir.check_dataset(workdir, digits)


def test_a_failure_that_cannot_be_removed_is_named(workdir):
    (workdir / 'failure.json').mkdir()
    refused('cannot write .*failure.json', rundir.remove_failure, workdir, error=StorageError)


def test_create_makes_parents_and_keeps_the_config(tmp_path, config):
    config.learning_rate = 1 / 3
    config.augment.random_resized_crop_scale = (0.25, 0.75)
    workdir = tmp_path / 'a' / 'b'
    rundir.create(workdir, config)
    assert names(workdir) == ['config.json']
    assert config_module.flatten(rundir.read_config(workdir)) == config_module.flatten(config)
    assert rundir.read_result(workdir) is None


def test_create_again_leaves_the_config_alone(workdir, config):
    before = (workdir / 'config.json').stat()
    rundir.create(workdir, config)
    after = (workdir / 'config.json').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_files(workdir):
    history = [{'epoch': 1, 'train_loss': 0.1 + 0.2}, {'epoch': 2, 'train_loss': 1e-30}]
    rundir.write_history(workdir, history)
    rundir.write_result(workdir, RESULT)
    path = rundir.write_evaluation(workdir, 'validation', {'accuracy': 0.25})
    assert names(workdir) == ['config.json', 'evaluation-validation.json', 'metrics.jsonl', 'result.json']
    assert [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()] == history
    assert rundir.read_result(workdir) == RESULT
    assert path == workdir / 'evaluation-validation.json'
    assert json.loads(path.read_text()) == {'accuracy': 0.25}


def test_files_are_utf_8_whatever_the_locale_is(workdir):
    code = "import pathlib, sys; from flax_dlvc import rundir; rundir.write_text(pathlib.Path(sys.argv[1]), '\\u2019')"
    ascii_locale = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    subprocess.run([sys.executable, '-c', code, workdir / 'table.md'], env=os.environ | ascii_locale, check=True)
    assert (workdir / 'table.md').read_text('utf-8') == '\u2019'


def test_history_is_written_whole(workdir):
    rundir.write_history(workdir, [{'epoch': 1}, {'epoch': 2}])
    with (workdir / 'metrics.jsonl').open() as reader:  # who reads while it is written sees the old file, whole
        rundir.write_history(workdir, [{'epoch': 3}])
        assert reader.read() == '{"epoch": 1}\n{"epoch": 2}\n'
    assert (workdir / 'metrics.jsonl').read_text() == '{"epoch": 3}\n'


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(workdir, monkeypatch):
    rundir.write_result(workdir, RESULT)

    def full_disk(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(rundir.os, 'fsync', full_disk)
    newer = {**RESULT, 'seed': 1}
    message = refused('No space left on device', rundir.write_result, workdir, newer, error=StorageError)
    assert str(workdir / 'result.json') in message
    assert names(workdir) == ['config.json', 'result.json']
    assert rundir.read_result(workdir) == RESULT


def test_check_of_a_new_directory_writes_nothing(tmp_path, config):
    assert rundir.check(tmp_path / 'new', config) is None
    assert rundir.check(tmp_path, config) is None
    assert names(tmp_path) == []


def test_check_of_the_same_run(workdir, config):
    assert rundir.check(workdir, config) is None
    rundir.write_result(workdir, RESULT)
    assert rundir.check(workdir, config) == RESULT


def test_check_names_the_fields_that_differ(workdir, config):
    config.seed = 1
    config.model.patch_size = 8
    message = refused('another config', rundir.check, workdir, config)
    assert 'differs in model.patch_size, seed;' in message and str(workdir) in message
    assert names(workdir) == ['config.json']


def test_execution_fields_may_differ(workdir, config):
    config.num_devices, config.steps_per_call = 3, 7
    config.evaluation_batch_size, config.keep_checkpoints = 99, 2
    assert rundir.check(workdir, config) is None


def test_a_finished_run_may_be_given_more_epochs(workdir, config):
    rundir.write_result(workdir, RESULT)
    config.num_epochs += 1
    refused('differs in num_epochs;', rundir.check, workdir, config)  # without a checkpoint it would begin anew
    (workdir / 'checkpoints' / '4').mkdir(parents=True)
    assert rundir.check(workdir, config) is None
    rundir.write_result(workdir, RESULT | {'stopped_early': True})
    assert rundir.check(workdir, config)['stopped_early']
    config.num_epochs -= 2
    refused('differs in num_epochs;', rundir.check, workdir, config)
    config.num_epochs += 2
    config.seed = 1
    refused('differs in num_epochs, seed;', rundir.check, workdir, config)


def test_an_unfinished_run_may_be_given_fewer_epochs_than_it_was_to_have(workdir, config):
    rundir.write_history(workdir, [RECORD | {'epoch': epoch} for epoch in (1, 2)])
    config.num_epochs = 2
    assert rundir.check(workdir, config) is None
    config.num_epochs = 1
    refused('differs in num_epochs;', rundir.check, workdir, config)


@pytest.mark.parametrize('name', SCHEDULE_FIELDS)
def test_another_number_of_epochs_is_another_run_where_the_schedule_ends_with_the_last(tmp_path, config, name):
    config.schedule.name = name
    rundir.create(tmp_path, config)
    config.num_epochs += 1
    if name in ('constant', 'exponential'):
        assert rundir.check(tmp_path, config) is None
    else:
        refused('differs in num_epochs;', rundir.check, tmp_path, config)


def test_adopting_another_number_of_epochs(workdir, config):
    rundir.write_result(workdir, RESULT)
    rundir.adopt(workdir, config)
    assert rundir.read_result(workdir) == RESULT
    config.num_epochs += 1
    rundir.adopt(workdir, config)
    assert names(workdir) == ['config.json']
    assert rundir.read_config(workdir).num_epochs == config.num_epochs


def test_a_run_that_goes_on_gets_the_fields_that_are_newer(workdir, config):
    path = workdir / 'config.json'
    whole = path.read_text()
    rundir.adopt(workdir, config)
    assert (path.read_text(), rundir.lacking_fields(workdir)) == (whole, [])
    values = json.loads(whole)
    del values['augment']['cutout'], values['ema_decay']
    path.write_text(json.dumps(values))
    assert rundir.lacking_fields(workdir) == ['augment.cutout', 'ema_decay']
    assert rundir.check(workdir, config) is None
    rundir.adopt(workdir, config)
    assert path.read_text() == whole


def test_adopting_another_way_to_carry_it_out(workdir, config):
    config.accumulate_steps, config.evaluation_batch_size = 2, 50
    rundir.write_result(workdir, RESULT)
    rundir.adopt(workdir, config)
    assert rundir.read_config(workdir).accumulate_steps == 1  # what the result was made with
    (workdir / 'result.json').unlink()
    rundir.adopt(workdir, config)
    adopted = rundir.read_config(workdir)
    assert (adopted.accumulate_steps, adopted.evaluation_batch_size) == (2, 50)


@pytest.mark.parametrize('name', ['checkpoints', 'result.json'])
def test_check_of_a_run_without_its_config(tmp_path, config, name):
    (tmp_path / name).mkdir()
    refused('without its config.json', rundir.check, tmp_path, config)


def test_a_directory_of_something_else_may_be_used(tmp_path, config):
    (tmp_path / 'notes.txt').write_text('mine')
    assert rundir.check(tmp_path, config) is None


def test_check_of_a_file(tmp_path, config):
    (tmp_path / 'file').write_text('')
    refused('not a directory', rundir.check, tmp_path / 'file', config)


DAMAGE = {
    'empty': b'',
    'truncated': b'{"test": {"accuracy": 0.',
    'html': b'<html>\n<body>\n',
    'list': b'[1, 2]',
    'null': b'null',
    'number': b'3',
    'empty object': b'{}',
    'not UTF-8': b'\xff\xfe{}',
    'deep list': b'[' * 100_000,
    'deep object': b'{"test":' * 100_000,
    'NUL': b'\x00' * 100,
}


@pytest.mark.parametrize('content', DAMAGE.values(), ids=DAMAGE)
def test_damaged_config(workdir, config, content):
    (workdir / 'config.json').write_bytes(content)
    message = refused('config', rundir.read_config, workdir)
    assert str(workdir) in message
    refused('config', rundir.check, workdir, config)


@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
def test_truncated_config(workdir, share):
    text = (workdir / 'config.json').read_text()
    (workdir / 'config.json').write_text(text[: int(share * len(text)) - 2])
    refused('config.json', rundir.read_config, workdir)


def test_invalid_config(workdir):
    text = (workdir / 'config.json').read_text()
    (workdir / 'config.json').write_text(text.replace('"seed": 0', '"seed": -1'))
    refused(r'config\.json: seed must be in', rundir.read_config, workdir)


def test_no_config(tmp_path):
    refused('not a run directory', rundir.read_config, tmp_path)
    (tmp_path / 'config.json').mkdir()
    refused('not a run directory', rundir.read_config, tmp_path)


@pytest.mark.parametrize(
    'content',
    [*DAMAGE.values(), b'{"test": 3}', b'{"test": null}', b'{"test": {}}', b'{"test": {"accuracy": 0.5}'],
    ids=[*DAMAGE, 'test is a number', 'test is null', 'no accuracy', 'no end'],
)
def test_damaged_result(workdir, config, content):
    (workdir / 'result.json').write_bytes(content)
    for message in (refused('damaged', rundir.read_result, workdir), refused('damaged', rundir.check, workdir, config)):
        assert str(workdir / 'result.json') in message


def test_a_result_that_is_a_directory(workdir):
    (workdir / 'result.json').mkdir()
    refused('damaged', rundir.read_result, workdir)


def test_a_place_that_cannot_be_written(tmp_path, config):
    (tmp_path / 'file').write_text('')
    workdir = tmp_path / 'file' / 'run'
    assert rundir.check(workdir, config) is None
    message = refused('cannot write', rundir.create, workdir, config)
    assert str(workdir) in message
    refused('cannot write', rundir.write_result, workdir, RESULT, error=StorageError)
    assert names(tmp_path) == ['file']


def test_a_name_that_is_too_long(tmp_path, config):
    workdir = tmp_path / ('a' * 300)

    def check_and_create():
        rundir.check(workdir, config)
        rundir.create(workdir, config)

    refused('too long', check_and_create)


@pytest.mark.parametrize('name', ['run[1]', 'a\\b'])
def test_a_name_with_which_no_checkpoint_can_be_saved(tmp_path, workdir, config, name):
    """Orbax would save one that nobody can read, and say nothing."""
    refused('no checkpoint can be saved in', rundir.check, tmp_path / name, config)
    refused('no checkpoint can be saved in', rundir.check, tmp_path / name / 'below', config)
    (tmp_path / 'link').symlink_to(tmp_path / name)
    refused('no checkpoint can be saved in', rundir.check, tmp_path / 'link', config)
    assert not (tmp_path / name).exists()
    rundir.write_result(workdir, RESULT)
    workdir.rename(tmp_path / name)
    assert rundir.check(tmp_path / name, config) == RESULT  # nothing is left to save


def test_a_link_to_itself(tmp_path, config):
    (tmp_path / 'link').symlink_to('link')
    assert rundir.check(tmp_path / 'link', config) is None
    refused('cannot write .*link: File exists', rundir.create, tmp_path / 'link', config)


def test_who_asks_whether_a_process_trains_is_not_taken_for_one(workdir):
    with rundir.lock(workdir):
        assert rundir.is_locked(workdir)
    asking = (workdir / '.lock').open()
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.1, asking.close).start()
    with rundir.lock(workdir):
        assert asking.closed


def test_one_process_at_a_time(workdir):
    script = f"""
from pathlib import Path
from flax_dlvc import rundir
from flax_dlvc.errors import ConfigError
try:
    with rundir.lock(Path({str(workdir)!r})):
        print('free')
except ConfigError as error:
    print(error)
"""

    def try_elsewhere():
        return subprocess.run([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True, check=True).stdout

    with rundir.lock(workdir):
        assert f'another process is training in {workdir}' in try_elsewhere()
    assert try_elsewhere() == 'free\n'


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    with pytest.raises(ConfigError, match=r'cannot be locked \(No locks available\)'), rundir.lock(tmp_path):
        pytest.fail('locked')


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path):
    path = tmp_path / 'picture.png'
    path.write_text('before')
    with pytest.raises(ZeroDivisionError), rundir.whole(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    assert [file.name for file in tmp_path.iterdir()] == ['picture.png']
    assert path.read_text() == 'before'


def test_two_processes_write_the_same_file_in_turn(tmp_path, monkeypatch):
    with rundir.whole(tmp_path / 'picture.png') as mine:
        mine.write_text('mine')
        monkeypatch.setattr('os.getpid', lambda: 0)
        with rundir.whole(tmp_path / 'picture.png') as theirs:
            theirs.write_text('theirs')
        assert (tmp_path / 'picture.png').read_text() == 'theirs'
    assert (tmp_path / 'picture.png').read_text() == 'mine'

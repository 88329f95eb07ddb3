"""`flax_dlvc.verify` on whole and on damaged run directories."""

import json
import re
import shutil

import pytest
from conftest import ROOT

from flax_dlvc import rundir, verify
from flax_dlvc.errors import ConfigError


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory, command, small_run_flags):
    workdir = tmp_path_factory.mktemp('verify') / 'run'
    done = command('main', '--config', ROOT / 'configs' / 'cnn.py', '--workdir', workdir, *small_run_flags)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_whole_run_is_ok(finished_run, command):
    done = command('verify', '--workdir', finished_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ''
    checked = [line.removesuffix(': ok') for line in done.stdout.splitlines()]
    assert checked == [
        'config.json',
        'dataset.json',
        'checkpoint of step 8',
        'checkpoint of step 12',
        'result.json',
        'metrics.jsonl',
    ]


def test_fields_that_are_newer_than_a_run_are_named(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / 'run')
    values = json.loads((workdir / 'config.json').read_text())
    del values['augment']['cutout'], values['max_rewinds']
    (workdir / 'config.json').write_text(json.dumps(values))
    assert next(verify.verify(workdir)) == ('config.json (with defaults of augment.cutout, max_rewinds)', None)


def test_a_run_that_is_going_on_is_not_called_damaged(finished_run):
    with (
        rundir.lock(finished_run),
        pytest.raises(ConfigError, match=r'a process is training in .* when the run has ended'),
    ):
        verify.main(['verify', '--workdir', str(finished_run)])


def change_result(workdir):
    result = json.loads((workdir / 'result.json').read_text())
    result['test']['accuracy'] = 0.125
    (workdir / 'result.json').write_text(json.dumps(result))


def cut_metrics(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    (workdir / 'metrics.jsonl').write_text('\n'.join(lines[:-1]))


def truncate_checkpoint(workdir, step='8'):
    for path in (workdir / 'checkpoints' / step / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])


def test_metrics_are_the_same_but_for_rounding():
    """Of 100 examples of each of two classes, one or two may be on the other side elsewhere; three are too many."""

    def metrics(right, cross_entropy=1.0):
        rows = [[right, 100 - right], [20, 80]]
        accuracies = {'accuracy': (right + 80) / 200, 'mean_class_accuracy': (right + 80) / 200}
        by_class = {'per_class_accuracy': [right / 100, 0.8], 'num_examples': 200}
        return accuracies | by_class | {'cross_entropy': cross_entropy, 'confusion_matrix': rows}

    def compare(said):
        said = {key: value for key, value in said.items() if key != 'confusion_matrix'}
        return verify._compare_result(said, metrics(70), 8)

    assert compare(metrics(70, 1.00005)) is None
    assert compare(metrics(68)) is None
    assert 'cross_entropy 1.0, not 1.001' in compare(metrics(70, 1.001))
    for key in ('accuracy', 'mean_class_accuracy', 'per_class_accuracy'):
        assert f'{key} ' in compare(metrics(67))
    assert 'num_examples 200, not 201' in compare(metrics(70) | {'num_examples': 201})


def test_a_metric_that_verify_does_not_know():
    """One that was added to `metrics.summarize`, or has gone from it."""
    test = {'num_examples': 20_000, 'confusion_matrix': [[10_000, 0], [0, 10_000]]}

    def compare(said, again):
        return verify._compare_result({'new': said}, test | {'new': again}, 8)

    for same in ((0.5, 0.50005), (1e6, 1e6 + 10), (3, 3), ([0.5, None], [0.5, None]), (None, None)):
        assert compare(*same) is None
    for other in ((0.5, 0.501), (3, 4), ([0.5], [0.6]), (0.5, [0.5]), (0.5, None), (None, 0.5)):
        assert compare(*other) == f'the checkpoint of step 8 gives new {other[1]}, not {other[0]}'
    assert verify._compare_result({'gone': 0.5}, test, 8) == 'the checkpoint of step 8 gives gone None, not 0.5'


def test_a_damaged_newest_checkpoint_says_nothing_of_the_history(finished_run, tmp_path, command_here):
    workdir = shutil.copytree(finished_run, tmp_path / 'run')
    truncate_checkpoint(workdir, '12')
    done = command_here('verify', '--workdir', workdir)
    assert done.returncode == 1
    assert 'the checkpoint of step 12 is damaged' in done.stdout
    assert 'metrics.jsonl' not in done.stdout


@pytest.mark.parametrize(
    ('damage', 'line'),
    [
        (change_result, r'result\.json: the checkpoint of step \d+ gives accuracy 0\.\d+, not 0\.125$'),
        (cut_metrics, r'metrics\.jsonl: it is not the history'),
        (truncate_checkpoint, 'checkpoint of step 8: '),
    ],
)
def test_what_is_wrong_is_named(finished_run, tmp_path, command_here, damage, line):
    workdir = shutil.copytree(finished_run, tmp_path / 'run')
    damage(workdir)
    done = command_here('verify', '--workdir', workdir)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [found for found in done.stdout.splitlines() if not found.endswith(': ok')]
    assert len(wrong) == 1, wrong
    assert re.match(line, wrong[0]), wrong
    assert done.stderr.count('\n') == 1

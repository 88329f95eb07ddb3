"""`flax_dlvc.verify` on whole and on damaged run directories, in real processes."""

import json
import re
import shutil

import pytest
from conftest import ROOT


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
        'checkpoint of step 8',
        'checkpoint of step 12',
        'result.json',
        'metrics.jsonl',
    ]


def change_result(workdir):
    result = json.loads((workdir / 'result.json').read_text())
    result['test']['accuracy'] = 0.125
    (workdir / 'result.json').write_text(json.dumps(result))


def cut_metrics(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    (workdir / 'metrics.jsonl').write_text('\n'.join(lines[:-1]))


def truncate_checkpoint(workdir):
    for path in (workdir / 'checkpoints' / '8' / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ('damage', 'line'),
    [
        (change_result, r'result\.json: the checkpoint of step \d+ gives accuracy 0\.\d+, not 0\.125$'),
        (cut_metrics, r'metrics\.jsonl: it is not the history'),
        (truncate_checkpoint, 'checkpoint of step 8: '),
    ],
)
def test_what_is_wrong_is_named(finished_run, tmp_path, command, damage, line):
    workdir = shutil.copytree(finished_run, tmp_path / 'run')
    damage(workdir)
    done = command('verify', '--workdir', workdir)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [found for found in done.stdout.splitlines() if not found.endswith(': ok')]
    assert len(wrong) == 1, wrong
    assert re.match(line, wrong[0]), wrong
    assert done.stderr.count('\n') == 1

"""`flax_dlvc.runs` on real small runs: finished, stopped, running, diverged, damaged."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from flax_dlvc import loop, rundir, runs
from flax_dlvc.errors import ConfigError, DivergedError

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, small_vit_config):
    """A finished run, one at another rate that a stop cut after two epochs, and one that diverged."""
    folder = tmp_path_factory.mktemp('runs')
    config = small_vit_config.copy_and_resolve_references()
    loop.run(config, folder / 'a')
    shutil.copytree(folder / 'a', folder / 'deeper' / 'b')
    config.learning_rate = 0.5
    rundir.write_text(folder / 'deeper' / 'b' / 'config.json', rundir.config_module.to_json(config))
    (folder / 'deeper' / 'b' / 'result.json').unlink()
    (folder / 'deeper' / 'b' / 'evaluation-test.json').unlink()
    rundir.write_history(folder / 'deeper' / 'b', rundir.read_history(folder / 'a')[:2])
    config.optimizer.name, config.learning_rate, config.optimizer.gradient_clip_norm = 'sgd', 1e30, 0.0
    with pytest.raises(DivergedError):
        loop.run(config, folder / 'c')
    return folder


@pytest.fixture
def records(folder, capsys):
    runs.main(['runs', str(folder), '--json'])
    return json.loads(capsys.readouterr().out)


def test_a_record_says_what_the_run_recorded(folder, records, small_vit_config):
    assert [(record['name'], record['state']) for record in records] == [
        ('a', 'finished'),
        ('c', 'diverged'),
        ('deeper/b', 'stopped'),
    ]
    history = rundir.read_history(folder / 'a')
    best = max(history, key=lambda line: line['validation_accuracy'])
    record = records[0]
    assert (record['best_validation_accuracy'], record['best_epoch']) == (best['validation_accuracy'], best['epoch'])
    assert record['test_accuracy'] == rundir.read_result(folder / 'a')['test']['accuracy']
    assert record['seconds'] == pytest.approx(sum(4 * 64 / line['images_per_second'] for line in history))
    assert record['config']['learning_rate'] == small_vit_config.learning_rate
    assert (records[2]['epochs_run'], records[2]['test_accuracy']) == (2, None)
    assert 'loss is' in records[1]['failure']


def test_the_best_epoch_is_the_one_that_the_run_chose(folder, tmp_path, capsys):
    """Here by the loss, of which the second is the least; without validation, the last."""
    workdir = shutil.copytree(folder / 'deeper' / 'b', tmp_path / 'b')
    config = rundir.read_config(workdir)
    config.early_stopping.metric = 'validation_loss'
    rundir.write_text(workdir / 'config.json', rundir.config_module.to_json(config))
    first, second = rundir.read_history(workdir)
    losses = {'validation_loss': 0.5, 'validation_accuracy': 0.25}
    rundir.write_history(workdir, [first | {'validation_loss': 0.75, 'validation_accuracy': 0.5}, second | losses])
    record = runs.describe(tmp_path, workdir)
    assert (record['best_epoch'], record['best_validation_accuracy']) == (2, 0.25)
    nothing = {'validation_loss': None, 'validation_accuracy': None}
    rundir.write_history(workdir, [first | nothing, second | nothing])
    record = runs.describe(tmp_path, workdir)
    assert (record['best_epoch'], record['best_validation_accuracy']) == (2, None)


def test_a_history_without_its_first_epochs_is_shown_as_far_as_it_goes(folder, tmp_path):
    workdir = shutil.copytree(folder / 'deeper' / 'b', tmp_path / 'b')
    rundir.write_history(workdir, [record | {'epoch': record['epoch'] + 3} for record in rundir.read_history(workdir)])
    assert runs.describe(tmp_path, workdir)['best_epoch'] in (4, 5)


def test_the_table_has_the_fields_that_differ_and_no_others(folder, capsys):
    runs.main(['runs', str(folder)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert 'learning_rate' in head
    assert 'optimizer.name' in head
    assert 'batch_size' not in head
    assert [row.split()[0] for row in rows] == ['a', 'c', 'deeper/b']
    assert rows[1].split()[-1] == 'diverged'


def test_sorting(folder, capsys):
    def order(column):
        runs.main(['runs', str(folder), '--json', '--sort', column])
        return [record['name'] for record in json.loads(capsys.readouterr().out)]

    assert order('learning_rate') == ['a', 'deeper/b', 'c']
    assert order('test_accuracy')[0] == 'a'
    assert order('best_validation_accuracy')[-1] == 'c'
    with pytest.raises(ConfigError, match="unknown column 'speed'"):
        order('speed')


def test_a_run_whose_lock_is_held_is_running(folder):
    def state():
        return runs.describe(folder, folder / 'c')['state']

    with rundir.lock(folder / 'c'):
        assert state() == 'running'
    assert state() == 'diverged'


def test_a_diverged_run_that_is_begun_again_has_diverged_no_more(folder, tmp_path):
    workdir = shutil.copytree(folder / 'c', tmp_path / 'c')
    rundir.remove_failure(workdir)
    assert runs.describe(tmp_path, workdir)['state'] == 'stopped'


def test_an_imported_model_has_the_test_accuracy_that_it_was_evaluated_to(folder, tmp_path):
    """Until it is trained on: then step 0 is not its best checkpoint any more."""
    for file in ('config.json', 'dataset.json'):
        shutil.copy(folder / 'a' / file, tmp_path)
    evaluation = rundir.read_test_evaluation(folder / 'a') | {'step': 0}
    rundir.write_evaluation(tmp_path, 'test', evaluation)
    assert runs.describe(tmp_path, tmp_path)['test_accuracy'] == evaluation['accuracy']
    shutil.copy(folder / 'a' / 'metrics.jsonl', tmp_path)
    assert runs.describe(tmp_path, tmp_path)['test_accuracy'] is None


@pytest.mark.parametrize(
    ('file', 'content'),
    [
        ('config.json', '{'),
        ('config.json', None),
        ('metrics.jsonl', '{"epoch": 1}\n'),
        ('metrics.jsonl', '[1, 2'),
        ('result.json', '{"test": 3}'),
        ('evaluation-test.json', '7'),
        ('metrics.jsonl', b'\xff\xfe'),
    ],
)
def test_a_damaged_run_is_a_row_and_the_others_go_on(folder, tmp_path, file, content, capsys):
    for name in 'ab':
        shutil.copytree(folder / 'a', tmp_path / name)
    path = tmp_path / 'a' / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    runs.main(['runs', str(tmp_path), '--json'])
    damaged, whole = json.loads(capsys.readouterr().out)
    assert damaged['state'].startswith('damaged: ')
    assert whole['state'] == 'finished'
    runs.main(['runs', str(tmp_path)])
    assert 'damaged: ' in capsys.readouterr().out


def test_compare_draws_and_names_what_differs(folder, tmp_path, capsys):
    out = tmp_path / 'both.png'
    runs.main(['runs', str(folder), '--compare', 'a', 'deeper/b', '--out', str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['learning_rate: 0.0003 | 0.5', f'curves: {out}']
    assert Image.open(out).size == (1500, 600)
    assert list(tmp_path.iterdir()) == [out]


def test_paths_are_compared_where_there_is_no_folder_of_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.main(['runs', '--compare', str(folder / 'a'), str(folder / 'deeper' / 'b')])
    assert capsys.readouterr().out.endswith('curves: comparison.png\n') and (tmp_path / 'comparison.png').exists()
    with pytest.raises(ConfigError, match=r'^runs is not a directory$'):
        runs.main(['runs'])


def test_compare_draws_a_line_per_run_and_split(folder):
    from flax_dlvc import figures, results

    compared = [results.read_run(folder, folder / 'a'), results.read_run(folder, folder / 'deeper' / 'b')]
    figure = figures.compare(compared)
    history = rundir.read_history(folder / 'a')
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].get_lines()}
    assert lines['validation, a'] == [line['validation_accuracy'] for line in history]
    named = [label for label in lines if not label.startswith('_')]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == named
    assert lines['train, deeper/b'] == [line['train_accuracy'] for line in history[:2]]
    figure = figures.compare([dataclasses.replace(run, name='_x') for run in compared])  # matplotlib hides such names
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ['train, _x', 'validation, _x'] * 2


@pytest.mark.parametrize(
    'arguments',
    [
        ['nowhere'],
        ['{folder}', '--sort', 'speed'],
        ['{folder}', '--compare', 'a', 'z'],
        ['{folder}', '--compare', 'c', 'c'],
        ['{folder}', '--compare', 'a', 'x' * 300],
        ['{folder}', '--compare', 'a', 'a', '--out', 'x.svg'],
        ['{folder}', '--compare', 'a', 'a', '--json'],
        ['{folder}', '--out', 'x.png'],
        ['{folder}', '--compare', 'a', 'a', '--out', '{folder}/no/x.png'],
    ],
)
def test_what_a_user_gets_wrong_is_one_line(folder, arguments):
    with pytest.raises(ConfigError) as error:
        runs.main(['runs', *(argument.format(folder=folder) for argument in arguments)])
    assert '\n' not in str(error.value)


def test_nothing_to_list(tmp_path, capsys):
    for arguments in ([], ['--sort', 'learning_rate']):
        runs.main(['runs', str(tmp_path), *arguments])
        assert capsys.readouterr().out == f'no run directories in {tmp_path}\n'


def test_the_command_exits_with_2_and_needs_no_jax(folder, command):
    done = command('runs', folder, '--sort', 'speed')
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)
    script = (
        f"import sys; from flax_dlvc import runs; runs.main(['runs', {str(folder)!r}]); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True, capture_output=True)

"""The study: the grid, the statistics, the tables rebuilt from run directories, the page, and real small studies."""

import contextlib
import csv
import html
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, read_history

from flax_dlvc import answers, page, rundir, study, tables
from flax_dlvc.errors import ConfigError

CLASSES = ['<b>zero</b>', 'one']
HOSTILE = '<script>document.title="run"</script> & | $x_1$'


def write_run(directory, name, seed, accuracy, **fields):
    """A finished run of two classes, as `main` leaves it, without checkpoints."""
    config = tables.base_config(name)
    config.seed = seed
    config.update_from_flattened_dict(fields)
    rundir.create(directory, config)
    record = {
        'step': 312,
        'train_loss': 0.5,
        'train_accuracy': 0.9,
        'validation_loss': 1.0,
        'validation_accuracy': accuracy,
        'learning_rate': 1e-3,
        'images_per_second': 400.0,
    }
    rundir.write_history(directory, [{'epoch': 1} | record, {'epoch': 2} | record | {'step': 624}])
    right = round(100 * accuracy)
    test = {
        'accuracy': right / 100,
        'mean_class_accuracy': right / 100,
        'cross_entropy': 2 - accuracy,
        'per_class_accuracy': [right / 100] * 2,
        'num_examples': 200,
    }
    confusion = [[right, 100 - right], [100 - right, right]]
    evaluation = {'confusion_matrix': confusion, 'expected_calibration_error': 0.1, 'class_names': CLASSES}
    rundir.write_evaluation(directory, 'test', test | evaluation)
    result = {'config_name': name, 'dataset': config.dataset, 'seed': seed, 'best_epoch': 2, 'epochs_run': 2}
    result |= {'stopped_early': True, 'num_parameters': 10, 'test': test, 'environment': {'jax': HOSTILE}}
    rundir.write_result(directory, result)


@pytest.fixture(scope='module')
def finished_study(tmp_path_factory):
    """Three seeds of three rows, one of a fourth, a gentler crop, and a run that failed."""
    directory = tmp_path_factory.mktemp('study')
    for name, accuracies in {
        'cnn': (0.70, 0.71, 0.74),
        'cnn_dropout': (0.80, 0.81, 0.83),
        'cnn_augment': (0.60, 0.62, 0.61),
        'cnn_dropout_augment': (0.66,),
    }.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(directory / name / f'seed_{seed}', name, seed, accuracy)
    for seed, accuracy in enumerate((0.70, 0.69)):
        cell = 'cnn_augment,augment.random_resized_crop_scale_min=0.5'
        scale = {'augment.random_resized_crop_scale': (0.5, 1.0)}
        write_run(directory / cell / f'seed_{seed}', 'cnn_augment', seed, accuracy, **scale)
    write_run(directory / 'vit' / 'seed_0', 'vit', 0, 0.5, num_epochs=8)
    failed = tables.base_config('vit_dropout')
    rundir.create(directory / 'vit_dropout' / 'seed_0', failed)
    rundir.write_failure(directory / 'vit_dropout' / 'seed_0', HOSTILE)
    study.write(directory)
    return directory


def read_csv(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_the_grid_is_models_by_regularizations_by_seeds(tmp_path):
    grid = study.plan(
        tmp_path,
        models=['cnn', 'vit'],
        regularizations=['none', 'dropout_augment'],
        seeds=2,
        overrides=['--config.dataset=digits'],
    )
    names = [planned.directory.relative_to(tmp_path).as_posix() for planned in grid]
    cells = ('cnn', 'cnn_dropout_augment', 'vit', 'vit_dropout_augment')
    assert names == [f'{cell}/seed_{seed}' for cell in cells for seed in (0, 1)]
    assert all(planned.config.dataset == 'digits' for planned in grid)
    assert [planned.config.seed for planned in grid] == [0, 1] * 4


def test_a_crop_axis_shares_the_files_own_value_and_spares_what_does_not_crop(tmp_path):
    grid = study.plan(
        tmp_path,
        models=['cnn'],
        regularizations=['none', 'augment'],
        seeds=1,
        vary=['augment.random_resized_crop_scale_min=0.08,0.5'],
    )
    assert {planned.cell: planned.config.augment.random_resized_crop_scale for planned in grid} == {
        'cnn': (0.08, 1.0),
        'cnn_augment': (0.08, 1.0),
        'cnn_augment,augment.random_resized_crop_scale_min=0.5': (0.5, 1.0),
    }


def test_an_axis_of_tuples_and_one_of_numbers(tmp_path):
    axes = ['augment.random_resized_crop_scale=(0.5,1.0),(0.25, 0.75)', 'learning_rate=0.01']
    grid = study.plan(tmp_path, models=['cnn'], regularizations=['augment'], seeds=1, vary=axes)
    scales = [planned.config.augment.random_resized_crop_scale for planned in grid]
    assert scales == [(0.5, 1.0), (0.25, 0.75)]
    assert {planned.config.learning_rate for planned in grid} == {0.01}


@pytest.mark.parametrize(
    'arguments',
    [
        ['--models', 'cnn,mlp'],
        ['--regularizations', 'some'],
        ['--seeds', '0'],
        ['--vary', 'learning_rate'],
        ['--vary', 'learning_rat=1,2'],
        ['--vary', 'augment.random_resized_crop_scale_min=x'],
        ['--vary', 'seed=1,2'],
        ['--config.seed=1'],
        ['--config.nothing=1'],
        ['--config.num_epochs=0'],
        ['--unknown'],
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_nothing_is_written(tmp_path, arguments):
    with pytest.raises(ConfigError) as error:
        study.main(['study', '--workdir', str(tmp_path / 'study'), *arguments])
    assert '\n' not in str(error.value).strip()
    assert not (tmp_path / 'study').exists()


def test_statistics_are_scipys_on_the_written_csv(finished_study):
    """Recomputed from runs.csv; compared with what table.csv says."""
    runs, rows = read_csv(finished_study / 'runs.csv'), read_csv(finished_study / 'table.csv')
    compared = 0
    for row in rows:
        for metric in ('accuracy', 'cross_entropy'):
            values = [
                float(run[f'test_{metric}'])
                for run in runs
                if run['run'].startswith(f'{row["cell"]}/') and run[f'test_{metric}']
            ]
            assert int(row['seeds']) == len(values)
            if len(values) < 2:
                assert row[f'{metric}_sd'] == row[f'{metric}_difference_low'] == ''
                continue
            assert float(row[f'{metric}_mean']) == pytest.approx(np.mean(values), rel=1e-12)
            assert float(row[f'{metric}_sd']) == pytest.approx(scipy.stats.tstd(values), rel=1e-9)
            if row[f'{metric}_report']:
                report = float(row[f'{metric}_report'])
                low, high = scipy.stats.ttest_1samp(values, report).confidence_interval(0.95)
                assert float(row[f'{metric}_difference_low']) == pytest.approx(low - report, rel=1e-9)
                assert float(row[f'{metric}_difference_high']) == pytest.approx(high - report, rel=1e-9)
                compared += 1
    assert compared == 8


def test_differences_of_means_are_welchs():
    left, right = [0.7, 0.74, 0.71, 0.69], [0.6, 0.66]
    expected = scipy.stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
    difference = tables.difference_of_means(left, right)
    assert difference.interval == pytest.approx(tuple(expected), rel=1e-9)
    assert tables.difference_of_means(left, [0.6]).interval is None
    assert tables.difference_of_means([0.5, 0.5], [0.25, 0.25]).interval == (0.25, 0.25)


def test_the_reports_figures_stand_beside_ours(finished_study):
    table = (finished_study / 'table.md').read_text()
    assert '| CNN | none | 3 | 71.67 ± 2.08 | 70.16 | +1.51 [-3.66, +6.68] |' in table
    assert '| CNN | dropout and augmentation | 1 | 66.00 | – | – |' in table
    assert 'num_epochs 8 (file: 30)' in table
    assert 'seed 0 failed' in table


def test_other_data_is_not_compared_with_the_report(tmp_path):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.9, dataset='digits')
    (cell,) = tables.group(tables.read_runs(tmp_path))
    assert cell.report is None and cell.note == 'one run'


def test_answers_say_what_the_runs_say(finished_study):
    text = (finished_study / 'answers.md').read_text()
    assert 'CNN, dropout, against none: +9.67 ' in text and ': better.' in text
    assert 'CNN, augmentation, against none: -10.67 ' in text and ': worse.' in text
    assert 'From 0.08 to 0.5: +8.50 ' in text
    assert f'against dropout alone: -15.33 points of accuracy (1 against 3 seeds): {answers.NOT_ENOUGH}' in text


def test_a_table_is_rebuilt_from_the_committed_files_alone(finished_study, tmp_path):
    names = ('config.json', 'metrics.jsonl', 'result.json', 'evaluation-test.json', 'failure.json')
    for path in finished_study.glob('*/seed_*/*'):
        if path.name in names:
            copy = tmp_path / path.relative_to(finished_study)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    written = [path for path in finished_study.rglob('*') if path.is_file() and 'seed_' not in str(path)]
    assert len(written) >= 12
    for path in written:
        assert (tmp_path / path.relative_to(finished_study)).read_bytes() == path.read_bytes(), path


def test_the_command_of_a_run_is_its_config(finished_study):
    from flax_dlvc.config import differing_fields, parse_command_line
    from flax_dlvc.main import define_flags

    for run in tables.read_runs(finished_study):
        words = shlex.split(page.command(run))[2:]
        assert differing_fields(parse_command_line(words, define_flags).config, run.config) == []


def test_hostile_text_is_shown_and_not_run(finished_study):
    text = (finished_study / 'report.html').read_text()
    assert text.count('<script>') == 1
    assert '&lt;script&gt;document.title=' in text
    assert '&lt;b&gt;zero&lt;/b&gt;' in text


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PROBE = """<script>addEventListener('load', () => {
const table = document.querySelector('table.sortable'), report = {title: document.title};
const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.key));
const button = table.tHead.rows[0].cells[3].querySelector('button');
const numbers = () => column().filter((x) => !isNaN(x));
button.click(); report.up = numbers();
button.click(); report.down = numbers();
report.fetched = performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith('data:'));
document.querySelectorAll('details').forEach((d) => { d.open = true; });
report.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
report.width = document.documentElement.clientWidth;
report.images = [...document.images].map((i) => i.complete && i.naturalWidth > 0);
document.documentElement.setAttribute('data-report', JSON.stringify(report));
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
@pytest.mark.parametrize('width', [400, 1200])
def test_the_page_in_a_browser(finished_study, tmp_path, width):
    """A frame of the wanted width, since a window has a least width."""
    text = (finished_study / 'report.html').read_text().replace('</body>', PROBE)
    (tmp_path / 'probe.html').write_text(text)
    relay = (
        f'<iframe src="probe.html" style="width:{width}px;height:800px;border:0"></iframe><script>onload = () => '
        'document.body.setAttribute("data-report", frames[0].document.documentElement.dataset.report)</script>'
    )
    (tmp_path / 'frame.html').write_text(f'<!doctype html><body style="margin:0">{relay}</body>')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', '--enable-logging=stderr']
    flags += [f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=5000', '--dump-dom']
    address = (tmp_path / 'frame.html').as_uri()
    done = subprocess.run([BROWSER, *flags, address], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-report="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    report = json.loads(html.unescape(found[1]))
    assert report['title'].startswith('CNN, ResNet18 and ViT')
    assert report['up'] == sorted(report['up']) and len(report['up']) == 6
    assert report['down'] == report['up'][::-1]
    assert report['fetched'] == []
    assert width - 20 <= report['width'] <= width  # less a scroll bar
    assert report['wide'] <= 0
    assert report['images'] and all(report['images'])
    assert 'CONSOLE' not in done.stderr


SMALL_STUDY = ['--models', 'cnn', '--regularizations', 'none,dropout', '--seeds', '2']


@pytest.fixture(scope='module')
def whole_study(tmp_path_factory, small_run_flags):
    """A study that is left alone, on a terminal: its directory, and the pictures of its live table."""
    directory = tmp_path_factory.mktemp('whole')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-m', 'flax_dlvc.study', '--workdir', directory, *SMALL_STUDY, *small_run_flags],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TERM': 'xterm', 'COLUMNS': '120', 'LINES': '40'},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown.decode())
    assert process.wait(timeout=60) == 0, text
    return directory, text


def test_a_terminal_shows_a_line_per_run(whole_study):
    """With epoch, best validation accuracy and the time left; in the end what the runs' files say."""
    directory, text = whole_study
    assert re.search(r'at most \d+ seconds left', text)
    assert re.search(r'cnn +│ 0 +│ running +│ [12]/3 +│ 0\.\d{4}', text)
    assert re.search(r'cnn_dropout +│ 1 +│ waiting +│ 0/3 +│ +│', text)
    last = text[text.rindex('best validation accuracy') :]
    for cell in ('cnn', 'cnn_dropout'):
        for seed in (0, 1):
            best = max(r['validation_accuracy'] for r in read_history(directory / cell / f'seed_{seed}'))
            assert re.search(rf'│ {cell} +│ {seed} +│ finished +│ 3/3 +│ {best:.4f} ', last), last
    assert '[1/4]' not in text


def test_parallel_runs_are_bit_for_bit_the_serial_ones(whole_study, command, small_run_flags, tmp_path):
    serial, _ = whole_study
    flags = ['--models', 'cnn', '--regularizations', 'none', '--seeds', 2, '--parallel-runs', 2, *small_run_flags]
    devices = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    done = command('study', '--workdir', tmp_path, *flags, **devices)
    assert done.returncode == 0, done.stderr
    assert '[2/2] cnn seed ' in done.stdout
    for seed in (0, 1):
        ours, theirs = tmp_path / 'cnn' / f'seed_{seed}', serial / 'cnn' / f'seed_{seed}'
        assert read_history(ours) == read_history(theirs)
        assert rundir.read_result(ours)['test'] == rundir.read_result(theirs)['test']


def test_a_dry_run_writes_nothing_and_knows_the_time(whole_study, small_run_flags, tmp_path, capsys):
    """Within a factor of ten of the runs' own speed: other work on the machine moves both."""
    serial, _ = whole_study
    arguments = ['study', '--workdir', str(tmp_path / 'study'), '--models', 'cnn', '--regularizations', 'none']
    study.main([*arguments, '--seeds', '2', *small_run_flags, '--config.num_epochs=300', '--dry-run'])
    shown = capsys.readouterr().out
    assert not (tmp_path / 'study').exists()
    assert 'cnn: 2 seeds, 0 finished' in shown
    milliseconds = float(re.search(r'(\d+) ms a step', shown)[1])
    speed = rundir.read_history(serial / 'cnn' / 'seed_1')[-1]['images_per_second']
    assert 0.1 < milliseconds / (1000 * 64 / speed) < 10
    # 4 steps an epoch and the validation split's 290 examples.
    expected = milliseconds / 1000 * (4 + 290 / 64 / 3) * 300 * 2
    number, unit = re.search(r'2 runs; at most ([\d.]+) (seconds|minutes|hours)', shown).groups()
    total = float(number) * {'seconds': 1, 'minutes': 60, 'hours': 3600}[unit]
    assert total == pytest.approx(expected, rel=0.25)


def test_a_study_that_is_killed_and_started_again_ends_with_the_same_table(
    whole_study, start, command, small_run_flags, tmp_path
):
    """Stopped by SIGTERM within its first run, then killed when that one is finished, then left alone."""
    flags = [*SMALL_STUDY, *small_run_flags]

    def wait_for(path):
        deadline = time.monotonic() + 240
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.exists(), process.communicate()

    process = start('study', '--workdir', tmp_path, *flags)
    wait_for(tmp_path / 'cnn' / 'seed_0' / 'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, process.communicate()
    process.communicate()
    process = start('study', '--workdir', tmp_path, *flags)
    wait_for(tmp_path / 'cnn' / 'seed_0' / 'result.json')
    process.kill()
    process.communicate()
    finished = (tmp_path / 'cnn' / 'seed_0' / 'result.json').stat().st_mtime_ns
    last = command('study', '--workdir', tmp_path, *flags)
    assert last.returncode == 0, last.stderr
    assert '[4/4] ' in last.stdout
    assert (tmp_path / 'cnn' / 'seed_0' / 'result.json').stat().st_mtime_ns == finished
    for name in ('table.md', 'table.csv', 'table.tex', 'answers.md'):
        assert (tmp_path / name).read_bytes() == (whole_study[0] / name).read_bytes()
    assert 'digits' in (tmp_path / 'table.md').read_text()


def test_runs_without_a_test_evaluation_are_tabled_without_it(tmp_path):
    """No confusion matrix and no calibration error: an empty field, not a crash."""
    for seed, accuracy in enumerate((0.70, 0.74)):
        write_run(tmp_path / 'cnn' / f'seed_{seed}', 'cnn', seed, accuracy)
        (tmp_path / 'cnn' / f'seed_{seed}' / 'evaluation-test.json').unlink()
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    (row,) = read_csv(tmp_path / 'table.csv')
    assert float(row['accuracy_mean']) == pytest.approx(0.72)
    assert {value for name, value in row.items() if 'calibration' in name} == {''}
    assert 'nan' not in (tmp_path / 'table.md').read_text()
    assert not list((tmp_path / 'figures').glob('confusion*'))
    assert (tmp_path / 'report.html').exists()


def test_a_run_that_diverges_is_reported_and_the_others_go_on(tmp_path, small_run_flags, capsys):
    from flax_dlvc.errors import CommandError

    vary = ['--vary', 'learning_rate=1e30,0.001', '--config.optimizer.name=sgd', '--config.num_epochs=1']
    arguments = ['study', '--workdir', str(tmp_path), '--models', 'cnn', '--regularizations', 'none', '--seeds', '1']
    with pytest.raises(CommandError, match='1 of 2 runs failed') as error:
        study.main([*arguments, *small_run_flags, *vary])
    assert error.value.exit_code == 1
    assert 'loss is nan' in (tmp_path / 'table.md').read_text()
    assert 'cnn seed 0 finished after epoch 1' in capsys.readouterr().out

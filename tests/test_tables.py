"""What is made of a study's run directories: statistics, tables, answers, figures and the page."""

import csv
import html
import json
import re
import shlex
import shutil
import subprocess
import types
import warnings

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flax_dlvc import answers, data, figures, page, results, rundir, study, tables
from flax_dlvc.board import Board
from flax_dlvc.errors import ConfigError
from flax_dlvc.grid import WRITABLE, Planned

CLASSES = ['<b>zero</b>', 'one']
HOSTILE = '<script>document.title="run"</script> & | $x_1$'


def write_run(directory, name, seed, accuracy, /, **fields):
    """A finished run of two classes, as `main` leaves it, without checkpoints."""
    config = results.base_config(name)
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
    failed = results.base_config('vit_dropout')
    rundir.create(directory / 'vit_dropout' / 'seed_0', failed)
    rundir.write_failure(directory / 'vit_dropout' / 'seed_0', HOSTILE, 1)
    study.write(directory)
    return directory


def read_csv(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


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
    difference = results.difference_of_means(left, right)
    assert difference.interval == pytest.approx(tuple(expected), rel=1e-9)
    assert results.difference_of_means(left, [0.6]).interval is None
    assert results.difference_of_means([0.5, 0.5], [0.25, 0.25]) == results.Difference(0.25, None)
    assert results.difference_to_constant([0.5, 0.5], 0.25) == results.Difference(0.25, None)
    assert results.difference_of_means([0.5, 0.5], [0.25, 0.3]).interval is not None


def test_the_reports_figures_stand_beside_ours(finished_study):
    table = (finished_study / 'table.md').read_text()
    assert '| CNN | none | 3 | 71.67 ± 2.08 | 70.16 | +1.51 [-3.66, +6.68] |' in table
    assert '| CNN | dropout and augmentation | 1 | 66.00 | – | – |' in table
    assert 'num_epochs 8 (file: 30)' in table
    assert 'seed 0 failed' in table


def test_other_data_is_not_compared_with_the_report(tmp_path):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.9, dataset='digits')
    (cell,) = results.group(results.read_runs(tmp_path))
    assert cell.report == {} and cell.note == 'one run'


def test_figures_of_folders_with_long_paths_have_names_of_their_own(tmp_path):
    folders = [f'folder:/{"data/" * 50}{name}/photos of whatever there was' for name in ('a', 'b')]
    for number, folder in enumerate(folders):
        write_run(tmp_path / f'cnn{number}' / 'seed_0', 'cnn', 0, 0.9, dataset=folder)
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    curves = sorted(path.name for path in (tmp_path / 'figures').glob('curves_cnn_*.png'))
    assert len(curves) == 2 and all('_photos of whatever there was_' in name for name in curves)


def test_what_splits_a_batch_otherwise_is_noted_and_repeated(tmp_path):
    for seed, parts in enumerate((1, 8)):
        write_run(
            tmp_path / 'cnn' / f'seed_{seed}', 'cnn', seed, 0.9, accumulate_steps=parts, keep_checkpoints=seed + 1
        )
    (cell,) = results.group(results.read_runs(tmp_path))
    assert cell.note == 'accumulate_steps 1, 8 (default: 1)'
    assert ['accumulate_steps=8' in page.command(run) for run in cell.runs] == [False, True]
    assert not any('keep_checkpoints' in page.command(run) for run in cell.runs)


def test_answers_say_what_the_runs_say(finished_study):
    text = (finished_study / 'answers.md').read_text()
    assert 'CNN, dropout, against none: +9.67 ' in text and ': better.' in text
    assert 'CNN, augmentation, against none: -10.67 ' in text and ': worse.' in text
    assert 'From 0.08 to 0.5: +8.50 ' in text
    assert f'against dropout alone: -15.33 points of accuracy (seeds: 1 against 3): {answers.NOT_ENOUGH}' in text


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
    from flax_dlvc.main import make_parser

    for run in results.read_runs(finished_study):
        words = shlex.split(page.command(run))[2:]
        assert differing_fields(parse_command_line(make_parser(), words)[1], run.config) == []


def test_hostile_text_is_shown_and_not_run(finished_study):
    text = (finished_study / 'report.html').read_text()
    assert text.count('<script>') == 1
    assert '&lt;script&gt;document.title=' in text
    assert '&lt;b&gt;zero&lt;/b&gt;' in text


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PROBE = """<script>addEventListener('load', () => {
const table = document.querySelector('table.sortable'), report = {title: document.title};
const keys = () => [...table.tBodies[0].rows].map((row) => row.cells[3].dataset.key);
const button = table.tHead.rows[0].cells[3].querySelector('button');
button.click(); report.up = keys();
button.click(); report.down = keys();
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
    numbers = [float(key) for key in report['up'][:6]]
    assert numbers == sorted(numbers) and [float(key) for key in report['down'][:6]] == numbers[::-1]
    assert set(report['up'][6:]) == set(report['down'][6:]) == {'–'}  # what is not known comes last, either way
    assert report['fetched'] == []
    assert width - 20 <= report['width'] <= width  # less a scroll bar
    assert report['wide'] <= 0
    assert report['images'] and all(report['images'])
    assert 'CONSOLE' not in done.stderr


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


def test_pictures_of_runs_that_are_gone_go_and_the_users_own_stay(tmp_path):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7)
    (tmp_path / 'figures').mkdir()
    for name in ('curves_vit.png', 'confusion_vit.svg', 'my_own.png', 'notes.txt'):
        (tmp_path / 'figures' / name).write_text('')
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    left = {path.name for path in (tmp_path / 'figures').iterdir()}
    assert {name for name in left if 'vit' in name or 'cnn' not in name} == {'my_own.png', 'notes.txt'}
    assert 'curves_cnn.png' in left


def test_a_study_without_validation_is_tabled(tmp_path):
    for seed in (0, 1):
        directory = tmp_path / 'cnn' / f'seed_{seed}'
        write_run(directory, 'cnn', seed, 0.7, **{'splits.validation': '', 'early_stopping.patience': 0})
        nothing = {'validation_loss': None, 'validation_accuracy': None}
        rundir.write_history(directory, [record | nothing for record in rundir.read_history(directory)])
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    assert '| 90.00 ± 0.00 | – | 70.00 ± 0.00 |' in (tmp_path / 'answers.md').read_text()
    table = (tmp_path / 'table.md').read_text()
    assert "| CNN | none, patience 0, validation '' | 2 |" in table
    assert "splits.validation '' (file: train[80%:])" in table
    assert 'chose or, where there was none, the last one, on the test split.' in table
    assert (tmp_path / 'figures' / 'curves_cnn.png').exists()
    planned = Planned('cnn', tables_config(tmp_path), tmp_path / 'cnn' / 'seed_0')
    Board([], 1).follow(planned)
    assert (planned.epochs, planned.best) == (2, None)


def tables_config(directory):
    return results.read_runs(directory)[0].config


def test_a_run_that_stopped_early_is_of_the_longer_row_too(tmp_path):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7)
    write_run(tmp_path / 'cnn' / 'seed_1', 'cnn', 1, 0.7, num_epochs=50)
    planned = Planned('cnn', tables_config(tmp_path), tmp_path / 'cnn' / 'seed_0')
    planned.config.num_epochs = 50
    study.carry_out([planned], 1)
    assert (planned.state, planned.epochs) == ('finished', 2)
    (cell,) = results.group(results.read_runs(tmp_path))
    assert [run.config.seed for run in cell.finished] == [0, 1]


def test_rows_are_sorted_by_number_and_say_how_many_seeds_a_mean_has(tmp_path):
    for rate in (0.1, 0.01, 1e-05):
        for seed in (0, 1):
            directory = tmp_path / f'cnn,learning_rate={rate}' / f'seed_{seed}'
            write_run(directory, 'cnn', seed, 0.7, learning_rate=rate)
    for name in ('cnn,learning_rate=0.01/seed_0', 'cnn,learning_rate=0.1/seed_0', 'cnn,learning_rate=0.1/seed_1'):
        (tmp_path / name / 'evaluation-test.json').unlink()
    cells = results.group(results.read_runs(tmp_path))
    assert [cell.config.learning_rate for cell in cells] == [1e-05, 0.01, 0.1]
    (column,) = (column for title, column in tables.COLUMNS if title.startswith('Calibration'))
    assert [column(cell) for cell in cells] == ['10.00 ± 0.00', '10.00 (1 of 2 seeds)', '–']
    assert [results.class_names([cell]) for cell in cells] == [CLASSES, CLASSES, ['0', '1']]


def test_an_evaluation_of_another_checkpoint_is_left_out(tmp_path):
    directory = tmp_path / 'cnn' / 'seed_0'
    write_run(directory, 'cnn', 0, 0.7)
    evaluation = rundir.read_test_evaluation(directory)
    for step, known in ((624, True), (312, False)):
        rundir.write_evaluation(directory, 'test', evaluation | {'step': step})
        (run,) = results.read_runs(tmp_path)
        assert bool(run.evaluation) == known and run.test['accuracy'] == 0.7


def shown_titles(figure):
    return [axes.get_title().split('\n')[:-1] for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize(
    ('field', 'value'),
    [('augment.random_resized_crop_scale', (0.5, 1.0)), ('augment.random_resized_crop_ratio', (0.5, 2.0))],
)
def test_a_crop_that_was_set_for_all_rows_is_no_difference_of_those_without_crops(tmp_path, field, value):
    for name in ('cnn', 'cnn_dropout', 'cnn_augment', 'cnn_dropout_augment'):
        for seed, accuracy in enumerate((0.7, 0.71)):
            write_run(tmp_path / name / f'seed_{seed}', name, seed, accuracy, **{field: value})
    study.write(tmp_path)
    text = (tmp_path / 'answers.md').read_text()
    assert 'has the same settings' not in text
    special = f'{field.split(".")[-1]} {results.plain(value)}'
    assert f'* CNN, augmentation, {special}, against none: ' in text and '* CNN, dropout, against none: ' in text
    assert f'* CNN, dropout and augmentation, {special}, against dropout alone: ' in text
    assert f'* CNN, dropout and augmentation, {special}, against augmentation alone: ' in text
    assert 'CNN, none | 2' in text and 'CNN, dropout | 2' in text
    for kind in ('curves', 'confusion'):
        assert (tmp_path / 'figures' / f'{kind}_cnn.png').exists()


def test_pictures_show_of_each_row_one_crop_and_say_what_is_special(finished_study, tmp_path):
    drawn = {stem: figure for stem, _, figure in figures._figures(study_cells(finished_study), finished_study)}
    rows = [['none'], ['dropout'], ['augmentation'], ['dropout', 'and augmentation']]
    assert shown_titles(drawn['curves_cnn']) == shown_titles(drawn['confusion_cnn']) == rows
    for rate in (0.1, 0.01):
        for scale in (0.08, 0.5):
            directory = tmp_path / f'cnn_augment,learning_rate={rate},scale={scale}' / 'seed_0'
            fields = {'learning_rate': rate, 'augment.random_resized_crop_scale': (scale, 1.0)}
            write_run(directory, 'cnn_augment', 0, 0.7, **fields)
    cells = study_cells(tmp_path)
    drawn = {stem: figure for stem, _, figure in figures._figures(cells, tmp_path)}
    rows = [['augmentation', 'learning_rate 0.01'], ['augmentation', 'learning_rate 0.1']]
    assert shown_titles(drawn['curves_cnn']) == shown_titles(drawn['confusion_cnn']) == rows
    titles = [f'CNN, augmentation, learning_rate {rate}' for rate in (0.01, 0.1)]
    assert [title for title, _ in answers.crop_scales(cells)] == titles
    (legend,) = drawn['crop_scale'].legends
    assert [text.get_text() for text in legend.get_texts()] == titles


@pytest.mark.parametrize('field', ['random_mirror', 'random_resized_crop'])
def test_rows_are_compared_by_what_their_runs_had(tmp_path, field):
    """Not by what differs from their config files, which differ in this field themselves."""
    for name in ('cnn', 'cnn_dropout', 'cnn_augment', 'cnn_dropout_augment'):
        for seed, accuracy in enumerate((0.7, 0.71)):
            write_run(tmp_path / name / f'seed_{seed}', name, seed, accuracy, **{f'augment.{field}': False})
    text = answers.to_answers(study_cells(tmp_path))
    assert 'has the same settings' not in text and 'interval needs' not in text
    assert f'* CNN, augmentation, {field} False, against none: ' in text
    assert f'* CNN, dropout and augmentation, {field} False, against augmentation alone: ' in text


def test_rows_of_other_settings_are_not_compared_whatever_their_files_are_called(tmp_path):
    """A file's own learning rate may be the default one, which the package's file of that model is not."""
    write_run(tmp_path / 'vit' / 'seed_0', 'vit', 0, 0.6)
    write_run(tmp_path / 'mine' / 'seed_0', 'vit_dropout', 0, 0.6, name='mine', learning_rate=1e-3)
    text = answers.to_answers(study_cells(tmp_path))
    assert '* ViT, dropout, learning_rate 0.001: no row without regularisation has the same settings' in text
    write_run(tmp_path / 'vit,learning_rate=0.001' / 'seed_0', 'vit', 0, 0.6, learning_rate=1e-3)
    assert '* ViT, dropout, learning_rate 0.001, against none: ' in answers.to_answers(study_cells(tmp_path))


def test_a_config_file_of_ones_own_is_of_the_series_that_it_fits(tmp_path):
    scale = {'augment.random_resized_crop_scale': (0.5, 1.0)}
    for seed, accuracy in enumerate((0.7, 0.71)):
        write_run(tmp_path / 'cnn_augment' / f'seed_{seed}', 'cnn_augment', seed, accuracy)
        write_run(tmp_path / 'cnn_gentle' / f'seed_{seed}', 'cnn_augment', seed, accuracy, name='cnn_gentle', **scale)
    text = answers.to_answers(study_cells(tmp_path))
    assert '* CNN, augmentation; test accuracy by the lowest area of a crop: 0.08: ' in text
    assert 'From 0.08 to 0.5: ' in text and 'no two rows' not in text


def test_a_row_shows_no_field_that_its_model_does_not_take(tmp_path):
    for name in results.MODELS:
        write_run(tmp_path / name / 'seed_0', name, 0, 0.7, **{'model.num_layers': 4})
    titles = ['ResNet18, none', 'CNN, none', 'ViT, none, num_layers 4']
    assert [cell.title for cell in study_cells(tmp_path)] == titles


def test_a_copy_of_a_run_does_not_count(finished_study, tmp_path):
    shutil.copytree(finished_study / 'cnn', tmp_path / 'cnn')
    shutil.copytree(tmp_path / 'cnn' / 'seed_0', tmp_path / 'cnn' / 'seed_0_backup')
    (cell,) = study_cells(tmp_path)
    assert [run.config.seed for run in cell.runs] == [0, 1, 2]
    shutil.copytree(tmp_path / 'cnn' / 'seed_0', tmp_path / 'cnn' / 'seed_3')
    with pytest.raises(ConfigError, match=r'cnn/seed_3 holds a run of seed 0, .*call it seed_0, or move it'):
        study_cells(tmp_path)


def test_a_row_names_a_field_so_that_it_is_no_other(tmp_path):
    fields = {'optimizer.name': 'sgd', 'optimizer.momentum': 0.5, 'schedule.name': 'cosine'}
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7, **fields)
    (cell,) = study_cells(tmp_path)
    assert cell.title == 'CNN, none, momentum 0.5, optimizer.name sgd, schedule.name cosine'
    assert list(map(results.short, ('name', 'seed', 'splits.test'))) == ['name', 'seed', 'test']


def study_cells(directory):
    return results.group(results.read_runs(directory))


@pytest.mark.parametrize('shape', [(8, 8, 3), (8, 12, 1)])
def test_the_strip_of_augmentations_shows_whole_images(tmp_path, monkeypatch, shape):
    random = np.random.default_rng(0)
    split = data.Split(random.integers(0, 256, (6, *shape), dtype=np.uint8), np.array([1, 0, 1, 2, 0, 1]))
    monkeypatch.setattr(data, 'load', lambda _: types.SimpleNamespace(train=split))
    figures.save_examples(results.base_config('cnn'), tmp_path / 'examples.png')
    figure = figures.augmentation(tmp_path / 'examples.png', [0.5])
    shown = np.stack([axes.images[0].get_array() for axes in figure.axes[:3]])
    np.testing.assert_allclose(shown, np.broadcast_to(split.images[[0, 1, 3]], (3, *shape[:2], 3)) / 255, atol=1e-6)


def test_runs_of_other_classes_are_in_no_table_together(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / 'cnn' / f'seed_{seed}', 'cnn', seed, 0.7, dataset='folder:own')
    result = rundir.read_result(tmp_path / 'cnn' / 'seed_1')
    result['test']['per_class_accuracy'] = [0.7, 0.7, 0.7]
    rundir.write_result(tmp_path / 'cnn' / 'seed_1', result)
    expected = 'folder:own had other classes in cnn/seed_1 than in cnn/seed_0'
    with pytest.raises(ConfigError, match=expected):
        study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    write_run(tmp_path / 'cnn' / 'seed_1', 'cnn', 1, 0.7, dataset='folder:own')
    evaluation = rundir.read_test_evaluation(tmp_path / 'cnn' / 'seed_1')
    rundir.write_evaluation(tmp_path / 'cnn' / 'seed_1', 'test', evaluation | {'class_names': ['one', 'two']})
    with pytest.raises(ConfigError, match=expected):
        study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    (tmp_path / 'cnn' / 'seed_1' / 'evaluation-test.json').unlink()  # names that are not known are no others
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])


def test_the_legend_of_crop_scales_is_inside_of_the_picture(tmp_path):
    for rate in (0.1, 0.01):
        for scale in (0.08, 0.5):
            fields = {'learning_rate': rate, 'augment.random_resized_crop_scale': (scale, 1.0)}
            fields |= {'optimizer.gradient_clip_norm': 1.0, 'schedule.name': 'cosine', 'label_smoothing': 0.1}
            directory = tmp_path / f'cnn_dropout_augment,{rate},{scale}' / 'seed_0'
            write_run(directory, 'cnn_dropout_augment', 0, 0.7, **fields)
    drawn = {stem: figure for stem, _, figure in figures._figures(study_cells(tmp_path), tmp_path)}
    figure = drawn['crop_scale']
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # as of a layout that has no room
        FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.axes[0].get_window_extent().y0


def test_the_strip_of_images_says_of_which_dataset_and_is_drawn_anew_for_another_one(finished_study, tmp_path):
    config = results.read_runs(finished_study)[0].config
    config.dataset = 'digits'
    assert figures.dataset_of_examples(tmp_path / 'examples.png') == ''
    figures.save_examples(config, tmp_path / 'examples.png')
    assert figures.dataset_of_examples(tmp_path / 'examples.png') == 'digits'
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7)
    captions = dict(figures.draw_all(study_cells(tmp_path), tmp_path))
    assert captions['augmentation'].startswith('What augmentation does to a few training images of digits, by')

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, 'save_examples', lambda config, path: seen.append(config.dataset))
        for dataset in ('digits', 'folder:own'):
            config.dataset = dataset
            study.write(tmp_path, config)
    assert seen == ['folder:own']


def test_rebuild_goes_alone_and_says_what_it_wrote(tmp_path, capsys):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7)
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    assert capsys.readouterr().out.startswith(f'written: {tmp_path}/report.html, table.md, ')
    for flags, named in (
        (['--seeds=2'], '--seeds=2'),
        (['--models=cnn', '--config.num_epochs=1'], '--models=cnn --config.num_epochs=1'),
        (['--parallel-runs', '2', '--dry-run'], '--parallel-runs --dry-run'),
        (['--seeds', '3'], '--seeds'),  # as it is by default
    ):
        with pytest.raises(ConfigError, match=rf'^--rebuild takes all runs .* goes without {re.escape(named)}$'):
            study.main(['study', '--workdir', str(tmp_path), '--rebuild', *flags])


def test_where_nothing_is_finished_no_table_is_empty(tmp_path):
    rundir.create(tmp_path / 'cnn' / 'seed_0', results.base_config('cnn'))
    study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    for name in ('table.md', 'answers.md'):
        lines = (tmp_path / name).read_text().splitlines()
        rules = [place for place, line in enumerate(lines) if line.startswith('| --- |')]
        assert all(lines[place + 1].startswith('|') for place in rules), name
    page_text = (tmp_path / 'report.html').read_text()
    assert 'here are 0 finished runs.' in page_text and 'Accuracy by class' not in page_text


def test_runs_of_other_images_are_in_no_table_together(tmp_path):
    def write(seed, splits, num_train, mean):
        name = f'cnn,splits.train={splits.translate(WRITABLE)}/seed_{seed}'
        write_run(tmp_path / name, 'cnn', seed, 0.7, **{'dataset': 'folder:own', 'splits.train': splits})
        sizes = {'train': num_train, 'validation': 10, 'test': 12}
        described = {'name': 'folder:own', 'class_names': CLASSES, 'image_shape': [8, 8, 1], 'num_examples': sizes}
        rundir.write_text(tmp_path / name / 'dataset.json', json.dumps(described | {'mean': [mean], 'std': [0.25]}))

    write(0, 'train[:80%]', 38, 0.5)
    write(1, 'train[:80%]', 38, 0.5 + 1e-12)
    write(0, 'train[:40%]', 19, 0.51)  # less of the same
    study_tables = tables.to_markdown(study_cells(tmp_path))
    assert '| CNN | none | 2 |' in study_tables and '| CNN | none, train train[:40%] | 1 |' in study_tables
    for num_train, mean in ((166, 0.5), (38, 0.6)):
        write(2, 'train[:80%]', num_train, mean)
        with pytest.raises(ConfigError, match=r'other images in cnn.*/seed_2 than in cnn.*/seed_0; a study has one'):
            tables.to_markdown(study_cells(tmp_path))


def test_what_cannot_be_compared_is_said(tmp_path):
    write_run(tmp_path / 'cnn' / 'seed_0', 'cnn', 0, 0.7)
    write_run(tmp_path / 'cnn_augment' / 'seed_0', 'cnn_augment', 0, 0.6, num_epochs=8)
    write_run(tmp_path / 'cnn_dropout_augment' / 'seed_0', 'cnn_dropout_augment', 0, 0.6)
    text = answers.to_answers(results.group(results.read_runs(tmp_path)))
    missing = f'has the same settings, {answers.NOT_ENOUGH}.'
    assert f'* CNN, augmentation, num_epochs 8: no row without regularisation {missing}' in text
    assert f'* CNN, dropout and augmentation: no row with dropout alone {missing}' in text
    assert f'* CNN, dropout and augmentation: no row with augmentation alone {missing}' in text
    assert f'* CNN: no two rows differ in the lowest area of a crop alone, {answers.NOT_ENOUGH}.' in text


def test_a_model_of_which_nothing_is_finished_is_named(tmp_path):
    for name in ('cnn', 'cnn_augment'):
        write_run(tmp_path / name / 'seed_0', name, 0, 0.7)
    for name in ('vit', 'vit_augment'):
        rundir.create(tmp_path / name / 'seed_0', results.base_config(name))
    missing = f': no two rows differ in the lowest area of a crop alone, {answers.NOT_ENOUGH}.'
    assert f'* CNN, ViT{missing}' in answers.to_answers(study_cells(tmp_path))
    for name in ('cnn', 'cnn_augment'):
        (tmp_path / name / 'seed_0' / 'result.json').unlink()
    text = answers.to_answers(study_cells(tmp_path))
    assert f'* CNN, ViT{missing}' in text and f'No run is finished: {answers.NOT_ENOUGH}.' in text
    gentle = results.base_config('cnn_augment')
    gentle.augment.random_resized_crop_scale = (0.5, 1.0)
    rundir.create(tmp_path / 'cnn_gentle' / 'seed_0', gentle)
    assert answers.to_answers(study_cells(tmp_path)) == text


def test_nothing_in_a_name_is_markup():
    name = r'\a_b_ *c* `d` <e> |f [g](h) &amp; _i_'
    escaped = tables.escape_markdown(name)
    assert escaped == r'\\a_b\_ \*c\* \`d\` \<e\> \|f [g]\(h) \&amp; \_i\_'


def test_a_name_is_shown_as_it_is_in_both_renderings(tmp_path):
    name = r'{0} \a_b_ *c* `d` <e> |f'
    for lowest in (0.08, 0.5):
        fields = {'augment.random_resized_crop_scale': (lowest, 1.0), 'dataset': name, 'splits.test': name}
        write_run(tmp_path / f'cnn_augment,{lowest}' / 'seed_0', 'cnn_augment', 0, 0.7, **fields)
    cells = study_cells(tmp_path)
    text, escaped = answers.to_answers(cells), tables.escape_markdown(name)
    shown = [page._shown(block) for block in answers.to_blocks(cells)]
    crops = 'Does a gentler crop rescue augmentation?'
    series = 'test accuracy by the lowest area of a crop: 0.08: 70.00 %, 0.5: 70.00 %.'
    assert f'\n\n## {crops} ({escaped})\n\n* CNN, augmentation, test {escaped}; {series}\n  * From 0.08' in text
    assert [('heading', f'{crops} ({name})'), ('item', f'CNN, augmentation, test {name}; {series}')] == shown[6:8]
    assert f'| CNN, augmentation, test {escaped} | 1 |' in text
    assert shown[2][1][1][:2] == [f'CNN, augmentation, test {name}', '1']
    assert answers.NOT_ENOUGH in text and not any('**' in str(content) for _, content in shown)


def test_pictures_of_runs_that_are_gone_go_too(finished_study, tmp_path):
    shutil.copytree(finished_study, tmp_path / 'study')
    directory = tmp_path / 'study' / 'figures'
    study.write(tmp_path / 'study')
    before = {path.name for path in directory.iterdir()}
    assert {'curves_cnn.png', 'curves_vit.svg'} < before
    (directory / 'mine.txt').write_text('kept')
    shutil.rmtree(tmp_path / 'study' / 'vit')
    study.write(tmp_path / 'study')
    gone = {name for name in before if '_vit.' in name}
    assert {path.name for path in directory.iterdir()} == before - gone | {'mine.txt'}


def test_the_strip_of_a_dataset_that_is_gone_is_left_out(finished_study, tmp_path):
    shutil.copytree(finished_study, tmp_path / 'study')
    config = results.base_config('cnn')
    config.dataset = 'folder:/nowhere'
    study.write(tmp_path / 'study', config)
    assert not list(tmp_path.glob('study/figures/augmentation.*'))
    assert (tmp_path / 'study' / 'report.html').exists()

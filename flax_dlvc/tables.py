"""From run directories to statistics and tables; reads nothing else, so that they can be rebuilt anywhere.

A study is a directory of `CELL/seed_N` run directories. A cell is a setting that was run with one or more seeds.
"""

import csv
import dataclasses
import importlib
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import default
from flax_dlvc import rundir
from flax_dlvc.config import differing_fields, flatten
from flax_dlvc.errors import ConfigError

MODELS = {'resnet18': 'ResNet18', 'cnn': 'CNN', 'vit': 'ViT'}
REGULARIZATIONS = {
    'none': 'none',
    'dropout': 'dropout',
    'augment': 'augmentation',
    'dropout_augment': 'dropout and augmentation',
}

# The report's Table 1: accuracy (fraction) and cross-entropy (nats) on CIFAR-10's test images, one run each.
REPORT = {
    ('resnet18', 'none'): (0.7167, 1.51),
    ('resnet18', 'dropout'): (0.7069, 1.37),
    ('resnet18', 'augment'): (0.5977, 2.36),
    ('cnn', 'none'): (0.7016, 1.17),
    ('cnn', 'dropout'): (0.7167, 0.85),
    ('cnn', 'augment'): (0.5963, 1.49),
    ('vit', 'none'): (0.6349, 1.27),
    ('vit', 'dropout'): (0.6398, 1.23),
    ('vit', 'augment'): (0.561, 1.34),
}
CROP_SCALE = 'augment.random_resized_crop_scale'


# Statistics


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of means and its 95 % confidence interval, None where there are too few runs to have one."""

    value: float
    interval: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference_to_constant(values: Sequence[float], constant: float) -> Difference:
    """Mean of the values minus a constant, with Student's interval on n - 1 degrees of freedom."""
    value = statistics.fmean(values) - constant
    if len(values) < 2:
        return Difference(value, None)
    return Difference(value, _interval(value, statistics.variance(values) / len(values), len(values) - 1))


def difference_of_means(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Mean of `left` minus mean of `right`, with Welch's interval (Welch 1947), which lets the variances differ."""
    value = statistics.fmean(left) - statistics.fmean(right)
    if min(len(left), len(right)) < 2:
        return Difference(value, None)
    a, b = statistics.variance(left) / len(left), statistics.variance(right) / len(right)
    degrees = (a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1)) if a + b else 1
    return Difference(value, _interval(value, a + b, degrees))


def _interval(value: float, squared_error: float, degrees: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    margin = float(stdtrit(degrees, 0.975)) * math.sqrt(squared_error)
    return value - margin, value + margin


# Runs and cells


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as it was found; `result` is None while the run is not finished."""

    name: str  # the directory below the study's
    config: ConfigDict
    history: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None
    evaluation: dict[str, Any]  # evaluation-test.json; empty where there is none
    failure: str

    @property
    def test(self) -> dict[str, Any]:
        """All that is known of the test split."""
        return self.evaluation | (self.result or {}).get('test', {})

    @cached_property
    def epoch_seconds(self) -> list[float]:
        """Time that the training steps of each epoch take, by its images/s; epochs without one are left out."""
        seconds, previous = [], 0
        for record in self.history:
            if record['images_per_second'] > 0:
                seconds.append((record['step'] - previous) * self.config.batch_size / record['images_per_second'])
            previous = record['step']
        return seconds

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median time that an epoch's training steps take."""
        return statistics.median(self.epoch_seconds) if self.epoch_seconds else None


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one setting, which differ in their seeds alone.

    `settings` are the fields that differ from the config file, with its value behind ours.
    """

    name: str
    model: str
    regularization: str
    settings: dict[str, tuple[Any, Any]]
    runs: tuple[Run, ...]

    @property
    def config(self) -> ConfigDict:
        """That of the first run."""
        return self.runs[0].config

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.config.dataset

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that have a result."""
        return [run for run in self.runs if run.result]

    def values(self, metric: str) -> list[float]:
        """A metric of the test split by finished run, where it was recorded."""
        return [run.test[metric] for run in self.finished if run.test.get(metric) is not None]

    @property
    def report(self) -> tuple[float, float] | None:
        """The report's accuracy and cross-entropy, where it has them and they are of the same data."""
        return REPORT.get((self.model, self.regularization)) if self.dataset == 'cifar10' else None

    @property
    def variant(self) -> str:
        """The regularisation, and what else is special."""
        special = ''.join(f', {field.split(".")[-1]} {_plain(ours)}' for field, (ours, _) in self.settings.items())
        return REGULARIZATIONS[self.regularization] + special

    @property
    def title(self) -> str:
        """Model, regularisation and what else is special, for people."""
        return f'{model_title(self.model)}, {self.variant}'

    @property
    def note(self) -> str:
        """What was reduced or changed, and what is missing."""
        notes = [f'{field} {_plain(ours)} (file: {_plain(theirs)})' for field, (ours, theirs) in self.settings.items()]
        if len(self.finished) == 1:
            notes.append('one run')
        for run in self.runs:
            if run.failure:
                notes.append(f'seed {run.config.seed} failed: {run.failure}')
            elif not run.result:
                notes.append(f'seed {run.config.seed} not finished, {len(run.history)} epochs')
        return '; '.join(notes)


def model_title(model: str) -> str:
    """A model for people; those that are not the report's have no title but their name."""
    return MODELS.get(model, model)


def _plain(value: Any) -> str:
    return '-'.join(f'{item:g}' for item in value) if isinstance(value, tuple) else str(value)


def read_runs(directory: Path) -> list[Run]:
    """Every run of a study, sorted by name.

    Raises:
        ConfigError: one of them is damaged.
    """
    return [read_run(directory, path.parent) for path in sorted(directory.glob('*/seed_*/config.json'))]


def read_run(directory: Path, workdir: Path) -> Run:
    """Reads the run in `workdir`, which lies below the study's `directory`."""
    result, history = rundir.read_result(workdir), rundir.read_history(workdir)
    if result and not 0 < result['best_epoch'] <= len(history):
        raise ConfigError(f'{workdir} lacks the best epoch of its result in metrics.jsonl; is a file damaged?')
    return Run(
        name=workdir.relative_to(directory).as_posix(),
        config=rundir.read_config(workdir),
        history=history,
        result=result,
        evaluation=rundir.read_test_evaluation(workdir),
        failure='' if result else rundir.read_failure(workdir),
    )


def group(runs: Iterable[Run]) -> list[Cell]:
    """Puts runs that differ in nothing but their seed into one cell; sorted as the report's table is."""
    groups: list[list[Run]] = []
    for run in runs:
        for members in groups:
            same_cell = run.name.split('/')[0] == members[0].name.split('/')[0]
            if same_cell and set(differing_fields(run.config, members[0].config)) <= {'seed'}:
                members.append(run)
                break
        else:
            groups.append([run])
    return sorted((_cell(members) for members in groups), key=_order)


def _cell(runs: list[Run]) -> Cell:
    config = runs[0].config
    model = config.model.name
    augmented = config.augment.random_resized_crop or config.augment.random_mirror
    by_fields = '_'.join(['dropout'] * (config.dropout_rate > 0) + ['augment'] * augmented) or 'none'
    by_name = {config_name(model, regularization): regularization for regularization in REGULARIZATIONS}
    base = base_config(config.name) if config.name in by_name else default.get_config()
    ours, theirs = flatten(config), flatten(base)
    ignored = ('name', 'seed', 'dataset', 'model.name')
    return Cell(
        name=runs[0].name.split('/')[0],
        model=model,
        regularization=by_name.get(config.name, by_fields),
        settings={f: (ours[f], theirs[f]) for f in differing_fields(config, base) if f not in ignored},
        runs=tuple(sorted(runs, key=lambda run: run.config.seed)),
    )


def _order(cell: Cell) -> tuple[Any, ...]:
    models = [*MODELS, cell.model]  # others come last
    return (
        cell.dataset,
        models.index(cell.model),
        list(REGULARIZATIONS).index(cell.regularization),
        len(cell.settings),
        [(field, str(ours)) for field, (ours, _) in cell.settings.items()],
    )


def config_name(model: str, regularization: str) -> str:
    """The config file's stem of a cell."""
    return model if regularization == 'none' else f'{model}_{regularization}'


def base_config(name: str) -> ConfigDict:
    """What a config file of the package says."""
    config = importlib.import_module(f'configs.{name}').get_config()
    config.name = name
    return config


# Tables

Column = tuple[str, Callable[[Cell], str]]


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in percent."""
    return '–' if value is None else f'{100 * value:.{digits}f}'


def mean_and_deviation(values: Sequence[float], form: Callable[[float], str]) -> str:
    """'mean ± standard deviation'; the mean alone of a single run."""
    if not values:
        return '–'
    sd = deviation(values)
    return form(statistics.fmean(values)) + ('' if sd is None else f' ± {form(sd)}')


def signed(difference: Difference, scale: float = 1.0) -> str:
    """'+1.23 [0.45, 2.01]'; without the interval where there is none."""
    text = f'{scale * difference.value:+.2f}'
    if difference.interval is None:
        return text
    low, high = difference.interval
    return f'{text} [{scale * low:+.2f}, {scale * high:+.2f}]'


def _nats(value: float) -> str:
    return f'{value:.3f}'


def _to_report(cell: Cell, metric: str, place: int, scale: float) -> str:
    values = cell.values(metric)
    return signed(difference_to_constant(values, cell.report[place]), scale) if values and cell.report else '–'


COLUMNS: tuple[Column, ...] = (
    ('Model', lambda cell: model_title(cell.model)),
    ('Regularisation', lambda cell: cell.variant),
    ('Seeds', lambda cell: str(len(cell.finished))),
    ('Accuracy (%)', lambda cell: mean_and_deviation(cell.values('accuracy'), percent)),
    ('Report (%)', lambda cell: percent(cell.report[0]) if cell.report else '–'),
    ('Difference [95 % CI]', lambda cell: _to_report(cell, 'accuracy', 0, 100)),
    ('Cross-entropy (nats)', lambda cell: mean_and_deviation(cell.values('cross_entropy'), _nats)),
    ('Report (nats)', lambda cell: f'{cell.report[1]:.2f}' if cell.report else '–'),
    ('Difference [95 % CI] ', lambda cell: _to_report(cell, 'cross_entropy', 1, 1)),
    ('Calibration error (%)', lambda cell: mean_and_deviation(cell.values('expected_calibration_error'), percent)),
    ('Best epoch', lambda cell: best_epochs(cell)),
    ('Notes', lambda cell: cell.note),
)


def best_epochs(cell: Cell) -> str:
    """Of each finished run."""
    return ', '.join(str(run.result['best_epoch']) for run in cell.finished if run.result) or '–'


def class_names(cells: Sequence[Cell]) -> list[str]:
    """The names of the classes, or their numbers where no run recorded them."""
    for cell in cells:
        for run in cell.finished:
            return run.evaluation.get('class_names') or list(map(str, range(len(run.test['per_class_accuracy']))))
    return []


def per_class(cell: Cell) -> list[float | None]:
    """Accuracy of each class, averaged over the finished runs."""
    by_run = [run.test['per_class_accuracy'] for run in cell.finished]
    return [None if None in values else statistics.fmean(values) for values in zip(*by_run, strict=True)]


def datasets(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by dataset: no table mixes two."""
    return {name: [cell for cell in cells if cell.dataset == name] for name in sorted({c.dataset for c in cells})}


CAPTION = (
    'Means ± standard deviations over seeds, of the checkpoint that validation chose, on the test split. The interval '
    'is that of Student’s t over seeds, with the report’s single run taken as a constant; of one seed there is none.'
)


def to_markdown(cells: Sequence[Cell]) -> str:
    """table.md."""
    text = ''
    for dataset, members in datasets(cells).items():
        rows = [[column(cell) for _, column in COLUMNS] for cell in members]
        text += f'## {escape_markdown(dataset)}\n\n{CAPTION}\n\n' + markdown([title for title, _ in COLUMNS], rows)
        named = [[cell.title, *(percent(a, 1) for a in per_class(cell))] for cell in members if cell.finished]
        text += '\nAccuracy by class (%), averaged over seeds:\n\n' + markdown(['', *class_names(members)], named)
    return text or 'No runs yet.\n'


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(head), ['---'] * len(head), *rows]
    escaped = ([cell if cell == '---' else escape_markdown(cell.strip()) for cell in line] for line in lines)
    return ''.join(f'| {" | ".join(line)} |\n' for line in escaped)


def escape_markdown(text: str) -> str:
    """Text of which nothing is taken for markup, in one line."""
    for character in '\\`*<>|':
        text = text.replace(character, f'\\{character}')
    return ' '.join(text.split())


_TEX = {character: f'\\{character}' for character in '&%$#_{}'} | {
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '±': r'$\pm$',
    '–': '--',
    '’': "'",
    '<': r'\textless{}',
    '>': r'\textgreater{}',
}


def _escape_tex(text: str) -> str:
    return ''.join(_TEX.get(character, character) for character in text.strip())


def to_tex(cells: Sequence[Cell]) -> str:
    """table.tex: a `tabular` for each dataset; needs the package booktabs."""
    text = ''
    for dataset, members in datasets(cells).items():
        lines = [[title for title, _ in COLUMNS], *([column(cell) for _, column in COLUMNS] for cell in members)]
        head, *body = (' & '.join(map(_escape_tex, line)) + r' \\' for line in lines)
        text += '\n'.join(
            [
                f'% {" ".join(dataset.split())}',
                f'\\begin{{tabular}}{{ll{"r" * (len(COLUMNS) - 3)}l}}',
                r'\toprule',
                head,
                r'\midrule',
                *body,
                r'\bottomrule',
                r'\end{tabular}',
                f'% {CAPTION}',
                '',
            ]
        )
    return text


def to_csv(cells: Sequence[Cell]) -> str:
    """table.csv: a line per cell; accuracies are fractions, cross-entropies nats."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = {
            'cell': cell.name,
            'dataset': cell.dataset,
            'model': cell.model,
            'regularization': cell.regularization,
            'settings': '; '.join(f'{field}={_plain(ours)}' for field, (ours, _) in cell.settings.items()),
            'seeds': len(cell.finished),
        }
        for place, metric in enumerate(
            ('accuracy', 'cross_entropy', 'mean_class_accuracy', 'expected_calibration_error')
        ):
            values = cell.values(metric)
            row[f'{metric}_mean'] = statistics.fmean(values) if values else None
            row[f'{metric}_sd'] = deviation(values)
            if place < 2:
                report = cell.report[place] if cell.report else None
                difference = difference_to_constant(values, report) if values and report is not None else None
                low, high = (difference and difference.interval) or (None, None)
                row[f'{metric}_report'] = report
                row[f'{metric}_difference'] = difference and difference.value
                row[f'{metric}_difference_low'], row[f'{metric}_difference_high'] = low, high
        best = [run.result['best_epoch'] for run in cell.finished if run.result]
        row['best_epoch_mean'] = statistics.fmean(best) if best else None
        row['per_class_accuracy'] = ' '.join('' if a is None else f'{a:.6f}' for a in per_class(cell))
        row['notes'] = cell.note
        rows.append(row)
    return _csv(rows)


def runs_to_csv(runs: Sequence[Run]) -> str:
    """runs.csv: a line per run, with its speed."""
    rows = []
    for run in runs:
        result = run.result or {}
        last = run.history[result['best_epoch'] - 1] if result else {}
        rows.append(
            {
                'run': run.name,
                'config': run.config.name,
                'dataset': run.config.dataset,
                'seed': run.config.seed,
                'num_parameters': result.get('num_parameters'),
                'epochs_run': result.get('epochs_run', len(run.history)),
                'best_epoch': result.get('best_epoch'),
                'stopped_early': result.get('stopped_early'),
                'train_accuracy': last.get('train_accuracy'),
                'validation_accuracy': last.get('validation_accuracy'),
                'test_accuracy': run.test.get('accuracy'),
                'test_mean_class_accuracy': run.test.get('mean_class_accuracy'),
                'test_cross_entropy': run.test.get('cross_entropy'),
                'test_expected_calibration_error': run.test.get('expected_calibration_error'),
                'seconds_per_epoch': run.seconds_per_epoch,
                'failure': run.failure,
            }
        )
    return _csv(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ''
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()

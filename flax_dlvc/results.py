"""From run directories to cells and their statistics; reads nothing else, so that they can be rebuilt anywhere.

A study is a directory of `CELL/seed_N` run directories. A cell is a setting that was run with one or more seeds.
"""

import dataclasses
import importlib
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from flax_dlvc import rundir, stopping
from flax_dlvc.config import (
    CONFIGS,
    CROP_FIELDS,
    PARTITION_FIELDS,
    defaults,
    differing_fields,
    flatten,
    without_effect,
)
from flax_dlvc.data import is_same
from flax_dlvc.errors import ConfigError
from flax_dlvc.words import plural

T = TypeVar('T')

MODELS = {'resnet18': 'ResNet18', 'cnn': 'CNN', 'vit': 'ViT'}
REGULARIZATIONS = {
    'none': 'none',
    'dropout': 'dropout',
    'augment': 'augmentation',
    'dropout_augment': 'dropout and augmentation',
}

# The report's Table 1, on CIFAR-10's test images: accuracy (fraction) and cross-entropy (nats) of one run each.
REPORT = {
    ('resnet18', 'none'): {'accuracy': 0.7167, 'cross_entropy': 1.51},
    ('resnet18', 'dropout'): {'accuracy': 0.7069, 'cross_entropy': 1.37},
    ('resnet18', 'augment'): {'accuracy': 0.5977, 'cross_entropy': 2.36},
    ('cnn', 'none'): {'accuracy': 0.7016, 'cross_entropy': 1.17},
    ('cnn', 'dropout'): {'accuracy': 0.7167, 'cross_entropy': 0.85},
    ('cnn', 'augment'): {'accuracy': 0.5963, 'cross_entropy': 1.49},
    ('vit', 'none'): {'accuracy': 0.6349, 'cross_entropy': 1.27},
    ('vit', 'dropout'): {'accuracy': 0.6398, 'cross_entropy': 1.23},
    ('vit', 'augment'): {'accuracy': 0.561, 'cross_entropy': 1.34},
}
CROP_SCALE = 'augment.random_resized_crop_scale'
TECHNIQUES = {  # the fields in which a row with one of them differs from a row without
    'dropout': ('dropout_rate',),
    'augment': ('augment.random_resized_crop', *CROP_FIELDS, 'augment.random_mirror'),
}


# Statistics


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of means and its 95 % confidence interval, None where too few runs differ to have one."""

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


def _interval(value: float, squared_error: float, degrees: float) -> tuple[float, float] | None:
    from scipy.special import stdtrit

    if squared_error == 0:  # equal runs, which accuracies on few images may be by chance, say nothing of their spread
        return None
    margin = float(stdtrit(degrees, 0.975)) * math.sqrt(squared_error)
    return value - margin, value + margin


# Runs and cells


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as it was found; `result` is empty while the run is not finished."""

    name: str  # the directory below the study's
    config: ConfigDict
    history: tuple[dict[str, Any], ...]
    result: dict[str, Any]
    evaluation: dict[str, Any]  # evaluation-test.json; empty where there is none of the best checkpoint
    data: dict[str, Any]  # dataset.json; empty where there is none
    failure: str

    @property
    def test(self) -> dict[str, Any]:
        """All that is known of the test split."""
        return self.evaluation | self.result.get('test', {})

    @cached_property
    def best(self) -> dict[str, Any]:
        """The record of the epoch that the run tested, or would by now; empty where no epoch is finished."""
        rule = self.config.early_stopping
        by_now = stopping.follow(self.history, metric=rule.metric, min_delta=rule.min_delta)
        best_epoch = self.result.get('best_epoch', by_now.best_epoch)
        return next((record for record in self.history if record['epoch'] == best_epoch), {})

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

    `settings` are the fields that differ from the package's config file of this model and regularisation, with its
    value behind ours, without those that change nothing here.
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
    def report(self) -> dict[str, float]:
        """The report's metrics, where it has them and they are of the same data; else empty."""
        return REPORT.get((self.model, self.regularization), {}) if self.dataset == 'cifar10' else {}

    def without(self, field: str) -> 'Cell':
        """The cell as if a field were as in the config file, to tell what it shares with others and to name that."""
        return dataclasses.replace(self, settings={f: pair for f, pair in self.settings.items() if f != field})

    @property
    def variant(self) -> str:
        """The regularisation, and what else is special."""
        special = ''.join(f', {short(field)} {plain(ours)}' for field, (ours, _) in self.settings.items())
        return REGULARIZATIONS[self.regularization] + special

    @property
    def title(self) -> str:
        """Model, regularisation and what else is special, for people."""
        return f'{model_title(self.model)}, {self.variant}'

    @property
    def note(self) -> str:
        """What was reduced or changed, and what is missing."""
        notes = [f'{field} {plain(ours)} (file: {plain(theirs)})' for field, (ours, theirs) in self.settings.items()]
        usual = defaults()
        for field in PARTITION_FIELDS:
            values = sorted({run.config[field] for run in self.runs})
            if values != [usual[field]]:
                notes.append(f'{field} {", ".join(map(str, values))} (default: {usual[field]})')
        if len(self.finished) == 1:
            notes.append('one run')
        for run in self.runs:
            if run.failure:
                notes.append(f'seed {run.config.seed} failed: {run.failure}')
            elif not run.result:
                notes.append(f'seed {run.config.seed} not finished, {plural(len(run.history), "epoch")}')
        return '; '.join(notes)


def model_title(model: str) -> str:
    """A model for people; those that are not the report's have no title but their name."""
    return MODELS.get(model, model)


def plain(value: Any) -> str:
    """A config field's value for people; of a (lowest, highest) field 'LOWEST-HIGHEST', of an empty one two quotes."""
    return '-'.join(f'{item:g}' for item in value) if isinstance(value, tuple) else str(value) or "''"


@cache
def short(field: str) -> str:
    """The end of a dotted field's name that no other field has."""
    fields, parts = flatten(defaults()), field.split('.')
    ends = ['.'.join(parts[start:]) for start in range(len(parts))]
    return next(end for end in reversed(ends) if end == field or sum(f.endswith(f'.{end}') for f in fields) == 1)


def read_runs(directory: Path) -> list[Run]:
    """Every run of a study, sorted by name; a directory that is not called seed_N is none.

    Raises:
        ConfigError: one of them is damaged, or a copy: its seed is not the one that it is called by.
    """
    paths = [path.parent for path in sorted(directory.glob('*/seed_*/config.json'))]
    runs = [read_run(directory, path) for path in paths if path.name.removeprefix('seed_').isdecimal()]
    for run in runs:
        if Path(run.name).name != f'seed_{run.config.seed}':
            raise ConfigError(
                f'{directory / run.name} holds a run of seed {run.config.seed}, which may not count twice; '
                f'call it seed_{run.config.seed}, or move it out of the study'
            )
    return runs


def read_run(directory: Path, workdir: Path) -> Run:
    """Reads the run in `workdir`, which lies below the study's `directory`."""
    result, history = rundir.read_result(workdir), rundir.read_history(workdir)
    if result and not 0 < result['best_epoch'] <= len(history):
        raise ConfigError(f'{workdir} lacks the best epoch of its result in metrics.jsonl; is a file damaged?')
    evaluation = rundir.read_test_evaluation(workdir)
    best_step = history[result['best_epoch'] - 1]['step'] if result else None
    if not history:  # an imported model has a checkpoint of step 0 alone
        best_step = 0
    if evaluation.get('step', best_step) != best_step:  # `evaluate` can be asked for any checkpoint
        evaluation = {}
    return Run(
        name=workdir.relative_to(directory).as_posix(),
        config=rundir.read_config(workdir),
        history=history,
        result=result or {},
        evaluation=evaluation,
        data=rundir.read_description(workdir) if (workdir / 'dataset.json').exists() else {},
        failure='' if result else rundir.read_failure(workdir)[0],
    )


def group(runs: Iterable[Run]) -> list[Cell]:
    """Puts runs that differ in nothing but their seed into one cell; sorted as the report's table is."""

    def same_cell(run: Run, other: Run) -> bool:
        same_directory = run.name.split('/')[0] == other.name.split('/')[0]
        return same_directory and differ_only_in((), run.config, other.config)

    return sorted((_cell(members) for members in partition(runs, same_cell)), key=_order)


def partition(items: Iterable[T], are_alike: Callable[[T, T], bool]) -> list[list[T]]:
    """The items in lists, each of those that are like its first one."""
    lists: list[list[T]] = []
    for item in items:
        members = next((members for members in lists if are_alike(item, members[0])), None)
        if members is None:
            lists.append([item])
        else:
            members.append(item)
    return lists


def _cell(runs: list[Run]) -> Cell:
    config = runs[0].config
    model = config.model.name
    augmented = config.augment.random_resized_crop or config.augment.random_mirror
    regularization = '_'.join(['dropout'] * (config.dropout_rate > 0) + ['augment'] * augmented) or 'none'
    base = base_config(config_name(model, regularization)) if model in MODELS else defaults()
    ours, theirs = flatten(config), flatten(base)
    ignored = {'name', 'seed', 'dataset', 'model.name', *without_effect(config)}
    return Cell(
        name=runs[0].name.split('/')[0],
        model=model,
        regularization=regularization,
        settings={f: (ours[f], theirs[f]) for f in differing_fields(config, base) if f not in ignored},
        runs=tuple(sorted(runs, key=lambda run: run.config.seed)),
    )


def differ_only_in(fields: Collection[str], left: ConfigDict, right: ConfigDict) -> bool:
    """Whether two runs differ in none but these fields; their names and seeds, and what changes neither, aside."""
    aside = {'name', 'seed'} | without_effect(left) & without_effect(right)
    return set(differing_fields(left, right)) - aside <= set(fields)


def _order(cell: Cell) -> tuple[Any, ...]:
    models = [*MODELS, cell.model]  # others come last
    return (
        cell.dataset,
        models.index(cell.model),
        list(REGULARIZATIONS).index(cell.regularization),
        len(cell.settings),
        [(field, ours) for field, (ours, _) in cell.settings.items()],
    )


def config_name(model: str, regularization: str) -> str:
    """The config file's stem of a cell."""
    return model if regularization == 'none' else f'{model}_{regularization}'


def base_config(name: str) -> ConfigDict:
    """What a config file of the package says.

    Raises:
        ConfigError: there is none of that name.
    """
    if not (CONFIGS / f'{name}.py').is_file():
        raise ConfigError(f'there is no {CONFIGS / name}.py; a study takes each model and regularization from a file')
    config = importlib.import_module(f'configs.{name}').get_config()
    config.name = name
    return config


def flags(config: ConfigDict, file: str, ignored: Collection[str] = ()) -> list[str]:
    """What a command says besides a config file of the package to have this config, but for the ignored fields."""
    ours, theirs = flatten(config), flatten(base_config(file))
    return [f'--config.{f}={ours[f]}' for f in ours if f not in ('name', *ignored) and ours[f] != theirs[f]]


def class_names(cells: Sequence[Cell]) -> list[str]:
    """The names of the classes, or their numbers where no run recorded them."""
    finished = [run for cell in cells for run in cell.finished]
    names = next((run.evaluation['class_names'] for run in finished if run.evaluation.get('class_names')), None)
    return names or [str(number) for run in finished[:1] for number in range(len(run.test['per_class_accuracy']))]


def per_class(cell: Cell) -> list[float | None]:
    """Accuracy of each class, averaged over the finished runs."""
    by_run = [run.test['per_class_accuracy'] for run in cell.finished]
    return [None if None in values else statistics.fmean(values) for values in zip(*by_run, strict=True)]


def datasets(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by dataset: no table mixes two.

    Raises:
        ConfigError: a dataset of one name had other classes, or of the same splits other images, in one run than in
            another.
    """
    by_name = {name: [cell for cell in cells if cell.dataset == name] for name in sorted({c.dataset for c in cells})}
    for name, members in by_name.items():
        finished = [run for cell in members for run in cell.finished]
        others = [('classes', run, finished[0]) for run in finished if _have_other_classes(run, finished[0])]
        described = [run for run in finished if run.data]
        for alike in partition(described, lambda run, other: run.config.splits == other.config.splits):
            others += [
                ('images', run, alike[0]) for run in alike if not is_same(run.data, alike[0].data, tolerance=1e-6)
            ]
        if others:
            what, run, other = others[0]
            raise ConfigError(
                f'{name} had other {what} in {run.name} than in {other.name}; '
                'a study has one dataset: start another one for the changed data'
            )
    return by_name


def _have_other_classes(run: Run, other: Run) -> bool:
    """By number, and by name where both runs recorded the names."""
    names, others = run.evaluation.get('class_names'), other.evaluation.get('class_names')
    counts = len(run.test['per_class_accuracy']), len(other.test['per_class_accuracy'])
    return counts[0] != counts[1] or (None not in (names, others) and names != others)

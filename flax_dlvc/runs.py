"""The run directories below a folder as a table: `python -m flax_dlvc.runs [DIR] [--sort COLUMN] [--json]`.

`--compare A B [--out FILE.png]` plots two of them in one picture and prints the fields in which they differ.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flax_dlvc import results, rundir, tables
from flax_dlvc.config import defaults, flatten
from flax_dlvc.errors import (
    ArgumentParser,
    CommandError,
    ConfigError,
    DivergedError,
    existing_directory,
    named_path,
    run_command,
)

# What is known of every run beside its config; accuracies are fractions.
RESULTS = ('best_validation_accuracy', 'best_epoch', 'test_accuracy', 'seconds', 'state')
HIGHEST_FIRST = ('best_validation_accuracy', 'test_accuracy')


def find(directory: Path) -> list[Path]:
    """The run directories below a folder, itself included, sorted; nothing is looked for inside of one."""
    found = []
    for path, folders, files in os.walk(directory):
        if {'config.json', 'metrics.jsonl', 'result.json'} & set(files) or 'checkpoints' in folders:
            found.append(Path(path))
            folders.clear()
    return sorted(found)


def describe(directory: Path, workdir: Path) -> dict[str, Any]:
    """A run as a flat record; a damaged one has a name and a state, and None for the rest.

    The best epoch is the one that is tested: by the config's metric or, without validation, the last.
    `seconds` are those of the training steps, by each epoch's images/s: without compiling, evaluating and saving.
    """
    record: dict[str, Any] = {'name': _name(directory, workdir), 'config': {}} | dict.fromkeys(
        (*RESULTS, 'epochs_run', 'failure')
    )
    try:
        run = results.read_run(directory, workdir)
        _, exit_code = rundir.read_failure(workdir)
        state = 'diverged' if exit_code == DivergedError.exit_code else 'stopped'
        return record | {
            'config': flatten(run.config),
            'epochs_run': len(run.history),
            'best_validation_accuracy': run.best.get('validation_accuracy'),
            'best_epoch': run.best.get('epoch'),
            'test_accuracy': run.test.get('accuracy'),
            'seconds': sum(run.epoch_seconds) if run.epoch_seconds else None,
            'state': 'running' if rundir.is_locked(workdir) else 'finished' if run.result else state,
            'failure': run.failure,
        }
    except CommandError as error:
        return record | {'state': f'damaged: {error}'}
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON, but not what a run writes
        return record | {'state': f'damaged: {type(error).__name__}: {error}'}


def _name(directory: Path, workdir: Path) -> str:
    return workdir.resolve().name if workdir == directory else workdir.relative_to(directory).as_posix()


def differences(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The fields that are not the same in all of these flat configs, how a run is carried out included."""
    return [field for field in (configs[0] if configs else ()) if any(c[field] != configs[0][field] for c in configs)]


def sort(records: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Sorted by a column or config field: accuracies from the highest, all else from the lowest; the unknown last.

    Raises:
        ConfigError: there is no such column.
    """
    fields = {*flatten(defaults())}.union(*(record['config'] for record in records))
    if column not in {'name', *RESULTS, *fields}:
        raise ConfigError(
            f'unknown column {column!r}; there are name, {", ".join(RESULTS)} and the fields of the config'
        )

    def value(record: dict[str, Any]) -> Any:
        return record[column] if column in ('name', *RESULTS) else record['config'].get(column)

    known = [record for record in records if value(record) is not None]
    unknown = [record for record in records if value(record) is None]
    return sorted(known, key=value, reverse=column in HIGHEST_FIRST) + unknown


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people; of the configs the fields that differ."""
    fields = differences([record['config'] for record in records if record['config']])
    shown = Table(box=None, header_style='bold')
    for title in ('name', *('config' if field == 'name' else field for field in fields)):
        shown.add_column(title, overflow='fold')
    for title in ('best validation (%)', 'epoch', 'test (%)', 'seconds'):
        shown.add_column(title, justify='right')
    shown.add_column('state', overflow='fold')
    for record in records:
        seconds, epoch = record['seconds'], record['best_epoch']
        cells = [
            record['name'],
            *(str(record['config'].get(field, '–')) for field in fields),
            tables.percent(record['best_validation_accuracy']),
            '–' if epoch is None else str(epoch),
            tables.percent(record['test_accuracy']),
            '–' if seconds is None else f'{seconds:.1f}',
            record['state'],
        ]
        shown.add_row(*map(Text, cells))
    return shown


def compare(directory: Path, names: Sequence[str], out: Path) -> None:
    """Plots the curves of runs in one picture and prints the fields in which they differ.

    Raises:
        ConfigError: one is not a whole run directory, none has an epoch to show, or `out` cannot be written.
    """
    from flax_dlvc import figures, pictures

    # `Path.is_dir` raises where a name is too long.
    paths = [directory / name if os.path.isdir(directory / name) else Path(name) for name in names]  # noqa: PTH112
    runs = [
        dataclasses.replace(results.read_run(path.parent, path), name=name)
        for name, path in zip(names, paths, strict=True)
    ]
    left, right = (flatten(run.config) for run in runs)
    for field in differences([left, right]):
        print(f'{field}: {left[field]} | {right[field]}')
    if not any(run.history for run in runs):
        raise ConfigError('neither run has finished an epoch; there is nothing to plot')
    with pictures.plain_style():
        pictures.save_png(figures.compare(runs), out)
    print(f'curves: {out}')


def main(argv: list[str]) -> None:
    """Parses the command line and prints."""
    parser = ArgumentParser('python -m flax_dlvc.runs', description='The run directories below a folder as a table.')
    parser.add_argument('directory', type=existing_directory, nargs='?', help='the folder; runs by default')
    parser.add_argument('--sort', default='name', metavar='COLUMN', help=f'name, {", ".join(RESULTS)} or a field')
    parser.add_argument('--json', action='store_true', help='everything, with all fields of the configs, as JSON')
    parser.add_argument('--compare', nargs=2, metavar=('A', 'B'), help='two runs, by their names in the table or paths')
    parser.add_argument('--out', type=named_path, help='the picture that --compare draws; comparison.png by default')
    arguments = parser.parse_args(argv[1:])
    if arguments.compare:
        if arguments.json or arguments.sort != 'name':
            raise ConfigError('--compare goes without --json and --sort')
        directory = arguments.directory or Path('runs')  # of which paths have no need
        compare(directory, arguments.compare, arguments.out or Path('comparison.png'))
        return
    if arguments.out:
        raise ConfigError('--out goes with --compare')
    directory = arguments.directory or existing_directory('runs')
    records = sort([describe(directory, workdir) for workdir in find(directory)], arguments.sort)
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif records:
        Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table(records))
    else:
        print(f'no run directories in {directory}')


if __name__ == '__main__':
    run_command(main)

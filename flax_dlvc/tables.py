"""A study's cells as tables: Markdown, CSV and TeX."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from flax_dlvc.results import (
    Cell,
    Difference,
    Run,
    class_names,
    datasets,
    deviation,
    difference_to_constant,
    model_title,
    per_class,
    plain,
)

REPORTED = ('accuracy', 'cross_entropy')  # metrics that the report has
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


def _to_report(cell: Cell, metric: str, scale: float) -> str:
    values = cell.values(metric)
    return signed(difference_to_constant(values, cell.report[metric]), scale) if values and cell.report else '–'


COLUMNS: tuple[Column, ...] = (
    ('Model', lambda cell: model_title(cell.model)),
    ('Regularisation', lambda cell: cell.variant),
    ('Seeds', lambda cell: str(len(cell.finished))),
    ('Accuracy (%)', lambda cell: mean_and_deviation(cell.values('accuracy'), percent)),
    ('Report (%)', lambda cell: percent(cell.report.get('accuracy'))),
    ('Difference [95 % CI]', lambda cell: _to_report(cell, 'accuracy', 100)),
    ('Cross-entropy (nats)', lambda cell: mean_and_deviation(cell.values('cross_entropy'), _nats)),
    ('Report (nats)', lambda cell: f'{cell.report["cross_entropy"]:.2f}' if cell.report else '–'),
    ('Difference [95 % CI]', lambda cell: _to_report(cell, 'cross_entropy', 1)),
    ('Calibration error (%)', lambda cell: _calibration(cell)),
    ('Best epoch', lambda cell: best_epochs(cell)),
    ('Notes', lambda cell: cell.note),
)


def _calibration(cell: Cell) -> str:
    """Runs of before it was recorded have none."""
    values = cell.values('expected_calibration_error')
    of = f' ({len(values)} of {len(cell.finished)} seeds)' if 0 < len(values) < len(cell.finished) else ''
    return mean_and_deviation(values, percent) + of


def best_epochs(cell: Cell) -> str:
    """Of each finished run."""
    return ', '.join(str(run.result['best_epoch']) for run in cell.finished) or '–'


def caption(cells: Sequence[Cell]) -> str:
    """What the tables' numbers are."""
    validated = all(cell.config.splits.validation for cell in cells)
    return (
        'Means ± standard deviations over seeds, of the checkpoint that validation chose'
        f'{"" if validated else " or, where there was none, the last one"}, on the test split. The interval is that of '
        'Student’s t over seeds, with the report’s single run taken as a constant; of one seed there is none.'
    )


def to_markdown(cells: Sequence[Cell]) -> str:
    """table.md."""
    text = ''
    for dataset, members in datasets(cells).items():
        rows = [[column(cell) for _, column in COLUMNS] for cell in members]
        text += f'## {escape_markdown(dataset)}\n\n{caption(members)}\n\n'
        text += markdown([title for title, _ in COLUMNS], rows)
        named = [[cell.title, *(percent(a, 1) for a in per_class(cell))] for cell in members if cell.finished]
        if named:
            text += '\nAccuracy by class (%), averaged over seeds:\n\n' + markdown(['', *class_names(members)], named)
    return text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [list(head), ['---'] * len(head), *rows]
    escaped = ([cell if cell == '---' else escape_markdown(cell) for cell in line] for line in lines)
    return ''.join(f'| {" | ".join(line)} |\n' for line in escaped)


# Characters; the ( of a link; underscores, unless between letters or digits.
_MARKUP = re.compile(r'[\\`*<>|&]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])')


def escape_markdown(text: str) -> str:
    """Text of which nothing is taken for markup, in one line."""
    return ' '.join(_MARKUP.sub(r'\\\g<0>', text).split())


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
    return ''.join(_TEX.get(character, character) for character in text)


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
                f'% {caption(members)}',
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
            'settings': '; '.join(f'{field}={plain(ours)}' for field, (ours, _) in cell.settings.items()),
            'seeds': len(cell.finished),
        }
        for metric in ('accuracy', 'cross_entropy', 'mean_class_accuracy', 'expected_calibration_error'):
            values = cell.values(metric)
            row[f'{metric}_mean'] = statistics.fmean(values) if values else None
            row[f'{metric}_sd'] = deviation(values)
            if metric in REPORTED:
                report = cell.report.get(metric)
                difference = difference_to_constant(values, report) if values and report is not None else None
                low, high = (difference and difference.interval) or (None, None)
                row[f'{metric}_report'] = report
                row[f'{metric}_difference'] = difference and difference.value
                row[f'{metric}_difference_low'], row[f'{metric}_difference_high'] = low, high
        best = [run.result['best_epoch'] for run in cell.finished]
        row['best_epoch_mean'] = statistics.fmean(best) if best else None
        row['per_class_accuracy'] = ' '.join('' if a is None else f'{a:.6f}' for a in per_class(cell))
        row['notes'] = cell.note
        rows.append(row)
    return _csv(rows)


def runs_to_csv(runs: Sequence[Run]) -> str:
    """runs.csv: a line per run, with its speed."""
    rows = []
    for run in runs:
        result = run.result
        best = run.best if result else {}
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
                'train_accuracy': best.get('train_accuracy'),
                'validation_accuracy': best.get('validation_accuracy'),
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

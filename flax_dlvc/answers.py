"""The report's question 1.3 and its two open questions, answered from the runs, with what is uncertain about it."""

from collections.abc import Sequence
from typing import Any

from flax_dlvc import results, tables
from flax_dlvc.results import CROP_SCALE, REGULARIZATIONS, Cell


def to_answers(cells: Sequence[Cell]) -> str:
    """answers.md: the report's question 1.3 and its two open ones, as far as the runs answer them."""
    text = '# What the runs say\n'
    for dataset, members in results.datasets(cells).items():
        known = [cell for cell in members if cell.finished]
        where = f' ({tables.escape_markdown(dataset)})'
        text += (
            f'\n## 1.3 What did data augmentation, regularisation and early stopping bring?{where}\n\n'
            + _experiments(known)
            + _against_none(known)
            + f'\n## Does a gentler crop rescue augmentation?{where}\n\n'
            + _crop_scale(known)
            + f'\n## Do dropout and augmentation together beat either?{where}\n\n'
            + _combination(known)
        )
    return text


NOT_ENOUGH = '**not enough runs to say**'


def verdict(left: Cell, right: Cell, metric: str = 'accuracy') -> str:
    """Says whether `left` is better than `right`, with the evidence, or that this cannot be said."""
    a, b = left.values(metric), right.values(metric)
    difference = results.difference_of_means(a, b)
    shown = f'{tables.signed(difference, 100)} points of accuracy ({len(a)} against {len(b)} seeds)'
    if difference.interval is None:
        return f'{shown}: {NOT_ENOUGH}, an interval takes two seeds of each'
    if not difference.is_clear:
        return f'{shown}: no clear difference, the interval holds zero'
    return f'{shown}: {"better" if difference.value > 0 else "worse"}'


def _experiments(cells: Sequence[Cell]) -> str:
    """All of them, also those that did not help: train and validation accuracy at the best epoch, and test."""
    head = ['Experiment', 'Seeds', 'Train (%)', 'Validation (%)', 'Test (%)', 'Best epoch', 'Epochs run']
    rows = []
    for cell in cells:
        best = [run.history[run.result['best_epoch'] - 1] for run in cell.finished if run.result]
        rows.append(
            [
                cell.title,
                str(len(cell.finished)),
                tables.mean_and_deviation([record['train_accuracy'] for record in best], tables.percent),
                tables.mean_and_deviation([record['validation_accuracy'] for record in best], tables.percent),
                tables.mean_and_deviation(cell.values('accuracy'), tables.percent),
                tables.best_epochs(cell),
                ', '.join(str(run.result['epochs_run']) for run in cell.finished if run.result),
            ]
        )
    return (
        'Train and validation are those of the best epoch; training accuracy is measured while training, with dropout '
        'and on augmented images where the row has them.\n\n' + tables.markdown(head, rows) + '\n'
    )


def _against_none(cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        plain = _plain(cell, cells)
        if cell.regularization != 'none' and plain:
            lines.append(f'* {cell.title}, against none: {verdict(cell, plain)}.')
    early = [run for cell in cells for run in cell.finished if run.result and run.result['stopped_early']]
    total = sum(len(cell.finished) for cell in cells)
    lines.append(f'* Early stopping ended {len(early)} of {total} runs before their last epoch.')
    return '\n'.join(map(_escape_line, lines)) + '\n'


def _plain(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell without regularisation that is `cell` in all else."""
    return next((other for other in cells if _is_part(other, cell, 'none')), None)


def crop_scales(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """By model and regularisation, the cells that differ in the crop's scale alone, gentlest last; two at least."""
    series: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell.config.augment.random_resized_crop and cell.finished:
            others = tuple((f, str(pair[0])) for f, pair in cell.settings.items() if f != CROP_SCALE)
            series.setdefault((cell.model, cell.regularization, others), []).append(cell)
    found = []
    for members in series.values():
        members.sort(key=crop_scale)
        if len({crop_scale(cell) for cell in members}) > 1:
            found.append(
                (
                    f'{results.model_title(members[0].model)}, {REGULARIZATIONS[members[0].regularization]}',
                    members,
                )
            )
    return found


def crop_scale(cell: Cell) -> float:
    """The lowest area of a crop, as a fraction of the image's."""
    return cell.config.augment.random_resized_crop_scale[0]


def _crop_scale(cells: Sequence[Cell]) -> str:
    series = crop_scales(cells)
    if not series:
        return f'Every run crops alike: {NOT_ENOUGH}. `--vary {CROP_SCALE}_min=0.08,0.25,0.5,0.75` adds the axis.\n'
    lines = []
    for title, members in series:
        by_scale = ', '.join(
            f'{crop_scale(cell):g}: {tables.mean_and_deviation(cell.values("accuracy"), tables.percent)} %'
            for cell in members
        )
        lines.append(f'* {title}; test accuracy by the lowest area of a crop: {by_scale}.')
        strongest, *gentler = members
        for cell in gentler:
            lines.append(f'  * From {crop_scale(strongest):g} to {crop_scale(cell):g}: {verdict(cell, strongest)}.')
        plain = _plain(strongest, cells)
        if plain:
            for cell in gentler:
                lines.append(f'  * {crop_scale(cell):g} against no regularisation: {verdict(cell, plain)}.')
    return '\n'.join(map(_escape_line, lines)) + '\n'


def _combination(cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        if cell.regularization != 'dropout_augment':
            continue
        for other in ('dropout', 'augment'):
            single = next((c for c in cells if _is_part(c, cell, other)), None)
            if single:
                lines.append(f'* {cell.title}, against {REGULARIZATIONS[other]} alone: {verdict(cell, single)}.')
    if not lines:
        return f'No model has both the combination and one of its parts: {NOT_ENOUGH}.\n'
    epochs = sorted({cell.config.num_epochs for cell in cells})
    shown = str(epochs[0]) if len(epochs) == 1 else f'{epochs[0]} to {epochs[-1]}'
    lines.append(f'* Epochs allowed: {shown}. Of more the runs say nothing.')
    return '\n'.join(map(_escape_line, lines)) + '\n'


def _is_part(single: Cell, both: Cell, regularization: str) -> bool:
    """Whether `single` has `regularization` alone and is `both` in all else, the crop included where both crop."""
    dropped = () if 'augment' in regularization else (CROP_SCALE,)
    ours = {field: pair[0] for field, pair in both.settings.items() if field not in dropped}
    theirs = {field: pair[0] for field, pair in single.settings.items()}
    return single.model == both.model and single.regularization == regularization and ours == theirs


def _escape_line(line: str) -> str:
    return line.replace('<', '\\<').replace('|', '\\|')

"""The report's question 1.3 and its two open questions, answered from the runs, with what is uncertain about it."""

from collections.abc import Sequence

from flax_dlvc import results, tables
from flax_dlvc.results import CROP_SCALE, REGULARIZATIONS, TECHNIQUES, Cell


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
            + _crop_scale(members)
            + f'\n## Do dropout and augmentation together beat either?{where}\n\n'
            + _combination(known)
        )
    return text


NOT_ENOUGH = '**not enough runs to say**'


def verdict(left: Cell, right: Cell, metric: str = 'accuracy') -> str:
    """Says whether `left` is better than `right`, with the evidence, or that this cannot be said."""
    a, b = left.values(metric), right.values(metric)
    difference = results.difference_of_means(a, b)
    shown = f'{tables.signed(difference, 100)} points of accuracy (seeds: {len(a)} against {len(b)})'
    if difference.interval is None:
        return f'{shown}: {NOT_ENOUGH}, an interval needs two seeds of each'
    if not difference.is_clear:
        return f'{shown}: no clear difference, the interval contains zero'
    return f'{shown}: {"better" if difference.value > 0 else "worse"}'


def _without_partner(cell: Cell, what: str) -> str:
    return f'* {_title(cell)}: no row {what} has the same settings, {NOT_ENOUGH}.'


def _title(cell: Cell) -> str:
    return tables.escape_markdown(cell.title)


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
                *(_mean([record[f'{split}_accuracy'] for record in best]) for split in ('train', 'validation')),
                _mean(cell.values('accuracy')),
                tables.best_epochs(cell),
                ', '.join(str(run.result['epochs_run']) for run in cell.finished if run.result),
            ]
        )
    return (
        'Train and validation are those of the best epoch; training accuracy is measured while training, with dropout '
        'and on augmented images where the row has them.\n\n' + tables.markdown(head, rows) + '\n'
    )


def _mean(accuracies: Sequence[float | None]) -> str:
    """In percent; there are runs without validation."""
    return tables.mean_and_deviation([each for each in accuracies if each is not None], tables.percent)


def _against_none(cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        if cell.regularization == 'none':
            continue
        if plain := _plain(cell, cells):
            lines.append(f'* {_title(cell)}, against none: {verdict(cell, plain)}.')
        else:
            lines.append(_without_partner(cell, 'without regularisation'))
    early = [run for cell in cells for run in cell.finished if run.result and run.result['stopped_early']]
    total = sum(len(cell.finished) for cell in cells)
    lines.append(f'* Early stopping ended {len(early)} of {total} runs before their last epoch.')
    return '\n'.join(lines) + '\n'


def _plain(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell without regularisation that is `cell` in all else."""
    return next((other for other in cells if _is_part(other, cell, 'none')), None)


def crop_scales(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """With a title, cells that differ in the crop's lowest area alone, gentlest last; two at least."""

    def alike(cell: Cell, other: Cell) -> bool:
        highest = {each.config.augment.random_resized_crop_scale[1] for each in (cell, other)}
        return len(highest) == 1 and results.differ_only_in([CROP_SCALE], cell.config, other.config)

    cropped = [cell for cell in cells if cell.config.augment.random_resized_crop and cell.finished]
    return [
        (members[0].without(CROP_SCALE).title, sorted(members, key=crop_scale))
        for members in results.partition(cropped, alike)
        if len(set(map(crop_scale, members))) > 1
    ]


def crop_scale(cell: Cell) -> float:
    """The lowest area of a crop, as a fraction of the image's."""
    return cell.config.augment.random_resized_crop_scale[0]


def _crop_scale(cells: Sequence[Cell]) -> str:
    lines, series = [], crop_scales(cells)
    for title, members in series:
        by_scale = ', '.join(f'{crop_scale(cell):g}: {_mean(cell.values("accuracy"))} %' for cell in members)
        lines.append(f'* {title}; test accuracy by the lowest area of a crop: {by_scale}.')
        strongest, *gentler = members
        for cell in gentler:
            lines.append(f'  * From {crop_scale(strongest):g} to {crop_scale(cell):g}: {verdict(cell, strongest)}.')
        plain = _plain(strongest, [cell for cell in cells if cell.finished])
        if plain:
            for cell in gentler:
                lines.append(f'  * {crop_scale(cell):g} against no regularisation: {verdict(cell, plain)}.')
    seen = {members[0].model for _, members in series}
    missing = [model for model in dict.fromkeys(cell.model for cell in cells) if model not in seen]
    if missing:
        names = tables.escape_markdown(', '.join(map(results.model_title, missing)))
        lines.append(
            f'* {names}: no two rows differ in the lowest area of a crop alone, {NOT_ENOUGH}. '
            f'`--vary {CROP_SCALE}_min=0.08,0.25,0.5,0.75` adds them.'
        )
    return ''.join(f'{line}\n' for line in lines)


def _combination(cells: Sequence[Cell]) -> str:
    lines = []
    compared: set[int] = set()
    for cell in cells:
        if cell.regularization != 'dropout_augment':
            continue
        for other in ('dropout', 'augment'):
            single = next((c for c in cells if _is_part(c, cell, other)), None)
            if single:
                lines.append(f'* {_title(cell)}, against {REGULARIZATIONS[other]} alone: {verdict(cell, single)}.')
                compared |= {cell.config.num_epochs, single.config.num_epochs}
            else:
                lines.append(_without_partner(cell, f'with {REGULARIZATIONS[other]} alone'))
    if not lines:
        return f'No row has both: {NOT_ENOUGH}.\n'
    if compared:
        shown = ' or '.join(map(str, sorted(compared)))
        lines.append(f'* The rows compared here may train for {shown} epochs; of more the runs say nothing.')
    return '\n'.join(lines) + '\n'


def _is_part(single: Cell, both: Cell, regularization: str) -> bool:
    """Whether `single` has `regularization` alone and is `both` in all else; in crop and rate, where both have them."""
    dropped = [field for name, fields in TECHNIQUES.items() if name not in regularization for field in fields]
    return single.regularization == regularization and results.differ_only_in(dropped, single.config, both.config)

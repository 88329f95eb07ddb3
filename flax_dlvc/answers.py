"""The report's question 1.3 and its two open questions, answered from the runs, with what is uncertain about it."""

from collections.abc import Sequence
from typing import Any

from flax_dlvc import results, tables
from flax_dlvc.results import CROP_SCALE, REGULARIZATIONS, TECHNIQUES, Cell
from flax_dlvc.words import plural

# A kind; a table's rows, or Markdown with {} for each name; the names, in which nothing is markup.
Block = tuple[str, Any, Sequence[str]]
_BEGINS = {'heading': '## ', 'paragraph': '', 'item': '* ', 'nested': '  * '}


def to_answers(cells: Sequence[Cell]) -> str:
    """answers.md."""
    text, before = '# What the runs say\n', ''
    for kind, content, names in to_blocks(cells):
        if not {kind, before} <= {'item', 'nested'}:
            text += '\n'
        if kind == 'table':
            text += tables.markdown(content[0], content[1:])
        else:
            text += f'{_BEGINS[kind]}{content.format(*map(tables.escape_markdown, names))}\n'
        before = kind
    return text


def to_blocks(cells: Sequence[Cell]) -> list[Block]:
    """The report's question 1.3 and its two open ones, as far as the runs answer them."""
    blocks: list[Block] = []
    for dataset, members in results.datasets(cells).items():
        known = [cell for cell in members if cell.finished]
        for question, answer in (
            ('1.3 What did data augmentation, regularisation and early stopping bring?', _experiments(known)),
            ('Does a gentler crop rescue augmentation?', _crop_scale(members)),
            ('Do dropout and augmentation together beat either?', _combination(known)),
        ):
            blocks += [('heading', f'{question} ({{}})', [dataset]), *answer]
    return blocks


NOT_ENOUGH = '**not enough runs to say**'


def verdict(left: Cell, right: Cell) -> str:
    """Says whether `left` is better than `right`, with the evidence, or that this cannot be said."""
    a, b = left.values('accuracy'), right.values('accuracy')
    difference = results.difference_of_means(a, b)
    shown = f'{tables.signed(difference, 100)} points of accuracy (seeds: {len(a)} against {len(b)})'
    if difference.interval is None:
        return f'{shown}: {NOT_ENOUGH}, an interval needs two seeds of each that differ'
    if not difference.is_clear:
        return f'{shown}: no clear difference, the interval contains zero'
    return f'{shown}: {"better" if difference.value > 0 else "worse"}'


def _against(cell: Cell, other: Cell | None, name: str, missing: str) -> Block:
    if other is None:
        return 'item', f'{{}}: no row {missing} has the same settings, {NOT_ENOUGH}.', [cell.title]
    return 'item', f'{{}}, against {name}: {verdict(cell, other)}.', [cell.title]


def _experiments(cells: Sequence[Cell]) -> list[Block]:
    """All of them, also those that did not help: train and validation accuracy at the best epoch, and test."""
    if not cells:
        return [('paragraph', f'No run is finished: {NOT_ENOUGH}.', [])]
    rows = [['Experiment', 'Seeds', 'Train (%)', 'Validation (%)', 'Test (%)', 'Best epoch', 'Epochs run']]
    for cell in cells:
        best = [run.best for run in cell.finished]
        rows.append(
            [
                cell.title,
                str(len(cell.finished)),
                *(_mean([record[f'{split}_accuracy'] for record in best]) for split in ('train', 'validation')),
                _mean(cell.values('accuracy')),
                tables.best_epochs(cell),
                ', '.join(str(run.result['epochs_run']) for run in cell.finished),
            ]
        )
    note = (
        'Train and validation are those of the best epoch; training accuracy is measured while training, with dropout '
        'and on augmented images where the row has them.'
    )
    comparisons = [
        _against(cell, _plain(cell, cells), 'none', 'without regularisation')
        for cell in cells
        if cell.regularization != 'none'
    ]
    finished = [run.result for cell in cells for run in cell.finished]
    early = sum(result['stopped_early'] for result in finished)
    ended = f'Early stopping ended {early} of {plural(len(finished), "run")} before the last epoch.'
    return [('paragraph', note, []), ('table', rows, []), *comparisons, ('item', ended, [])]


def _mean(accuracies: Sequence[float | None]) -> str:
    """In percent; there are runs without validation."""
    return tables.mean_and_deviation([each for each in accuracies if each is not None], tables.percent)


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


def _crop_scale(cells: Sequence[Cell]) -> list[Block]:
    blocks: list[Block] = []
    series = crop_scales(cells)
    for title, members in series:
        by_scale = ', '.join(f'{crop_scale(cell):g}: {_mean(cell.values("accuracy"))} %' for cell in members)
        blocks.append(('item', f'{{}}; test accuracy by the lowest area of a crop: {by_scale}.', [title]))
        strongest, *gentler = members
        for cell in gentler:
            compared = f'From {crop_scale(strongest):g} to {crop_scale(cell):g}: {verdict(cell, strongest)}.'
            blocks.append(('nested', compared, []))
        plain = _plain(strongest, [cell for cell in cells if cell.finished])
        if plain:
            for cell in gentler:
                compared = f'{crop_scale(cell):g} against no regularisation: {verdict(cell, plain)}.'
                blocks.append(('nested', compared, []))
    seen = {members[0].model for _, members in series}
    missing = [model for model in dict.fromkeys(cell.model for cell in cells) if model not in seen]
    if missing:
        text = (
            f'{{}}: no two rows differ in the lowest area of a crop alone, {NOT_ENOUGH}. '
            f'`--vary {CROP_SCALE}_min=0.08,0.25,0.5,0.75` adds them.'
        )
        blocks.append(('item', text, [', '.join(map(results.model_title, missing))]))
    return blocks


def _combination(cells: Sequence[Cell]) -> list[Block]:
    blocks: list[Block] = []
    compared: set[int] = set()
    for cell in cells:
        if cell.regularization != 'dropout_augment':
            continue
        for other in ('dropout', 'augment'):
            single = next((c for c in cells if _is_part(c, cell, other)), None)
            name = f'{REGULARIZATIONS[other]} alone'
            blocks.append(_against(cell, single, name, f'with {name}'))
            if single:
                compared |= {cell.config.num_epochs, single.config.num_epochs}
    if not blocks:
        return [('paragraph', f'No row has both: {NOT_ENOUGH}.', [])]
    if compared:
        *fewer, most = sorted(compared)
        shown = ' or '.join([*map(str, fewer), plural(most, 'epoch')])
        blocks.append(('item', f'The rows compared here may train for {shown}; of more the runs say nothing.', []))
    return blocks


def _is_part(single: Cell, both: Cell, regularization: str) -> bool:
    """Whether `single` has `regularization` alone and is `both` in all else; in crop and rate, where both have them."""
    dropped = [field for name, fields in TECHNIQUES.items() if name not in regularization for field in fields]
    return single.regularization == regularization and results.differ_only_in(dropped, single.config, both.config)

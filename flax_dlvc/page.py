"""A study as one HTML file that fetches nothing."""

import base64
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_dlvc import answers, config, results, tables
from flax_dlvc.results import Cell, Run
from flax_dlvc.words import plural


def render(cells: Sequence[Cell], workdir: Path, drawn: Sequence[tuple[str, str]]) -> str:
    """report.html: the questions, tables, figures, runs and how to repeat them; every text is escaped.

    Args:
        cells: of the study.
        workdir: where its figures are.
        drawn: what `figures.draw_all` returned.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader('flax_dlvc'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = [*tables.COLUMNS[:-1], ('Seconds per epoch', _seconds), tables.COLUMNS[-1]]
    return (
        environment.get_template('report.html').render(
            datasets=results.datasets(cells),
            columns=columns,
            sort_key=_sort_key,
            per_class=lambda cell: [tables.percent(accuracy, 1) for accuracy in results.per_class(cell)],
            class_names=results.class_names,
            caption=tables.caption,
            answers=map(_shown, answers.to_blocks(cells)),
            figures=[(caption, _data_uri(workdir / 'figures' / f'{stem}.svg')) for stem, caption in drawn],
            runs=[run for cell in cells for run in cell.runs],
            num_finished=plural(sum(len(cell.finished) for cell in cells), 'finished run'),
            fields=lambda run: config.flatten(run.config),
            command=command,
        )
        + '\n'
    )


def command(run: Run) -> str:
    """The shell command that repeats a run."""
    known = [
        results.config_name(model, regularization)
        for model in results.MODELS
        for regularization in results.REGULARIZATIONS
    ]
    name = run.config.name if run.config.name in known else 'default'
    flags = results.flags(run.config, name, set(config.EXECUTION_FIELDS) - set(config.PARTITION_FIELDS))
    return shlex.join(
        ['python', '-m', 'flax_dlvc.main', '--config', f'configs/{name}.py', *flags, '--workdir', f'runs/{run.name}']
    )


def _seconds(cell: Cell) -> str:
    seconds = [run.seconds_per_epoch for run in cell.runs if run.seconds_per_epoch]
    return f'{sum(seconds) / len(seconds):.1f}' if seconds else '–'


def _sort_key(text: str) -> str:
    """The number that a cell of the table begins with; its text where there is none."""
    first = text.split()[0].rstrip(',;') if text.split() else ''
    try:
        return str(float(first))
    except ValueError:
        return text


def _data_uri(path: Path) -> str:
    return f'data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}'


def _shown(block: answers.Block) -> tuple[str, Any]:
    """A block for the template, which needs no Markdown: of the answers, two marks."""
    kind, content, names = block
    return kind, content if kind == 'table' else re.sub(r'\*\*|`', '', content).format(*names)

"""A study's grid: models by regularisations by seeds, and by fields of a config; a run of it, and how far it is."""

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

import configs
from flax_dlvc import results
from flax_dlvc.config import EXECUTION_FIELDS, flatten, parse_command_line
from flax_dlvc.errors import ConfigError

WRITABLE = str.maketrans('[]', '()')  # with brackets in a directory's name `rundir.check` would refuse it


@dataclasses.dataclass
class Planned:
    """A run of the grid, and how far it is."""

    cell: str
    config: ConfigDict
    directory: Path
    flags: tuple[str, ...]  # what makes the config file this config, besides the seed
    state: str = 'waiting'  # then 'running', 'finished', 'failed', or 'elsewhere' where another process trains it
    epochs: int = 0
    best: float | None = None
    began: tuple[float, int] | None = None  # when it was started, by time.monotonic, and after how many epochs
    seconds_per_epoch: float | None = None

    @property
    def command(self) -> list[str]:
        """The arguments of `python` that carry out this run alone."""
        seed = (f'--config.seed={self.config.seed}',) if self.config.seed else ()
        arguments = (*self.flags, *seed, f'--workdir={self.directory}')
        return ['-m', 'flax_dlvc.main', f'--config={_config_file(self.config.name)}', *arguments]

    @property
    def epochs_left(self) -> int:
        """At most; it may stop early."""
        return self.config.num_epochs - self.epochs if self.state in ('waiting', 'running') else 0


def _config_file(name: str) -> Path:
    return Path(configs.__path__[0]) / f'{name}.py'


def plan(
    workdir: Path,
    *,
    models: Sequence[str],
    regularizations: Sequence[str],
    seeds: int,
    overrides: Sequence[str] = (),
    vary: Sequence[str] = (),
) -> list[Planned]:
    """The grid, seeds innermost.

    Args:
        workdir: the study's directory.
        models: names of `MODELS`.
        regularizations: names of `REGULARIZATIONS`.
        seeds: how many, from 0 on.
        overrides: '--config.FIELD=VALUE' for every run.
        vary: 'FIELD=V1,V2,…': an axis each. FIELD_min and FIELD_max are the ends of a (lowest, highest) field.

    Raises:
        ConfigError: a name, field or value is wrong.
    """
    axes = [[(field, value) for value in values] for field, values in map(_parse_axis, vary)]
    grid: list[Planned] = []
    for model, regularization in itertools.product(models, regularizations):
        name = results.config_name(model, regularization)
        for point in itertools.product(*axes):
            flags, labels = {_field_of(flag): flag for flag in overrides}, []
            # Whether it crops comes first: of what does not, fields of crops are left out.
            for field, value in sorted(point, key=lambda axis: axis[0] != 'augment.random_resized_crop'):
                so_far = _parse_config(name, list(flags.values()))
                if field.startswith('augment.random_resized_crop_') and not so_far.augment.random_resized_crop:
                    continue  # it changes nothing where nothing is cropped
                if field == 'dropout_rate' and 'dropout' not in regularization:
                    continue  # a row without dropout stays one
                flag = _axis_flag(field, value, so_far)
                changed = flags | {_field_of(flag): flag}
                if flatten(_parse_config(name, list(changed.values()))) != flatten(so_far):
                    flags = changed
                    labels.append(f'{field}={value}')
            cell = ','.join([name, *labels]).translate(WRITABLE)
            if any(planned.cell == cell for planned in grid):
                continue
            for seed in range(seeds):
                config = _parse_config(name, [*flags.values(), f'--config.seed={seed}'])
                grid.append(Planned(cell, config, workdir / cell / f'seed_{seed}', tuple(flags.values())))
    return grid


def _field_of(flag: str) -> str:
    return flag.partition('=')[0]


def _parse_config(name: str, flags: Sequence[str]) -> ConfigDict:
    return parse_command_line(['study', f'--config={_config_file(name)}', *flags], lambda _: None).config


def _parse_axis(text: str) -> tuple[str, list[str]]:
    """'FIELD=V1,V2' to the field and its values; commas inside brackets belong to a value."""
    field, equals, values = text.partition('=')
    if not equals or not values or '/' in text:
        raise ConfigError(f'--vary takes FIELD=V1,V2,…, not {text!r}')
    parts, depth = [''], 0
    for character in values:
        depth += (character in '([') - (character in ')]')
        if character == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    if '' in parts:
        raise ConfigError(f'--vary {text!r} has an empty value')
    if field in ('seed', 'name', 'model.name'):
        raise ConfigError(f'--vary cannot vary {field}; see --seeds and --models')
    if field in EXECUTION_FIELDS:
        raise ConfigError(f'--vary cannot vary {field}, which does not make another run of it')
    return field, list(dict.fromkeys(parts))


def _axis_flag(field: str, value: str, base: ConfigDict) -> str:
    """The flag that sets a field, or one end of a (lowest, highest) field, to a value."""
    fields = flatten(base)
    stem, _, end = field.rpartition('_')
    if field in fields or not isinstance(fields.get(stem), tuple) or end not in ('min', 'max'):
        return f'--config.{field}={value}'
    lowest, highest = fields[stem]
    try:
        number = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise ConfigError(f'{field} must be a number, not {value!r}') from None
    return f'--config.{stem}={(number, highest) if end == "min" else (lowest, number)}'

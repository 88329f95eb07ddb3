"""A study's grid: models by regularisations by seeds, and by fields of a config; a run of it, and how far it is."""

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flax_dlvc import results
from flax_dlvc.config import (
    CONFIGS,
    CROP_FIELDS,
    EXECUTION_FIELDS,
    defaults,
    flatten,
    load_config,
    validate,
    without_effect,
)
from flax_dlvc.errors import ConfigError
from flax_dlvc.results import TECHNIQUES

# Fields that turn a technique on.
SWITCHES = {technique: {*fields} - {*CROP_FIELDS} for technique, fields in TECHNIQUES.items()}
WRITABLE = str.maketrans('[]', '()')  # with brackets in a directory's name `rundir.check` would refuse it


@dataclasses.dataclass
class Planned:
    """A run of the grid, and how far it is."""

    cell: str
    config: ConfigDict
    directory: Path
    state: str = 'waiting'  # then 'running', 'finished', 'failed', or 'elsewhere' where another process trains it
    epochs: int = 0
    best: float | None = None
    began: tuple[float, int] | None = None  # when it was started, by time.monotonic, and after how many epochs
    seconds_per_epoch: float | None = None

    @property
    def command(self) -> list[str]:
        """The arguments of `python` that carry out this run alone."""
        file, flags = _config_file(self.config.name), results.flags(self.config, self.config.name)
        return ['-m', 'flax_dlvc.main', f'--config={file}', *flags, f'--workdir={self.directory}']

    @property
    def epochs_left(self) -> int:
        """At most; it may stop early."""
        return self.config.num_epochs - self.epochs if self.state in ('waiting', 'running') else 0


def _config_file(name: str) -> Path:
    return CONFIGS / f'{name}.py'


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
        overrides: '--config.FIELD=VALUE' for every run; a technique's fields only where the row has it.
        vary: 'FIELD=V1,V2,…': an axis each. FIELD_min and FIELD_max are the ends of a (lowest, highest) field.

    Raises:
        ConfigError: a name, field or value is wrong, or an axis or a technique's override changes no row.
    """
    axes = [[(field, value) for value in values] for field, values in map(_parse_axis, vary)]
    # An axis may switch augmentation on; a row without dropout stays one.
    varied = {field for axis in axes for field, _ in axis} - {'dropout_rate'}
    cells: dict[str, ConfigDict] = {}
    changed: set[str] = set()  # fields that some row differs by
    ignored: set[str] = set()  # and that some row does not take
    for model, regularization in itertools.product(models, regularizations):
        name = results.config_name(model, regularization)
        file = flatten(results.base_config(name))
        foreign = {f for technique, fields in SWITCHES.items() if technique not in regularization for f in fields}
        base = _config_at(name, overrides, ())
        base.update_from_flattened_dict({field: file[field] for field in foreign})
        usual = flatten(base) | _ends(base)
        for point in itertools.product(*axes):
            config = _config_at(name, overrides, point)
            asked = flatten(config) | _ends(config)
            config.update_from_flattened_dict({field: file[field] for field in foreign - varied})
            config.update_from_flattened_dict({field: usual[field] for field in without_effect(config)})
            validate(config)
            ours = flatten(config) | _ends(config)
            differing = {field: value for field, value in point if ours[field] != usual[field]}
            labels = [f'{field}={value}' for field, value in differing.items()]
            changed |= differing.keys()
            ignored |= {field for field, _ in point if ours[field] != asked[field]}
            if config not in cells.values():  # what changes nothing makes no other row, nor does 0.10 beside 0.1
                cells[','.join([name, *labels]).translate(WRITABLE)] = config
    idle = [f'--vary {field}' for field in sorted(ignored - changed)]
    overridden = {override.partition('=')[0].rpartition('config.')[2] for override in overrides}
    for technique, fields in SWITCHES.items():
        if not any(technique in regularization for regularization in regularizations):
            idle += [f'--config.{field}' for field in sorted(fields & overridden)]
    if idle:
        raise ConfigError(f'{", ".join(idle)} changes none of the rows; see --models and --regularizations')
    grid = []
    for cell, config in cells.items():
        for seed in range(seeds):
            config = config.copy_and_resolve_references()
            config.seed = seed
            grid.append(Planned(cell, config, workdir / cell / f'seed_{seed}'))
    return grid


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
    if '' in map(str.strip, parts):
        raise ConfigError(f'--vary {text!r} has an empty value')
    usual = defaults()
    if field not in flatten(usual) | _ends(usual):
        raise ConfigError(f'--vary: unknown field {field!r}; configs/default.py lists the fields')
    if field in ('seed', 'name', 'model.name'):
        raise ConfigError(f'--vary cannot vary {field}; see --seeds and --models')
    if field in EXECUTION_FIELDS:
        raise ConfigError(f'--vary cannot vary {field}, which does not make another run of it')
    return field, list(dict.fromkeys(part.strip() for part in parts))


def _config_at(name: str, overrides: Sequence[str], point: Sequence[tuple[str, str]]) -> ConfigDict:
    """A config file's config with overrides and the fields of a point; not checked, as it takes all of its fields."""
    known = flatten(defaults())
    flags = [f'--config.{field}={value}' for field, value in point if field in known]
    config = load_config(_config_file(name), [*overrides, *flags], check=False)
    for field, value in point:
        if field in known:
            continue
        stem, _, end = field.rpartition('_')
        pair = flatten(config)[stem]
        try:
            number = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ConfigError(f'{field} must be a number, not {value!r}') from None
        config.update_from_flattened_dict({stem: (number, *pair[1:]) if end == 'min' else (*pair[:1], number)})
    return config


def _ends(config: ConfigDict) -> dict[str, Any]:
    """FIELD_min and FIELD_max of each (lowest, highest) field."""
    pairs = {field: value for field, value in flatten(config).items() if isinstance(value, tuple)}
    return {f'{field}_min': pair[:1] for field, pair in pairs.items()} | {
        f'{field}_max': pair[1:] for field, pair in pairs.items()
    }

"""Configs: reading them from the command line and from a run directory, checking them, writing them as JSON."""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from configs import default
from flax_dlvc.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def defaults() -> ConfigDict:
    """What configs/default.py says: every field.

    Raises:
        ConfigError: Python took another package of that name for ours, as of a project in whose directory it started.
    """
    if Path(default.__file__).resolve().parent != CONFIGS:
        raise ConfigError(
            f'{default.__file__} takes the place of {CONFIGS}; start in another directory, or with python -P'
        )
    return default.get_config()


def parse_command_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses a parser's own arguments and, among them, `--config FILE --config.FIELD=VALUE …`.

    Args:
        parser: of the arguments besides; `--config` is added to it.
        argv: the command line, program name first.

    Raises:
        ConfigError: as of the parser and of `load_config`.
    """
    add_config_argument(parser)
    arguments, overrides = parser.parse_known_args(argv[1:])
    return arguments, load_config(arguments.config, overrides)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`; what `load_config` takes besides are the arguments that the parser does not know."""
    parser.add_argument(
        '--config', metavar='FILE', nargs='?', help='the config file; --config.FIELD=VALUE sets a field of it'
    )


def load_config(file: str | Path | None, overrides: Sequence[str], *, check: bool = True) -> ConfigDict:
    """The config of a file, with fields set as on a command line.

    Args:
        file: the config file's path; after a colon an argument of its `get_config` may follow.
        overrides: '--config.FIELD=VALUE', each; what ml_collections takes besides, too.
        check: whether the config has to be valid; one that is changed further is checked later.

    Returns:
        The config, with `name` set to the file's stem, and checked.

    Raises:
        ConfigError: an unknown flag or field, a value of the wrong type, or a config file that cannot be loaded.
    """
    if not file:
        raise ConfigError('no config: say --config configs/NAME.py')
    path = Path(str(file).partition(':')[0])
    if not os.path.isfile(path):  # noqa: PTH113, as `Path.is_file` raises where a name is too long
        raise ConfigError(f'{path} is not a file: say --config configs/NAME.py')
    _check_overrides(overrides)
    argv = ['', f'--config={file}', *overrides]
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=flag_values, sys_argv=argv)
    try:
        surplus = flag_values(argv)[1:]
        config: ConfigDict = flag_values.config
        is_config = hasattr(config, 'to_dict')  # raises what kept the file from being read
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_wrong_type(error)) from error
    except flags.Error as error:
        raise ConfigError(_one_line(error)) from error
    except (Exception, SystemExit) as error:  # the config file is the user's code and may raise anything
        # An OSError comes wrapped into another one, which does not name it.
        cause = error.__cause__ if isinstance(error, OSError) else None
        raise ConfigError(f'{path}: {_one_line(cause or error)}') from error
    if not is_config:
        raise ConfigError(f'{path}: get_config() must return a ConfigDict, not {type(config).__name__}')
    if config.get('name') == '':
        config.name = path.stem
    if surplus:
        raise ConfigError(f'{surplus[0]!r} is not a flag; fields are set as --config.FIELD=VALUE')
    if check:
        validate(config)
    return config


def _check_overrides(overrides: Sequence[str]) -> None:
    """Names what is unknown: absl has flags of its own, such as --flagfile, and leaves a field's group out."""
    fields = flatten(defaults())
    for argument in overrides:
        override = re.match(r'--?(?:no)?config\.([^=\[]+)', argument)
        if override and not any(f'{field}.'.startswith(f'{override[1]}.') for field in fields):
            raise ConfigError(f'unknown field {override[1]!r}; configs/default.py lists the fields')
        if not override and re.match('--?[a-zA-Z]', argument):
            raise ConfigError(f'unknown flag {argument!r}; see --help')


def _wrong_type(error: flags.IllegalFlagValueError) -> str:
    """Which value of which field has another type, by a message that begins with 'flag --config.FIELD=VALUE:'."""
    message = _one_line(error)
    override = re.match(r'flag --config\.([^=]+)=(.*?): ', message)
    usual = flatten(defaults())
    if override is None or override[1] not in usual:
        return message
    return f'{override[1]} must be of type {type(usual[override[1]]).__name__}, not {override[2]!r}'


def _one_line(error: BaseException) -> str:
    """The last, most telling line of an exception's message, with its type where the message alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, flags.Error | OSError) and lines:
        return ' '.join(dict.fromkeys((lines[0], lines[-1])))
    if not lines:
        return type(error).__name__
    return lines[-1] if len(lines) > 1 else f'{type(error).__name__}: {lines[-1].strip(chr(34))}'


Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what it must be


def _at_least(lowest: int) -> Rule:
    return lambda value: lowest <= value < math.inf, f'must be at least {lowest}'


def _one_of(*names: str) -> Rule:
    *others, last = map(repr, names)
    return names.__contains__, f'must be {", ".join(others)} or {last}'


def _is_range(value: Sequence[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] < math.inf


_PROBABILITY: Rule = lambda value: 0 <= value < 1, 'must be in [0, 1)'
_POSITIVE: Rule = lambda value: 0 < value < math.inf, 'must be positive and finite'

# The models, each with the fields of `config.model` that it takes.
MODEL_FIELDS: dict[str, tuple[str, ...]] = {
    'cnn': (),
    'resnet18': ('stem',),
    'vit': (
        'embed_dim', 'hidden_dim', 'num_heads', 'num_layers', 'patch_size', 'patch_stem', 'stochastic_depth_rate',
    ),
    'airbench': ('widths', 'depth'),
}  # fmt: skip
BATCH_NORM_MODELS = ('resnet18', 'airbench')
# The optimizers and schedules, likewise with the fields of their groups.
OPTIMIZER_FIELDS: dict[str, tuple[str, ...]] = {
    'adamw': ('weight_decay', 'gradient_clip_norm'),
    'sgd': ('momentum', 'weight_decay', 'gradient_clip_norm'),
    'muon': (
        'momentum', 'weight_decay', 'gradient_clip_norm', 'newton_schulz_steps', 'sgd_momentum', 'classifier_factor',
        'bias_factor', 'whitening_bias_epochs',
    ),
}  # fmt: skip
SCHEDULE_FIELDS: dict[str, tuple[str, ...]] = {
    'constant': ('warmup_epochs',),
    'exponential': ('decay_per_epoch', 'warmup_epochs'),
    'linear': ('warmup_epochs',),
    'cosine': ('warmup_epochs',),
    'one_cycle': (),
}
CROP_FIELDS = ('augment.random_resized_crop_scale', 'augment.random_resized_crop_ratio')

_RULES: dict[str, Rule] = {
    # Names the run directory, unless --workdir does.
    'name': (lambda v: not {'/', '\0'} & set(v) and v not in ('.', '..'), "must be a file's name, without '/'"),
    'seed': (lambda v: 0 <= v < 2**32, 'must be in [0, 2**32)'),
    'batch_size': _at_least(1),
    'accumulate_steps': _at_least(1),
    'evaluation_batch_size': _at_least(1),
    'model.name': _one_of(*MODEL_FIELDS),
    'model.stem': _one_of('imagenet', 'cifar'),
    'model.embed_dim': _at_least(1),
    'model.hidden_dim': _at_least(1),
    'model.num_heads': _at_least(1),
    'model.num_layers': _at_least(1),
    'model.patch_size': _at_least(1),
    'model.patch_stem': _one_of('linear', 'convolutional'),
    'model.stochastic_depth_rate': _PROBABILITY,
    'model.widths': (
        lambda v: len(v) == 3 and min(v) >= 1 and all(isinstance(width, int) for width in v),
        'must be three whole numbers of at least 1',
    ),
    'model.depth': (lambda v: v in (2, 3), 'must be 2 or 3'),
    'compute_dtype': _one_of('float32', 'bfloat16'),
    'dropout_rate': _PROBABILITY,
    'label_smoothing': _PROBABILITY,
    'augment.random_resized_crop_scale': (
        lambda v: _is_range(v) and v[1] <= 1,
        'must be (lowest, highest) with 0 < lowest <= highest <= 1',
    ),
    'augment.random_resized_crop_ratio': (_is_range, 'must be (lowest, highest) with 0 < lowest <= highest'),
    'augment.random_translate': _at_least(0),
    'augment.mixup_alpha': _at_least(0),
    'augment.cutmix_alpha': _at_least(0),
    'augment.cutout': _at_least(0),
    'num_epochs': _at_least(1),
    'learning_rate': _POSITIVE,
    'optimizer.name': _one_of(*OPTIMIZER_FIELDS),
    'optimizer.momentum': _PROBABILITY,
    'optimizer.weight_decay': _at_least(0),
    'optimizer.gradient_clip_norm': _at_least(0),
    'optimizer.newton_schulz_steps': _at_least(1),
    'optimizer.sgd_momentum': _PROBABILITY,
    'optimizer.classifier_factor': _POSITIVE,
    'optimizer.bias_factor': _POSITIVE,
    'optimizer.whitening_bias_epochs': _at_least(0),
    'schedule.name': _one_of(*SCHEDULE_FIELDS),
    'schedule.decay_per_epoch': (lambda v: 0 < v <= 1, 'must be in (0, 1]'),
    'schedule.warmup_epochs': _at_least(0),
    'ema_decay': _PROBABILITY,
    'test_time_augmentation': _one_of('none', 'mirror', 'mirror_translate'),
    'early_stopping.metric': _one_of('validation_accuracy', 'validation_loss'),
    'early_stopping.patience': _at_least(0),
    'early_stopping.min_delta': _at_least(0),
    'keep_checkpoints': _at_least(1),
    'checkpoint_every_steps': _at_least(0),
    'checkpoint_every_minutes': _at_least(0),
    'on_divergence': _one_of('stop', 'rewind'),
    'max_rewinds': _at_least(0),
    'num_devices': _at_least(0),
    'steps_per_call': _at_least(0),
}


def validate(config: ConfigDict) -> None:
    """Checks fields, types and ranges.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    expected, actual = flatten(defaults()), flatten(config)
    for field in actual:
        if field not in expected:
            raise ConfigError(f'unknown field {field!r}; configs/default.py lists the fields')
    for field, value in expected.items():
        if field not in actual:
            raise ConfigError(f'field {field!r} is missing; configs/default.py lists the fields')
        if not _same_type(actual[field], value):
            raise ConfigError(f'{field} must be of type {type(value).__name__}, not {actual[field]!r}')
    for field, (holds, message) in _RULES.items():
        if not holds(actual[field]):
            raise ConfigError(f'{field} {message}, not {actual[field]!r}')
    if config.model.name == 'vit':
        _validate_vit(config)
    if config.augment.random_mirror and config.augment.alternating_mirror:
        raise ConfigError('augment.random_mirror and augment.alternating_mirror exclude each other')
    if not config.splits.validation and config.early_stopping.patience:
        raise ConfigError(
            'splits.validation is empty, so there is nothing to stop early by: set early_stopping.patience to 0'
        )
    if 'warmup_epochs' in SCHEDULE_FIELDS[config.schedule.name] and config.schedule.warmup_epochs > config.num_epochs:
        raise ConfigError('schedule.warmup_epochs must not exceed num_epochs')


def _validate_vit(config: ConfigDict) -> None:
    model = config.model
    if model.embed_dim % model.num_heads:
        raise ConfigError('model.embed_dim must be divisible by model.num_heads')
    if model.patch_stem == 'convolutional' and model.patch_size % 2:
        raise ConfigError("model.patch_stem 'convolutional' halves the image, so that model.patch_size must be even")
    if model.patch_stem == 'convolutional' and model.embed_dim < 4:
        raise ConfigError("model.patch_stem 'convolutional' begins with model.embed_dim // 4 features: set 4 or more")
    if config.optimizer.name == 'muon':
        raise ConfigError("optimizer.name 'muon' is for convolutional networks; train the vit with 'adamw'")


def _same_type(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(map(_is_number, value))
    if isinstance(example, float):
        return _is_number(value)
    return type(value) is type(example)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
    """The config as one dict from dotted field to value."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else {f'{prefix}{key}': value})
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; `from_json` gives the same config back."""
    return json.dumps(config.to_dict(), indent=2) + '\n'


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote; a field that is newer than the text gets its default, with which nothing changes.

    Raises:
        ConfigError: not JSON, or not a valid config.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not values:
            raise TypeError('not a JSON object with fields')
        config = ConfigDict(_completed(_lists_to_tuples(values), defaults().to_dict()))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f'not a config: {_one_line(error)}') from error
    validate(config)
    return config


def _completed(values: Any, usual: Any) -> Any:
    """The values, and the usual ones of what they lack, in groups as well."""
    if not isinstance(values, dict) or not isinstance(usual, dict):
        return values
    return values | {key: _completed(values.get(key, usual[key]), usual[key]) for key in usual}


def _lists_to_tuples(value: Any) -> Any:
    """JSON has no tuples, and configs have no lists."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


# Fields that say how a run is carried out; they may differ when it goes on, and between seeds of a study. Two of them
# change more than rounding: they move dropout masks, mixing, and a batch norm that is not synchronised.
PARTITION_FIELDS = ('accumulate_steps', 'num_devices')
EXECUTION_FIELDS = (
    *PARTITION_FIELDS,
    'checkpoint_every_minutes',
    'checkpoint_every_steps',
    'evaluation_batch_size',
    'keep_checkpoints',
    'max_rewinds',
    'on_divergence',
    'steps_per_call',
)

# Schedules in which no epoch depends on how many there are to be: a longer run begins with the shorter one.
OPEN_ENDED_SCHEDULES = ('constant', 'exponential')


def without_effect(config: ConfigDict) -> set[str]:
    """Fields that change nothing in a run: of other models, optimizers and schedules, and of what is off.

    Of a name that is not valid no field is without effect.
    """
    fields = set()
    for group, by_name in (('model', MODEL_FIELDS), ('optimizer', OPTIMIZER_FIELDS), ('schedule', SCHEDULE_FIELDS)):
        taken = by_name.get(config[group].name, tuple(config[group]))
        fields |= {f'{group}.{field}' for field in set(config[group]) - {'name', *taken}}
    if config.model.name != 'airbench':
        fields.add('optimizer.whitening_bias_epochs')
    if config.model.name not in BATCH_NORM_MODELS:
        fields.add('synchronize_batch_norm')
    if not config.augment.random_resized_crop:
        fields.update(CROP_FIELDS)
    if not config.splits.validation:
        fields.update(('early_stopping.metric', 'early_stopping.min_delta'))
    return fields


def differing_fields(left: ConfigDict, right: ConfigDict) -> list[str]:
    """Dotted names of the fields that make two runs different ones."""
    left_fields, right_fields = flatten(left), flatten(right)
    return [
        field
        for field in left_fields
        if field not in EXECUTION_FIELDS and left_fields[field] != right_fields.get(field)
    ]

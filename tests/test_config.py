import inspect
import json
import math
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import configs
from configs import default
from flax_dlvc.config import (
    BATCH_NORM_MODELS,
    MODEL_FIELDS,
    differing_fields,
    flatten,
    from_json,
    parse_command_line,
    to_json,
    validate,
    without_effect,
)
from flax_dlvc.errors import ConfigError
from flax_dlvc.main import make_parser

CONFIG_FILES = sorted(
    path for path in Path(configs.__file__).parent.glob('*.py') if path.stem not in ('__init__', 'default')
)
RECIPES = ('fast94', 'fast96', 'resnet18_strong', 'vit_strong')
OF_THE_REPORT = [
    f'{model}{suffix}'
    for model in ('cnn', 'resnet18', 'vit')
    for suffix in ('', '_dropout', '_augment', '_dropout_augment')
]
EXECUTION_FIELDS = [
    'accumulate_steps',
    'checkpoint_every_minutes',
    'checkpoint_every_steps',
    'evaluation_batch_size',
    'keep_checkpoints',
    'max_rewinds',
    'num_devices',
    'on_divergence',
    'steps_per_call',
]
QUICKSTART = str(Path(configs.__file__).parent / 'quickstart.py')


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line as a process that was started with it."""

    def parse_process(*arguments):
        argv = ['main', *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', argv)
        return parse_command_line(make_parser(), argv)[1]

    return parse_process


def refused(match, call, *arguments):
    with pytest.raises(ConfigError, match=match) as caught:
        call(*arguments)
    assert '\n' not in str(caught.value)
    assert 'Traceback' not in str(caught.value)


def with_field(field, value):
    """The default config with one field replaced, whatever the value's type."""
    values = default.get_config().to_dict()
    group = values
    *parents, last = field.split('.')
    for parent in parents:
        group = group[parent]
    group[last] = value
    return ConfigDict(values)


def test_default_is_valid():
    validate(default.get_config())


def test_json_round_trip():
    config = default.get_config()
    config.augment.random_resized_crop_scale = (0.25, 0.1 + 0.2)
    config.seed = 2**32 - 1
    config.learning_rate = 1 / 3
    again = from_json(to_json(config))
    assert flatten(again) == flatten(config)
    assert {field: type(value) for field, value in flatten(again).items()} == {
        field: type(value) for field, value in flatten(config).items()
    }
    assert again.augment.random_resized_crop_scale == (0.25, 0.1 + 0.2)
    assert to_json(again) == to_json(config)
    json.loads(to_json(config))


@pytest.mark.parametrize(
    'text',
    ['', '{', 'null', '3', '[]', '"seed"', '{"seed": 1', '[' * 100_000, '{"a":' * 600 + '1' + '}' * 600, '\x00', '{}'],
)
def test_json_of_something_else(text):
    refused('config|missing', from_json, text)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('seed', True),
        ('seed', 1.0),
        ('seed', '1'),
        ('seed', None),
        ('num_epochs', True),
        ('learning_rate', '0.001'),
        ('learning_rate', True),
        ('learning_rate', None),
        ('dataset', 3),
        ('augment.random_mirror', 1),
        ('augment.random_mirror', 'yes'),
        ('augment.random_resized_crop_scale', 0.5),
        ('augment.random_resized_crop_scale', [0.08, 1.0]),
        ('augment.random_resized_crop_scale', (True, 1.0)),
        ('augment.random_resized_crop_scale', ('0.08', '1')),
        ('splits.train', ('train',)),
    ],
)
def test_wrong_type(field, value):
    refused(f'^{re.escape(field)} must be of type ', validate, with_field(field, value))


def test_a_list_in_json_is_a_tuple():
    text = to_json(default.get_config()).replace('"seed": 0', '"seed": [0, 1]')
    refused(r'^seed must be of type int, not \(0, 1\)', from_json, text)


@pytest.mark.parametrize('value', [1, 0.5])
def test_a_number_without_a_point_is_a_float(value):
    validate(with_field('learning_rate', value))


@pytest.mark.parametrize('field', ['foo', 'model.foo', 'seed.foo'])
def test_unknown_field(field):
    config = with_field('seed', {'foo': 1}) if field == 'seed.foo' else with_field(field, 1)
    refused(f"^unknown field '{field}'", validate, config)
    refused(f"^unknown field '{field}'", from_json, json.dumps(config.to_dict()))


@pytest.mark.parametrize('field', sorted(flatten(default.get_config())))
def test_missing_field(field):
    values = default.get_config().to_dict()
    group = values
    *parents, last = field.split('.')
    for parent in parents:
        group = group[parent]
    usual = group.pop(last)
    refused(f"^field '{re.escape(field)}' is missing", validate, ConfigDict(values))
    # A run directory's config.json may be older than the field.
    assert flatten(from_json(json.dumps(values)))[field] == usual


def test_missing_group():
    config = default.get_config()
    config.augment.cutout, config.seed = 8, 3
    values = config.to_dict()
    assert flatten(from_json(json.dumps(values))) == flatten(config)
    del values['augment']
    refused(r"^field 'augment\.\w+' is missing", validate, ConfigDict(values))
    expected = flatten(config) | {'augment.cutout': 0}
    assert flatten(from_json(json.dumps(values))) == expected
    refused("^unknown field 'augment'", from_json, json.dumps(values | {'augment': 3}))


# Field, values just inside the range, values just outside.
RANGES = [
    ('name', ['', 'cnn', '..cnn', 'a b'], ['../cnn', '/cnn', 'cnn/', '.', '..', 'c\0nn']),
    ('seed', [0, 2**32 - 1], [-1, 2**32]),
    ('batch_size', [1], [0, -1]),
    ('accumulate_steps', [1], [0, -1]),
    ('evaluation_batch_size', [1], [0, -1]),
    ('model.name', ['cnn', 'resnet18', 'vit', 'airbench'], ['', 'CNN', 'resnet']),
    ('model.stem', ['imagenet', 'cifar'], ['', 'cifar10']),
    ('model.embed_dim', [1], [0, -1]),
    ('model.hidden_dim', [1], [0, -1]),
    ('model.num_heads', [1], [0, -1]),
    ('model.num_layers', [1], [0, -1]),
    ('model.patch_size', [1], [0, -1]),
    ('compute_dtype', ['float32', 'bfloat16'], ['float16', '']),
    ('dropout_rate', [0.0, 0.999], [-0.001, 1.0]),
    ('label_smoothing', [0.0, 0.999], [-0.001, 1.0]),
    (
        'augment.random_resized_crop_scale',
        [(0.01, 1.0), (1.0, 1.0)],
        [
            (0.0, 1.0),
            (-0.5, 0.5),
            (0.5, 1.01),
            (0.8, 0.5),
            (0.5,),
            (0.1, 0.5, 1.0),
            (),
            (math.nan, 1.0),
            (0.1, math.nan),
        ],
    ),
    (
        'augment.random_resized_crop_ratio',
        [(0.5, 2.0), (1.0, 1.0), (3.0, 4.0)],
        [(0.0, 1.0), (-1.0, 1.0), (2.0, 0.5), (1.0,), (1.0, 2.0, 3.0), (), (math.nan, 1.0), (1.0, math.inf)],
    ),
    ('num_epochs', [1], [0, -1]),
    ('learning_rate', [1e-9, 100.0], [0.0, -1e-3, math.inf]),
    ('optimizer.name', ['adamw', 'sgd', 'muon'], ['adam', '']),
    ('optimizer.newton_schulz_steps', [1], [0]),
    ('optimizer.sgd_momentum', [0.0, 0.9], [-0.1, 1.0]),
    ('optimizer.classifier_factor', [0.1, 5000.0], [0.0, -1.0, math.inf]),
    ('optimizer.bias_factor', [0.1, 5000.0], [0.0, -1.0, math.inf]),
    ('optimizer.whitening_bias_epochs', [0.0, 3.0], [-0.1, math.inf]),
    ('test_time_augmentation', ['none', 'mirror', 'mirror_translate'], ['six', '']),
    ('model.widths', [(1, 1, 1)], [(1, 1), (0, 1, 1), (1.5, 2, 2)]),
    ('model.depth', [2, 3], [1, 4]),
    ('augment.random_translate', [0, 4], [-1]),
    ('augment.mixup_alpha', [0.0, 0.8], [-0.1, math.inf]),
    ('augment.cutmix_alpha', [0.0, 1.0], [-0.1, math.inf]),
    ('model.patch_stem', ['linear', 'convolutional'], ['', 'conv']),
    ('model.stochastic_depth_rate', [0.0, 0.1], [-0.1, 1.0]),
    ('augment.cutout', [0, 12], [-1]),
    ('optimizer.momentum', [0.0, 0.999], [-0.1, 1.0]),
    ('optimizer.weight_decay', [0.0, 10.0], [-0.1, math.inf]),
    ('optimizer.gradient_clip_norm', [0.0, 10.0], [-0.1, math.inf]),
    ('schedule.name', ['constant', 'exponential', 'linear', 'cosine', 'one_cycle'], ['quadratic', '']),
    ('schedule.decay_per_epoch', [1e-9, 1.0], [0.0, 1.001, -0.5]),
    ('schedule.warmup_epochs', [0.0, 0.5, 30.0], [-0.1, 30.5, math.inf]),
    ('ema_decay', [0.0, 0.9999], [-0.1, 1.0]),
    ('early_stopping.metric', ['validation_accuracy', 'validation_loss'], ['test_accuracy', '']),
    ('early_stopping.patience', [0, 100], [-1]),
    ('early_stopping.min_delta', [0.0, 10.0], [-0.1, math.inf]),
    ('keep_checkpoints', [1], [0, -1]),
    ('checkpoint_every_steps', [0, 100], [-1]),
    ('checkpoint_every_minutes', [0.0, 0.5], [-0.1, math.inf]),
    ('on_divergence', ['stop', 'rewind'], ['', 'ignore']),
    ('max_rewinds', [0, 3], [-1]),
    ('num_devices', [0, 8], [-1]),
    ('steps_per_call', [0, 50], [-1]),
]


@pytest.mark.parametrize(('field', 'value'), [(field, value) for field, inside, _ in RANGES for value in inside])
def test_inside_the_range(field, value):
    validate(with_field(field, value))


@pytest.mark.parametrize(('field', 'value'), [(field, value) for field, _, outside in RANGES for value in outside])
def test_outside_the_range(field, value):
    refused(f'^{re.escape(field)} must ', validate, with_field(field, value))


FLOAT_FIELDS = sorted(field for field, value in flatten(default.get_config()).items() if isinstance(value, float))


@pytest.mark.parametrize('field', FLOAT_FIELDS)
def test_nan_is_never_in_range(field):
    refused(f'^{re.escape(field)} must .* not nan$', validate, with_field(field, math.nan))


def test_every_field_has_a_range():
    fields = {field for field, value in flatten(default.get_config()).items() if not isinstance(value, bool)}
    free_text = {'dataset', 'init_from', 'splits.train', 'splits.validation', 'splits.test'}
    assert fields - free_text == {field for field, _, _ in RANGES}


def test_heads_divide_the_embedding():
    config = with_field('model.num_heads', 3)
    validate(config)  # a CNN has none
    config.model.name = 'vit'
    refused('model.embed_dim must be divisible by model.num_heads', validate, config)
    config.model.embed_dim = 255
    validate(config)


def expected_settings(name):
    """Model, dropout rate, augmentation and dataset that a config's name promises."""
    if name == 'quickstart':
        return 'cnn', 0.5, False, 'digits'
    model, *regularizations = name.split('_')
    dropout_rate = (0.2 if model == 'vit' else 0.5) if 'dropout' in regularizations else 0.0
    return model, dropout_rate, 'augment' in regularizations, 'cifar10'


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_spares_the_test_images(parse, path):
    config = parse('--config', path)
    assert config.name == path.stem
    assert 'test' not in config.splits.train + config.splits.validation


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(parse, name):
    config = parse('--config', Path(configs.__file__).with_name(f'{name}.py'))
    assert (config.dataset, config.splits.test) == ('cifar10', 'test')


@pytest.mark.parametrize('name', [*OF_THE_REPORT, 'quickstart'])
def test_config_of_the_report(parse, name):
    config = parse('--config', Path(configs.__file__).with_name(f'{name}.py'))
    model, dropout_rate, augmented, dataset = expected_settings(name)
    assert config.model.name == model
    assert config.dropout_rate == dropout_rate
    assert config.augment.random_resized_crop is augmented
    assert config.augment.random_mirror is augmented
    assert config.augment.random_resized_crop_scale == (0.08, 1.0)
    assert config.augment.random_resized_crop_ratio == (3 / 4, 4 / 3)
    assert config.dataset == dataset
    assert config.optimizer.name == 'adamw'


def test_overrides(parse):
    config = parse(
        f'--config={QUICKSTART}',
        '--config.seed=7',
        '--config.learning_rate=1',
        '--config.model.name=vit',
        '--config.augment.random_mirror=true',
        '--config.augment.random_resized_crop_scale=(0.5,1.0)',
        '--config.splits.train=train[:10%]',
    )
    assert (config.seed, config.model.name, config.augment.random_mirror) == (7, 'vit', True)
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.augment.random_resized_crop_scale == (0.5, 1.0)
    assert config.splits.train == 'train[:10%]'
    assert config.name == 'quickstart'


def test_further_flags(monkeypatch):
    argv = ['main', '--config', QUICKSTART, '--workdir', 'somewhere']
    monkeypatch.setattr(sys, 'argv', argv)
    arguments, _ = parse_command_line(make_parser(), argv)
    assert arguments.workdir == Path('somewhere') and not arguments.profile


def test_overrides_are_read_from_the_given_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['another program'])
    argv = ['main', '--config', QUICKSTART, '--config.seed=7']
    assert parse_command_line(make_parser(), argv)[1].seed == 7


def test_command_lines_are_independent(parse):
    assert parse('--config', QUICKSTART, '--config.seed=7').seed == 7
    assert parse('--config', QUICKSTART).seed == 0


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ([], 'no config: say --config'),
        (['--config'], 'no config: say --config'),
        (['--config='], 'no config: say --config'),
        (['--config.seed=1'], 'no config: say --config'),
        (['--config', '/nowhere/to_be_found.py'], '^/nowhere/to_be_found.py is not a file: say --config'),
        (['--config=/', '--config.seed=1'], '^/ is not a file'),
        (['--config', 'x' * 300], f'^{"x" * 300} is not a file'),
        (['--config', QUICKSTART, '--config.foo=1'], "unknown field 'foo'"),
        (['--config', QUICKSTART, '--config.model.foo=1'], "unknown field 'model.foo'"),
        (['--config', QUICKSTART, '--config.seed=abc'], "^seed must be of type int, not 'abc'$"),
        (['--config', QUICKSTART, '--config.seed=1.5'], r"^seed must be of type int, not '1\.5'$"),
        (['--config', QUICKSTART, '--config.seed=-1'], r'seed must be in \[0, 2\*\*32\), not -1'),
        (['--config', QUICKSTART, '--config.seed'], 'Missing value for flag --config.seed'),
        (['--config', QUICKSTART, '--config.learning_rate=x'], "^learning_rate must be of type float, not 'x'$"),
        (['--config', QUICKSTART, '--config.learning_rate=nan'], 'learning_rate must be positive'),
        (
            ['--config', QUICKSTART, '--config.augment.random_mirror=maybe'],
            'random_mirror must be of type bool',
        ),
        (['--config', QUICKSTART, '--config.batch_size='], "^batch_size must be of type int, not ''$"),
        (['--config', QUICKSTART, '--config.augment.random_resized_crop_scale=(0.5,'], 'random_resized_crop_scale'),
        (['--config', QUICKSTART, '--config.augment.random_resized_crop_scale=0.5'], 'random_resized_crop_scale must'),
        (['--config', QUICKSTART, '--config.augment.random_resized_crop_scale=(a,b)'], 'random_resized_crop_scale'),
        (['--config', QUICKSTART, '--config.model=3'], 'config.model=3'),
        (['--config', QUICKSTART, '--foo=1'], "^unknown flag '--foo=1'; see --help$"),
        (['--config', QUICKSTART, '--work', 'x'], "^unknown flag '--work'"),
        (['--config', QUICKSTART, '--undefok=foo', '--foo'], "^unknown flag '--undefok=foo'"),
        (['--config', QUICKSTART, '--flagfile=/etc/passwd'], "^unknown flag '--flagfile"),
        (['--config', QUICKSTART, 'surplus'], "'surplus' is not a flag"),
        (['--config', QUICKSTART, '--config.seed=1', '2'], "'2' is not a flag"),
    ],
    ids=lambda value: ' '.join(value[2:] or value) if isinstance(value, list) else '',
)
def test_refused_command_line(parse, arguments, match):
    refused(match, parse, *arguments)


GET_DEFAULT = 'from configs import default\ndef get_config():\n    config = default.get_config()\n    '


@pytest.mark.parametrize(
    ('text', 'match'),
    [
        ('def get_config(:\n', r'broken\.py: SyntaxError.*line 1'),
        ('1 / 0\n', r'broken\.py: ZeroDivisionError: division by zero'),
        ('import no_such_module\n', r'broken\.py: .*No module named .no_such_module'),
        ('open("/nowhere")\n', r"broken\.py: .*No such file or directory: '/nowhere'"),
        ('raise SystemExit(3)\n', r'broken\.py: SystemExit'),
        ('raise KeyError("SIZE") from ValueError("unset")\n', r'broken\.py: KeyError: .SIZE'),
        ('def get_config():\n    raise ValueError("many words")\n', 'many words'),
        ('def get_config():\n    raise ValueError("two\\nlines")\n', 'lines'),
        ('def get_config(): pass\n', r'broken\.py.*get_config\(\)'),
        ('def get_config(): return 3\n', r'broken\.py.*get_config\(\)'),
        ('def get_config(): return {}\n', r'broken\.py.*get_config\(\)'),
        ('from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()\n', 'field .* is missing'),
        (GET_DEFAULT + 'config.foo = 1\n    return config\n', "unknown field 'foo'"),
        (GET_DEFAULT + 'del config.seed\n    return config\n', "field 'seed' is missing"),
        (GET_DEFAULT + 'del config.name\n    return config\n', "field 'name' is missing"),
        (GET_DEFAULT + 'config.seed = "1"\n    return config\n', 'seed'),
    ],
)
def test_refused_config_file(parse, tmp_path, text, match):
    path = tmp_path / 'broken.py'
    path.write_text(text)
    refused(match, parse, '--config', path)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'embed_dim': 20}, 'embed_dim must be divisible by model.num_heads'),
        ({'patch_stem': 'convolutional', 'patch_size': 3}, 'patch_size must be even'),
        ({'patch_stem': 'convolutional', 'embed_dim': 2, 'num_heads': 1}, 'set 4 or more'),
    ],
)
def test_a_vit_that_cannot_be_built_is_refused_and_does_not_matter_to_others(fields, message):
    config = default.get_config()
    config.model.update(fields)
    validate(config)
    config.model.name = 'vit'
    refused(message, validate, config)


def test_muon_does_not_train_the_vit():
    config = with_field('optimizer.name', 'muon')
    validate(config)
    config.model.name = 'vit'
    refused("optimizer.name 'muon' is for convolutional networks", validate, config)


def test_fields_of_other_models_and_of_what_is_off_have_no_effect():
    config = with_field('model.name', 'resnet18')
    crops = {'augment.random_resized_crop_scale', 'augment.random_resized_crop_ratio'}
    others = {f'model.{field}' for field in config.model} - {'model.name', 'model.stem'}
    muons = ('newton_schulz_steps', 'sgd_momentum', 'classifier_factor', 'bias_factor', 'whitening_bias_epochs')
    of_adamw = {'optimizer.momentum', *(f'optimizer.{field}' for field in muons)}
    assert without_effect(config) == others | crops | of_adamw
    config.augment.random_resized_crop = True
    config.schedule.name, config.schedule.warmup_epochs = 'one_cycle', 40.0
    validate(config)  # as it warms up by itself
    assert without_effect(config) == others | of_adamw | {'schedule.decay_per_epoch', 'schedule.warmup_epochs'}
    config.model.name, config.schedule.name, config.optimizer.name = 'cnn', 'exponential', 'muon'
    config.splits.validation = ''
    idle = {'synchronize_batch_norm', 'early_stopping.metric', 'early_stopping.min_delta'}
    assert without_effect(config) == others | {'model.stem', 'optimizer.whitening_bias_epochs'} | idle
    config.model.name = 'airbench'
    assert without_effect(config) == others - {'model.widths', 'model.depth'} | {'model.stem'} | idle - {
        'synchronize_batch_norm'
    }


def test_the_fields_of_each_model_are_those_that_it_takes():
    from flax_dlvc.models import MODELS

    options = set(default.get_config().model) - {'name'}
    parameters = {name: inspect.signature(model).parameters.keys() for name, model in MODELS.items()}
    assert {name: options & taken for name, taken in parameters.items()} == {
        name: set(fields) for name, fields in MODEL_FIELDS.items()
    }
    assert {name for name, taken in parameters.items() if 'batch_norm_axis' in taken} == {*BATCH_NORM_MODELS}


def test_differing_fields():
    left, right = default.get_config(), default.get_config()
    assert differing_fields(left, right) == []
    right.seed = 1
    right.model.embed_dim = 128
    right.augment.random_resized_crop_scale = (0.5, 1.0)
    expected = ['seed', 'model.embed_dim', 'augment.random_resized_crop_scale']
    assert sorted(differing_fields(left, right)) == sorted(expected)
    assert sorted(differing_fields(right, left)) == sorted(expected)


@pytest.mark.parametrize('field', EXECUTION_FIELDS)
def test_execution_fields_do_not_make_another_run(field):
    assert differing_fields(default.get_config(), with_field(field, 17)) == []


@pytest.mark.parametrize('field', sorted(flatten(default.get_config()).keys() - EXECUTION_FIELDS))
def test_any_other_field_does(field):
    assert differing_fields(default.get_config(), with_field(field, 'something else')) == [field]


def test_no_validation_means_no_early_stopping():
    config = default.get_config()
    config.splits.validation = ''
    with pytest.raises(ConfigError, match=r'early_stopping\.patience to 0'):
        validate(config)
    config.early_stopping.patience = 0
    validate(config)

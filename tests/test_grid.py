"""The grid: its order, its axes, and what they leave alone."""

import pytest

from flax_dlvc import rundir
from flax_dlvc.config import parse_command_line
from flax_dlvc.errors import ConfigError
from flax_dlvc.grid import plan
from flax_dlvc.main import make_parser


def test_the_grid_is_models_by_regularizations_by_seeds(tmp_path):
    grid = plan(
        tmp_path,
        models=['cnn', 'vit'],
        regularizations=['none', 'dropout_augment'],
        seeds=2,
        overrides=['--config.dataset=digits'],
    )
    names = [planned.directory.relative_to(tmp_path).as_posix() for planned in grid]
    cells = ('cnn', 'cnn_dropout_augment', 'vit', 'vit_dropout_augment')
    assert names == [f'{cell}/seed_{seed}' for cell in cells for seed in (0, 1)]
    assert all(planned.config.dataset == 'digits' for planned in grid)
    assert [planned.config.seed for planned in grid] == [0, 1] * 4


def test_a_model_without_config_files_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'there is no .*configs/unknown\.py; a study takes'):
        plan(tmp_path, models=['unknown'], regularizations=['none'], seeds=1)


def test_a_crop_axis_shares_the_files_own_value_and_spares_what_does_not_crop(tmp_path):
    grid = plan(
        tmp_path,
        models=['cnn'],
        regularizations=['none', 'augment'],
        seeds=1,
        vary=['augment.random_resized_crop_scale_min=0.08,0.5'],
    )
    assert {planned.cell: planned.config.augment.random_resized_crop_scale for planned in grid} == {
        'cnn': (0.08, 1.0),
        'cnn_augment': (0.08, 1.0),
        'cnn_augment,augment.random_resized_crop_scale_min=0.5': (0.5, 1.0),
    }


def test_an_axis_of_tuples_and_one_of_numbers(tmp_path):
    axes = ['augment.random_resized_crop_scale=(0.5,1.0),(0.25, 0.75)', 'learning_rate=0.01']
    grid = plan(tmp_path, models=['cnn'], regularizations=['augment'], seeds=1, vary=axes)
    scales = [planned.config.augment.random_resized_crop_scale for planned in grid]
    assert scales == [(0.5, 1.0), (0.25, 0.75)]
    assert {planned.config.learning_rate for planned in grid} == {0.01}


def test_ends_of_a_pair_are_set_one_after_the_other(tmp_path):
    stem = 'augment.random_resized_crop_scale'
    grid = plan(
        tmp_path,
        models=['cnn'],
        regularizations=['augment'],
        seeds=1,
        overrides=[f'--config.{stem}=(0.5, 0.9)'],
        vary=[f'{stem}_min=0.25,0.5', f'{stem}_max=0.75,0.9'],
    )
    scales = [planned.config.augment.random_resized_crop_scale for planned in grid]
    assert scales == [(0.25, 0.75), (0.25, 0.9), (0.5, 0.75), (0.5, 0.9)]
    assert all(len([flag for flag in planned.command if flag.startswith(f'--config.{stem}=')]) == 1 for planned in grid)


def test_an_axis_can_switch_crops_on(tmp_path):
    axes = ['augment.random_resized_crop=True,False', 'augment.random_resized_crop_scale_min=0.25,0.5']
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes)
    settings = [planned.config.augment for planned in grid]
    assert [(each.random_resized_crop, each.random_resized_crop_scale[0]) for each in settings] == [
        (True, 0.25), (True, 0.5), (False, 0.08),
    ]  # fmt: skip


@pytest.mark.parametrize('order', [1, -1])
def test_axes_may_come_in_any_order(tmp_path, order):
    axes = ['augment.random_resized_crop_scale_min=0.25,0.5', 'augment.random_resized_crop=True,False'][::order]
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes)
    settings = [planned.config.augment for planned in grid]
    assert {(each.random_resized_crop, each.random_resized_crop_scale[0]) for each in settings} == {
        (True, 0.25), (True, 0.5), (False, 0.08),
    }  # fmt: skip


def test_a_cell_of_a_split_is_a_directory_in_which_checkpoints_can_be_saved(tmp_path):
    axes = ['splits.train=train[:20%],train[20%:40%]']
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes)
    assert [planned.cell for planned in grid] == ['cnn,splits.train=train(:20%)', 'cnn,splits.train=train(20%:40%)']
    for planned in grid:
        assert rundir.check(planned.directory, planned.config) is None


def test_a_row_without_dropout_stays_one(tmp_path):
    grid = plan(
        tmp_path,
        models=['cnn'],
        regularizations=['none', 'dropout'],
        seeds=1,
        vary=['dropout_rate=0.2,0.5'],
    )
    assert {planned.cell: planned.config.dropout_rate for planned in grid} == {
        'cnn': 0.0,
        'cnn_dropout,dropout_rate=0.2': 0.2,
        'cnn_dropout': 0.5,
    }


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize(
    'axes',
    [
        ['model.embed_dim=100,200', 'model.num_heads=5,10'],
        ['augment.random_resized_crop_scale_max=0.05,0.5', 'augment.random_resized_crop_scale_min=0.01'],
        ['schedule.warmup_epochs=40', 'num_epochs=50'],
        ['augment.alternating_mirror=True', 'augment.random_mirror=False'],
    ],
)
def test_a_point_has_to_be_valid_as_a_whole_only(tmp_path, axes, order):
    grid = plan(tmp_path, models=['vit'], regularizations=['augment'], seeds=1, vary=axes[::order])
    first, second = (axis.partition('=')[2].split(',') for axis in axes)
    assert len({planned.cell for planned in grid}) == len(grid) == len(first) * len(second)


def test_what_every_run_shares_may_need_an_axis_to_be_valid(tmp_path):
    overrides, axes = ['--config.schedule.warmup_epochs=40'], ['num_epochs=50,60']
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes, overrides=overrides)
    assert [(planned.cell, planned.config.schedule.warmup_epochs) for planned in grid] == [
        ('cnn,num_epochs=50', 40),
        ('cnn,num_epochs=60', 40),
    ]


def test_a_model_has_no_rows_of_fields_that_it_does_not_take(tmp_path):
    axes = ['model.embed_dim=128,512', 'learning_rate=0.1']
    grid = plan(tmp_path, models=['cnn', 'vit'], regularizations=['none'], seeds=1, vary=axes)
    assert [(planned.cell, planned.config.model.embed_dim) for planned in grid] == [
        ('cnn,learning_rate=0.1', 256),
        ('vit,model.embed_dim=128,learning_rate=0.1', 128),
        ('vit,model.embed_dim=512,learning_rate=0.1', 512),
    ]


@pytest.mark.parametrize(
    ('axis', 'message'),
    [
        ('learning_rat=1', "unknown field 'learning_rat'"),
        ("early_stopping={'patience':3}", "unknown field 'early_stopping'"),
        ('model.widths[0]=3', 'unknown field'),
        ('augment.random_resized_crop_scale_min=x', 'scale_min must be a number'),
        ('augment.random_resized_crop_scale_min=2', 'scale must be .lowest, highest. with'),
        ('model.num_heads=7', 'must be divisible by'),
        ('optimizer.name=adam,sgd', "optimizer.name must be 'adamw', 'sgd' or 'muon', not 'adam'"),
        ('schedule.name=step', 'schedule.name must be'),
    ],
)
def test_a_wrong_axis_is_one_line(tmp_path, axis, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan(tmp_path, models=['vit'], regularizations=['augment'], seeds=1, vary=[axis])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('axis', 'regularization'), [('dropout_rate=0.0,0.2', 'augment'), ('model.patch_size=8', 'dropout')]
)
def test_an_axis_that_changes_no_row_is_refused(tmp_path, axis, regularization):
    field = axis.partition('=')[0]
    message = rf'^--vary {field} changes none of the rows; see --models and --regularizations$'
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, models=['cnn'], regularizations=[regularization], seeds=1, vary=[axis])
    rows = plan(tmp_path, models=['cnn', 'vit'], regularizations=[regularization, 'dropout'], seeds=1, vary=[axis])
    assert {field in row.cell for row in rows} == {True, False}  # the others stay as they are


def test_what_is_set_for_every_run_leaves_rows_without_a_technique_without_it(tmp_path):
    overrides = ['--config.dropout_rate=0.25', '--config.augment.random_mirror=False', '--config.learning_rate=0.5']
    rows = ['none', 'dropout', 'augment', 'dropout_augment']
    grid = plan(tmp_path, models=['cnn'], regularizations=rows, seeds=1, overrides=overrides)
    configs = [planned.config for planned in grid]
    assert [config.dropout_rate for config in configs] == [0.0, 0.25, 0.0, 0.25]
    assert [config.augment.random_resized_crop for config in configs] == [False, False, True, True]
    assert not any(config.augment.random_mirror for config in configs)
    assert {config.learning_rate for config in configs} == {0.5}
    for planned in grid:
        assert parse_command_line(make_parser(), planned.command[1:])[1] == planned.config

    for override in ('--config.dropout_rate=0.25', '--config.augment.random_mirror=True'):
        with pytest.raises(ConfigError, match=rf'^{override.partition("=")[0]} changes none of the rows; see --models'):
            plan(tmp_path, models=['cnn', 'vit'], regularizations=['none'], seeds=1, overrides=[override])


def test_a_value_that_is_spelled_twice_makes_one_row(tmp_path):
    axes = ['learning_rate=0.1, 0.10,1e-1,0.2', 'optimizer.momentum=0.5,0.6']  # and AdamW has no such momentum
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes[:1])
    assert [planned.cell for planned in grid] == ['cnn,learning_rate=0.1', 'cnn,learning_rate=0.2']
    with pytest.raises(ConfigError, match=r'^--vary optimizer\.momentum changes none of the rows'):
        plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1, vary=axes)


def test_the_command_of_a_run_is_its_config(tmp_path):
    axes = ['augment.random_resized_crop_ratio=(0.5,2)']
    overrides = ['--config.early_stopping.patience=0', '--config.keep_checkpoints=3', '--config.splits.validation=']
    grid = plan(tmp_path, models=['cnn'], regularizations=['augment'], seeds=2, vary=axes, overrides=overrides)
    for planned in grid:
        assert parse_command_line(make_parser(), planned.command[1:])[1] == planned.config

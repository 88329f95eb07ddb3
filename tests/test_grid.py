"""The grid: its order, its axes, and what they leave alone."""

from flax_dlvc.grid import plan


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

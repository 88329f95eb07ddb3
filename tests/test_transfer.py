"""What a run keeps of the trained model that it begins from."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import cnn
from flax_dlvc import data, rundir
from flax_dlvc.errors import ConfigError
from flax_dlvc.setup import Setup
from flax_dlvc.transfer import begin_from, load_trained, save_as_run


def make_setup(config, num_classes, channels):
    sizes = {'train': 100, 'validation': 10, 'test': 10}
    description = {'name': 'grey', 'class_names': list('abcdefg')[:num_classes], 'num_examples': sizes}
    description |= {'image_shape': [32, 32, channels], 'mean': [0.5] * channels, 'std': [0.2] * channels}
    return Setup(config, data.without_examples(description), jax.local_devices()[:1])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A CNN for three colours and five classes, as it is initialised."""
    workdir = tmp_path_factory.mktemp('transfer') / 'run'
    config = cnn.get_config()
    config.name = 'cnn'
    setup = make_setup(config, num_classes=5, channels=3)
    save_as_run(workdir, setup, setup.create_state().variables)
    return workdir


def leaves(variables):
    """Arrays by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def test_what_fits_is_kept_and_the_rest_stays_as_initialised(trained):
    config = cnn.get_config()
    config.seed, config.ema_decay = 1, 0.9
    setup = make_setup(config, num_classes=7, channels=1)
    initial = setup.create_state()
    state, anew = begin_from(trained, setup, initial)
    assert anew == ['Conv_0/kernel', 'Dense_1/bias', 'Dense_1/kernel']
    fresh, kept, begun = (leaves(tree) for tree in (initial.params, load_trained(trained)[1]['params'], state.params))
    assert set(begun) == set(fresh) == set(kept)
    for name, value in begun.items():
        np.testing.assert_array_equal(value, (fresh if name in anew else kept)[name])
        if name.endswith('kernel'):
            assert not np.array_equal(fresh[name], kept[name])
    averaged = leaves(state.ema['params'])
    for name, value in begun.items():
        np.testing.assert_array_equal(averaged[name], value)


def test_a_directory_whose_weights_cannot_be_saved_does_not_pass_for_a_run(tmp_path):
    setup = make_setup(cnn.get_config(), num_classes=5, channels=3)
    variables = jax.tree.map(lambda leaf: leaf * np.nan, setup.create_state().variables)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    with pytest.raises(FloatingPointError):
        save_as_run(tmp_path / 'run', setup, variables)
    assert rundir.check(tmp_path / 'run', setup.config) is None
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['.lock', 'notes.txt']


def test_what_is_saved_without_examples_is_evaluated_on_any_labels(trained):
    setup, _ = load_trained(trained)
    assert set(setup.dataset.test.labels) == {-1}
    images = np.zeros((10, 32, 32, 3), np.uint8)
    found = dataclasses.replace(setup.dataset, test=data.Split(images, np.arange(10, dtype=np.int32) % 5))
    rundir.check_dataset(trained, found)
    with pytest.raises(ConfigError, match=r'not what .* says of it any more'):
        rundir.check_dataset(trained, dataclasses.replace(found, test=data.Split(images[:9], found.test.labels[:9])))


def test_nothing_fits(trained, small_vit_config):
    setup = make_setup(small_vit_config, num_classes=5, channels=3)
    with pytest.raises(
        ConfigError, match=r'no array of .*run has the name and the shape of one of vit; choose another --config\.init'
    ):
        begin_from(trained, setup, setup.create_state())


def test_a_run_is_not_overwritten(trained):
    setup, variables = load_trained(trained)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob('*')}
    with pytest.raises(ConfigError, match='holds a run already; choose another --workdir'):
        save_as_run(trained, setup, variables)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob('*')} == before

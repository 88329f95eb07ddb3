"""Real Orbax directories: what goes in comes out, what is kept, what is refused."""

import dataclasses
import functools
import importlib.metadata
import logging
import logging.handlers
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from flax_dlvc import checkpoint, steps
from flax_dlvc.checkpoint import Checkpoints, Progress, inspect, versions
from flax_dlvc.errors import ConfigError, StorageError
from flax_dlvc.models import create_model
from flax_dlvc.stopping import Stopping

pytestmark = pytest.mark.usefixtures('quick_compilation')


def make_state(step=0, hidden_dim=16, seed=0):
    model = create_model(
        'vit',
        num_classes=10,
        dropout_rate=0.1,
        dtype='float32',
        embed_dim=16,
        hidden_dim=hidden_dim,
        num_heads=2,
        num_layers=1,
        patch_size=4,
    )
    state = steps.create_state(model, optax.adamw(1e-3), (8, 8, 3), 10, seed)
    return jax.device_put(state.replace(step=state.step + step), steps.replicated(jax.devices()[:1]))


@functools.cache
def target():
    """A state like those that are saved, to which they are restored."""
    return make_state()


def make_progress(epoch, best_epoch):
    history = tuple({'epoch': number, 'step': 10 * number, 'validation_loss': 1 / 3} for number in range(1, epoch + 1))
    return Progress(history, Stopping(0.1 * best_epoch, best_epoch, epoch - best_epoch), 10 * best_epoch)


def restore(workdir, step):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step, target())


def test_state_and_progress_come_back_bit_for_bit(tmp_path):
    state, progress = make_state(10, seed=5), make_progress(1, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress)
    restored, restored_progress = restore(tmp_path, 10)
    assert restored_progress == progress
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_a_version_with_other_empty_fields_comes_back(tmp_path):
    state = make_state(10, seed=5)
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    assert fields.pop('ema') == {}
    older = jax.tree_util.register_dataclass(dataclasses.make_dataclass('Older', [*fields, 'retired']))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(older(**fields, retired={}), make_progress(1, 1))
    restored, _ = restore(tmp_path, 10)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_what_is_saved_does_not_change_with_the_state(tmp_path):
    """The loop gives a state's memory to the next step while it is still being written."""
    state = make_state(10)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, make_progress(1, 1))
        jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)(state)
    restored, _ = restore(tmp_path, 10)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize('keep_latest', [1, 2])
def test_latest_and_best_are_kept(tmp_path, keep_latest):
    state = make_state()
    with Checkpoints(tmp_path, keep_latest=keep_latest) as checkpoints:
        for epoch in range(1, 7):
            checkpoints.save(state.replace(step=state.step + 10 * epoch), make_progress(epoch, min(epoch, 2)))
            checkpoints.wait()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 60
        assert checkpoints.find('best') == 20
        assert checkpoints.find('latest') == 60
    kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert kept == [20, 50, 60][-keep_latest - 1 :] if keep_latest == 2 else kept == [20, 60]


def test_the_best_is_kept_when_saving_goes_on_in_another_process(tmp_path):
    state = make_state()
    for epoch in range(1, 5):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state.replace(step=state.step + 10 * epoch), make_progress(epoch, 1))
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['10', '40']


def epochs_in_processes_of_their_own(workdir, best_epochs):
    """Saves an epoch for each entry, as `keep_checkpoints=2` and a process for each do."""
    state = make_state()
    for epoch, best_epoch in enumerate(best_epochs, 1):
        with Checkpoints(workdir, keep_latest=2) as checkpoints:
            checkpoints.restore_latest(state)
            checkpoints.save(state.replace(step=state.step + 10 * epoch), make_progress(epoch, best_epoch))


def test_the_best_of_an_older_one_that_is_kept_is_kept(tmp_path):
    epochs_in_processes_of_their_own(tmp_path, [1, 1, 1, 4])
    shutil.rmtree(tmp_path / 'checkpoints' / '40' / 'state')
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        _, progress = checkpoints.restore_latest(make_state())
        assert len(progress.history) == 3
        assert checkpoints.find('best') == 10
        checkpoints.restore(10, make_state())


def test_no_other_checkpoint_is_kept(tmp_path):
    epochs_in_processes_of_their_own(tmp_path, [1, 1, 1, 4, 4])
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['40', '50']


def test_an_epoch_that_ends_after_its_state_was_saved_is_noted_in_place(tmp_path):
    """As when a run was stopped in validation: whatever happens meanwhile, the state is there."""
    state = make_state(10, seed=5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress())
    files = {path: path.stat().st_ino for path in (tmp_path / 'checkpoints' / '10' / 'state').rglob('*')}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(checkpoints.restore_latest(state)[0], make_progress(1, 1))
        assert checkpoints.find('best') == 10
    assert files == {path: path.stat().st_ino for path in (tmp_path / 'checkpoints' / '10' / 'state').rglob('*')}
    restored, progress = restore(tmp_path, 10)
    assert progress == make_progress(1, 1)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    with Checkpoints(tmp_path) as checkpoints:  # as when a run that was rewound is stopped before its next step
        checkpoints.save(state, dataclasses.replace(progress, rewinds=2))
    assert restore(tmp_path, 10)[1].rewinds == 2


def test_another_models_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10, hidden_dim=32), make_progress(1, 1))
    with pytest.raises(ConfigError, match=r'step 10 has other arrays than .* this code make, first opt_state/'):
        restore(tmp_path, 10)


def test_a_missing_step_is_named_with_those_there_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10), make_progress(1, 1))
    with pytest.raises(ConfigError, match='no checkpoint of step 11; there are: 10'):
        restore(tmp_path, 11)
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(ConfigError, match="'best', 'latest' or"):
        checkpoints.find('newest')


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10), make_progress(1, 1))
    (tmp_path / 'checkpoints' / '10').rename(tmp_path / 'checkpoints' / '20')
    with pytest.raises(ConfigError, match=r'step 20 is damaged .* or of another step'):
        restore(tmp_path, 20)


def test_what_a_killed_process_left_of_a_save_is_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10), make_progress(1, 1))
    left = tmp_path / 'checkpoints' / '20.orbax-checkpoint-tmp-0'
    shutil.copytree(tmp_path / 'checkpoints' / '10', left)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [10]
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(20), make_progress(2, 1))
    assert not left.exists()


def test_a_last_save_that_fails_is_said_unless_something_else_is(tmp_path):
    def fail():
        raise OSError('no room')

    def leave(workdir):
        with Checkpoints(workdir) as checkpoints:
            close, checkpoints._manager.close = checkpoints._manager.close, fail
            yield
        close()

    with pytest.raises(StorageError, match=r'cannot save to .*\(no room\)'):
        list(leave(tmp_path / 'well'))
    with pytest.raises(KeyError):
        leaving = leave(tmp_path / 'otherwise')
        next(leaving)
        leaving.throw(KeyError())


@pytest.mark.parametrize('made_anew', [False, True])
def test_nothing_is_saved_in_a_directory_that_was_removed(tmp_path, made_anew):
    """Not even where a save that was under way, or somebody else, has made one of the same name since."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), Progress())
        checkpoints.wait()
        shutil.rmtree(checkpoints.directory)
        if made_anew:
            checkpoints.directory.mkdir()
        with pytest.raises(StorageError, match=r'cannot save to .*it is gone'):
            checkpoints.save(make_state(2), Progress())
        assert not [*tmp_path.glob('checkpoints/*')]


def test_a_programs_own_logging_and_hooks_stay_as_they_are(tmp_path, monkeypatch):
    """Of Orbax alone nothing is logged, and of TensorStore's closed loops nothing reported."""
    heard = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: heard.append(str(unraisable.exc_value)))
    checkpoint._ignore_closed_loops.cache_clear()
    logger = logging.getLogger('absl')
    monkeypatch.setattr(logger, 'handlers', [handler := logging.handlers.BufferingHandler(100)])
    level = logger.level
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(), make_progress(1, 1))
    checkpoint._ignore_closed_loops.cache_clear()
    for message in ('Event loop is closed', 'else'):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message)))
    assert heard == ['else']
    logger.warning('mine')
    assert [record.getMessage() for record in handler.buffer] == ['mine'] and logger.level == level


def test_rewinding_removes_what_is_newer_than_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        checkpoints.rewind()  # nothing is there yet
        for epoch in (1, 2, 3):
            checkpoints.save(make_state(10 * epoch), make_progress(epoch, min(2, epoch)))
        checkpoints.rewind()
        assert (checkpoints.steps, checkpoints.find('best')) == ([10, 20], 20)
    with Checkpoints(tmp_path / 'first epoch') as checkpoints:
        checkpoints.save(make_state(5), Progress())
        checkpoints.rewind()
        assert checkpoints.steps == []


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10), make_progress(1, 1))
    for path in (tmp_path / 'checkpoints' / '10' / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match='step 10 is damaged'):
        restore(tmp_path, 10)


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='has no checkpoints'):
        Checkpoints(tmp_path, read_only=True)
    (tmp_path / 'checkpoints').mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(ConfigError, match='holds no checkpoint'):
        checkpoints.find('best')


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
    """A directory with the checkpoints of steps 10, the best, and 20."""
    workdir = tmp_path_factory.mktemp('two')
    with Checkpoints(workdir, keep_latest=2) as checkpoints:
        for epoch in (1, 2):
            state = make_state(10 * epoch, seed=epoch)
            checkpoints.save(state, make_progress(epoch, 1))
    return workdir


def restore_latest(workdir):
    with Checkpoints(workdir, keep_latest=2) as checkpoints:
        return checkpoints.restore_latest(target())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {
    'truncated': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    'zeroed': lambda path: path.write_bytes(bytes(path.stat().st_size)),
    'bit flipped': flip_a_bit,
    'emptied': lambda path: path.write_bytes(b''),
    'removed': lambda path: path.unlink(),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_whatever_happens_to_a_file_is_detected_or_harmless(two_checkpoints, tmp_path, capsys, damage):
    """Each file of the newest checkpoint in turn: it, or the one before, comes back whole."""
    expected = {step: restore(two_checkpoints, step) for step in (10, 20)}
    newest = two_checkpoints / 'checkpoints' / '20'
    files = [path.relative_to(newest) for path in sorted(newest.rglob('*')) if path.is_file()]
    assert len(files) >= 8
    fallbacks = 0
    for number, file in enumerate(files):
        workdir = shutil.copytree(two_checkpoints, tmp_path / str(number))
        DAMAGES[damage](workdir / 'checkpoints' / '20' / file)
        state, progress = restore_latest(workdir)
        step = int(state.step)
        jax.tree.map(np.testing.assert_array_equal, state, expected[step][0])
        assert progress == expected[step][1]
        warning = capsys.readouterr().err
        if step == 10:
            fallbacks += 1
            assert 'warning: the checkpoint of step 20 is damaged' in warning
            assert (workdir / 'damaged' / '20').is_dir()
            assert not (workdir / 'checkpoints' / '20').exists()
        else:
            assert warning == ''
    assert fallbacks >= 2  # at least the arrays and the progress are not harmless


def test_an_emptied_checkpoint_is_set_aside(two_checkpoints, tmp_path):
    workdir = shutil.copytree(two_checkpoints, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / '20')
    (workdir / 'checkpoints' / '20').mkdir()
    state, _ = restore_latest(workdir)
    assert int(state.step) == 10


def test_a_step_that_is_damaged_again_is_set_aside_beside_the_first(two_checkpoints, tmp_path):
    workdir = shutil.copytree(two_checkpoints, tmp_path / 'run')
    for name in ('20', '20x'):
        shutil.rmtree(workdir / 'checkpoints' / '20', ignore_errors=True)
        shutil.copytree(workdir / 'checkpoints' / '10', workdir / 'checkpoints' / '20')
        restore_latest(workdir)
        assert (workdir / 'damaged' / name).is_dir()


def test_where_none_is_whole_nothing_is_changed(two_checkpoints, tmp_path):
    workdir = shutil.copytree(two_checkpoints, tmp_path / 'run')
    for path in (workdir / 'checkpoints').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    with pytest.raises(ConfigError, match='holds no whole checkpoint'):
        restore_latest(workdir)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['10', '20']


def test_where_the_best_is_damaged_a_run_does_not_go_on_without_it(two_checkpoints, tmp_path):
    """It would train to its end, and then have nothing to test."""
    workdir = shutil.copytree(two_checkpoints, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / '10' / 'state')
    with pytest.raises(ConfigError, match=r'step 10 is damaged .* it is the best of this run: test the newest with'):
        restore_latest(workdir)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['10', '20']


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    state = make_state(10)
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), state.params)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FloatingPointError):
        checkpoints.save(state.replace(params=params), make_progress(1, 1))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == []


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_the_fingerprint_changes_with_any_word(dtype):
    leaf = jax.numpy.arange(64).astype(dtype)
    (before, _), finite = inspect([leaf, jax.numpy.ones(1)])
    assert finite
    for index in range(64):
        (after, _), _ = inspect([leaf.at[index].add(1), jax.numpy.ones(1)])
        assert after != before
    (swapped, _), _ = inspect([leaf[::-1], jax.numpy.ones(1)])
    assert swapped != before


@pytest.mark.parametrize('number', [1.0, np.nan, np.inf])
def test_an_accelerator_computes_the_fingerprints_of_a_cpu(monkeypatch, number):
    generator = np.random.default_rng(0)
    tree = {
        'float32': jax.numpy.asarray(generator.normal(size=(3, 3, 64, 64)), 'float32'),
        'bfloat16': jax.numpy.asarray(generator.normal(size=(300, 5)), 'bfloat16').at[0, 0].set(number),
        'int32': jax.numpy.int32(-(2**31)),
        'uint32': jax.numpy.asarray(generator.integers(2**32, size=70_000, dtype=np.uint32)),
    }
    on_a_cpu = inspect(tree)
    words = np.asarray(tree['uint32']).tolist()
    assert on_a_cpu[0][-1] == sum(word * (place * 0x9E3779B2 + 1) for place, word in enumerate(words)) % 2**32
    assert on_a_cpu[1] == np.isfinite(number)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert inspect(tree) == on_a_cpu


def test_a_package_that_is_run_uninstalled_has_no_version(monkeypatch):
    version = importlib.metadata.version

    def installed(package):
        if package == 'flax_dlvc':
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    assert versions()['flax_dlvc'] == version('flax_dlvc')
    monkeypatch.setattr(importlib.metadata, 'version', installed)
    uninstalled = versions.__wrapped__()  # a process asks once
    assert uninstalled['flax_dlvc'] == '' and uninstalled['jax'] == version('jax')


def test_going_on_under_another_version_is_said(tmp_path, monkeypatch, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10), make_progress(1, 1))
        checkpoints.restore_latest(make_state())
        assert capsys.readouterr().err == ''
        saved_by = versions()['jax']
        monkeypatch.setattr('flax_dlvc.checkpoint.versions', lambda: versions() | {'jax': '99.0'})
        checkpoints.restore_latest(make_state())
    assert capsys.readouterr().err == (
        f'warning: since step 10 jax {saved_by} is now 99.0; the digits may change from here on\n'
    )

"""Random damage to everything that a user can hand over: it is read, or refused in one line; nothing else happens.

FLAX_DLVC_FUZZ sets the number of inputs of each kind, and makes them differ from time to time.
"""

import gzip
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_archive import examples, members, write_tar

from configs import default
from flax_dlvc import config, interop, loop, results, rundir, runs, tables
from flax_dlvc.archive import read_archive
from flax_dlvc.errors import CommandError
from flax_dlvc.evaluate import main as evaluate_main
from flax_dlvc.images import ImageError, read_image

INPUTS = 'FLAX_DLVC_FUZZ'
fuzz = settings(
    max_examples=int(os.environ.get(INPUTS, '100')),
    derandomize=INPUTS not in os.environ,
    database=None,
    deadline=10_000,  # milliseconds for one input: nothing hangs
    suppress_health_check=list(HealthCheck),
)

# What happens to a file's bytes: (where, as a fraction of its length; how many are dropped; what comes instead).
DAMAGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40) | st.integers(0, 100_000), st.binary(max_size=40)),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(config.flatten(default.get_config()))
VALUES = (
    st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=20)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ['True', 'none', '()', '(1,)', '(1, 2)', '(nan, inf)', '{}', '1e400', 'cifar10', 'vit', '[[[', '-0']
    )
)


def damage(content, damages):
    for where, dropped, inserted in damages:
        start = int(where * len(content))
        content = content[:start] + inserted + content[start + dropped :]
    return content


def is_read_or_refused(read, *arguments):
    """Calls; whether nothing was raised. Only what ends a command in one line may be."""
    try:
        read(*arguments)
    except (CommandError, ImageError) as error:
        assert ' '.join(str(error).split())  # as run_command prints it
        return False
    return True


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """All that is read lies here, and nothing is ever written beside it."""
    folder = tmp_path_factory.mktemp('fuzzing') / 'folder'
    folder.mkdir()
    yield folder
    assert [path.name for path in folder.parent.iterdir()] == ['folder']


@fuzz
@given(
    st.lists(
        st.tuples(st.sampled_from(FIELDS) | st.sampled_from(FIELDS) | st.text(max_size=10), VALUES),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(overrides):
    flags = [f'--config.{field}={value}' for field, value in overrides]

    def parse():
        parsed = config.load_config('configs/cnn.py', flags)
        assert config.flatten(config.from_json(config.to_json(parsed))) == config.flatten(parsed)

    is_read_or_refused(parse)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """The text files of a finished run, by name, and its config."""
    from conftest import SMALL_RUN

    from configs import cnn

    small = cnn.get_config()
    small.update_from_flattened_dict(SMALL_RUN | {'num_epochs': 1})
    small.name = 'cnn'
    workdir = tmp_path_factory.mktemp('run') / 'run'
    loop.run(small, workdir)
    evaluate_main(['', '--workdir', str(workdir)])
    rundir.write_failure(workdir, 'it was too small', 1)
    files = (each for each in workdir.iterdir() if each.suffix in ('.json', '.jsonl'))
    return {each.name: each.read_bytes() for each in files}, small


def places(value, place=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield place
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*place, key))


def put(value, place, other):
    """The value with another one at a place."""
    if not place:
        return other
    copy = value.copy()
    copy[place[0]] = put(value[place[0]], place[1:], other)
    return copy


@fuzz
@given(st.data())
def test_text_files_of_a_run(folder, whole_run, data):
    files, small = whole_run
    name = data.draw(st.sampled_from(sorted(files)))
    if data.draw(st.booleans()):
        content = damage(files[name], data.draw(DAMAGES))
    else:
        value = json.loads(files[name])
        place = data.draw(st.sampled_from(list(places(value))))
        content = json.dumps(put(value, place, data.draw(JSON))).encode()
    workdir = folder / 'cell' / 'seed_0'
    workdir.mkdir(parents=True, exist_ok=True)
    for each in files:
        (workdir / each).write_bytes(content if each == name else files[each])
    is_read_or_refused(rundir.read_dataset, workdir)
    is_read_or_refused(rundir.check, workdir, small)
    assert (rundir.read_failure(workdir) == ('it was too small', 1)) or name == 'failure.json'
    runs.describe(folder, workdir)
    is_read_or_refused(tabulate, folder)
    assert sorted(each.name for each in workdir.iterdir()) == sorted(files)
    shutil.rmtree(folder / 'cell')


def tabulate(folder):
    cells = results.group(results.read_runs(folder))
    tables.to_markdown(cells)
    tables.to_csv(cells)


@fuzz
@given(
    st.sampled_from(['binary', 'python']),
    st.booleans(),
    st.none() | st.sampled_from(['../out', '/out', 'cifar-10-batches-py/../../out', 'a/' * 60, '\n']),
    DAMAGES,
)
def test_archives(folder, kind, inside, name, damages):
    """Damaged inside or outside of the compression, with members of names that lead elsewhere."""
    splits = {'train': examples('cifar10', 12, 0), 'test': examples('cifar10', 6, 1)}
    files = members('cifar10', kind, splits)
    path = write_tar(folder / 'archive', files if name is None else files | {name: b'-'})
    content = path.read_bytes()
    path.write_bytes(
        gzip.compress(damage(gzip.decompress(content), damages), 1) if inside else damage(content, damages)
    )
    is_read_or_refused(read_archive, path, 'cifar10')
    assert [each.name for each in folder.iterdir()] == ['archive']
    path.unlink()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """One picture in several formats, as bytes."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    directory = tmp_path_factory.mktemp('pictures')
    for suffix in ('png', 'jpg', 'gif', 'webp', 'bmp', 'tiff', 'ppm', 'ico', 'tga', 'jp2'):
        Image.fromarray(pixels).save(directory / f'picture.{suffix}')
    return {path.suffix: path.read_bytes() for path in directory.iterdir()}


@fuzz
@given(st.data())
def test_images(folder, pictures, data):
    suffix = data.draw(st.sampled_from(sorted(pictures)))
    path = folder / f'picture{suffix}'
    path.write_bytes(damage(pictures[suffix], data.draw(DAMAGES)))
    is_read_or_refused(read_image, path, (32, 32, data.draw(st.sampled_from([1, 3]))))
    path.unlink()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A small model's weights as safetensors, and its setup."""
    import jax

    from configs import vit
    from flax_dlvc.setup import set_up

    small = vit.get_config()
    small.update_from_flattened_dict({'dataset': 'digits', 'model.embed_dim': 8, 'model.hidden_dim': 8})
    small.update_from_flattened_dict({'model.num_heads': 1, 'model.num_layers': 1, 'num_devices': 1})
    setup = set_up(small)
    path = tmp_path_factory.mktemp('weights') / 'weights.safetensors'
    save_file(interop.to_torch(setup, jax.device_get(setup.create_state()).variables), path)
    return setup, path.read_bytes()


@fuzz
@given(st.data())
def test_weights(folder, weights, data):
    setup, content = weights
    length = 8 + int.from_bytes(content[:8], 'little')
    header, tensors = content[:length], content[length:]
    if data.draw(st.booleans()):
        header = damage(header, data.draw(DAMAGES))
    else:
        value = json.loads(header[8:])
        place = data.draw(st.sampled_from(list(places(value))))
        text = json.dumps(put(value, place, data.draw(JSON))).encode()
        header = len(text).to_bytes(8, 'little') + text
    path = folder / 'weights.safetensors'
    path.write_bytes(header + tensors)
    workdir = folder / 'run'
    if is_read_or_refused(interop.import_weights, setup, path, workdir):
        shutil.rmtree(workdir)
    assert not workdir.exists()
    path.unlink()

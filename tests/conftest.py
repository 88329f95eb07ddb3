"""Shared fixtures: a cache of its own for the session, two CPU devices, small runs, real processes."""

import atexit
import gc
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

# Before JAX is imported anywhere; child processes get all of it, so that what one has compiled serves the others: its
# key in the cache depends on how many devices there are, even where one is used.
if 'FLAX_DLVC_CACHE_DIR' not in os.environ:
    os.environ['FLAX_DLVC_CACHE_DIR'] = tempfile.mkdtemp(prefix='flax_dlvc_tests_')
    atexit.register(shutil.rmtree, os.environ['FLAX_DLVC_CACHE_DIR'], ignore_errors=True)
os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}

import jax

from flax_dlvc import runtime
from flax_dlvc.errors import GARBAGE_THRESHOLD, STOP_SIGNALS, run_command

runtime.set_cpu_options()  # in this process as in those that it starts, to the same bits
runtime.keep_compiled_programs(Path(os.environ['FLAX_DLVC_CACHE_DIR'], 'compiled'))

gc.set_threshold(GARBAGE_THRESHOLD)  # as in every command

ROOT = Path(__file__).parents[1]

# The CNN on a fifth of the digits: 4 steps an epoch, seconds a run.
SMALL_RUN = {
    'dataset': 'digits',
    'splits.train': 'train[:20%]',
    'splits.validation': 'train[80%:]',
    'batch_size': 64,
    'evaluation_batch_size': 100,
    'num_epochs': 3,
    'num_devices': 1,
}

# Fields of a ViT that compiles and steps in no time.
SMALL_VIT = {
    'model.embed_dim': 16,
    'model.hidden_dim': 16,
    'model.num_heads': 2,
    'model.num_layers': 1,
    'model.patch_size': 8,
}


# What takes a minute or more, the longest first: a worker that got one of them last would leave the other idle.
LONG_FILES = (
    'test_distributed', 'test_kills', 'test_loop', 'test_main', 'test_study', 'test_benchmarks', 'test_docs',
    'test_checkpoint', 'test_signals', 'test_convolution', 'test_storage', 'test_interop', 'test_steps', 'test_setup',
    'test_export', 'test_tables', 'test_memory',
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG_FILES)))


def make_config(**fields: Any) -> ConfigDict:
    """The default config on digits; a field's dots are double underscores."""
    from configs import default

    config = default.get_config()
    config.dataset = 'digits'
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in fields.items()})
    return config


def read_history(workdir: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl without the one field that is a time."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != 'images_per_second'} for line in lines]


def read_events(workdir: Path) -> list[Any]:
    """Every event in a run's event files; a record is length, its checksum, data, its checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / 'tensorboard').iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack('<Q', content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def restore_latest(workdir: Path) -> Any:
    """The training state in a run's newest checkpoint."""
    from flax_dlvc import rundir
    from flax_dlvc.checkpoint import Checkpoints
    from flax_dlvc.setup import set_up

    setup = set_up(rundir.read_config(workdir))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(checkpoints.steps[-1], setup.abstract_state)[0]


def check_same_run(workdir: Path, expected: Path) -> None:
    """That two runs have the same history, the same result and, bit for bit, the same newest checkpoint."""
    assert read_history(workdir) == read_history(expected)
    assert (workdir / 'result.json').read_text() == (expected / 'result.json').read_text()
    ours, theirs = (
        {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in jax.tree.leaves_with_path(state)}
        for state in map(restore_latest, (workdir, expected))
    )
    assert list(ours) == list(theirs)
    assert not [name for name in ours if ours[name] != theirs[name]]


@pytest.fixture(scope='session')
def digits() -> Any:
    """The embedded dataset."""
    from flax_dlvc import data

    return data.load(make_config())


@pytest.fixture
def small_config() -> ConfigDict:
    """The config of a small run, to be changed as a test likes."""
    from configs import cnn

    config = cnn.get_config()
    config.update_from_flattened_dict(SMALL_RUN)
    config.name = 'cnn'
    return config


@pytest.fixture(scope='session')
def small_vit_config() -> ConfigDict:
    """The smallest ViT on the same data."""
    from configs import vit

    config = vit.get_config()
    config.update_from_flattened_dict(SMALL_RUN | SMALL_VIT)
    config.name = 'vit'
    return config


@pytest.fixture(scope='session')
def small_run_flags() -> list[str]:
    """The same as flags."""
    return [f'--config.{field}={value}' for field, value in SMALL_RUN.items()]


@pytest.fixture(scope='session')
def small_vit_flags(small_run_flags: list[str]) -> list[str]:
    """Those of the smallest ViT on the same data."""
    return [*small_run_flags, *(f'--config.{field}={value}' for field, value in SMALL_VIT.items())]


@pytest.fixture(scope='module')
def quick_compilation() -> Iterator[None]:
    """For files whose programs run for a second: XLA optimises them little, here and in the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
        jax.config.update('jax_disable_most_optimizations', True)
        yield
    jax.config.update('jax_disable_most_optimizations', False)
    jax.clear_caches()  # none of them is left to other files


@pytest.fixture
def process_as_it_was() -> Iterator[None]:
    """For commands in this process: what `run_command` sets in it ends with the test."""
    threshold, handlers = gc.get_threshold(), {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    gc.set_threshold(*threshold)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command_here(
    process_as_it_was: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess]:
    """`command` in this process, where all is imported already: for what does not depend on a process of its own."""

    def command_here(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        words = [f'flax_dlvc.{module}', *map(str, arguments)]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, 'argv', words)
            for name, value in environment.items():
                patch.setenv(name, value)
            run_command(importlib.import_module(words[0]).main)
        return subprocess.CompletedProcess(words, ended.value.code, *capsys.readouterr())

    return command_here


@pytest.fixture(scope='session')
def start() -> Callable[..., subprocess.Popen]:
    """Starts `python -m flax_dlvc.MODULE ARGUMENT …` from the repository's root."""

    def start(module: str, *arguments: object, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, '-m', f'flax_dlvc.{module}', *map(str, arguments)],
            cwd=ROOT,
            # XLA's options each command has to set itself, and before it starts the backend.
            env={name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope='session')
def command(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m flax_dlvc.MODULE ARGUMENT …` to its end."""

    def command(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        process = start(module, *arguments, **environment)
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return command


def maximum_error(result: Any, reference: Any) -> float:
    """The largest difference of two trees, leaf by leaf relative to the largest value in the reference."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)

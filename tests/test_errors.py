"""With which exit code and which line an error ends a command, and what every command begins with."""

import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from flax_dlvc.errors import (
    STOP_SIGNALS,
    ConfigError,
    StoppedError,
    StorageError,
    ending,
    existing_directory,
    noted_signals,
    run_command,
    unwritable,
)


@pytest.mark.parametrize(
    ('error', 'end'),
    [
        (ConfigError('two\nlines'), (2, 'two lines')),
        (StoppedError('stopped', signal.SIGTERM), (143, 'stopped')),
        (KeyboardInterrupt(signal.SIGTERM), (143, 'stopped by SIGTERM')),
        (KeyboardInterrupt(), (130, 'stopped by SIGINT')),
        (BrokenPipeError(), (141, 'the reader of the output has left')),
        (OSError(errno.ENOSPC, 'No space', 'a'), (4, 'cannot write a: No space; free space and start again')),
        (OSError(errno.ENOENT, 'No such file', 'a'), None),
        (ValueError('a bug'), None),
    ],
)
def test_ending(error, end):
    assert ending(error) == end


def test_a_device_that_is_out_of_memory():
    import jax
    import jax.numpy as jnp

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros((1 << 50,)).block_until_ready()
    exit_code, message = ending(caught.value)
    assert exit_code == 1 and 'the device is out of memory; set a larger --config.accumulate_steps' in message
    assert ending(RuntimeError('a bug')) is None


@pytest.mark.usefixtures('process_as_it_was')
def test_a_command_searches_for_garbage_seldom_but_does():
    searches = []

    def main(_):
        kept = []
        for count in (10_000, 20_000):
            before = gc.get_stats()[0]['collections']
            kept += [[] for _ in range(count)]
            searches.append(gc.get_stats()[0]['collections'] - before)

    gc.set_threshold(700)
    gc.collect()
    with pytest.raises(SystemExit):
        run_command(main)
    assert searches == [0, 1]


def test_at_the_end_of_a_command_nothing_is_searched_for_garbage():
    script = """
import atexit, gc
from flax_dlvc.errors import run_command
atexit.register(lambda: print(gc.get_freeze_count() > 0))
run_command(lambda _: None)
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'True\n'


def test_a_signal_while_a_module_is_imported_ends_a_command_there(tmp_path):
    """An error could be caught, or end the process by a signal of its own."""
    (tmp_path / 'a_module.py').write_text("""
import signal
try:
    signal.raise_signal(signal.SIGTERM)
finally:
    print('an error')
""")
    script = "from flax_dlvc.errors import run_command; run_command(lambda _: [print('said'), __import__('a_module')])"
    done = subprocess.run(
        [sys.executable, '-c', script],
        env=os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}', 'PYTHONUNBUFFERED': ''},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (143, 'stopped by SIGTERM\n', 'said\n')


@pytest.fixture
def hangup():
    """SIGHUP as it is without nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_signals_are_noted_and_one_that_nobody_took_note_of_comes_again(hangup):
    del hangup
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with noted_signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_DFL}
        noted.clear()
    with noted_signals() as noted:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # of the kernel, besides the shell's
        assert noted == [signal.SIGHUP]
        noted.clear()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    came = []
    signal.signal(signal.SIGHUP, lambda number, _: came.append(number))
    with noted_signals():
        signal.raise_signal(signal.SIGHUP)
        assert not came
    assert came == [signal.SIGHUP]


def test_nohup_has_its_way(hangup):
    del hangup
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with noted_signals() as noted:
        signal.raise_signal(signal.SIGHUP)
        assert not noted
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(('number', 'kind'), [(errno.ENOSPC, StorageError), (errno.EACCES, ConfigError)])
def test_the_disk_is_to_blame_or_the_name(number, kind):
    error = unwritable(Path('a'), OSError(number, 'why', 'temporary'), 'choose another --out')
    assert (type(error), str(error)) == (kind, 'cannot write a: why; choose another --out')


def test_a_directory_that_has_to_be_there(tmp_path):
    (tmp_path / 'file').write_text('')
    assert existing_directory(str(tmp_path)) == tmp_path
    for name in ('none', 'file'):
        with pytest.raises(ConfigError, match=f'{name} is not a directory$'):
            existing_directory(tmp_path / name)
    with pytest.raises(ConfigError, match=r'cannot read .*x: File name too long$'):
        existing_directory(tmp_path / ('x' * 300))


@pytest.mark.parametrize('redirection', ['>&-', '2>&-', '>&- 2>&-'])
def test_a_command_whose_output_is_closed_runs_and_keeps_its_exit_code(tmp_path, redirection):
    for directory, exit_code in ((tmp_path, 0), (tmp_path / 'none', 2)):
        command = f'exec {sys.executable} -m flax_dlvc.runs {directory} {redirection}'
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == exit_code
        assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_a_name_that_cannot_be_printed_is_escaped(tmp_path, encoding):
    os.makedirs(os.path.join(os.fsencode(tmp_path), 'één'.encode() + b'\xff', b'checkpoints'))  # noqa: PTH103, PTH118
    done = subprocess.run(
        [sys.executable, '-m', 'flax_dlvc.runs', tmp_path],
        cwd=ROOT,
        env=os.environ | {'PYTHONIOENCODING': encoding},
        capture_output=True,
        check=True,
    )
    assert {'utf-8': 'één\\udcff'.encode(), 'ascii': b'\\xe9\\xe9n\\udcff'}[encoding] in done.stdout

"""With which exit code and which line an error ends a command, and what every command begins with."""

import errno
import gc
import signal

import pytest

from flax_dlvc.errors import ConfigError, StoppedError, ending, run_command


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


@pytest.mark.usefixtures('commands_here')
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

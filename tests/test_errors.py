"""With which exit code and which line an error ends a command."""

import errno
import signal

import pytest

from flax_dlvc.errors import ConfigError, StoppedError, ending


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

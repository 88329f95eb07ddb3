import pytest

from flax_dlvc.words import describe_time, plural


@pytest.mark.parametrize(
    ('number', 'words'), [(0, '0 runs'), (1, '1 run'), (2, '2 runs'), (1000, '1,000 runs'), (10**6, '1,000,000 runs')]
)
def test_plural(number, words):
    assert plural(number, 'run') == words


@pytest.mark.parametrize(
    ('seconds', 'words'),
    [
        (0.4, '0 seconds'),
        (1.2, '1 second'),
        (89, '89 seconds'),
        (89.8, '1.5 minutes'),
        (120, '2 minutes'),
        (5000, '83 minutes'),
        (9000, '2.5 hours'),
        (99.6 * 3600, '100 hours'),
        (5e6, '1,389 hours'),
    ],
)
def test_time(seconds, words):
    assert describe_time(seconds) == words

"""Numbers in words, for people."""


def plural(number: int, noun: str) -> str:
    """A number of things: '1 run', '2 runs'."""
    return f'{number:,} {noun}{"s" * (number != 1)}'


def describe_time(seconds: float) -> str:
    """About how long something takes, in the unit that fits: '40 seconds', '2 minutes', '1.6 hours'."""
    if seconds < 90:
        return plural(round(seconds), 'second')
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'

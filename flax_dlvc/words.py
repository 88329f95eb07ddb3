"""Numbers in words, for people."""


def plural(number: int, noun: str) -> str:
    """A number of things: '1 run', '2 runs'."""
    return f'{number:,} {noun}{"s" * (number != 1)}'


def describe_time(seconds: float) -> str:
    """About how long something takes, to two digits, in the unit that fits: '40 seconds', '1.6 minutes', '12 hours'."""
    if round(seconds) < 90:
        return plural(round(seconds), 'second')
    number, unit = (seconds / 60, 'minutes') if seconds < 5400 else (seconds / 3600, 'hours')
    return f'{number:.2g} {unit}' if number < 99.5 else f'{number:,.0f} {unit}'

"""The run directory's text files.

They are config.json, dataset.json, metrics.jsonl, result.json, evaluation-SPLIT.json and failure.json. Each is written
whole to a temporary file that then takes its name, so a reader never sees half of one.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from flax_dlvc import config as config_module
from flax_dlvc import data
from flax_dlvc.errors import ConfigError, StorageError
from flax_dlvc.profiling import timed

# What is read of these files, at least, and its types. A run without validation has None for it; so has a class that
# the test split lacks.
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_RECORD = {'epoch': int, 'step': int, 'images_per_second': _NUMBER} | dict.fromkeys(
    ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy'), _MAYBE
)
_TEST = {'accuracy': _NUMBER, 'mean_class_accuracy': _NUMBER, 'cross_entropy': _NUMBER, 'per_class_accuracy': [_MAYBE]}
_EVALUATION = _TEST | {'class_names': [str], 'confusion_matrix': [[int]], 'expected_calibration_error': _NUMBER}
_RESULT = {
    'config_name': str,
    'dataset': str,
    'best_epoch': int,
    'epochs_run': int,
    'stopped_early': bool,
    'test': _TEST,
}

LOCK_SECONDS = 0.5  # for which one waits for a lock
ANEW = 'remove it and any result.json, and the command that trained the run writes them anew'
UNSAVABLE = '[\\'  # Orbax looks for what it has written by a pattern that begins with the path


def check(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Whether `config` may run in a directory; writes nothing.

    A finished run may be given more epochs where its schedule does not depend on their number.

    Returns:
        The result of the finished run that the directory holds, or None: there is something left to do.

    Raises:
        ConfigError: the directory holds a run of another config, or something that is not a run, or has a name with
            which no checkpoint can be saved.
    """
    result = _result_of(workdir, config)
    if result is None and set(UNSAVABLE) & set(os.path.realpath(workdir)):  # `Path.resolve` raises in loops
        names = ' or '.join(UNSAVABLE)
        raise ConfigError(f'no checkpoint can be saved in {workdir}: its path has {names}; choose another --workdir')
    return result


def _result_of(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """As `check`, whatever the directory is called."""
    try:
        if not workdir.exists():
            return None
        has_config = (workdir / 'config.json').exists()
    except OSError as error:  # a name that is too long, a directory above that is closed to us
        raise ConfigError(f'cannot read {workdir}: {error.strerror}; choose another --workdir') from error
    if not workdir.is_dir():
        raise ConfigError(f'{workdir} is not a directory; choose another --workdir')
    if not has_config:
        if (workdir / 'checkpoints').exists() or (workdir / 'result.json').exists():
            raise ConfigError(f'{workdir} holds a run without its config.json; choose another --workdir')
        return None
    stored, result = read_config(workdir), read_result(workdir)
    differing = config_module.differing_fields(config, stored)
    if differing == ['num_epochs'] and _length_may_change(workdir, config, stored, result):
        return result if result and result['stopped_early'] else None
    if differing:
        raise ConfigError(
            f'{workdir} holds a run of another config, which differs in {", ".join(differing)}; '
            'choose another --workdir or remove it'
        )
    return result


def _length_may_change(workdir: Path, config: ConfigDict, stored: ConfigDict, result: dict[str, Any] | None) -> bool:
    """Whether a run can go on, or be cut short before its end, with as many epochs as `config` says."""
    if config.schedule.name not in config_module.OPEN_ENDED_SCHEDULES:
        return False
    if result is None:
        return config.num_epochs >= len(read_history(workdir))
    can_go_on = result['stopped_early'] or any(workdir.glob('checkpoints/*'))
    return config.num_epochs > stored.num_epochs and can_go_on


def create(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory and writes config.json, unless it is there already.

    Raises:
        ConfigError: a new directory cannot be written.
    """
    if (workdir / 'config.json').exists():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'cannot write {workdir}: {error.strerror}; choose another --workdir') from error
    if not os.access(workdir, os.W_OK):
        raise ConfigError(f'cannot write {workdir}: permission denied; choose another --workdir')
    write_text(workdir / 'config.json', config_module.to_json(config))


def adopt(workdir: Path, config: ConfigDict) -> None:
    """Brings config.json up to date: fields that are newer, another number of epochs, or another way to carry it out.

    A result goes, as the run goes on, unless early stopping made it: that is the longer run's as well. A run that stays
    finished keeps the other fields that it was carried out with.
    """
    stored, result, adopted = read_config(workdir), read_result(workdir), config
    if result and (result['stopped_early'] or config.num_epochs == stored.num_epochs):
        adopted = stored.copy_and_resolve_references()
        adopted.num_epochs = config.num_epochs
    elif result:
        _remove(workdir / 'result.json')  # first: with the new config it would end the run
    text = config_module.to_json(adopted)
    if text != (workdir / 'config.json').read_text('utf-8'):  # which may lack fields, too
        write_text(workdir / 'config.json', text)


def write_dataset(workdir: Path, dataset: data.Dataset) -> None:
    """Writes dataset.json, what a trained model has to know of its dataset, unless it is there already.

    Raises:
        ConfigError: it is there and says otherwise: see `check_dataset`.
    """
    path = workdir / 'dataset.json'
    if path.exists():
        check_dataset(workdir, dataset)
    else:
        write_text(path, json.dumps(dataset.describe(), indent=2) + '\n')


def check_dataset(workdir: Path, dataset: data.Dataset) -> None:
    """Checks that a dataset is the one which a run began with, by all that dataset.json says of it.

    Raises:
        ConfigError: it has changed since, or dataset.json is missing or damaged.
    """
    if not data.is_same(read_description(workdir), dataset.describe(), tolerance=1e-12):
        path = workdir / 'dataset.json'
        raise ConfigError(
            f'{dataset.name} is not what {path} says of it any more; bring back what the run began with, '
            'or train anew in another --workdir'
        )


def read_dataset(workdir: Path) -> data.Dataset:
    """The dataset of a run, without its examples: class names, image shape, mean and standard deviation.

    Raises:
        ConfigError: dataset.json is missing or damaged.
    """
    return data.without_examples(read_description(workdir))


def read_description(workdir: Path) -> dict[str, Any]:
    """What dataset.json holds, which is what `data.Dataset.describe` said.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = workdir / 'dataset.json'
    try:
        description: dict[str, Any] = json.loads(path.read_text('utf-8'))
        data.without_examples(description)
        return description
    except FileNotFoundError as error:
        raise ConfigError(f'{workdir} has no dataset.json; is it a run directory?') from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f'{path} is damaged; {ANEW}') from error


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in a directory; the lock ends with its process, however that ends.

    Raises:
        ConfigError: another process has it.
        StorageError: the directory cannot be written any more.
    """
    try:
        file = (workdir / '.lock').open('w')
    except OSError as error:
        raise storage_error(workdir, error) from error
    with file:
        try:
            _lock_soon(file)
        except BlockingIOError:
            raise ConfigError(
                f'another process is training in {workdir}; wait for it, or choose another --workdir'
            ) from None
        except OSError as error:
            raise ConfigError(
                f'{workdir} cannot be locked ({error.strerror}); choose a --workdir on another file system'
            ) from error
        yield


def _lock_soon(file: IO[str]) -> None:
    """Locks a file, or raises a `BlockingIOError` after a while: `is_locked` has the lock for an instant, too."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def is_locked(workdir: Path) -> bool:
    """Whether a process is training in a directory, on this machine or another that shares its file system's locks."""
    try:
        with (workdir / '.lock').open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is closed to us
        return False
    return False


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run directory.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        return config_module.from_json((workdir / 'config.json').read_text('utf-8'))
    except ConfigError as error:
        raise ConfigError(f'{workdir / "config.json"}: {error}') from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{workdir} is not a run directory: it has no readable config.json') from error


def lacking_fields(workdir: Path) -> list[str]:
    """Fields that a readable config.json does not have, as they are newer; `read_config` gives them their defaults."""
    values = json.loads((workdir / 'config.json').read_text('utf-8'))
    there = config_module.flatten(ConfigDict(values))
    return [field for field in config_module.flatten(config_module.defaults()) if field not in there]


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
        ConfigError: there is one, but damaged.
    """
    return _read(workdir / 'result.json', _RESULT, 'remove it and the run ends again from its checkpoint')


def read_test_evaluation(workdir: Path) -> dict[str, Any]:
    """What `evaluate` wrote about the test split; empty where it wrote nothing.

    Raises:
        ConfigError: it is damaged.
    """
    return _read(workdir / 'evaluation-test.json', _EVALUATION, 'remove it, and evaluate writes it anew') or {}


def read_history(workdir: Path) -> tuple[dict[str, Any], ...]:
    """What metrics.jsonl holds, a record per finished epoch; () where there is none.

    Raises:
        ConfigError: it is damaged.
    """

    def parse(text: str) -> list[Any]:
        return [json.loads(line) for line in text.splitlines()]

    return tuple(_read(workdir / 'metrics.jsonl', [_RECORD], ANEW, parse) or ())


def _read(path: Path, form: Any, advice: str, parse: Callable[[str], Any] = json.loads) -> Any:
    """A file's content, checked against a form; None where there is no file."""
    try:
        value = parse(path.read_text('utf-8'))
        if not _has_form(value, form):
            raise ValueError('JSON of something else')
        return value
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f'{path} is damaged; {advice}') from error


def _has_form(value: Any, form: Any) -> bool:
    """Whether a JSON value has the keys of a form, a list its items', and the types; bool is no number here."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and _has_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def write_history(workdir: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes metrics.jsonl, a line per epoch."""
    write_text(workdir / 'metrics.jsonl', ''.join(json.dumps(record) + '\n' for record in history))


def write_result(workdir: Path, result: dict[str, Any]) -> None:
    """Writes result.json: the run has ended."""
    write_text(workdir / 'result.json', json.dumps(result, indent=2) + '\n')


def write_evaluation(workdir: Path, split: str, metrics: dict[str, Any]) -> Path:
    """Writes evaluation-SPLIT.json and returns its path."""
    path = workdir / f'evaluation-{split}.json'
    write_text(path, json.dumps(metrics, indent=2) + '\n')
    return path


def write_failure(workdir: Path, message: str, exit_code: int) -> None:
    """Writes failure.json: why a run diverged, or one of a study did not end."""
    write_text(workdir / 'failure.json', json.dumps({'message': message, 'exit_code': exit_code}) + '\n')


def remove_failure(workdir: Path) -> None:
    """Removes failure.json, which is of an attempt before this one."""
    _remove(workdir / 'failure.json')


def read_failure(workdir: Path) -> tuple[str, int]:
    """Why the run did not end, and its exit code; ('', 0) where no failure can be read."""
    try:
        failure = json.loads((workdir / 'failure.json').read_text('utf-8'))
        return str(failure['message']), int(failure.get('exit_code', 1))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return '', 0


@timed('logging')
def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with whole(path) as temporary, temporary.open('w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix to write to; it becomes the file once all went well, and is gone otherwise."""
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')  # two commands may write the same file
    try:
        yield temporary
        temporary.replace(path)
    finally:  # there is none where all went well
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove(path: Path) -> None:
    """Removes a file, if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error of a run's or a study's file that cannot be written any more."""
    return StorageError(f'cannot write {path}: {error.strerror}; free space or mend the disk, and start again')

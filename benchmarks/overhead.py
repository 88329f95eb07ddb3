"""What is lost around the compiled step: in the loop, in evaluation, and before the first step.

The loop is a whole process, `python -m flax_dlvc.main`, watched from outside: its epoch lines are the clock, so that
saving, logging and validation count. The bare step is the same compiled step, fed the same batches, without a loop.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.throughput import Contender, serve
from flax_dlvc.results import base_config

# Prints when all is imported, when the first training step begins and when it is complete, and leaves; begins as the
# command does.
_FIRST_STEP = """
import os, time
from flax_dlvc import errors, main
def until_the_first_step(argv):
    import jax
    from flax_dlvc import loop
    from flax_dlvc.setup import Setup
    print(time.time())
    train_step = Setup.train_step.fget
    def first_step(setup):
        def step(*arguments):
            begun = time.time()
            jax.block_until_ready(train_step(setup)(*arguments))
            print(begun, time.time(), flush=True)
            os._exit(0)
        return step
    Setup.train_step = property(first_step)
    main.main(argv)
errors.run_command(until_the_first_step)
"""

# Prints how long the training step of a config takes to compile, its imports and its data aside.
_COMPILE = """
import sys, time
import numpy as np
from flax_dlvc.config import parse_command_line
from flax_dlvc.main import make_parser
from flax_dlvc import steps
_, config = parse_command_line(make_parser(), sys.argv)
from flax_dlvc.setup import set_up
setup = set_up(config)
indices = np.zeros((1, 1, config.batch_size), np.int32)
start = time.perf_counter()
setup.lower_train_step(indices).compile()
print(time.perf_counter() - start)
"""

# A run in which only every other epoch is saved; prints when each ends, before it is.
_SAVES_IN_TURN = """
import sys, time
from flax_dlvc import main
from flax_dlvc.checkpoint import Checkpoints
save = Checkpoints.save
def save_in_turn(self, state, progress):
    print('ended', time.perf_counter(), flush=True)
    if len(progress.history) % 2:
        save(self, state, progress)
Checkpoints.save = save_in_turn
main.main(['main', *sys.argv[1:]])
"""


def main_flags(model: str, changes: dict[str, Any]) -> list[str]:
    """Flags of `flax_dlvc.main` for a model's config with dropout, on one device, with changes."""
    changes = {'num_devices': 1} | changes
    return [f'--config=configs/{model}_dropout.py', *(f'--config.{field}={value}' for field, value in changes.items())]


def start_up(model: str, changes: dict[str, Any], *, rounds: int) -> dict[str, list[float]]:
    """Seconds from process start to the end of the first training step, and what it cannot do without.

    Returns:
        In each round: `cold` without and `warm` with compiled programs in the cache (decoded images are there in
        both), of them `cold imports` and `warm imports`, until all is imported, and `cold step` and `warm step`, the
        step itself; `compile` (of the training step alone).
    """
    flags = main_flags(model, changes)
    _output([sys.executable, '-c', _COMPILE, *flags], {})  # decodes the images, once
    names = (*(f'{kind}{part}' for kind in ('cold', 'warm') for part in ('', ' imports', ' step')), 'compile')
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            cache = {'JAX_COMPILATION_CACHE_DIR': f'{directory}/compiled'}
            for kind in ('cold', 'warm'):
                started = time.time()
                output = _output([sys.executable, '-c', _FIRST_STEP, *flags, f'--workdir={directory}/{kind}'], cache)
                imported, *_, begun, ended = output.split()
                seconds[kind].append(float(ended) - started)
                seconds[f'{kind} imports'].append(float(imported) - started)
                seconds[f'{kind} step'].append(float(ended) - float(begun))
        with tempfile.TemporaryDirectory() as directory:
            cache = {'JAX_COMPILATION_CACHE_DIR': directory}
            seconds['compile'].append(float(_output([sys.executable, '-c', _COMPILE, *flags], cache).split()[-1]))
    return seconds


def _output(command: list[str], environment: dict[str, str]) -> str:
    """What a process prints."""
    return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def bare(model: str, changes: dict[str, Any], connection: Any) -> None:
    """A process that runs the compiled steps alone: `train()`, `validate()`, `forward()` as it is told."""
    import jax

    from flax_dlvc import evaluate
    from flax_dlvc.setup import set_up

    config = base_config(f'{model}_dropout')
    config.update_from_flattened_dict({'num_devices': 1} | changes)
    setup = set_up(config)
    train_split, validation_split = setup.place(setup.dataset.train), setup.place(setup.dataset.validation)
    holder = [setup.create_state()]
    train_calls = setup.training_calls(1)
    size = config.evaluation_batch_size
    batches = [
        setup.normalize(validation_split[0][start : start + size])
        for start in range(0, len(setup.dataset.validation), size)
    ]
    apply = jax.jit(lambda variables, images: setup.model.apply(variables, images, train=False))

    def train(whole_epoch: bool = True) -> None:
        for indices in train_calls if whole_epoch else (train_calls[0], train_calls[-1]):  # the last may be shorter
            holder[0], sums = setup.train_step(holder[0], *train_split, indices)
        jax.block_until_ready(sums)

    def forward() -> None:
        outputs = [apply(holder[0].variables, batch) for batch in batches]
        jax.block_until_ready(outputs)

    def validate() -> None:
        evaluate.evaluate(setup, holder[0].variables, validation_split)

    def size_of_epoch() -> int:
        return sum(np.size(indices) for indices in train_calls)

    serve(connection, {'train': train, 'forward': forward, 'validate': validate, 'images': size_of_epoch})


def loop(model: str, changes: dict[str, Any], *, epochs: int) -> dict[str, list[float]]:
    """Compares whole epochs of `flax_dlvc.main` with the bare steps, and `evaluate` with the bare forward pass.

    Returns:
        Seconds: `epoch` of main (training, validation, saving, logging; the first one, which compiles, left out),
        `train` of the same steps bare, `validate` (flax_dlvc.evaluate), `forward` (the model alone on batches that lie
        ready). And `images` of an epoch.
    """
    flags = main_flags(model, changes | {'num_epochs': epochs + 1, 'early_stopping.patience': 0})
    worker = Contender(bare, model, changes)
    for request in (('train', False), ('validate',), ('forward',)):
        worker.ask(*request)  # compiles
    seconds: dict[str, list[float]] = {'epoch': [], 'train': [], 'validate': [], 'forward': []}
    seconds['train'].append(worker.ask('train')[1])
    seconds['epoch'] += _epoch_seconds(('-m', 'flax_dlvc.main'), flags, epochs + 1)
    seconds['train'].append(worker.ask('train')[1])
    for _ in range(3):
        seconds['validate'].append(worker.ask('validate')[1])
        seconds['forward'].append(worker.ask('forward')[1])
    seconds['images'] = [worker.ask('images')[0]]
    worker.stop()
    return seconds


def saving(model: str, changes: dict[str, Any], *, turns: int) -> dict[str, list[float]]:
    """Compares epochs that begin with a save of the one before with epochs that do not, in turn, in one run.

    Returns:
        Seconds of each epoch after the second, `with` and `without` a save; what of it is asynchronous is in there.
    """
    epochs = 2 * turns + 3  # the first compiles, the second begins with the first save, which does, too
    flags = main_flags(model, changes | {'num_epochs': epochs + 1, 'early_stopping.patience': 0})
    lines = _lines(('-c', _SAVES_IN_TURN), flags, 'ended', epochs)
    seconds = np.diff([float(line.split()[1]) for line, _ in lines]).tolist()
    return {'with': seconds[2::2], 'without': seconds[3::2]}


def _epoch_seconds(program: Sequence[str], flags: Sequence[str], epochs: int) -> list[float]:
    """Seconds between the first epoch lines of a run."""
    return list(np.diff([when for _, when in _lines(program, flags, 'epoch', epochs)]))


def _lines(program: Sequence[str], flags: Sequence[str], start: str, number: int) -> list[tuple[str, float]]:
    """Starts a run, waits for a number of lines with a certain start, and ends it; the lines and when they came."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, '-u', *program, *flags, f'--workdir={directory}/run']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if line.startswith(start):
                lines.append((line, time.perf_counter()))
            if len(lines) == number:
                process.kill()
        process.wait()
        if len(lines) < number:
            raise RuntimeError(f'{" ".join(command)} ended with {process.returncode}')
    return lines[:number]

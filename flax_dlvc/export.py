"""A trained model as a file that JAX runs without this package: `python -m flax_dlvc.export --workdir DIR --out NEW`.

NEW gets `model.jax`, the inference function with its parameters (`jax.export.deserialize` reads it), and `model.json`,
which says what goes in and what comes out.

Shapes: B batch, H height, W width, C channels, K classes.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_dlvc.errors import (
    ArgumentParser,
    ConfigError,
    add_step_argument,
    existing_directory,
    named_path,
    run_command,
    unwritable,
)
from flax_dlvc.models.layers import traced_for
from flax_dlvc.setup import Setup
from flax_dlvc.transfer import load_trained

PLATFORMS = ('cpu', 'cuda')
WRITING = '.writing'  # folder inside `out` where the files lie until both are whole


def inference_function(setup: Setup, variables: Any) -> jax.export.Exported:
    """The function from images (B, H, W, C) uint8 to probabilities (B, K) float32, for any B and each platform.

    The layers take the faster route for each platform; the parameters are there once.
    """

    def infer_on(platform: str, variables: Any, images: jax.Array) -> jax.Array:
        with traced_for(platform):
            return setup.probabilities(variables, images)

    def infer(images: jax.Array) -> jax.Array:
        by_platform = {platform: partial(infer_on, platform) for platform in PLATFORMS}
        return jax.lax.platform_dependent(variables, images, **by_platform)

    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, *setup.dataset.image_shape), jnp.uint8)
    return jax.export.export(jax.jit(infer), platforms=PLATFORMS)(images)


def export(workdir: Path, which: str, out: Path) -> None:
    """Writes the inference function of a run directory's checkpoint into a new directory.

    Raises:
        ConfigError: the checkpoint cannot be had, there is something in `out`, or it cannot be made.
        StorageError: the disk is full or read-only.
    """
    try:
        is_new = not out.exists()
        if not is_new and not _is_free(out):
            raise ConfigError(f'{out} is there already; choose another --out')
    except OSError as error:
        raise ConfigError(f'cannot read {out}: {error.strerror}; choose another --out') from error
    setup, variables = load_trained(workdir, which)
    dataset = setup.dataset
    description = {
        'class_names': list(dataset.class_names),
        'input': {'shape': ['batch', *dataset.image_shape], 'dtype': 'uint8', 'values': '0 to 255, not normalised'},
        'output': {'shape': ['batch', len(dataset.class_names)], 'dtype': 'float32', 'values': 'probabilities'},
        'platforms': PLATFORMS,
        'jax_version': jax.__version__,
        'config_name': setup.config.name,
    }
    program = inference_function(setup, jax.device_get(variables)).serialize()
    writing = out / WRITING  # an empty `out` may be where the user stands, so it is filled, not replaced
    try:
        if writing.exists():
            shutil.rmtree(writing)
        writing.mkdir(parents=True)
        (writing / 'model.jax').write_bytes(program)
        (writing / 'model.json').write_text(json.dumps(description, indent=2) + '\n', 'utf-8')
        for path in writing.iterdir():
            path.replace(out / path.name)
        writing.rmdir()
    except BaseException as error:  # signals too
        shutil.rmtree(out if is_new else writing, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(out, error, 'choose another --out') from error
        raise


def _is_free(out: Path) -> bool:
    """Whether a directory is empty, or holds only what an export that was killed has left."""
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    return not names or (WRITING in names and names <= {WRITING, 'model.jax', 'model.json'})


def main(argv: list[str]) -> None:
    """Parses the command line and exports."""
    parser = ArgumentParser('python -m flax_dlvc.export', description='A trained model as a file that JAX alone runs.')
    parser.add_argument('--workdir', type=existing_directory, required=True, help='the run directory')
    parser.add_argument('--out', type=named_path, required=True, metavar='DIR', help='a new directory')
    add_step_argument(parser)
    arguments = parser.parse_args(argv[1:])
    export(arguments.workdir, arguments.step, arguments.out)
    size = (arguments.out / 'model.jax').stat().st_size
    print(f'{arguments.out / "model.jax"}: {size / 1e6:.1f} MB, for {" and ".join(PLATFORMS)}')


if __name__ == '__main__':
    run_command(main)

"""PyTorch's weights in and out, as safetensors; neither PyTorch nor pickle is needed.

    python -m flax_dlvc.interop import --config FILE --weights IN.safetensors --workdir DIR
    python -m flax_dlvc.interop export --workdir DIR --weights OUT.safetensors

The names are torchvision's for ResNet18 (`layer1.0.bn1.running_var`), the UvA deep learning tutorial 15's for the ViT
(`transformer.0.attn.in_proj_weight`), and for the CNN `conv1` to `conv3`, `fc1`, `fc2`, each `.weight` and `.bias`.

Shapes: KH KW kernel height and width, I inputs, O outputs, H W C the map that the CNN flattens.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_dlvc.config import add_config_argument, load_config
from flax_dlvc.errors import (
    ArgumentParser,
    ConfigError,
    add_step_argument,
    existing_directory,
    named_path,
    run_command,
    unwritable,
)
from flax_dlvc.rundir import whole
from flax_dlvc.setup import Setup, set_up
from flax_dlvc.transfer import load_trained, save_as_run

# From the path of a variable to PyTorch's name, by model: what to replace, one after the other.
_RENAMINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    'cnn': (
        (r'Conv_(\d)', lambda match: f'conv{int(match[1]) + 1}'),
        (r'Dense_(\d)', lambda match: f'fc{int(match[1]) + 1}'),
    ),
    'resnet18': (
        (r'(layer\d)_(\d)', r'\1.\2'),
        (r'downsample_conv', 'downsample.0'),
        (r'downsample_bn', 'downsample.1'),
    ),
    'vit': (
        (r'transformer_(\d+)', r'transformer.\1'),
        (r'linear_(\d)', r'linear.\1'),
        (r'mlp_head_(\d)', r'mlp_head.\1'),
        (r'in_proj/kernel', 'in_proj_weight'),
        (r'in_proj/bias', 'in_proj_bias'),
    ),
}
_PARAMETERS = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}

# What PyTorch keeps besides: counts of the batches that batch normalisation has seen, which nothing is computed from.
_IGNORED = '.num_batches_tracked'


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A variable's place in PyTorch: its name, its shape there, and the ways there and back."""

    name: str
    shape: tuple[int, ...]
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def torch_tensors(setup: Setup) -> Any:
    """A `Tensor` for every variable of a setup's model, in a tree like that of its variables.

    Raises:
        ConfigError: there are no names for the model.
    """
    if setup.config.model.name not in _RENAMINGS:
        raise ConfigError(f'{setup.config.model.name} has no names in PyTorch; there are: {", ".join(_RENAMINGS)}')
    variables = setup.abstract_state.variables
    # Only the CNN flattens a map: PyTorch's is (C, H, W), ours (H, W, C).
    height, width, _ = setup.dataset.image_shape
    convolutions = [name for name in variables['params'] if name.startswith('Conv_')]
    flattened = (height >> len(convolutions), width >> len(convolutions))

    def describe(path: Any, leaf: jax.ShapeDtypeStruct) -> Tensor:
        keys = [key.key for key in path[1:]]
        name = '/'.join(keys)
        for pattern, replacement in _RENAMINGS[setup.config.model.name]:
            name = re.sub(pattern, replacement, name)
        name = '.'.join(_PARAMETERS.get(part, part) for part in name.split('/'))
        map_shape = (*flattened, leaf.shape[0] // math.prod(flattened)) if keys == ['Dense_0', 'kernel'] else None
        return _tensor(name, leaf.shape, keys[-1], map_shape)

    return jax.tree_util.tree_map_with_path(describe, variables)


def _tensor(name: str, shape: Sequence[int], leaf: str, flattened_map: tuple[int, int, int] | None) -> Tensor:
    if leaf != 'kernel':
        return Tensor(name, tuple(shape), np.asarray, np.asarray)
    if flattened_map:  # (H W C, O) to (O, C H W)
        h, w, c = flattened_map
        return Tensor(
            name,
            (shape[1], shape[0]),
            lambda x: x.reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(shape[1], shape[0]),
            lambda x: x.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(shape),
        )
    # (KH, KW, I, O) to (O, I, KH, KW), or (I, O) to (O, I)
    order, back = ((3, 2, 0, 1), (2, 3, 1, 0)) if len(shape) == 4 else ((1, 0), (1, 0))
    return Tensor(name, tuple(shape[axis] for axis in order), lambda x: x.transpose(order), lambda x: x.transpose(back))


def to_torch(setup: Setup, variables: Any) -> dict[str, np.ndarray]:
    """A model's variables under PyTorch's names, in PyTorch's layout, float32.

    Raises:
        ConfigError: there are no names for the model.
    """
    pairs = zip(jax.tree.leaves(torch_tensors(setup)), jax.tree.leaves(variables), strict=True)
    return {tensor.name: np.ascontiguousarray(tensor.to_torch(np.asarray(value))) for tensor, value in pairs}


def from_torch(setup: Setup, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The variables of a setup's model, taken from tensors under PyTorch's names.

    Raises:
        ConfigError: there are no names for the model; or tensors are missing, surplus, misshapen, not of floating
            point or not finite.
    """
    tensors = torch_tensors(setup)
    expected = {tensor.name: tensor for tensor in jax.tree.leaves(tensors)}
    given = {name: value for name, value in weights.items() if not name.endswith(_IGNORED)}
    wrong = [
        ('missing', expected.keys() - given.keys()),
        ('surplus', given.keys() - expected.keys()),
        (
            'misshapen',
            [
                f'{name} is {given[name].shape}, not {tensor.shape}'
                for name, tensor in expected.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
        ('not finite numbers', [name for name, value in given.items() if not _is_finite(value)]),
    ]
    problems = '; '.join(f'{what}: {", ".join(sorted(names))}' for what, names in wrong if names)
    if problems:
        raise ConfigError(f'the weights are not those of {setup.config.model.name}: {problems}')
    return jax.tree.map(
        lambda tensor: np.ascontiguousarray(tensor.from_torch(given[tensor.name].astype(np.float32))), tensors
    )


def _is_finite(value: np.ndarray) -> bool:
    """Whether these are floating-point numbers, all of which float32 can hold."""
    with np.errstate(over='ignore'):
        return np.issubdtype(value.dtype, np.floating) and bool(np.isfinite(value.astype(np.float32)).all())


def import_weights(setup: Setup, weights: Path, workdir: Path) -> None:
    """Makes a run directory of a safetensors file; it is evaluated, predicted with and fine-tuned like any other.

    Raises:
        ConfigError: the file is not safetensors, its tensors do not fit, or the directory holds a run.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(weights)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f'{weights} cannot be read as safetensors ({error}); write one in PyTorch with '
            'safetensors.torch.save_file(model.float().state_dict(), PATH)'
        ) from error
    except OSError as error:
        raise ConfigError(f'cannot read {weights}: {error.strerror or error}') from error
    save_as_run(workdir, setup, from_torch(setup, tensors))


def export_weights(workdir: Path, which: str, weights: Path) -> None:
    """Writes a checkpoint of a run directory as a safetensors file, which PyTorch's `load_state_dict` takes.

    Raises:
        ConfigError: the checkpoint cannot be had, its model has no names in PyTorch, or `weights` cannot be made.
        StorageError: the disk is full or read-only.
    """
    from safetensors.numpy import save

    if weights.name in ('', '..'):
        raise ConfigError(f'{weights} is a directory; name a file with --weights')
    tensors = to_torch(*load_trained(workdir, which))
    try:
        with whole(weights) as temporary:
            temporary.write_bytes(save(tensors, metadata={'format': 'pt'}))
    except OSError as error:
        raise unwritable(weights, error, 'choose another --weights') from error


def main(argv: list[str]) -> None:
    """Parses the command line, imports or exports."""
    parser = ArgumentParser('python -m flax_dlvc.interop', description="PyTorch's weights in and out, as safetensors.")
    commands = parser.add_subparsers(dest='command', required=True)
    importing = commands.add_parser('import', help='make a run directory')
    add_config_argument(importing)
    exporting = commands.add_parser('export', help='write the weights of a run directory')
    add_step_argument(exporting)
    for command, directory in ((importing, named_path), (exporting, existing_directory)):
        command.add_argument('--weights', type=named_path, required=True, metavar='FILE.safetensors')
        command.add_argument('--workdir', type=directory, required=True, help='the run directory')
    arguments, overrides = parser.parse_known_args(argv[1:])
    if arguments.command == 'import':
        setup = set_up(load_config(arguments.config, overrides))
        import_weights(setup, arguments.weights, arguments.workdir)
        print(f'made the run directory {arguments.workdir} from {arguments.weights}')
        return
    if overrides:
        parser.error(f'unknown arguments: {" ".join(overrides)}')
    export_weights(arguments.workdir, arguments.step, arguments.weights)
    print(f'wrote the weights of {arguments.workdir} to {arguments.weights}')


if __name__ == '__main__':
    run_command(main)

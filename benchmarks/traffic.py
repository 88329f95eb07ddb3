"""Kernels and memory traffic of a training step on an H100 that need not be there: XLA compiles for it anywhere.

`python -m benchmarks.traffic --config configs/fast94.py` wants the CUDA build of JAX (`pip install 'jax[cuda12]'`) and
no GPU. What is not a convolution or a matrix product waits for memory, so its bytes say what there is to gain. They are
those of each kernel's operands and results, counted once. Not seen are caches, the time of a kernel, the choices that
XLA makes by timing, and what lies within branches and loops, which count as one kernel. With `--output DIR` the figures
go to DIR/benchmarks.md.
"""

import math
import os
import re
from typing import Any

import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from benchmarks.results import Results
from benchmarks.throughput import synthetic_dataset
from flax_dlvc.config import parse_command_line
from flax_dlvc.errors import ArgumentParser, ConfigError, named_path, run_command
from flax_dlvc.models.layers import traced_for
from flax_dlvc.setup import Setup

# Of CUDA's device properties what XLA asks for (its `GpuTargetConfigProto`).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
STEPS = 25  # in a call: a loop, as on a GPU; alone, a step would copy parameters besides
INSTRUCTION = re.compile(r'%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)')
NO_KERNEL = ('bitcast', 'constant', 'get-tuple-element', 'parameter', 'tuple')


def compile_step(config: ConfigDict) -> Any:
    """The training step of a config, compiled for one H100 and for images like CIFAR-10's.

    Raises:
        ConfigError: JAX is installed without CUDA.
    """
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')  # which asks the driver
    try:
        devices = topologies.get_topology_desc(platform='cuda', target_config=H100, topology='1x1x1').devices
    except NotImplementedError as error:
        raise ConfigError("no compiler for GPUs: pip install 'jax[cuda12]'") from error
    setup = Setup(config, synthetic_dataset(config.batch_size), list(devices))
    with traced_for('cuda'):
        lowered = setup.lower_train_step(np.zeros((1, STEPS, config.batch_size), np.int32))
    return lowered.compile({'xla_gpu_enable_triton_gemm': False})  # kernels by Triton are chosen by timing them


def count(program: str) -> dict[str, int]:
    """Of a compiled program's text the number of kernels, and the bytes of those that multiply and of the others.

    The program is its entry or, where that is longer, the body of a loop: a step.
    """
    bodies = re.findall(r'^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}', program, re.MULTILINE | re.DOTALL)
    loops = re.findall(r' while\(.*body=%([\w.-]+)', program)
    step = max((body for name, body in bodies if name in loops or name == bodies[-1][0]), key=len)
    sizes: dict[str, int] = {}
    counts = {'kernels': 0, 'product_bytes': 0, 'other_bytes': 0}
    for line in step.splitlines():
        if not (instruction := INSTRUCTION.search(line)):
            continue
        name, result, operation, operands = instruction.groups()
        multiplies = re.search('custom_call_target="__(cublas|cudnn[$]conv)', line) is not None
        sizes[name] = size_of(result.split(', s8[')[0].split(', u8[')[0] if multiplies else result)  # less its scratch
        if operation not in NO_KERNEL:
            taken = {operand: sizes[operand] for operand in re.findall(r'%([\w.-]+)', operands)}
            counts['kernels'] += 1
            counts['product_bytes' if multiplies else 'other_bytes'] += sum(taken.values()) + sizes[name]
    return counts


def size_of(shapes: str) -> int:
    """Bytes of an array or a tuple of them, such as '(f32[2,3]{1,0}, pred[])'."""
    total = 0
    for kind, shape in re.findall(r'([a-z]+[0-9]*)\[([0-9,]*)\]', shapes):
        bits = re.search('[0-9]+', kind)  # 'pred' has none
        total += (int(bits[0]) if bits else 8) // 8 * math.prod(map(int, filter(None, shape.split(','))))
    return total


def main(argv: list[str]) -> None:
    """Parses the command line, compiles, prints."""
    parser = ArgumentParser('python -m benchmarks.traffic', description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=named_path, help='directory of benchmarks.json and .md')
    arguments, config = parse_command_line(parser, argv)
    step = compile_step(config)
    value = count(step.as_text()) | {'temporary_bytes': step.memory_analysis().temp_size_in_bytes}
    print(
        f'{config.name}, {config.batch_size} images: {value["kernels"]} kernels; '
        f'{value["product_bytes"] / 1e9:.2f} GB of products, {value["other_bytes"] / 1e9:.2f} GB of the rest; '
        f'{value["temporary_bytes"] / 1e9:.2f} GB of temporaries'
    )
    if arguments.output:
        Results(arguments.output).keep('traffic', f'{config.name}, {config.batch_size} images', value)


if __name__ == '__main__':
    run_command(main)

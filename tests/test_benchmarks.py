import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import results, scaling, speedrun, throughput, traffic, utilization
from benchmarks.throughput import Contender, ratios, synthetic_setup
from flax_dlvc.setup import set_up

ROOT = Path(__file__).parents[1]


def test_ratio_is_taken_within_a_turn_and_against_the_best_peer():
    contenders = {'ours': {'train': [10, 30, 20]}, 'a': {'train': [5, 20, 10]}, 'b': {'train': [4, 60, 2]}, 'c': {}}
    assert ratios(contenders, 'train', ('a',)) == (1.5, 2.0, 2.0)
    assert ratios(contenders, 'train', ('a', 'b')) == (0.5, 2.0, 2.0)


def measure(output, *arguments):
    """Runs `python -m benchmarks ARGUMENT … --quick` for the CNN: its figures, its page and what it prints."""
    command = [sys.executable, '-m', 'benchmarks', *arguments, '--quick', '--models', 'cnn', '--output', output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((output / 'benchmarks.json').read_text()), (output / 'benchmarks.md').read_text(), done.stdout


def test_command_measures_and_keeps_what_was_measured_before(tmp_path):
    (tmp_path / 'benchmarks.json').write_text('{"throughput": {}, "other": {"kept": 1}}')
    options = ('--batch-sizes', '16', '--dtypes', 'float32', '--peers', 'eager')
    figures, page, printed = measure(tmp_path, 'throughput', *options)
    ((case, entry),) = figures['throughput'].items()
    assert case == f'cnn, batch 16, float32, {results.machine()["processor"]}'
    contenders = entry['value']['contenders']
    ours = contenders['ours']
    assert len(ours['train']) == len(ours['evaluate']) == 1 and ours['train'][0] > 0 and ours['peak_bytes'] > 2**26
    assert figures['other'] == {'kept': 1}
    assert f'| {case} |' in page
    if 'eager' in contenders:
        return
    assert 'torch is not installed' in printed


def test_processors_of_one_name_are_told_apart(monkeypatch):
    first = 'processor\t: 0\ncpu family\t: {}\nmodel\t\t: 2\nmodel name\t: AMD EPYC'
    kinds = []
    for family in (25, 26):
        monkeypatch.setattr(Path, 'read_text', lambda _, family=family: f'{first.format(family)}\n\nprocessor\t: 1\n')
        kinds.append(results._processor())
    assert kinds == ['AMD EPYC (family 25, model 2)', 'AMD EPYC (family 26, model 2)']


def test_command_measures_what_is_lost_around_the_step(tmp_path):
    parts = ('startup', 'overhead', 'saving')
    figures, page, _ = measure(tmp_path, *parts)
    start, loop, saving = (figures[part]['cnn']['value'] for part in parts)
    for kind in ('cold', 'warm'):
        assert 0 < start[f'{kind} step'][0] < start[kind][0] - start[f'{kind} imports'][0] < start[kind][0]
    assert start['compile'][0] < start['cold'][0]
    assert loop['images'] == [288] and len(loop['epoch']) == 1 and len(loop['train']) == 2
    assert min(loop['train'] + loop['validate']) > 0 and len(saving['with']) == len(saving['without']) == 1
    assert re.search(r'\| cnn( \| [\d.]+ / \*\*[\d.]+\*\* / [\d.]+){7} \|', page)
    assert '| cnn | 288 |' in page and '| cnn | 1 |' in page


def test_readme_states_the_committed_figures():
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    directory = ROOT / 'docs' / 'results'
    page = (directory / 'benchmarks.md').read_text()
    assert results.render(json.loads((directory / 'benchmarks.json').read_text())) == page

    def medians(title: str, figure: str) -> list[str]:
        table = page.partition(title)[2]
        return [re.search(rf'\n\| {model}{figure}', table)[1] for model in scaling.MODELS]

    for title, phase in (('**Training step**', 'training step'), ('**Evaluation step**', 'evaluation step')):
        for processor, name in (
            ('AMD EPYC of family 26', r'AMD EPYC \(family 26, model 2\)'),
            ('another AMD EPYC', 'AMD EPYC'),
            ('Intel Xeon', r'Intel\(R\) Xeon\(R\) Processor'),
        ):
            figures = medians(title, rf', batch 128, float32, {name}, 2 cores \|.*\*\*([\d.]+)\*\*')
            assert f'| {phase}, {processor} | {" | ".join(figures)} |' in readme
    loop = medians('## Around the step', r' \| [\d,]+ \| [\d.]+ / \*\*([\d.]+)')
    assert 'a run has {}, {} and {} of the speed'.format(*loop) in readme


def test_every_turn_has_new_processes_and_a_peer_that_fails_is_named(monkeypatch):
    started = []

    class Counted(Contender):
        def __init__(self, target, *arguments):
            started.append(target)
            super().__init__(target, *arguments)

    monkeypatch.setattr(throughput, 'Contender', Counted)
    case = throughput.Case('cnn', 8, 'float32')
    ours, eager = throughput.compare(case, ('eager',), rounds=2, turn_seconds=0)['contenders'].values()
    assert len(ours['train']) == len(ours['evaluate']) == started.count(throughput.ours) == 2
    if importlib.util.find_spec('torch'):
        assert len(eager['train']) == len(eager['evaluate']) == started.count(throughput.peer) == 2
    else:
        assert eager.keys() == {'failed'} and started.count(throughput.peer) == 1


def test_scaling_table_compares_with_what_single_devices_cost():
    # (wall, processor) seconds
    value = {'platform': 'cpu', 'cores': 2, 'batch_size': 8, 'bytes': 4, 'reduce': {'2': [(0.5, 0.5)]}}
    value['steps'] = {'1 x 8': [(2.0, 3.0)], '1 x 4': [(1.0, 1.5)], '2 x 8': [(4.0, 6.0)], '2 x 4': [(2.5, 5.0)]}
    one, each, both = scaling.rows(value)
    assert (one.devices, one.per_device, one.images, one.ratio, one.share) == (1, 8, [4.0], [1.0], [0.0])
    assert (each.devices, each.per_device, each.images, each.ratio) == (2, 8, [4.0], [1.0])
    assert (each.share, each.cores, each.explained) == ([0.125], [1.5], [(2 * 3 + 0.5) / 6])
    assert (both.per_device, both.images, both.ratio, both.explained) == (4, [3.2], [0.8], [(2 * 1.5 + 0.5) / 5])
    assert scaling.rows(value | {'platform': 'gpu'})[1].explained == [(2 + 0.5) / 4]


def test_projection_adds_up():
    cluster = scaling.Cluster(
        peak_flops=100, fraction=0.5, memory_bandwidth=70, node=2, link_bandwidth=8, network_bandwidth=4,
        link_latency=0.25, network_latency=0.5,
    )  # fmt: skip
    step = scaling.Program(flops_per_image=5, parameter_bytes=10, reduced_bytes=16)
    assert scaling.compute_seconds(step, cluster, 20) == 20 * 5 / 50 + 7 * 10 / 70
    assert scaling.reduce_seconds(16, 1, cluster) == 0
    assert scaling.reduce_seconds(16, 2, cluster) == 16 / 8 + 2 * 0.25
    assert scaling.reduce_seconds(16, 4, cluster) == 1.5 * 16 / 4 + 4 * 0.5 + 2 * 0.25  # four of six hops between nodes
    assert scaling.efficiency(step, cluster, 4, 20) == 3 / 11.5
    # Half of the time is work from 8.5 s on, 1 s of which is the update.
    assert scaling.least_images(step, cluster, 4, 0.5) == 75
    # 32 images in all: 4.2 s on 1, 1.6 + 1 + 2.5 on 2, 0.8 + 1 + 8.5 on 4.
    assert scaling.fastest(step, cluster, 32) == 1
    assert scaling.fastest(step, cluster, 64) == 2  # 7.4; 4.2 + 2.5; 2.6 + 8.5
    text = scaling.projection({'tiny': step}, [cluster], (2, 4), 20, 64)
    assert '| tiny | 50% | 0 | 3,000,000 | 2,500,000 µs; 7; **55%** | 8,500,000 µs; 7; **26%** |' in text
    assert '6,700,000 µs; 10; **1.1×** | 11,100,000 µs; 6; **0.7×** | 2 |' in text


def test_page_states_the_defaults():
    page = (ROOT / 'docs' / 'scaling.md').read_text()
    prose, _, tables = page.partition(scaling.GENERATED)
    cluster = scaling.Cluster()
    for stated in (cluster.peak_flops / 1e12, cluster.memory_bandwidth / 1e12, cluster.link_bandwidth / 1e9):
        assert f'{stated:g}' in prose
    step = scaling.program('cnn')
    assert f'| cnn | {step.flops_per_image / 1e6:,.1f} | {step.parameter_bytes:,} | {step.reduced_bytes:,} |' in tables


def test_what_the_page_says_of_scaling_is_what_its_tables_say():
    prose, _, tables = (ROOT / 'docs' / 'scaling.md').read_text().partition(scaling.GENERATED)
    prose = ' '.join(prose.split())
    *_, shares, speed_ups, images = (
        [re.split(r' *\| *', line.strip('| ')) for line in part.splitlines() if re.match(r'\| (cnn|res|vit)', line)]
        for part in tables.split('**Fixed work')[-1].replace('**Images', '**Fixed total').split('**Fixed total')
    )
    kept = [int(re.search(r'\*\*(\d+)%', row[4])[1]) for row in shares if row[0] != 'vit']
    assert f'keep {min(kept)}-{max(kept)} % with 128 each' in prose
    times = [float(re.search(r'\*\*([\d.]+)×', row[5])[1]) for row in speed_ups if row[0] != 'vit']
    assert f'at most {max(times)} times as fast' in prose
    cnn, resnet18 = (max(int(row[3].split(';')[0]) for row in images if row[0] == name) for name in ('cnn', 'resnet18'))
    assert f'the CNN {cnn}, the ResNet18 {resnet18} images a GPU' in prose


def test_scaling_runs_on_one_and_two_devices(tmp_path):
    figures, page, _ = measure(tmp_path, 'scaling', '--device-counts', '1', '2')
    value = figures['scaling']['cnn']['value']
    assert set(value['steps']) == {'1 x 2', '1 x 1', '2 x 2', '2 x 1'} and set(value['reduce']) == {'2'}
    assert value['bytes'] == 2_481_448
    for row in scaling.rows(value)[1:]:
        assert row.share[0] > 0 and row.images[0] > 0 and row.cores[0] > 0
    assert '| cnn, 2 x 1 |' in page


def test_flops_of_the_program_for_accelerators_without_what_padding_multiplies():
    config = importlib.import_module('configs.resnet18').get_config()
    config.batch_size, config.model.stem = 4, 'cifar'
    train, _ = utilization.count_flops(synthetic_setup(config))
    # By layer: kernel positions that lie on the map, twice over, times channels; and the classifier.
    inside = lambda size, stride: sum(min(size, i + 2) - max(0, i - 1) for i in range(0, size, stride)) ** 2  # noqa: E731
    widths = [(64, 32, 1), (128, 16, 2), (256, 8, 2), (512, 4, 2)]
    products, inputs = inside(32, 1) * 3 * 64, 64
    for width, size, stride in widths:
        products += inside(size * stride, stride) * inputs * width + 3 * inside(size, 1) * width * width
        products += size * size * inputs * width * (stride == 2)
        inputs = width
    products += 512 * 10
    assert 4 * 2 * 3 * products < train < 1.05 * 4 * 2 * 3 * products


def test_utilization_is_the_share_of_a_product(tmp_path):
    value = {'images': [10.0, 30.0], 'flops': [100.0, 200.0], 'flops_per_image': 2.0}
    assert utilization.shares(value) == [0.2, 0.3]
    figures, page, _ = measure(tmp_path, 'utilization', '--batch-sizes', '16', '--dtypes', 'float32')
    value = figures['utilization']['cnn, batch 16, float32']['value']
    assert value['device'] == 'cpu' and 0 < utilization.shares(value)[0] < 1
    assert '| cnn, batch 16, float32 | cpu |' in page


def test_traffic_is_what_the_kernels_of_a_step_read_and_write():
    program = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[2,8]{1,0})) -> (s32[], bf16[2,8]{1,0}) {
  %carry = (s32[], bf16[2,8]{1,0}) parameter(0)
  %x = bf16[2,8]{1,0} get-tuple-element(%carry), index=1
  %flat = bf16[16]{0} bitcast(%x)
  %conv = (bf16[4,8]{1,0}, u8[4096]{0}) custom-call(%x, %flat), custom_call_target="__cudnn$convForward", metadata={}
  %y = bf16[4,8]{1,0} get-tuple-element(%conv), index=0
  %number = s32[] constant(1)
  %fused = (f32[4,8]{1,0}, pred[4]{0}) fusion(%y, %x, %y), kind=kLoop, calls=%add
  %next = s32[] copy(%number)
  ROOT %out = (s32[], bf16[2,8]{1,0}) tuple(%next, %x)
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[2,8]{1,0}) while(%x), condition=%add, body=%body
}
"""
    products, others = 32 + 32 + 64, 64 + 32 + 4 * 32 + 4 + 4 + 4
    assert traffic.count(program) == {'kernels': 3, 'product_bytes': products, 'other_bytes': others}


def test_traffic_without_a_loop_is_that_of_the_whole_program():
    x = np.ones((300, 7), np.float32)
    program = jax.jit(lambda x: np.float32(2) * jax.numpy.sin(x) + x).lower(x).compile().as_text()
    assert traffic.count(program) == {'kernels': 1, 'product_bytes': 0, 'other_bytes': 2 * x.nbytes}


def test_traffic_of_a_step_for_a_gpu_that_is_not_there(tmp_path):
    command = [sys.executable, '-m', 'benchmarks.traffic', '--config', 'configs/cnn_dropout_augment.py']
    done = subprocess.run([*command, '--output', tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if importlib.util.find_spec('jax_plugins') is None:  # of JAX's CUDA build
        assert done.returncode == 2
        assert done.stderr == "error: no compiler for GPUs: pip install 'jax[cuda12]'\n"
        assert not list(tmp_path.iterdir())
        return
    assert done.returncode == 0, done.stderr
    ((name, entry),) = json.loads((tmp_path / 'benchmarks.json').read_text())['traffic'].items()
    value = entry['value']
    assert 50 < value['kernels'] < 100
    # Three convolutions with two or three products each take and give maps of 4 to 17 MB.
    assert 8e7 < value['product_bytes'] < 2e8 and 8e7 < value['other_bytes'] < 3e8
    assert name == 'cnn_dropout_augment, 128 images'
    assert f'| {name} |' in (tmp_path / 'benchmarks.md').read_text()


def run_speedrun(*arguments):
    command = [sys.executable, '-m', 'benchmarks.speedrun', '--config', 'configs/cnn.py', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_speedrun_prints_and_keeps_every_run(small_run_flags, tmp_path):
    done = run_speedrun('--runs', 2, *small_run_flags, '--config.num_epochs=1', '--output', tmp_path)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / 'benchmarks.json').read_text())['speedrun']['cnn']['value']
    runs = entry['ours']
    assert len(set(runs['accuracy'])) == 2 and min(runs['seconds']) > 0
    for seed, (accuracy, seconds) in enumerate(zip(*runs.values(), strict=True)):
        assert f'ours, seed {seed}: {accuracy:.4f} in {seconds:.3f} s' in done.stdout
    mean = results.mean_and_error(runs['accuracy'])
    assert f'accuracy {mean} (mean and its standard error)' in done.stdout
    assert f'| cnn, ours | cpu | 2 | {mean} |' in (tmp_path / 'benchmarks.md').read_text()
    # 4 steps of 64 images, forward and backward, and 300 images forward.
    assert entry['flops']['training'] / entry['flops']['testing'] == pytest.approx(3 * 4 * 64 / 300, rel=0.05)


def test_mean_has_a_standard_error():
    assert results.mean_and_error([0.25, 0.5, 0.75]) == '0.5000 ± 0.1443'
    assert results.mean_and_error([0.5]) == '0.5000'


def test_speedrun_without_runs_replaces_nothing(small_run_flags, tmp_path):
    done = run_speedrun('--runs', 0, *small_run_flags, '--output', tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: --output keeps runs')
    assert not list(tmp_path.iterdir())
    kept = results.Results(tmp_path)
    with pytest.raises(ValueError, match='data'):
        kept.keep('speedrun', 'cnn', {'device': 'CPU', 'flops': {}, 'ours': {'accuracy': [], 'seconds': []}})
    assert not list(tmp_path.iterdir())


def test_speedrun_says_that_the_script_is_missing_or_does_not_run(small_run_flags, tmp_path):
    done = run_speedrun(*small_run_flags, '--peer', 'nowhere/airbench94_muon.py')
    assert (done.returncode, done.stderr) == (2, 'error: --peer: nowhere/airbench94_muon.py is not there\n')
    script = tmp_path / 'no_airbench.py'
    script.touch()
    done = run_speedrun(*small_run_flags, '--peer', script)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f'error: {script} does not run here; ')


PEER = """
import torch


class CifarNet(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def cuda(self):
        return self


def print_training_details(variables, is_final_entry):
    raise AssertionError('replaced')


def main(run, model):
    train, test = (torch.load(f'cifar10/{name}.pt') for name in ('train', 'test'))
    for time_seconds in (1.0, len(test['images']) / 1000):
        print_training_details(locals(), False)
    return float((train['labels'] == int(run)).float().mean())
"""


def test_peer_script_finds_our_images_and_answers_its_own_seconds(tmp_path, digits):
    pytest.importorskip('torch', reason='PyTorch, the peer of the benchmarks, is not installed')
    script = tmp_path / 'peer_script.py'
    script.write_text(PEER)
    contender = Contender(speedrun.peer, script, digits)
    for label in (3, 7):
        accuracy, seconds = contender.ask('run', str(label))[0]
        assert accuracy == pytest.approx(np.mean(digits.train.labels == label))
        assert seconds == len(digits.test) / 1000
    contender.stop()


@pytest.mark.parametrize('name', ['cnn', 'resnet18', 'vit'])
def test_reference_computes_the_same_logits(name):
    torch = pytest.importorskip('torch', reason='PyTorch, the peer of the benchmarks, is not installed')
    from benchmarks.torch_reference import MODELS
    from flax_dlvc.interop import to_torch

    config = importlib.import_module(f'configs.{name}_dropout').get_config()
    config.dataset = 'digits'
    setup = set_up(config)
    variables = setup.create_state().variables
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    reference = MODELS[name](0.5).eval()
    weights = {key: torch.from_numpy(value.copy()) for key, value in to_torch(setup, variables).items()}
    reference.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        theirs = reference(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(setup.model.apply, static_argnames='train')(variables, images, train=False)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

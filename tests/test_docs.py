"""What the documentation says holds: its commands run, in order, in one directory; its results and files are there."""

import ast
import importlib
import itertools
import json
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from flax_dlvc import answers, results, tables
from flax_dlvc.config import load_config, validate

# What a command cannot be run for here, by how it begins. The config and the fields that it names are checked.
NOT_RUN = {
    './launch.sh': 'makes an environment, for which tests/test_launch.py has a stand-in; then tests/test_main.py',
    'exec ./launch.sh': 'likewise',
    'sbatch': 'needs SLURM, for which tests/test_launch.py has a stand-in',
    'mpirun': 'needs Open MPI, for which tests/test_launch.py has a stand-in',
    'COORDINATOR_ADDRESS': 'needs two hosts; tests/test_distributed.py has two processes',
    'pip install': 'changes the environment',
    'tensorboard': 'is a server, and not of this package',
    'tfds build': 'needs TensorFlow and the network',
    'python -m flax_dlvc.main --config configs/cnn.py --config.dataset=fashion_mnist': 'needs what TensorFlow prepares',
    'python -m flax_dlvc.data --dataset cifar10': 'needs the official archive; tests/test_archive.py makes small ones',
    'python -m benchmarks': 'takes minutes to hours; tests/test_benchmarks.py runs the smallest sizes',
}

# What the commands leave behind, among other things.
WRITTEN = (
    'runs/quickstart/curves.png',
    'seen.png',
    'comparison.png',
    'runs/study/report.html',
    'exported/model.jax',
    'explained/0000_photo.png',
)

# Those of table.md that the README repeats, in this order.
README_COLUMNS = (
    'Model',
    'Regularisation',
    'Seeds',
    'Accuracy (%)',
    'Report (%)',
    'Cross-entropy (nats)',
    'Report (nats)',
    'Best epoch',
)


def pages():
    """The site's pages in the order of its menu, then the README."""
    index = ROOT / 'docs' / 'index.md'
    names = [line for block in re.findall(r'```{toctree}\n(.*?)```', index.read_text(), re.S) for line in block.split()]
    listed = [ROOT / 'docs' / f'{name}.md' for name in names]
    found = [index, *(page for page in listed if page.exists()), ROOT / 'README.md']
    with_commands = [page for page in ROOT.glob('docs/**/*.md') if '```sh' in page.read_text()]
    assert set(with_commands) <= set(found)
    return found


def commands():
    """Each command once, with its page; a line of a block, or several joined by backslashes."""
    found = {}
    for page in pages():
        for block in re.findall(r'^```sh\n(.*?)^```', page.read_text(), re.S | re.M):
            for line in block.replace('\\\n', ' ').splitlines():
                words = tuple(shlex.split(line, comments=True))
                if words:
                    found.setdefault(words, page.name)
    return [(page, words) for words, page in found.items()]


def begin_of_not_run(words):
    return next((begin for begin in NOT_RUN if re.match(rf'{re.escape(begin)}\b', ' '.join(words))), None)


def check_config(words):
    """That the config file which a command names is there, and takes the fields that it sets."""
    fields = [word for word in words if word.startswith('--config.')]
    for file in (word for word in words if re.fullmatch(r'configs/\w+\.py', word)):
        load_config(file, fields)


def smaller(words, small_flags):
    """The command on a fifth of the digits for an epoch, unless its own flags say otherwise; of a study one run."""
    words = list(words)
    if '--config' in words:
        after = words.index('--config') + 2
        return words[:after] + small_flags + words[after:]
    if 'flax_dlvc.study' in words and '--rebuild' not in words:
        regularization = 'augment' if '--vary' in words else 'none'  # the pages vary crops
        return [*words, '--models=cnn', f'--regularizations={regularization}', '--seeds=1', *small_flags]
    return words


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with the configs and the images that the pages speak of."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    digits, labels = load_digits(return_X_y=True)
    for number, (digit, label) in enumerate(zip(digits[:60], labels, strict=False)):
        names = [f'photos/digit_{label}/{number}.png']
        names += ['photo.jpg', 'photo.png', 'holiday/1.png', 'scans/1.png'] if number == 0 else []
        for path in map(tmp_path.joinpath, names):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(15 * digit.reshape(8, 8))).resize((80, 60)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures('quick_compilation')
def test_commands_in_the_documentation_run(workplace, small_vit_flags, command_here):
    small_flags = [*small_vit_flags, '--config.num_epochs=1']
    not_run = set()
    for page, words in commands():
        check_config(words)
        if begin := begin_of_not_run(words):
            not_run.add(begin)
            continue
        assert words[:2] == ('python', '-m'), f'{shlex.join(words)} neither runs nor is it in NOT_RUN'
        module, *arguments = smaller(words, small_flags)[2:]
        done = command_here(module.removeprefix('flax_dlvc.'), *arguments)
        assert done.returncode == 0, f'{page}: {shlex.join(words)}: {done.stderr}'
    assert not_run == set(NOT_RUN), 'some of NOT_RUN is on no page any more'
    assert all((workplace / name).stat().st_size for name in WRITTEN)


def test_configs_in_the_documentation_are_valid():
    texts = [page.read_text() for page in pages()]
    blocks = [block for text in texts for block in re.findall(r'^```python\n(.*?)^```', text, re.S | re.M)]
    scripts = [block for block in blocks if 'get_config' in block]
    assert scripts
    for script in scripts:
        names = {}
        exec(script, names)
        validate(names['get_config']())


def test_results_are_those_of_the_runs_beside_them():
    cells = results.group(results.read_runs(ROOT / 'docs' / 'results' / 'runs'))
    assert (ROOT / 'docs' / 'results' / 'table.md').read_text() == tables.to_markdown(cells)
    assert (ROOT / 'docs' / 'results' / 'answers.md').read_text() == answers.to_answers(cells)
    columns = [column for column in tables.COLUMNS if column[0] in README_COLUMNS]
    rows = [[text(cell) for _, text in columns] for cell in cells]
    in_readme = re.search(r'^\| Model \|.*?\n(?=\n)', (ROOT / 'README.md').read_text(), re.S | re.M)
    assert in_readme and in_readme[0] == tables.markdown(README_COLUMNS, rows)


@pytest.mark.parametrize(
    'name',
    [
        results.config_name(*cell)
        for cell in itertools.product(sorted({model for model, _ in results.REPORT}), results.REGULARIZATIONS)
    ],
)
def test_config_says_what_its_run_with_seed_0_came_to(name):
    run = ROOT / 'docs' / 'results' / 'runs' / name / 'seed_0'
    result, config = (json.loads((run / file).read_text()) for file in ('result.json', 'config.json'))
    if result['stopped_early']:
        ended = f'stops after epoch {result["epochs_run"]} of {config["num_epochs"]}'
    else:
        ended = f'runs for all {config["num_epochs"]} epochs'
    test = f'{result["test"]["accuracy"]:.3f} test accuracy, {result["test"]["cross_entropy"]:.3f} nats'
    line = f'CIFAR-10, seed 0: {ended}; best epoch {result["best_epoch"]}: {test}.'
    assert line in importlib.import_module(f'configs.{name}').__doc__.splitlines()


def test_imports_point_up_the_list_of_files():
    """Those inside functions, too. The one exception is the README's: the command `data --show` draws."""
    listed = re.findall(r'^\| \[.*?\]\(flax_dlvc/(\w+)', (ROOT / 'README.md').read_text(), re.M)
    found = {path.stem for path in (ROOT / 'flax_dlvc').iterdir() if path.suffix == '.py' or path.name == 'models'}
    assert sorted(listed) == sorted(found - {'__init__'})
    downwards = {
        (module, imported)
        for place, module in enumerate(listed)
        for path in (ROOT / 'flax_dlvc').glob(f'{module}/*.py' if module == 'models' else f'{module}.py')
        for imported in imports_of(path) & set(listed[place + 1 :])
    }
    assert downwards == {('data', 'pictures')}


def imports_of(path):
    """The package's modules that a file imports, by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'flax_dlvc':
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('flax_dlvc.'):
            names.add(node.module.split('.')[1])
        assert not (isinstance(node, ast.Import) and any(a.name.startswith('flax_dlvc') for a in node.names)), path
    return names

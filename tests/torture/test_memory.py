"""A long run needs no more memory than a short one."""

from pathlib import Path

import numpy as np
from conftest import ROOT

EPOCHS = 200  # longer than `runtime.TRIM_INTERVAL`, on a fast machine, too
SETTLED = 10  # epochs


def test_memory_is_flat(tmp_path, start, small_run_flags):
    """The most that the last third of the epochs needs, with a save each, against the most of the first third.

    What leaked one state would grow by 1 % each time. Batches are small, since steps under way at the same time, one
    or three, need as much memory each.
    """
    changes = ('splits.train=train[:5%]', 'splits.validation=train[97%:]', 'batch_size=16', 'evaluation_batch_size=50')
    changes = (*changes, f'num_epochs={EPOCHS}', 'early_stopping.patience=0')
    flags = (*small_run_flags, *(f'--config.{change}' for change in changes))
    process = start('main', '--config', ROOT / 'configs' / 'cnn.py', '--workdir', tmp_path / 'run', *flags)
    pages, faults = [], []
    for line in process.stdout:
        if line.startswith('epoch '):
            pages.append(int(Path(f'/proc/{process.pid}/statm').read_text().split()[1]))
            faults.append(int(Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()[7]))
    assert process.wait(60) == 0
    assert len(pages) == EPOCHS
    first, last = max(pages[SETTLED : EPOCHS // 3]), max(pages[-EPOCHS // 3 :])
    faults_of_an_epoch = np.median(np.diff(faults[SETTLED:]))
    print(f'{first // 256} MiB, {last // 256} MiB; {faults_of_an_epoch} page faults in the median epoch')
    assert last < 1.05 * first
    # What a step frees is kept for the next one: its pages do not fault again.
    assert faults_of_an_epoch < 1000

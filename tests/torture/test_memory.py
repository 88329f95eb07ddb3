"""A long run needs no more memory than a short one."""

import os
from pathlib import Path

from conftest import ROOT

# By hand, with FLAX_DLVC_KILLS, many epochs. Until it is settled the heap takes its size.
EPOCHS, SETTLED = (200, 20) if 'FLAX_DLVC_KILLS' in os.environ else (60, 20)


def test_memory_is_flat(tmp_path, start, small_run_flags):
    """A save an epoch: what leaked one state would grow by 1 % each time.

    Batches are small, since steps under way at the same time, one or three, need as much memory each.
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
    print(*(page // 256 for page in (pages[SETTLED - 1], max(pages), pages[-1])), 'MiB at settling, highest, last')
    print((faults[-1] - faults[SETTLED - 1]) / (EPOCHS - SETTLED), 'page faults an epoch')
    assert pages[-1] < 1.05 * pages[SETTLED - 1]
    # What a step frees is kept for the next one: its pages do not fault again.
    assert faults[-1] - faults[SETTLED - 1] < 1000 * (EPOCHS - SETTLED)

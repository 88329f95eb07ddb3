"""Where the time goes: phases that add up, and a trace."""

import gzip
import json
import re
import threading
import time

import jax
import pytest

from flax_dlvc import data, loop
from flax_dlvc.errors import ConfigError
from flax_dlvc.profiling import COMPILE_EVENTS, PHASES, Profile, profiled, timed


def read_summary(out):
    """Wall time and seconds by phase, as printed."""
    wall = float(re.search(r'^where ([\d.]+) s went:$', out, re.MULTILINE)[1])
    return wall, {phase: float(re.search(rf'^  {phase} +([\d.]+) s', out, re.MULTILINE)[1]) for phase in PHASES}


def test_without_a_profile_nothing_is_timed():
    @timed('data')
    def twice(number):
        return 2 * number

    began = time.perf_counter()
    assert [twice(number) for number in range(10_000)] == list(range(0, 20_000, 2))
    assert time.perf_counter() - began < 1  # some 20 ms


def test_the_innermost_phase_gets_the_seconds_and_compiling_its_own(tmp_path):
    profile = Profile(tmp_path)
    profile.enter('input and host')
    time.sleep(0.02)
    profile.enter('evaluation')
    time.sleep(0.2)
    # A function is traced in 0.05 s within another one that takes 0.1 s; another thread's compiling is nobody's wait.
    profile.on_duration(f'{COMPILE_EVENTS}jaxpr_trace_duration', 0.05)
    profile.on_duration(f'{COMPILE_EVENTS}jaxpr_trace_duration', 0.1)
    profile.on_duration('/jax/something/else', 0.1)
    thread = threading.Thread(target=profile.on_duration, args=(f'{COMPILE_EVENTS}backend_compile_duration', 0.1))
    thread.start()
    thread.join()
    profile.leave()
    time.sleep(0.02)
    profile.leave()
    profile.on_duration(f'{COMPILE_EVENTS}backend_compile_duration', 0.01)
    profile.summary()
    seconds = profile.seconds
    assert seconds['compile'] == pytest.approx(0.11)
    assert 0.1 <= seconds['evaluation'] < 0.3
    assert 0.04 <= seconds['input and host'] < 0.3
    assert profile.num_programs == 2  # that of the other thread is one, too


@pytest.fixture
def profiled_run(small_config, tmp_path, capsys):
    """Runs under a profile; returns what is printed of it."""
    small_config.num_epochs = 2

    def run():
        with profiled(tmp_path):
            loop.run(small_config, tmp_path)
        return capsys.readouterr().out

    return run


def test_a_profile_says_where_the_time_went_and_traces_a_few_steps(profiled_run, tmp_path, monkeypatch):
    def slow(*arguments, batches=data.evaluation_batches):
        time.sleep(0.5)
        return batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data, 'evaluation_batches', slow)
        began = time.perf_counter()
        out = profiled_run()
        took = time.perf_counter() - began
    wall, seconds = read_summary(out)
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.1 * len(PHASES) / 2)
    assert 0.9 * took - 0.1 < wall < took + 0.1
    assert 1.5 <= seconds['evaluation'] < 1.5 + 0.5 * wall  # two validations and the test
    assert min(seconds['compile'], seconds['training'], seconds['saving'], seconds['logging'], seconds['profiling']) > 0
    assert seconds['other'] < 0.2 * wall

    (perfetto,) = tmp_path.glob('profile/plugins/profile/*/perfetto_trace.json.gz')
    assert len(list(perfetto.parent.glob('*.xplane.pb'))) == 1
    events = json.loads(gzip.decompress(perfetto.read_bytes()))['traceEvents']
    marked = {event['args']['step_num'] for event in events if event.get('name') == 'train'}
    assert marked == {str(call) for call in range(2, 8)}  # of eight calls: the first two compile
    assert any('convolution' in event.get('name', '') or 'dot' in event.get('name', '') for event in events)
    assert f'trace of {len(marked)} steps: {tmp_path / "profile"}' in out

    before = sorted(tmp_path.rglob('*'))
    assert profiled_run().endswith(f'nothing is left to profile: {tmp_path} holds a finished run\n')
    assert sorted(tmp_path.rglob('*')) == before


def test_what_cannot_be_traced_is_said_in_one_line(profiled_run, tmp_path):
    (tmp_path / 'profile').write_text('')
    with pytest.raises(ConfigError, match=r'^cannot write .*/profile: File exists; run without --profile$'):
        profiled_run()
    (tmp_path / 'profile').unlink()
    jax.profiler.start_trace(tmp_path / 'another')
    try:
        with pytest.raises(ConfigError, match=r'^cannot trace: .*; run without --profile$'):
            profiled_run()
    finally:
        jax.profiler.stop_trace()

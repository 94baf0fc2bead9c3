"""The trainer as its user meets it: the command line, files, mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from big_vision_dpn import (
  checkpoint,
  comparison,
  preflight,
  train,
  weights,
  workdir_lock,
  writers,
)

ROOT = pathlib.Path(__file__).parents[1]

PP = (
  'decode(1)|resize(16)|value_range(-1, 1)'
  '|onehot(10, key="label", key_result="labels")|keep("image", "labels")'
)

# A real run of seconds: dropout, mixup and a random crop draw every step.
TINY = f"""
import ml_collections

def get_config(arg=None):
  c = ml_collections.ConfigDict(type_safe=False)
  c.seed = 3
  c.total_steps = 24
  c.num_classes = 10
  c.loss = 'softmax_xent'
  c.input = dict(
    data=dict(name='bv:mnist5k', split='train[:100]'),
    batch_size=16,
    pp='decode(1)|resize(18)|random_crop(16)|{PP.partition('16)|')[2]}',
  )
  c.mixup = dict(p=0.2)
  c.model = dict(
    patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, dropout=0.1,
    patch_norm='dual',
  )
  c.lr = 3e-3
  c.wd = 1e-4
  c.grad_clip_norm = 1.0
  c.schedule = dict(decay_type='cosine', warmup_steps=4)
  c.log_training_steps = 2
  c.ckpt_steps = 5
  c.evals = dict(val=dict(
    type='classification', data=dict(name='bv:mnist5k', split='test[:50]'),
    pp_fn='{PP}', loss_name='softmax_xent', log_steps=6))
  return c
"""


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(TINY)
  return path


def _tiny_config(**fields):
  scope = {}
  exec(TINY, scope)
  config = scope['get_config']()
  config.update(ml_collections.ConfigDict(fields))
  return config


def _command(config_file, *args):
  return [
    sys.executable,
    '-m',
    'big_vision_dpn.train',
    '--config',
    str(config_file),
    *map(str, args),
  ]


def _run(config_file, *args, **kw):
  return subprocess.run(
    _command(config_file, *args),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    **kw,
  )


def _final_state(workdir):
  """All arrays of the newest checkpoint, as they are on disk."""
  target = preflight.check(_tiny_config()).state_shapes
  reader = checkpoint.Checkpointer(str(workdir))
  step, state, _ = reader.restore_newest(target)
  reader.close()
  return step, jax.device_get(jax.tree.leaves(state))


@pytest.fixture(scope='module')
def finished(config_file, tmp_path_factory):
  """A workdir with an uninterrupted run, and what the run printed."""
  workdir = tmp_path_factory.mktemp('whole')
  result = _run(config_file, '--workdir', workdir)
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def test_a_run_writes_metrics_checkpoints_and_progress(finished):
  workdir, printed = finished
  records = writers.read_metrics(str(workdir))
  assert [r['step'] for r in records] == [1, *range(2, 25, 2)]
  logged = {
    'training_loss', 'l2_grads', 'l2_params', 'l2_updates', 'global_schedule',
    'lr', 'img/sec', 'img/sec/core', 'core_hours', 'epoch', 'examples_seen',
  }  # fmt: skip
  assert all(logged <= r.keys() for r in records)
  assert [r['step'] for r in records if 'val/prec@1' in r] == [6, 12, 18, 24]
  assert records[0]['training_loss'] == pytest.approx(np.log(10), abs=1e-5)
  assert records[-1]['epoch'] == 24 * 16 / 100
  # The multiplier of the update that led to a step: step 1 had none before.
  assert records[0]['global_schedule'] == 0.0
  assert records[1]['global_schedule'] == 0.25
  assert records[-1]['lr'] == pytest.approx(
    3e-3 * records[-1]['global_schedule']
  )
  assert (workdir / 'checkpoints' / '24').is_dir()
  assert json.loads((workdir / 'config.json').read_text())['seed'] == 3
  for part in (
    'step 24/24 (100%)',
    'loss',
    'lr',
    'img/s',
    'left',
    'val/prec@1',
  ):
    assert part in printed
  assert 'Traceback' not in printed


def test_running_a_finished_run_again_changes_nothing(finished):
  workdir, _ = finished
  before = (workdir / 'metrics.jsonl').read_text()
  train.train(preflight.check(_tiny_config()), 'run', str(workdir))
  assert (workdir / 'metrics.jsonl').read_text() == before


def _signal_behind_step(config_file, workdir, step, number):
  """Starts the run, signals once it has logged `step`; gives the exit code."""
  process = subprocess.Popen(
    _command(config_file, '--workdir', workdir),
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    records = writers.read_metrics(str(workdir))
    if records and records[-1]['step'] >= step:
      break
    time.sleep(0.01)
  process.send_signal(number)
  return process.wait(timeout=60)


def test_killed_and_told_to_end_it_ends_with_the_same_bits(
  finished, config_file, tmp_path
):
  code = _signal_behind_step(config_file, tmp_path, 8, signal.SIGKILL)
  assert code == -signal.SIGKILL, 'the run ended before the kill'
  code = _signal_behind_step(config_file, tmp_path, 14, signal.SIGTERM)
  assert code == train.PREEMPTED
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert 14 <= saved < 24
  result = _run(config_file, '--workdir', tmp_path)
  assert result.returncode == 0, result.stderr
  assert f'{24 - saved} of 24 steps to go' in result.stdout

  step, expected = _final_state(finished[0])
  resumed_step, resumed = _final_state(tmp_path)
  assert step == resumed_step == 24
  assert len(expected) > 30
  for a, b in zip(resumed, expected, strict=True):
    np.testing.assert_array_equal(a, b)

  # Metrics: every step once, and equal but for what a clock measures.
  timed = ('img/sec', 'img/sec/core', 'core_hours')
  untimed = lambda w: [
    {k: v for k, v in r.items() if k not in timed}
    for r in writers.read_metrics(str(w))
  ]
  assert untimed(tmp_path) == untimed(finished[0])


def test_another_config_in_the_same_workdir_is_refused(finished):
  workdir, _ = finished
  for fields, message in (
    ({}, ''),
    ({'log_training_steps': 3}, ''),
    ({'lr': 0.5}, 'lr: 0.003 there, 0.5 now'),
  ):
    plan = preflight.check(_tiny_config(**fields), str(workdir))
    report = preflight.report_mistakes([plan], data_needed=True)
    assert message in report
    assert bool(message) == bool(report)


def _report(**fields):
  """What the user reads on stderr for a config with these fields."""
  plan = preflight.check(_tiny_config(**fields))
  return preflight.report_mistakes([plan], data_needed=True)


def test_the_tiny_config_has_no_mistakes():
  assert _report() == ''


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'sead': 1}, "Did you mean 'seed'"),
    ({'task': 'clasification'}, "Did you mean 'classification'"),
    ({'model_name': 'vitt'}, "unknown model 'vitt'. Did you mean 'vit'"),
    ({'model': {'variant': 'Q/16'}}, "unknown variant 'Q'"),
    ({'model': {'patchnorm': 'dual'}}, "Did you mean 'patch_norm'"),
    ({'model': {'patch_size': 5}}, 'do not divide an image of 16×16'),
    ({'loss': 'softmax'}, "Did you mean 'softmax_xent'"),
    ({'optax_name': 'scale_by_adan'}, "Did you mean 'scale_by_adam'"),
    ({'optax': {'bl': 1}}, "unknown argument of scale_by_adam 'bl'"),
    ({'schedule': {'decay_type': 'cosin'}}, "Did you mean 'cosine'"),
    ({'wd_mults': [('kernel', 1.0)]}, "config.wd_mults: 'kernel' matches none"),
    ({'mixup': {'alpha': 1}}, "unknown argument of mixup 'alpha'"),
    ({'num_classes': 11}, 'expected [11], config.num_classes'),
    ({'input': {'batch_size': 12}}, 'a multiple of the 8 devices'),
    ({'input': {'pp': 'decode|flip'}}, 'pp op 2 (flip), column 8'),
    ({'input': {'pp': 'decode|resize(16'}}, 'pp op 2'),
    ({'input': {'pp': 'decode|resize(16)'}}, "'labels' is needed"),
    ({'input': {'data': {'name': 'mnist6k'}}}, "no data set 'mnist6k'"),
    ({'input': {'data': {'split': 'val'}}}, "unknown split 'val'"),
    ({'evals': {'val': {'type': 'clas'}}}, "unknown evaluator 'clas'"),
    ({'evals': {'val': {'data': {'split': 'val'}}}}, 'config.evals.val: data'),
    ({'evals': {'val': {'lossname': 'x'}}}, "Did you mean 'loss_name'"),
    ({'model_init': '/nowhere/x.npz'}, '/nowhere/x.npz'),
    ({'total_steps': None}, 'config.total_steps'),
    (
      {'input': {'pp': PP.partition('|')[2]}},
      'config.input.pp: pp op 1 (resize)',
    ),
    ({'lr_mults': ('head/.*', 0.1)}, "(regex, value) pairs, not 'head/.*'"),
    ({'optax': {'mu_dtype': 'bf16'}}, 'bf16'),
    ({'model': {'num_heads': 0}}, 'config.model: ZeroDivisionError'),
    ({'input': {'streams': 0}}, 'config.input.streams is 0; expected at least'),
    ({'input': {'data': {'split': 'train[:0]'}}}, 'config.input.data'),
    ({'profile_steps': (2,)}, 'config.profile_steps'),
    (
      {
        'evals': {
          'again': {
            'type': 'mean',
            'pred': 'loss',
            'prefix': 'val/',
            'data': {'name': 'bv:mnist5k', 'split': 'test'},
            'pp_fn': PP,
            'log_steps': 1,
          }
        }
      },
      "prefix 'val/' is that of another one",
    ),
  ],
)
def test_mistakes(fields, message):
  assert message in _report(**fields)


def test_what_fails_in_the_training_step_fails_before_it(capsys):
  config = _tiny_config(optax={'b1': 'x'})
  assert train.run(config, None, dry_run=True) == 2
  assert 'the training step' in capsys.readouterr().err


def test_a_metric_that_no_evaluator_has_is_found_before_training(
  tmp_path, capsys
):
  config = _tiny_config()
  config.comparison = {'metric': 'val/prec1', 'runs': [('a', {})]}
  assert train.run(config, str(tmp_path), dry_run=False) == 2
  assert "Did you mean 'val/prec@1'" in capsys.readouterr().err
  assert os.listdir(tmp_path) == []


def test_checkpoints_to_keep_are_saved_and_kept(tmp_path):
  config = _tiny_config(total_steps=13, ckpt_steps=5, keep_ckpt_steps=3)
  del config.evals['val']
  train.train(preflight.check(config), 'run', str(tmp_path))
  steps = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
  assert steps == {3, 6, 9, 12, 13}


def test_missing_data_of_an_evaluator_is_reported(tmp_path):
  data = {'name': 'cifar10', 'split': 'test', 'data_dir': str(tmp_path)}
  report = _report(evals={'val': {'data': data, 'pp_fn': PP}})
  assert f'config.evals.val: cifar10 is not in {tmp_path}' in report
  assert f'tools.prepare_data cifar10 --data_dir={tmp_path}' in report


def test_all_mistakes_come_in_one_report(config_file):
  result = _run(
    config_file,
    '--config.loss=xent',
    '--config.input.pp=decode|flip',
    '--config.evals.val.data.split=tset',
    '--config.model.patch_norm=dul',
    '--config.grad_clip_norm=2',
  )
  assert result.returncode == 2
  assert 'Traceback' not in result.stderr
  assert result.stderr.startswith('4 to mend')
  for part in ('xent', 'flip_lr', "Did you mean 'test'", "'dual'"):
    assert part in result.stderr


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['configs/nowhere.py'], 'configs/nowhere.py'),
    (['configs/proj/dpn/vit_i1k.py:varient=S/16'], "Did you mean 'variant'"),
    (['configs/proj/dpn/vit_i1k.py', '--config.lrr=1'], '"lr"'),
  ],
)
def test_mistakes_on_the_command_line(args, message):
  result = _run(*args)
  assert result.returncode == 2
  assert message in result.stderr
  assert 'Traceback' not in result.stderr


def test_dry_run_of_imagenet_needs_no_data(capsys, tmp_path):
  scope = {}
  exec((ROOT / 'configs/proj/dpn/vit_i1k.py').read_text(), scope)
  config = scope['get_config']('variant=S/16,patch_norm=dual')
  config.input.data.data_dir = str(tmp_path)
  for spec in config.evals.values():
    spec.data.data_dir = str(tmp_path)
  assert train.run(config, None, dry_run=True) == 0
  printed = capsys.readouterr().out
  # 22,198,120 parameters without DPN, which adds two LayerNorms.
  assert f'{22_198_120 + 2 * (16 * 16 * 3 + 384):,}' in printed
  assert '1,268,355 examples' in printed
  assert '92,897 of 4,096' in printed
  assert 'ILSVRC2012_img_train.tar' in printed
  # Multiply-adds of the matmuls, twice forward and twice that backward.
  tokens, width, mlp, depth = 197, 384, 1536, 12
  macs = depth * (
    tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
  )
  flops = float(printed.split('FLOPs a step')[1].split()[0])
  assert flops == pytest.approx(4096 * 6 * macs, rel=0.1)


@pytest.mark.parametrize('mesh', [{}, {'mesh': [('data', 4), ('model', 2)]}])
def test_parts_of_a_batch_add_up_to_it(mesh, tmp_path):
  """With mixup; not with dropout, which draws anew for each part."""
  records = []
  for steps in (1, 2, 4):
    config = _tiny_config(
      total_steps=4, log_training_steps=1, grad_accum_steps=steps, **mesh
    )
    config.input.batch_size = 32
    config.model.dropout = 0.0
    del config.evals['val']
    plan = preflight.check(config)
    assert plan.mistakes.messages == []
    train.train(plan, 'run', str(tmp_path / str(steps)))
    keys = ('training_loss', 'l2_grads', 'l2_params', 'l2_updates')
    read = writers.read_metrics(str(tmp_path / str(steps)))
    records.append([[r[key] for key in keys] for r in read])
  np.testing.assert_allclose(records[1], records[0], rtol=1e-5)
  np.testing.assert_allclose(records[2], records[0], rtol=1e-5)


def test_average_of_the_parameters(tmp_path):
  """It is that of all states so far, and is evaluated beside the last one."""
  decay = 0.75
  plan = preflight.check(_tiny_config(total_steps=6, ema_decay=decay))
  state = train.init_state(plan)
  average = jax.device_get(state['params'])
  update = jax.jit(train.make_update_fn(plan), donate_argnums=0)
  for step, batch in zip(range(6), train.batches_from(plan, 0), strict=False):
    state, _ = update(state, batch, step)
    average = jax.tree.map(
      lambda a, p: decay * a + (1 - decay) * np.asarray(p),
      average,
      state['params'],
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    state['ema'],
    average,
  )
  (entry,) = plan.evaluators
  results = train.evaluate(entry, state, plan.layout)
  assert results.keys() == {
    f'{prefix}val/{name}'
    for prefix in ('', 'ema/')
    for name in ('loss', 'prec@1')
  }
  alone = train.evaluate(entry, {'params': state['ema']}, plan.layout)
  assert results['ema/val/loss'] == alone['val/loss'] != results['val/loss']
  assert set(plan.metrics) == results.keys()


def _config_of_one_bad_example(folder, **fields):
  """64 random images of which number 37 has a pixel that is no number."""
  image = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype('f')
  image[37, 0, 0] = np.nan
  np.savez(folder / 'data.npz', image=image, label=np.arange(64) % 10)
  config = _tiny_config(total_steps=12, log_training_steps=1, **fields)
  del config.evals['val']
  config.input.data = {'name': 'bv:npz', 'fname': str(folder / 'data.npz')}
  config.input.pp = PP.partition('value_range(-1, 1)|')[2]
  config.mixup = None
  return config


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
  config = _config_of_one_bad_example(tmp_path, ckpt_steps=1)
  workdir = tmp_path / 'workdir'
  assert train.run(config, str(workdir), dry_run=False) == train.NOT_FINITE
  record = json.loads((workdir / 'not_finite.json').read_text())
  step, places = record['step'], record['examples']
  assert f'step {step} is not finite: loss nan' in capsys.readouterr().err
  assert 1 <= step <= 4 and len(places) == 16
  assert any('example 37' in place for place in places)
  # What came before is there, and nothing of the step itself.
  steps = [r['step'] for r in writers.read_metrics(str(workdir))]
  assert steps == list(range(1, step))
  saved = {int(p.name) for p in (workdir / 'checkpoints').iterdir()}
  assert max(saved, default=0) == step - 1


def test_such_updates_can_be_left_out(tmp_path):
  config = _config_of_one_bad_example(tmp_path, nan_policy='skip')
  workdir = tmp_path / 'workdir'
  assert train.run(config, str(workdir), dry_run=False) == 0
  records = writers.read_metrics(str(workdir))
  bad = [i for i, r in enumerate(records) if np.isnan(r['training_loss'])]
  assert len(bad) == 3  # Of twelve steps, four of which are an epoch.
  assert [r['skipped_updates'] for r in records] == [
    sum(b <= i for b in bad) for i in range(12)
  ]
  assert all(np.isfinite(a).all() for a in weights.read(str(workdir)).values())


def test_a_workdir_is_of_one_run_at_a_time(config_file, tmp_path):
  with workdir_lock.locked(str(tmp_path)):
    result = _run(config_file, '--workdir', tmp_path)
  assert result.returncode == train.USER_MISTAKE
  assert f'{tmp_path} is in use by process {os.getpid()} on ' in result.stderr
  assert not (tmp_path / 'checkpoints').exists()


def test_a_workdir_that_cannot_be_written_to(tmp_path, capsys):
  (tmp_path / 'file').touch()
  workdir = str(tmp_path / 'file' / 'workdir')
  code = train.run(_tiny_config(), workdir, dry_run=False)
  assert code == train.USER_MISTAKE
  assert f'cannot write to {workdir}' in capsys.readouterr().err


FSDP = 'fsdp(axis="data", min_size_to_shard_mb=0)'
MESHES = {
  'data parallel': {},
  'fsdp': {'sharding_strategy': [('.*', FSDP)]},
  'tensor parallel': {
    'mesh': [('data', 4), ('model', 2)],
    'sharding_strategy': [('.*', 'tensor_parallel("model")')],
    'sharding_rules': [
      ('act_batch', 'data'),
      ('act_heads', 'model'),
      ('act_mlp', 'model'),
    ],
  },
  'mixed': {
    'mesh': [('replica', 2), ('data', -1), ('model', 2)],
    'sharding_strategy': [('.*', f'tensor_parallel("model")|{FSDP}')],
    'sharding_rules': [('act_batch', ('replica', 'data'))],
  },
}


def _losses(workdir, **fields):
  config = _tiny_config(total_steps=20, log_training_steps=1, **fields)
  config.evals.val.log_steps = 20
  plan = preflight.check(config)
  assert plan.mistakes.messages == []
  train.train(plan, 'run', str(workdir))
  records = writers.read_metrics(str(workdir))
  return [
    [r['training_loss'], r['l2_params'], r['l2_grads']] for r in records
  ], [
    records[-1]['val/loss'],
    records[-1]['val/prec@1'],
  ]


@pytest.fixture(scope='module')
def losses_of_one_device(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    first = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda: first)
    return _losses(tmp_path_factory.mktemp('one'))


@pytest.mark.parametrize('mesh', MESHES)
def test_any_mesh_trains_like_one_device(mesh, losses_of_one_device, tmp_path):
  """Losses and norms of 20 steps and the evaluation, to float32 rounding."""
  losses, metrics = _losses(tmp_path, **MESHES[mesh])
  np.testing.assert_allclose(losses, losses_of_one_device[0], rtol=1e-5)
  np.testing.assert_allclose(metrics, losses_of_one_device[1], rtol=1e-5)


def test_fsdp_splits_the_state_and_keeps_it_split():
  """Each of eight devices has an eighth of it, before and after a step."""
  config = _tiny_config(**MESHES['fsdp'])
  config.model.update(width=64, mlp_dim=256, depth=2)
  plan = preflight.check(config)
  state = train.init_state(plan)
  batch = plan.layout.put_batch(
    {k: np.zeros(s.shape, s.dtype) for k, s in plan.host_shapes.items()}
  )

  def share(state):
    leaves = jax.tree.leaves(state)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    return on_one / sum(x.nbytes for x in leaves)

  with plan.layout.activated():
    step = jax.jit(
      train.make_update_fn(plan),
      out_shardings=(train.state_shardings(plan), plan.layout.replicated),
    )
    after, _ = step(state, batch, 0)
  # What no dimension of is a multiple of 8 is left whole.
  assert share(state) == share(after)
  assert 1 / 8 <= share(after) < 1.1 / 8


def test_model_init_starts_from_a_big_vision_file(tmp_path):
  from big_vision_dpn import pytree

  config = _tiny_config()
  plan = preflight.check(config)
  params = train.init_state(plan)['params']
  names = pytree.flatten_with_names(params)
  rng = np.random.default_rng(0)
  arrays = {
    f'params/{k}': rng.normal(size=v.shape).astype(np.float32)
    for k, v in names.items()
  }
  np.savez(tmp_path / 'init.npz', **arrays)
  config.model_init = str(tmp_path / 'init.npz')
  config.model_load = {'dont_load': ['head/.*']}
  plan = preflight.check(config)
  assert not plan.mistakes.messages
  loaded = train.init_state(plan)['params']
  for name, value in pytree.flatten_with_names(loaded).items():
    fresh = name.startswith('head/')
    expected = names[name] if fresh else arrays[f'params/{name}']
    np.testing.assert_array_equal(value, expected)


def test_profile_writes_a_trace_of_a_run_that_ends_within_it(tmp_path):
  config = _tiny_config(total_steps=5, profile_steps=(2, 50))
  del config.evals['val']
  train.train(preflight.check(config), 'run', str(tmp_path))
  assert list(tmp_path.glob('profile/**/*.xplane.pb'))


def test_a_comparison_trains_its_runs_and_draws_them(tmp_path, capsys):
  config = _tiny_config(total_steps=4)
  config.comparison = ml_collections.ConfigDict(
    {
      'metric': 'val/prec@1',
      'runs': [
        ('dpn', {'model': {'patch_norm': 'dual'}}),
        ('baseline', {'model': {'patch_norm': 'none'}}),
      ],
      'next_steps': 'and then?',
    }
  )
  assert train.run(config, str(tmp_path), dry_run=False) == 0
  printed = capsys.readouterr().out
  assert printed.index('dpn  step') < printed.index('baseline  step')
  assert 'and then?' in printed
  assert (tmp_path / 'comparison.png').stat().st_size > 10_000
  for variant in comparison.variants(config, str(tmp_path)):
    stored = json.loads(
      pathlib.Path(variant.workdir, 'config.json').read_text()
    )
    expected = {'dpn': 'dual', 'baseline': 'none'}[variant.name]
    assert stored['model']['patch_norm'] == expected


def test_a_comparison_needs_a_workdir(capsys):
  config = _tiny_config()
  config.comparison = {'metric': 'val/prec@1', 'runs': [('a', {})]}
  assert train.run(config, None, dry_run=False) == 2
  assert '--workdir' in capsys.readouterr().err


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert train.run(_tiny_config(total_steps=4), None, dry_run=False) == 0
  assert os.listdir(tmp_path) == []

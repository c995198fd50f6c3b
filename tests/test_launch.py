"""The scripts in launch/, as far as they can be checked without a cluster: syntax, structure, and what they decide."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from diffusion.runtime.interrupt import EXIT_STATUS
from tests.test_main import ROOT

SCRIPTS = ['tpu_vm.sh', 'slurm.sbatch']


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_are_bash(script):
    done = subprocess.run(['bash', '-n', ROOT / 'launch' / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='shellcheck is not installed')
@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(['shellcheck', ROOT / 'launch' / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def pretend(folder, name, body):
    """A program on the PATH that does what `body` says, and writes down how it was called."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{folder}/calls"\n{body}\n')
    path.chmod(0o755)


def called(folder):
    return (folder / 'calls').read_text().splitlines() if (folder / 'calls').exists() else []


def run(script, folder, *args, **environment):
    path = f'{folder}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.run(
        ['bash', ROOT / 'launch' / script, *args],
        env=os.environ | {'PATH': path} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ('status', 'restarts', 'queued'),
    [(0, 0, False), (1, 0, False), (EXIT_STATUS, 0, True), (134, 3, True), (EXIT_STATUS, 100, False)],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, status, restarts, queued):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'srun', f'exit {status}')
    pretend(bin_, 'scontrol', '')
    environment = {'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(restarts), 'SLURM_SUBMIT_DIR': str(ROOT)}
    done = run('slurm.sbatch', bin_, '--workdir=a b', **environment)
    assert done.returncode == status
    calls = called(bin_)
    assert calls[0].endswith('main.py --workdir=a b')
    assert ('scontrol requeue 17' in calls) is queued


def test_slurm_waits_for_the_save_after_a_signal(tmp_path):
    """A signal that the script gets, too, does not end it before its processes have."""
    bin_ = tmp_path / 'bin'
    # $PPID is the script, which is sent SIGTERM while its step goes on to save.
    pretend(bin_, 'srun', f'kill -TERM $PPID; sleep 1; touch "{tmp_path}/saved"; exit {EXIT_STATUS}')
    pretend(bin_, 'scontrol', f'test -e "{tmp_path}/saved" || exit 9')
    done = run('slurm.sbatch', bin_, SLURM_JOB_ID='17', SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == EXIT_STATUS, done.stdout + done.stderr
    assert called(bin_)[-1] == 'scontrol requeue 17' and (tmp_path / 'saved').exists()


GCLOUD = """
words="$*"
case $words in
  *describe*) cat "{folder}/state" 2>/dev/null || exit 1 ;;
  *" create "*) echo READY > "{folder}/state" ;;
  *" delete "*) rm "{folder}/state" ;;
  *exit-status\\;*)                                      # main.py: preempted at first, complete afterwards
    if [ ! -e "{folder}/second" ]; then touch "{folder}/second"; echo {status} > "{folder}/status"
      echo {after} > "{folder}/state"; exit 1; fi ;;
  *"cat diffusion/exit-status"*) cat "{folder}/status" ;;
esac
"""


def test_tpus_that_are_taken_away_are_made_again(tmp_path):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', GCLOUD.format(folder=tmp_path, status=EXIT_STATUS, after='PREEMPTED'))
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py', '--workdir=/mnt/runs/digits')
    assert done.returncode == 0, done.stderr
    calls = [call for call in called(bin_) if call.startswith('gcloud')]
    actions = [word for call in calls for word in re.findall(r'tpu-vm (create|delete)', call)]
    assert actions == ['create', 'delete', 'create']
    started = [line for line in calls if '--config=configs/digits.py --workdir=/mnt/runs/digits' in line]
    assert len(started) == 2 and '--worker=all' in started[0]
    assert 'complete' in done.stderr


def test_tpus_do_not_repeat_what_is_refused(tmp_path):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', GCLOUD.format(folder=tmp_path, status=1, after='READY'))
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py')
    assert done.returncode == 1 and 'refuses to run' in done.stderr


def test_how_to_use_it_is_said(tmp_path):
    done = run('tpu_vm.sh', tmp_path)
    assert done.returncode == 2 and 'launch/tpu_vm.sh keep' in done.stderr and 'SHARE' in done.stderr


@pytest.fixture(scope='module')
def cluster():
    """{kind: object} of launch/kubernetes.yaml."""
    text = (ROOT / 'launch' / 'kubernetes.yaml').read_text(encoding='utf-8')
    objects = list(yaml.safe_load_all(text))
    assert all(set(o) >= {'apiVersion', 'kind', 'metadata'} for o in objects)
    return {o['kind']: o for o in objects}


def test_pods_can_find_each_other(cluster):
    """What JAX needs: an indexed Job, a headless Service that is its subdomain, and leave to ask about both."""
    job, service = cluster['Job'], cluster['Service']
    pod = job['spec']['template']['spec']
    assert job['spec']['completionMode'] == 'Indexed'
    assert job['spec']['completions'] == job['spec']['parallelism'] > 1
    assert service['spec']['clusterIP'] == 'None' and service['spec']['publishNotReadyAddresses'] is True
    assert service['spec']['selector'] == {'job-name': job['metadata']['name']}
    assert pod['subdomain'] == service['metadata']['name']
    allowed = {(group, what) for r in cluster['Role']['rules'] for group in r['apiGroups'] for what in r['resources']}
    assert allowed >= {('', 'pods'), ('', 'services'), ('batch', 'jobs')}
    assert all({'get', 'list'} <= set(rule['verbs']) for rule in cluster['Role']['rules'])
    binding = cluster['RoleBinding']
    assert binding['roleRef']['name'] == cluster['Role']['metadata']['name']
    assert [s['name'] for s in binding['subjects']] == [cluster['ServiceAccount']['metadata']['name']]
    assert pod['serviceAccountName'] == cluster['ServiceAccount']['metadata']['name']


def test_pods_that_can_go_on_are_started_again(cluster):
    job = cluster['Job']['spec']
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'  # else the API refuses a podFailurePolicy
    (container,) = pod['containers']
    actions = {}
    for rule in job['podFailurePolicy']['rules']:
        codes = rule.get('onExitCodes')
        if codes:
            assert codes['containerName'] == container['name'] and codes['operator'] == 'In'
            actions |= dict.fromkeys(codes['values'], rule['action'])
    assert actions[EXIT_STATUS] == actions[134] == 'Ignore' and actions[1] == 'FailJob'
    assert pod['terminationGracePeriodSeconds'] >= 120


def test_pods_have_the_volumes_they_mount(cluster):
    pod = cluster['Job']['spec']['template']['spec']
    (container,) = pod['containers']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    workdir = next(arg for arg in container['args'] if arg.startswith('--workdir=')).partition('=')[2]
    shared = {v['name'] for v in pod['volumes'] if 'persistentVolumeClaim' in v}
    assert any(m['name'] in shared and workdir.startswith(m['mountPath']) for m in container['volumeMounts'])

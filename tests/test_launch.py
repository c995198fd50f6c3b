"""The scripts in launch/, without a cluster: syntax, structure and decisions."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from diffusion.runtime.interrupt import EXIT_STATUS

ROOT = pathlib.Path(__file__).parent.parent
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
    """Put a program on the PATH that runs `body`, and records how it was called."""
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
def test_slurm_requeues_what_can_continue(tmp_path, status, restarts, queued):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'srun', f'exit {status}')
    pretend(bin_, 'scontrol', '')
    environment = {'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(restarts), 'SLURM_SUBMIT_DIR': str(ROOT)}
    done = run('slurm.sbatch', bin_, '--workdir=a b', **environment)
    assert done.returncode == status
    calls = called(bin_)
    assert calls[0].endswith('main.py --workdir=a b')
    assert ' --cpus-per-task=8 ' in calls[0]  # since 22.05 srun does not inherit it from sbatch
    assert ('scontrol requeue 17' in calls) is queued


def test_slurm_waits_for_the_save_after_a_signal(tmp_path):
    """A signal to the script as well does not end it before its processes."""
    bin_ = tmp_path / 'bin'
    # $PPID is the script. It gets SIGTERM while srun continues and saves.
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
  *exit-status\\;*)                                      # main.py: first preempted, then complete
    if [ ! -e "{folder}/second" ]; then touch "{folder}/second"; echo {status} > "{folder}/status"
      echo {after} > "{folder}/state"; exit 1; fi ;;
  *"cat diffusion/exit-status"*) cat "{folder}/status" ;;
esac
"""


def test_preempted_tpus_are_created_again(tmp_path):
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


@pytest.mark.parametrize(
    ('message', 'again'),
    [
        ("PERMISSION_DENIED: Permission denied on 'locations/us-central2-b' (or it may not exist).", False),
        ('{ "code": 8, "message": "There is no more capacity in the zone" }', True),
    ],
)
def test_tpus_are_created_later_unless_it_is_forbidden(tmp_path, message, again):
    bin_ = tmp_path / 'bin'
    refuse = f"""case "$*" in *" create "*)
      if [ ! -e "{tmp_path}/asked" ]; then touch "{tmp_path}/asked"; echo {shlex.quote(message)} >&2; exit 1; fi
    esac
    """
    pretend(bin_, 'gcloud', refuse + GCLOUD.format(folder=tmp_path, status=0, after='READY'))
    pretend(bin_, 'sleep', '')
    (tmp_path / 'second').touch()  # main.py is complete at once
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py')
    assert sum(' create ' in call for call in called(bin_)) == 1 + again
    assert done.returncode == (0 if again else 1) and message in done.stderr
    assert ('complete' if again else 'refused, see above') in done.stderr


@pytest.mark.parametrize(('spot', 'asked'), [({}, True), ({'SPOT': ''}, False)])
def test_tpus_that_are_not_preempted_can_be_asked_for(tmp_path, spot, asked):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', '')
    assert run('tpu_vm.sh', bin_, 'create', **spot).returncode == 0
    (call,) = called(bin_)
    assert ('--spot' in call) is asked and 'create diffusion' in call


def test_tpus_do_not_repeat_a_refused_run(tmp_path):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', GCLOUD.format(folder=tmp_path, status=1, after='READY'))
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py')
    assert done.returncode == 1 and 'refused to run' in done.stderr


def test_tpus_that_are_stopped_are_not_started_again(tmp_path):
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', GCLOUD.format(folder=tmp_path, status='stopped', after='READY'))
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py')
    assert done.returncode == EXIT_STATUS and 'stopped and saved' in done.stderr
    assert sum('main.py' in call for call in called(bin_)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('status', [EXIT_STATUS, 134])
def test_tpus_that_always_fail_are_given_up(tmp_path, status):
    """Hosts that never meet end with 75, as a stop does."""
    bin_ = tmp_path / 'bin'
    pretend(bin_, 'gcloud', f"""case "$*" in
      *describe*) echo READY ;;
      *"cat diffusion/exit-status"*) echo {status} ;;
      *main.py*) exit 1 ;;
    esac""")  # fmt: skip
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py', TRIES='3')
    assert done.returncode == 1 and '3 failures in a row' in done.stderr
    assert sum('main.py' in call for call in called(bin_)) == 3


@pytest.mark.parametrize('fails', ['git archive', 'gcloud scp', 'gcloud install_here'])
def test_nothing_starts_after_a_failed_installation(tmp_path, fails):
    """The exit status of an earlier run is not mistaken for its own."""
    bin_ = tmp_path / 'bin'
    program, what = fails.split()
    pretend(bin_, 'git', f'test {program} != git')
    pretend(bin_, 'gcloud', f"""case "$*" in
      *{what}*) exit 1 ;;
      *describe*) echo READY ;;
      *"cat diffusion/exit-status"*) echo 1 ;;
    esac""")  # fmt: skip
    pretend(bin_, 'sleep', '')
    done = run('tpu_vm.sh', bin_, 'keep', '--', '--config=configs/digits.py', TRIES='2', TMPDIR=str(tmp_path))
    assert done.returncode == 1 and 'a failed installation' in done.stderr
    assert not any('main.py' in call for call in called(bin_))
    assert not list(tmp_path.glob('*.tar.gz'))


# Runs a worker's commands on this machine, in a folder.
WORKER = """
cd "{home}"
for word; do
  case $word in --command=*) PATH="{bin}:/usr/bin:/bin" bash -c "${{word#--command=}}"; exit ;; esac
done
case "$*" in *" scp "*) cp "$5" diffusion.tar.gz ;; esac
"""


@pytest.fixture
def worker(tmp_path):
    """(folder of the pretended programs, home folder of a worker)."""
    bin_, home = tmp_path / 'bin', tmp_path / 'home'
    home.mkdir()
    pretend(bin_, 'gcloud', WORKER.format(home=home, bin=bin_))
    pretend(bin_, 'sudo', '')
    pretend(bin_, 'mountpoint', 'exit 1')
    pretend(bin_, 'pgrep', 'exit 1')  # nothing is running
    return bin_, home


VENV = 'mkdir -p .venv/bin && echo exit > .venv/bin/python && chmod +x .venv/bin/python'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('recent', 'whole', 'share', 'asked'),
    [
        (True, True, '', []),
        (True, False, '', ['python3', 'python3-venv']),
        (True, True, '10.0.0.2:/runs', ['nfs-common']),
        (False, True, '10.0.0.2:/runs', ['python3.11', 'python3.11-venv', 'nfs-common']),
    ],
)
def test_workers_get_the_packages_they_lack(worker, recent, whole, share, asked):
    bin_, home = worker
    pretend(bin_, 'python3', f'case "$*" in *version_info*) {str(recent).lower()} ;; '
            f'*ensurepip*) {str(whole).lower()} ;; *) {VENV} ;; esac')  # fmt: skip
    pretend(bin_, 'python3.11', f'case "$*" in *ensurepip*) false ;; *) {VENV} ;; esac')
    done = run('tpu_vm.sh', bin_, 'install', SHARE=share)
    assert done.returncode == 0, done.stderr
    assert (home / 'diffusion' / 'main.py').is_file() and (home / 'diffusion' / '.venv').is_dir()
    installed = [
        call.partition(' -y ')[2].split() for call in called(bin_) if call.startswith('sudo') and ' -y ' in call
    ]
    assert installed == ([asked] if asked else [])
    mounted = [call for call in called(bin_) if call.startswith('sudo mount ')]
    assert mounted == ([f'sudo mount -t nfs {share} /mnt/runs'] if share else [])


def test_an_installation_fails_if_the_share_cannot_be_mounted(worker):
    bin_, _ = worker
    pretend(bin_, 'python3', f'case "$*" in *-c*) ;; *) {VENV} ;; esac')
    pretend(bin_, 'sudo', 'test "$1" != mount')
    assert run('tpu_vm.sh', bin_, 'install', SHARE='10.0.0.2:/runs').returncode != 0


@pytest.mark.parametrize(
    ('ends', 'noted'),
    [('exit 75', '75'), ('touch stopped; exit 75', 'stopped'), ('touch stopped; exit 1', '1'), ('exit 0', '0')],
)
def test_workers_record_how_a_run_ended(worker, ends, noted):
    """A file `stopped` that an earlier run left does not count."""
    bin_, home = worker
    python = home / 'diffusion' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\n{ends}\n')
    python.chmod(0o755)
    (home / 'diffusion' / 'stopped').touch()
    done = run('tpu_vm.sh', bin_, 'start', '--', '--config=configs/digits.py')
    assert done.returncode == int(re.search(r'\d+', ends)[0])
    assert (home / 'diffusion' / 'exit-status').read_text().strip() == noted


@pytest.mark.parametrize(('noted', 'status'), [('0', 0), ('1', 1), ('stopped', EXIT_STATUS)])
def test_a_command_that_is_repeated_waits_for_the_training(worker, noted, status):
    """gcloud repeats it after a broken connection, which does not end the training. A second one must not start."""
    bin_, home = worker
    python = home / 'diffusion' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\ntouch "{home}/second"\n')
    python.chmod(0o755)
    pretend(bin_, 'pgrep', f'test ! -e "{home}/diffusion/exit-status"')
    pretend(bin_, 'sleep', f'echo {noted} > "{home}/diffusion/exit-status"')  # meanwhile the training ends
    done = run('tpu_vm.sh', bin_, 'start', '--', '--config=configs/digits.py')
    assert done.returncode == status and 'waiting for it' in done.stderr
    assert not (home / 'second').exists()
    assert (home / 'diffusion' / 'exit-status').read_text().strip() == noted


def test_nothing_is_installed_below_a_training(worker):
    bin_, home = worker
    pretend(bin_, 'pgrep', '')
    done = run('tpu_vm.sh', bin_, 'install')
    assert done.returncode == 0 and 'nothing is installed' in done.stderr
    assert not (home / 'diffusion').exists()


def test_stop_signals_the_training_and_not_its_shell(worker):
    bin_, home = worker
    (home / 'diffusion').mkdir()
    pretend(bin_, 'pkill', '')
    assert run('tpu_vm.sh', bin_, 'stop').returncode == 0
    assert (home / 'diffusion' / 'stopped').exists()
    (call,) = [call for call in called(bin_) if call.startswith('pkill')]
    pattern = call.split(' --full ')[1]
    assert re.search(pattern, '.venv/bin/python main.py --config=configs/digits.py')
    assert not re.search(pattern, 'bash -c cd diffusion && rm -f exit-status && .venv/bin/python main.py --config=x')
    pretend(bin_, 'pkill', 'exit 1')
    done = run('tpu_vm.sh', bin_, 'stop')
    assert done.returncode == 1 and 'nothing is running' in done.stderr
    assert not (home / 'diffusion' / 'stopped').exists()


def test_usage_is_printed(tmp_path):
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
    """JAX needs an indexed Job, a headless Service that is its subdomain, and permission to read both."""
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


def test_pods_that_can_continue_are_started_again(cluster):
    job = cluster['Job']['spec']
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'  # otherwise the API refuses a podFailurePolicy
    (container,) = pod['containers']
    actions = {}
    for rule in job['podFailurePolicy']['rules']:
        codes = rule.get('onExitCodes')
        if codes:
            assert codes['containerName'] == container['name'] and codes['operator'] == 'In'
            actions |= dict.fromkeys(codes['values'], rule['action'])
    assert actions[EXIT_STATUS] == actions[134] == 'Ignore' and actions[1] == 'FailJob'
    assert 137 not in actions and 0 < job['backoffLimit'] < 100  # killed for its memory: not for ever
    assert pod['terminationGracePeriodSeconds'] >= 120


def test_pods_have_the_volumes_they_mount(cluster):
    pod = cluster['Job']['spec']['template']['spec']
    (container,) = pod['containers']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    shared = {v['name'] for v in pod['volumes'] if 'persistentVolumeClaim' in v}
    for flag in ('--workdir=', '--config.data.data_dir='):
        folder = next(arg for arg in container['args'] if arg.startswith(flag)).partition('=')[2]
        assert any(m['name'] in shared and folder.startswith(m['mountPath']) for m in container['volumeMounts'])

"""A tiny pipeline of diffusers, and copies of it with changes.

expected.npz holds what diffusers computes with it; tests/peers/test_interop.py made both.
"""

import json
import pathlib
import shutil

PIPELINE = pathlib.Path(__file__).parents[1] / 'fixtures' / 'pipeline'
WEIGHTS = 'unet/diffusion_pytorch_model.safetensors'
NETWORK, SCHEDULER = 'unet/config.json', 'scheduler/scheduler_config.json'


def copy(tmp_path):
    """Return the folder of a copy."""
    return shutil.copytree(PIPELINE, tmp_path / 'theirs')


def changed(tmp_path, file, **changes):
    """Return the folder of a copy in which one JSON file has other values."""
    folder = copy(tmp_path)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder

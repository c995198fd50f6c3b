"""Downloads from the Hugging Face hub, which keeps what it has downloaded in a cache of its own."""

import os
import re
from typing import Any

from diffusion.interop.weights import one_line

PREFIX = 'hub:'


def download_file(place: str) -> str:
    """Download a file, and return its path.

    Args:
        place: 'hub:<owner>/<repository>/<path of the file>'.

    Raises:
        ValueError: the place has another form, huggingface_hub is not installed, or the download fails.
    """
    found = re.fullmatch(rf'{PREFIX}([^/]+/[^/]+)/(.+)', place)
    if not found:
        raise ValueError(f'{place!r} does not name a file of the hub: write {PREFIX}<owner>/<repository>/<file>')
    hub = _hub(place)
    try:
        return hub.hf_hub_download(*found.groups())
    except Exception as error:  # the hub's library raises many types
        raise ValueError(f'{place} cannot be downloaded ({one_line(error)})') from error


def download_pipeline(repo: str) -> str:
    """Download a repository with a pipeline of diffusers, and return its folder.

    Raises:
        ValueError: huggingface_hub is not installed, or the download fails.
    """
    missing = f'there is no folder {repo}'
    hub = _hub(missing)
    patterns = ['*.json', '*diffusion_pytorch_model.safetensors', '*diffusion_pytorch_model-*.safetensors']
    try:
        folder = hub.snapshot_download(repo, allow_patterns=patterns)
        if not any(name.endswith('.safetensors') for _, _, files in os.walk(folder) for name in files):
            folder = hub.snapshot_download(repo, allow_patterns=['*.json', '*diffusion_pytorch_model.bin'])
    except Exception as error:  # the hub's library raises many types
        raise ValueError(f'{missing}, and it cannot be downloaded from the hub ({one_line(error)})') from error
    return folder


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f'{what}; for the Hugging Face hub (extra [hub]): pip install huggingface_hub') from error
    return huggingface_hub

"""Single files of the Hugging Face hub."""

import re

from diffusion.interop.weights import one_line

PREFIX = 'hub:'


def download(place: str) -> str:
    """Download a file, or find it in the hub's own cache, and return its path.

    Args:
        place: 'hub:<owner>/<repository>/<path of the file>'.

    Raises:
        ValueError: the place has another form, huggingface_hub is not installed, or the download fails.
    """
    found = re.fullmatch(rf'{PREFIX}([^/]+/[^/]+)/(.+)', place)
    if not found:
        raise ValueError(f'{place!r} does not name a file of the hub: write {PREFIX}<owner>/<repository>/<file>')
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{place} needs the extra [hub]: pip install 'huggingface_hub>=0.30'") from error
    try:
        return huggingface_hub.hf_hub_download(*found.groups())
    except Exception as error:  # of the network, of the hub, or because there is no such file
        raise ValueError(f'{place} cannot be downloaded ({one_line(error)})') from error

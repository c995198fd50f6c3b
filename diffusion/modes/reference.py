"""--mode=reference: the features of the data, with which samples are compared, and their statistics."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import build, data, workdir
from diffusion.interop import hub
from diffusion.interop.pytorch_file import read_state_dict
from diffusion.interop.weights import read_safetensors
from diffusion.metrics import frechet
from diffusion.metrics.frechet import Moments
from diffusion.metrics.tables import FEATURES, METRICS, Features, preprocessing
from diffusion.runtime import hosts, mesh
from diffusion.runtime.compilation import compiling
from diffusion.runtime.npz import read_npz
from diffusion.util import RunError, cache_folder, json_sha256, naming, progress, say, unfinished, write_json

MOST_VECTORS = 200_000  # images whose features are kept; of more, every second or every third …
# Part of the names of cached features: to be raised whenever a network or its preprocessing returns other values.
VERSION = 1
# What has to agree between statistics in a file and what is asked.
COMPARED = ('features', 'dialect', 'weights_sha256', 'image_size', 'channels', 'crop')


def run(config: ConfigDict, path: str) -> int:
    """Compute the reference for every feature network whose weights are at hand, as far as it is not there yet.

    Args:
        config: the config of the command.
        path: the workdir, which may be empty.

    Returns:
        The exit status, 0.

    Raises:
        RunError: there are no such images, or the files cannot be written.
    """
    config = workdir.resolve(config, path)
    devices = make_mesh(config)
    split = config.metrics.split or config.data.split
    images = build.load_same_images(config, split)
    ready, left_out = networks(config, tuple(METRICS), images.images.shape[1:])
    for name, why in grouped(left_out).items():
        say(f'{name}: left out, because {why}')
    for network in ready:
        found = reference(config, network, images, split, devices, flip=config.metrics.flip)
        if not hosts.is_first():
            continue
        say(f'{network}: {found.record["count"]} images of {config.data.source}, {found.record["split"]} split')
        for output in found.moments:
            say(found.path(output))
    return 0


class Network(NamedTuple):
    """A feature network and one dialect of its preprocessing.

    Attributes:
        features: a key of FEATURES.
        dialect: one of its dialects.
        params: its parameters; None if it has none.
        weights_sha256: of the tensors that the parameters were made from, or None.
    """

    features: str
    dialect: str
    params: Any
    weights_sha256: str | None

    @property
    def preprocessing(self) -> str:
        """The first dialect that preprocesses images as this one does: with both, the features are the same."""
        return preprocessing(self.features, self.dialect)

    def __str__(self) -> str:
        return f'{self.features}, {self.dialect}'


def networks(
    config: ConfigDict, names: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[list[Network], dict[str, str]]:
    """Load the feature networks of some metrics, each in all dialects that are asked for.

    Args:
        config: config.metrics says where the weights are, and which dialects are asked for.
        names: keys of METRICS.
        shape: of an image, (H, W, C).

    Returns:
        The networks, and {metric: why it is left out}.

    Raises:
        RunError: a file that the config names does not hold the weights.
    """
    found: list[Network] = []
    left_out: dict[str, str] = {}
    for features in dict.fromkeys(METRICS[name].features for name in names):
        row = FEATURES[features]
        mine = [name for name in names if METRICS[name].features == features]
        if row.largest and math.prod(shape) > row.largest:
            why = f'an image has {math.prod(shape)} values, more than {row.largest}'
            left_out |= dict.fromkeys(mine, why)
            continue
        params = digest = None
        if row.convert:
            with naming(f'config.metrics.{row.key}'):
                file = weights_file(config, row)
                if not file:
                    left_out |= dict.fromkeys(mine, f'there are no weights of {features}: {row.weights}')
                    continue
                tensors = read_safetensors(file) if file.endswith('.safetensors') else read_state_dict(file)
                params, digest = row.convert(tensors, file), tensors_sha256(tensors)
        dialects = [dialect for dialect in config.metrics.dialects if dialect in row.dialects] or row.dialects[:1]
        found += [Network(features, dialect, params, digest) for dialect in dialects]
    return found, left_out


def grouped(left_out: dict[str, str]) -> dict[str, str]:
    """Group what is left out by its reason: {names: reason}."""
    return {', '.join(n for n in left_out if left_out[n] == why): why for why in dict.fromkeys(left_out.values())}


def weights_file(config: ConfigDict, row: Features) -> str:
    """Return the file of a network's weights, '' if there is none. A file of the hub is downloaded."""
    named = config.metrics[row.key]
    if named.startswith(hub.PREFIX):
        return hub.download_file(named)
    return os.path.expanduser(named) or (row.shipped() if row.shipped else '')


def tensors_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Return a SHA-256 of named tensors, whatever the format of their file."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        result.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())
        result.update(tensor.tobytes())
    return result.hexdigest()


def make_mesh(config: ConfigDict) -> Mesh:
    """Return the mesh of all devices."""
    with naming('config.mesh'):
        return mesh.make_mesh(config.mesh.fsdp)


def extractor(
    network: Network, devices: Mesh, shape: tuple[int, ...], outputs: tuple[str, ...], batch_size: int
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Compile a function of images (n, H, W, C) uint8, n ≤ batch_size, that returns {output: (n, D) float32}.

    Batches are split over all devices. All hosts have to call it, with the same images.
    """
    batch_size += -batch_size % devices.size
    batch = mesh.split_batch(devices)

    def extract(params, images):
        return {name: FEATURES[network.features].extract(params, images, network.dialect)[name] for name in outputs}

    params = jax.tree.map(lambda leaf: mesh.put(leaf, mesh.replicated(devices)), network.params)
    images = jax.ShapeDtypeStruct((batch_size, *shape), np.uint8, sharding=batch)
    with compiling(f'the features {network}'):
        program = jax.jit(extract, out_shardings=mesh.replicated(devices)).lower(params, images).compile()

    def run(images):
        whole = images[np.arange(batch_size) % len(images)]  # a short batch is filled up
        found = mesh.fetch(program(params, mesh.put_whole(whole, batch)))
        return {name: values[: len(images)] for name, values in found.items()}

    return run


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
        moments: {output: mean and covariance}, of all images.
        vectors: {output: (M, D) float32}, of as many images as are kept; {} if only the moments are known.
        record: what the reference is, for records.
        folder: where it is kept.
        labels: (M,) int32, the class of each vector's image, −1 for none; None if the images have no classes.
        classes: their names.
    """

    moments: dict[str, Moments]
    vectors: dict[str, np.ndarray]
    record: dict[str, Any]
    folder: str = ''
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def record_for(self, needs: str, output: str, dialect: str) -> dict[str, Any]:
        """Return the record for a metric.

        Its dialect is the metric's, even if the features were computed in another one that preprocesses images alike.
        If the metric needs the vectors of an output, and not all were kept, the record also has their number.
        """
        kept = len(self.vectors[output]) if needs == 'vectors' and output in self.vectors else None
        found = self.record | ({} if kept in (None, self.record.get('count')) else {'vectors': kept})
        return found | ({'dialect': dialect} if 'dialect' in found else {})

    def path(self, output: str) -> str:
        """The file of the moments, which pytorch-fid reads as well."""
        return os.path.join(self.folder, f'{output}.npz')


def reference_outputs(features: str) -> dict[str, bool]:
    """Return {output: whether its vectors are needed} for the outputs that some metric compares."""
    rows = [row for row in METRICS.values() if row.features == features and row.needs]
    return {row.output: any(r.needs == 'vectors' for r in rows if r.output == row.output) for row in rows}


def reference(
    config: ConfigDict, network: Network, images: data.Images, split: str, devices: Mesh, *, flip: bool = False
) -> Reference:
    """Return the reference of some images, from the cache or computed. All hosts have to call it.

    Args:
        config: says where the cache is.
        network: whose features are computed.
        images: one split of config.data.source.
        split: its name.
        devices: over which batches are split.
        flip: whether their mirror images belong to the reference as well.

    Raises:
        RunError: the cache cannot be written.
    """
    height, _, channels = images.images.shape[1:]
    described = {
        'features': network.features,
        'dialect': network.preprocessing,
        'weights_sha256': network.weights_sha256,
        'image_size': height,
        'channels': channels,
        'images_sha256': images.record['sha256'],
        'crop': config.data.crop,
        'preprocessing': images.record['fingerprint'],
        'flip': flip,
        'version': VERSION,
    }
    name = json_sha256(described)[:16]
    cache = os.path.expanduser(config.data.cache_dir) or cache_folder()
    folder = os.path.join(cache, 'references', name)
    if not hosts.from_first(np.array(os.path.exists(folder))):
        where = {'source': config.data.source, 'split': split}
        _compute(network, images, devices, folder, where | described, config.metrics.batch_size)
    if not hosts.is_first():
        return Reference({}, {}, described, folder)
    found = _read(folder)
    if images.labels is None:
        return found
    kept = np.arange(0, found.record['count'], _step(found.record['count']))
    return found._replace(labels=images.labels[kept % len(images)], classes=tuple(images.record['classes']))


def _step(count):
    """The vectors of every how many images are kept."""
    return math.ceil(count / MOST_VECTORS)


def _compute(network, images, devices, folder, described, batch_size):
    """Write the features of all images, and their moments, into a folder that appears when it is complete."""
    outputs = reference_outputs(network.features)
    size = min(batch_size, len(images))
    extract = extractor(network, devices, images.images.shape[1:], tuple(outputs), size)
    count = len(images) * (2 if described['flip'] else 1)
    step = _step(count)
    new = f'{folder}.{os.getpid()}.new'
    files: dict[str, IO[bytes]] = {}
    totals = {output: frechet.Accumulator() for output in outputs}
    with unfinished(new), contextlib.ExitStack() as opened:
        if hosts.is_first():
            with workdir.writing(folder, key='data.cache_dir'):
                os.makedirs(new)
                for output in [name for name, kept in outputs.items() if kept]:
                    files[output] = opened.enter_context(open(os.path.join(new, f'{output}.npy'), 'wb'))
        doing = f'reference ({network})'
        with progress(total=count, doing=doing, unit='image', hidden=not hosts.is_first()) as bar:
            for start in range(0, count, size):
                rows = np.arange(start, min(start + size, count))
                batch = images[rows % len(images)]
                batch = np.where((rows >= len(images))[:, None, None, None], batch[:, :, ::-1], batch)
                found = extract(batch)
                bar.update(len(rows))
                if not hosts.is_first():
                    continue
                for output, values in found.items():
                    totals[output].add(values)
                with workdir.writing(folder, key='data.cache_dir'):
                    for output, file in files.items():
                        values = found[output]
                        if start == 0:
                            shape = (math.ceil(count / step), values.shape[1])
                            header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
                            np.lib.format.write_array_header_1_0(file, header)
                        file.write(values[rows % step == 0].astype('<f4').tobytes())
        if hosts.is_first():
            record = described | {'count': count}
            with workdir.writing(folder, key='data.cache_dir'):
                for output, total in totals.items():
                    mean, covariance = total.moments()
                    path = os.path.join(new, f'{output}.npz')
                    np.savez(path, mu=mean, sigma=covariance, record=json.dumps(record | {'output': output}))
                opened.close()  # so that the last bytes are written
                write_json(os.path.join(new, 'record.json'), record)
                if os.path.exists(folder):  # another process was faster
                    shutil.rmtree(new)
                else:
                    os.rename(new, folder)


def _read(folder):
    """Read a complete reference."""
    try:
        with open(os.path.join(folder, 'record.json'), encoding='utf-8') as file:
            record = json.load(file)
        moments, vectors = {}, {}
        for output, keeps in reference_outputs(record['features']).items():
            with np.load(os.path.join(folder, f'{output}.npz')) as file:
                moments[output] = file['mu'], file['sigma']
            if keeps:
                vectors[output] = np.load(os.path.join(folder, f'{output}.npy'), mmap_mode='r')
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RunError(f'the reference in {folder} is damaged ({error}): remove that folder') from error
    return Reference(moments, vectors, record, folder)


class Statistics(NamedTuple):
    """Moments in a file: ours, or those of pytorch-fid (mu, sigma) or ADM (also mu_s, sigma_s).

    Attributes:
        path: of the file.
        features: the feature network that they are of; files of others are of inception.
        arrays: what the file holds.
        record: the description in a file of ours; {} for files of other projects.
    """

    path: str
    features: str
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]

    def reference(self, network: Network, shape: tuple[int, ...], crop: str) -> Reference:
        """Return the moments as a reference.

        Args:
            network: with which the samples are compared.
            shape: of an image, (H, W, C).
            crop: config.data.crop, by which images are preprocessed.

        Raises:
            ValueError: the moments are of another dialect, network, image size or kind of images; the message lists
                the differences.
        """
        asked = network._asdict() | {'image_size': shape[0], 'channels': shape[2], 'crop': crop}
        known = self.record
        if 'dialect' in known and preprocessing(network.features, known['dialect']) == network.preprocessing:
            known = known | {'dialect': network.dialect}
        differences = [f'{k}: {known.get(k)!r} there, {asked[k]!r} asked' for k in COMPARED if known.get(k) != asked[k]]
        if known and differences:
            raise ValueError(f'{self.path} holds statistics of something else: {"; ".join(differences)}')
        sizes = FEATURES[network.features].sizes
        outputs = {known['output']: ('mu', 'sigma')} if known else dict(FOREIGN)
        moments = {}
        for output, names in outputs.items():
            if not set(names) <= self.arrays.keys():
                continue
            mean, covariance = (np.asarray(self.arrays[name], np.float64) for name in names)
            size = sizes.get(output, mean.size)
            if mean.shape != (size,) or covariance.shape != (size, size):
                raise ValueError(
                    f'{self.path} holds {names[0]} {mean.shape} and {names[1]} {covariance.shape}, but {output} of '
                    f'{network.features} has {size} values'
                )
            moments[output] = mean, covariance
        digest = hashlib.sha256(b''.join(self.arrays[name].tobytes() for name in sorted(self.arrays))).hexdigest()
        return Reference(moments, {}, {'file': self.path, 'file_sha256': digest} | known)


FOREIGN = {'pool3': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}  # outputs, and their moments in files of others


def read_statistics(path: str) -> Statistics:
    """Read the moments in an .npz file.

    Raises:
        ValueError: it is no such file.
    """
    path = os.path.abspath(os.path.expanduser(path))
    try:
        arrays = read_npz(path, ('record', *itertools.chain(*FOREIGN.values())))
        record = json.loads(str(arrays.pop('record'))) if 'record' in arrays else {}
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as statistics ({error})') from error
    if not {'mu', 'sigma'} <= arrays.keys():
        raise ValueError(f'{path} does not hold the arrays mu and sigma, the moments of features')
    return Statistics(path, record.get('features', 'inception'), arrays, record)

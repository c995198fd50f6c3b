"""--mode=evaluate: metrics of images that were made elsewhere; and the functions of all modes that measure images."""

import hashlib
import math
import os
import zipfile
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import build, data, workdir
from diffusion.data.sources import open_source
from diffusion.metrics import frechet, memorization
from diffusion.metrics.tables import METRICS, Comparison, Metric
from diffusion.modes.reference import (
    Network,
    Reference,
    extractor,
    grouped,
    make_mesh,
    networks,
    read_statistics,
    reference,
    reference_outputs,
)
from diffusion.report.grid import save_grid
from diffusion.runtime import hosts
from diffusion.runtime.npz import read_header, read_npz
from diffusion.util import (
    RunError,
    json_sha256,
    naming,
    numerics,
    progress,
    read_json,
    replacing,
    say,
    versions,
    with_error,
    write_json,
)

CLOSEST = 10  # pairs of a sample and its nearest training image that are drawn
SHOWN = 20  # classes whose metrics are printed
FEWEST = 20  # images of a class, among the samples and in the reference, for a metric within the class


def run(config: ConfigDict, path: str) -> int:
    """Measure the images of config.evaluate.images, and write evaluations/<name>/.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        The exit status, 0.

    Raises:
        RunError: there are no such images, or the folder cannot be written.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    place = os.path.abspath(os.path.expanduser(config.evaluate.images))
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    with naming('config.evaluate.images'):
        images = open_images(config.evaluate.images, shape)
        labels = open_labels(config.evaluate.images, len(images))
    above = workdir.output_folder(config, path, 'evaluate', 'evaluations')
    devices = make_mesh(config)
    plan = prepare(config, shape)

    # Compute.
    digest = sha256(images)
    described = json_sha256(settings(config, plan))
    name = f'{os.path.splitext(os.path.basename(place))[0]}-{digest[:8]}-{described[:8]}'
    folder = os.path.join(above, name)
    stored = workdir.read_config(path) or {}
    same_data = all(stored.get('data', {}).get(key) == config.data[key] for key in ('source', 'crop'))
    trained_on = stored.get('images') if same_data else None  # the command line may name other data
    found = measure(config, plan, images, len(images), devices, trained_on, folder, labels)
    if not hosts.is_first():
        return 0

    # Record and report.
    record = {'images': {'place': place, 'count': len(images), 'sha256': digest, 'shape': list(shape)}}
    with workdir.writing(folder, key='evaluate.folder'):
        write_found(folder, record, found, {'numerics': numerics(), 'versions': versions()})
    say(f'{len(images)} images of {place}')
    tell(found)
    say(os.path.join(folder, 'record.json'))
    return 0


# Images.


def open_images(place: str, shape: tuple[int, ...]) -> Any:
    """Open images of one shape: (N, H, W, C) uint8, read as they are indexed.

    Args:
        place: an .npz file with arr_0, an .npy file, or a folder or zip file of pictures.
        shape: (H, W, C).

    Raises:
        ValueError: there are no images of that shape.
    """
    path = os.path.expanduser(place)
    if not place or not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(f'there is no file or folder {place!r}: name a folder of pictures, or samples.npz')
    if not path.endswith(('.npz', '.npy')):
        return Pictures(path, shape)
    try:
        images = open_npz(path) if path.endswith('.npz') else np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'{place} cannot be read as an array of images ({error})') from error
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise ValueError(
            f'{place} holds {images.dtype} {images.shape}, but uint8 (N, {", ".join(map(str, shape))}) was expected, '
            'as config.data.image_size and config.data.channels say'
        )
    return images


def open_labels(place: str, count: int) -> np.ndarray | None:
    """Return arr_1 of an .npz file if it is one whole number for each of `count` images, their classes; else None."""
    path = os.path.expanduser(place)
    if not path.endswith('.npz'):
        return None
    try:
        labels = read_npz(path, ['arr_1']).get('arr_1', np.empty(0))
    except (OSError, ValueError) as error:
        raise ValueError(f'arr_1 of {place} cannot be read as labels ({error})') from error
    return labels if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer) else None


def open_npz(path: str, name: str = 'arr_0') -> np.ndarray:
    """Open an array of an .npz file without reading it, if it is not compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f'{name}.npy')
        if member.compress_type != zipfile.ZIP_STORED:
            return read_npz(path, [name])[name]
    with open(path, 'rb') as file:
        file.seek(member.header_offset + 26)  # the lengths of the name and of the extra field
        lengths = np.frombuffer(file.read(4), '<u2')
        begin = file.seek(member.header_offset + 30 + int(lengths.sum()))
        shape, fortran, dtype = read_header(file)
        if file.tell() + math.prod(shape) * dtype.itemsize != begin + member.file_size:
            raise ValueError(f'its header says {dtype} {shape}, but it has {member.file_size} bytes')
        return np.memmap(path, dtype, 'r', file.tell(), shape, 'F' if fortran else 'C')


class Pictures:
    """Pictures of one shape in a folder or zip file, decoded as they are indexed.

    Args:
        path: of the folder or zip file.
        shape: (H, W, C) of every picture; a grey picture becomes one of three equal channels where C is 3.

    Raises:
        ValueError: there are no pictures.
    """

    def __init__(self, path: str, shape: tuple[int, ...]):
        self._source = open_source(f'folder:{os.path.abspath(path)}', '.')
        self.shape = (len(self._source), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        rows = np.atleast_1d(np.arange(len(self))[indices])
        return np.stack([self._read(int(row)) for row in rows])

    def _read(self, row):
        name = self._source.names[row]
        with naming(f'config.evaluate.images: {name}'):
            picture = self._source.read(row)
            if picture.shape[:2] != self.shape[1:3] or picture.shape[2] > self.shape[3]:
                raise ValueError(
                    f'is {picture.shape}, but {self.shape[1:]} was expected: samples are measured as they are, and '
                    'config.data.image_size and config.data.channels are those of the data'
                )
        return np.broadcast_to(picture, self.shape[1:])


def sha256(images: Any) -> str:
    """Return a SHA-256 of the pixels of all images."""
    result = hashlib.sha256()
    for start in range(0, len(images), 1000):
        result.update(np.ascontiguousarray(images[start : start + 1000]).data)
    return result.hexdigest()


# Measuring.


class Plan(NamedTuple):
    """The metrics to compute, determined before anything is computed.

    Attributes:
        networks: the feature networks whose weights are available.
        statistics: {network: the moments in config.metrics.reference} for those that the file is of.
        left_out: {metric: why it is left out}.
        known: what one call of `measure` computed for the next: programs, and the references of config.data.
    """

    networks: list[Network]
    statistics: dict[str, Reference]
    left_out: dict[str, str]
    known: dict[Any, Any]


def prepare(config: ConfigDict, shape: tuple[int, ...]) -> Plan:
    """Load what the metrics of config.sample.metrics need.

    Args:
        config: the config of the command.
        shape: of an image, (H, W, C).

    Raises:
        RunError: a file that the config names is not what it should be.
    """
    found, left_out = networks(config, tuple(config.sample.metrics), shape)
    if config.metrics.memorization and 'pixels' not in {network.features for network in found}:
        pixels, why = networks(config, ('FD-pixels',), shape)
        found += pixels
        for reason in why.values():
            left_out['copies of training images (pixels)'] = reason
    if not config.metrics.reference:
        return Plan(found, {}, left_out, {})
    with naming('config.metrics.reference'):
        file = read_statistics(config.metrics.reference)
        mine = [network for network in found if network.features == file.features]
        if not mine:
            raise ValueError(f'{file.path} holds statistics of {file.features}, which no metric that can be had uses')
        statistics = {str(network): file.reference(network, shape, config.data.crop) for network in mine}
    if not file.record:
        dialects = ', '.join(network.dialect for network in mine)
        say(
            f'{file.path} does not say how its images were resized, and is taken as {dialects}, by which samples are '
            'resized. If pytorch-fid wrote it, set --config.metrics.dialects="(\'pytorch-fid\',)"'
        )
    return Plan(found, statistics, left_out, {})


def settings(config: ConfigDict, plan: Plan) -> dict[str, Any]:
    """Return what determines the metrics of images, as JSON."""
    return {
        'metrics': config.metrics.to_dict() | {'names': list(config.sample.metrics)},
        'weights_sha256': {str(network): network.weights_sha256 for network in plan.networks},
        'statistics': {network: statistics.record for network, statistics in plan.statistics.items()},
        'data': {key: config.data[key] for key in ('source', 'split', 'image_size', 'channels', 'crop')},
    }


def measure(
    config: ConfigDict,
    plan: Plan,
    images: Any,
    count: int,
    devices: Mesh,
    trained_on: dict[str, Any] | None,
    folder: str,
    labels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure images. All hosts have to call it; the first one gets the results.

    If the images and those of the reference have classes, metrics that compare with the reference are also computed
    within each class. Such an entry has its 'label' and the name of the 'class', and its influences are those on the
    metric of the class, 0 for images of other classes.

    Args:
        config: config.sample.metrics names the metrics.
        plan: the result of `prepare`.
        images: (N, H, W, C) uint8, or an object that is indexed in the same way; only the first host needs it.
        count: N.
        devices: over which batches are split.
        trained_on: what config.json records of the images that the run was trained on; the training split of
            config.data must be the same. None if it records none.
        folder: where pictures are written.
        labels: (N,), the classes of the images; None if they have none, −1 for no class.

    Returns:
        {'metrics': [{'name', 'features', 'dialect', 'value', 'standard_error', 'n', 'reference', …}],
        'left_out': {metric: why}, 'memorization': [{'features', 'copies', …}], 'influences': {'metric|dialect': (N,)},
        where a metric of a class has the key 'metric|dialect|label', and the values of random subsets are at a
        metric's key + '|subsets', 'no_reference': {network: why there is none}}.
    """
    metrics: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    left_out = dict(plan.left_out)
    influences: dict[str, np.ndarray] = {}
    no_reference: dict[str, str] = {}
    of_class = labels if config.metrics.by_class and labels is not None and (labels >= 0).any() else None
    for alike in by_preprocessing(plan.networks):
        network = alike[0]  # the features of the others are the same
        rows = {
            name: row
            for name in config.sample.metrics
            if (row := METRICS[name]).features == network.features and any(row.has(other.dialect) for other in alike)
        }
        compared: Reference | str = 'it has no reference'
        if any(row.needs for row in rows.values()):
            compared = plan.statistics.get(str(network)) or _data(config, plan, network, devices, trained_on)
            if isinstance(compared, str):
                no_reference[str(network)] = compared
        outputs = tuple(dict.fromkeys(row.output for row in rows.values()))
        nearest_in = None
        if config.metrics.memorization and network.features not in {entry['features'] for entry in copies}:
            nearest_in = next(output for output, kept in reference_outputs(network.features).items() if kept)
            outputs = tuple(dict.fromkeys((*outputs, nearest_in)))
            training = _split(config, plan, network, devices, config.data.split, trained_on)
            held_out = _split(config, plan, network, devices, 'test', trained_on)
        found = extract_all(config, plan, network, images, count, devices, outputs)
        if not hosts.is_first():
            continue
        if nearest_in:
            level = memorization.LEVEL / len({network.features for network in plan.networks})
            copies.append(
                find_copies(network, images, found[nearest_in], nearest_in, training, held_out, level, folder)
            )
        for output in outputs:
            samples = found.pop(output)
            for other in alike:
                mine = {name: row for name, row in rows.items() if row.output == output and row.has(other.dialect)}
                parts = [measure_all(mine, other, samples, compared, output)]
                if of_class is not None and isinstance(compared, Reference):
                    parts.append(measure_classes(mine, other, samples, of_class, compared, output, trained_on))
                for part in parts:
                    metrics += part.metrics
                    left_out |= part.left_out
                    influences |= part.influences
    order = list(config.sample.metrics)
    for name in set(order) - left_out.keys() - {entry['name'] for entry in metrics}:
        left_out[name] = f'it is defined for the dialects {", ".join(METRICS[name].dialects)} alone'
    return {
        'metrics': sorted(metrics, key=lambda entry: order.index(entry['name'])),
        'left_out': left_out,
        'memorization': copies,
        'influences': influences,
        'no_reference': no_reference,
    }


def by_preprocessing(networks: list[Network]) -> list[list[Network]]:
    """Group the networks whose features are the same because their dialects preprocess images alike."""
    groups: dict[tuple[str, str], list[Network]] = {}
    for network in networks:
        groups.setdefault((network.features, network.preprocessing), []).append(network)
    return list(groups.values())


class Measured(NamedTuple):
    """A part of what `measure` finds; as its results of these names."""

    metrics: list[dict[str, Any]]
    left_out: dict[str, str]
    influences: dict[str, np.ndarray]


def measure_all(
    rows: dict[str, Metric], network: Network, samples: np.ndarray, compared: Reference | str, output: str
) -> Measured:
    """Compute metrics of all samples.

    Args:
        rows: the metrics of an output.
        network: whose output it is.
        samples: (N, D), the features of the samples.
        compared: the reference, or why there is none.
        output: of the network.
    """
    found = Measured([], {}, {})
    known = compared if isinstance(compared, Reference) else Reference({}, {}, {})
    comparison = Comparison(samples, known.vectors.get(output), known.moments.get(output), network.dialect)
    for name, row in rows.items():
        try:
            if row.needs and isinstance(compared, str):
                raise ValueError(compared)
            value = row.compute(comparison)
        except ValueError as error:
            found.left_out[name] = str(error)
            continue
        keep_arrays(found.influences, f'{name}|{network.dialect}', value, np.arange(len(samples)), len(samples))
        entry = {'name': name, 'features': network.features, 'dialect': network.dialect, **value, 'n': len(samples)}
        if row.needs and isinstance(compared, Reference):
            entry['reference'] = compared.record_for(row.needs, output, network.dialect)
        found.metrics.append(entry | {'weights_sha256': network.weights_sha256})
    return found


def keep_arrays(
    influences: dict[str, np.ndarray], key: str, value: dict[str, Any], samples: np.ndarray, count: int
) -> None:
    """Move the arrays of a metric's value, which --mode=compare needs, to the influences.

    Args:
        influences: gets the influence of each sample at `key`, and the values of random subsets at `key|subsets`.
        key: of the metric.
        value: what `Metric.compute` returned.
        samples: the indices of the samples that were compared.
        count: of all samples; the others have no influence.
    """
    if 'influences' in value:
        influences[key] = np.zeros(count)
        influences[key][samples] = value.pop('influences') * (count / len(samples))  # as on a mean of all samples
    if 'subset_values' in value:
        influences[f'{key}|subsets'] = value.pop('subset_values')


def measure_classes(
    rows: dict[str, Metric],
    network: Network,
    samples: np.ndarray,
    labels: np.ndarray,
    compared: Reference,
    output: str,
    trained_on: dict[str, Any] | None,
) -> Measured:
    """Compare the samples of each class with the images of this class in the reference.

    Args:
        rows: the metrics of an output; those that compare with no reference have no value within a class.
        network: whose output it is.
        samples: (N, D), the features of the samples.
        labels: (N,), their classes; −1 for none.
        compared: the reference.
        output: of the network.
        trained_on: see `measure`.
    """
    found = Measured([], {}, {})
    rows = {name: row for name, row in rows.items() if row.needs}
    if why := _without_classes(compared, output, trained_on, labels):
        found.left_out.update({f'{name} by class': why for name in rows})
        return found
    vectors, their_labels = compared.vectors[output], np.asarray(compared.labels)
    classes = np.unique(labels[labels >= 0]).tolist()
    record = compared.record_for('moments', output, network.dialect)
    record |= {'labels_sha256': data.labels_sha256(compared.classes, their_labels)}
    failed: dict[str, list[str]] = {}
    for label in classes:
        mine, theirs = labels == label, vectors[their_labels == label]
        n, count = int(mine.sum()), len(theirs)
        fewest_of = {'vectors': FEWEST, 'moments': max(FEWEST, samples.shape[1] + 1)}  # else covariances are singular
        moments = frechet.moments([theirs]) if min(n, count) >= fewest_of['moments'] else None
        comparison = Comparison(samples[mine], theirs, moments, network.dialect)
        for name, row in rows.items():
            fewest = fewest_of[row.needs]
            try:
                if min(n, count) < fewest:
                    raise ValueError(f'{n} samples and {count} images of the reference, but {fewest} are needed')
                value = row.compute(comparison)
            except ValueError as error:
                failed.setdefault(name, []).append(f'class {label}: {error}')
                continue
            keep_arrays(found.influences, f'{name}|{network.dialect}|{label}', value, np.flatnonzero(mine), len(labels))
            entry = {'name': name, 'label': label, 'class': compared.classes[label]}
            entry |= {'features': network.features, 'dialect': network.dialect, **value, 'n': n}
            entry |= {'reference': record | {'count': count}, 'weights_sha256': network.weights_sha256}
            found.metrics.append(entry)
    for name, reasons in failed.items():
        found.left_out[f'{name} by class'] = f'{len(reasons)} of {len(classes)} classes have no value; {reasons[0]}'
    return found


def _without_classes(compared, output, trained_on, labels):
    """Why there are no metrics by class, or ''."""
    if output not in compared.vectors:
        return 'only the moments of the reference are kept, but this needs the features of each image'
    if compared.labels is None:
        return 'the images of the reference have no classes'
    if labels.max() >= len(compared.classes):
        return f'the reference has {len(compared.classes)} classes, but the samples have label {labels.max()}'
    if trained_on and trained_on.get('labels_sha256') and trained_on['classes'] != list(compared.classes):
        return 'the reference has other classes than the images that the run was trained on'
    return ''


def write_found(folder: str, before: dict[str, Any], found: dict[str, Any], after: dict[str, Any]) -> None:
    """Write record.json with what `measure` found between other facts, and influences.npz for comparisons.

    Raises:
        OSError: they cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    influences = found.pop('influences')
    found.pop('no_reference', None)  # `left_out` says so
    with replacing(os.path.join(folder, 'influences.npz')) as file:
        np.savez(file, **influences)
    write_json(os.path.join(folder, 'record.json'), before | found | after)


def lost(folder: str, found: dict[str, Any]) -> list[str]:
    """Return the metrics in the record of a folder that `found`, which will replace it, does not have."""
    try:
        before = read_json(os.path.join(folder, 'record.json'))['metrics']
        names = [in_full(entry['name'], entry) for entry in before if 'label' not in entry]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if name not in {in_full(entry['name'], entry) for entry in found['metrics']}]


def _data(config, plan, network, devices, trained_on):
    """The reference that config.data and config.metrics describe, or why there is none."""
    split = config.metrics.split or config.data.split
    found = _split(config, plan, network, devices, split, trained_on, flip=config.metrics.flip)
    return found if isinstance(found, str) else found[1]


def _split(config, plan, network, devices, split, trained_on, flip=False):
    """The images of a split and their reference, or why there is none."""
    key = split, flip, network.features, network.preprocessing
    if key in plan.known:
        return plan.known[key]
    try:
        images = build.load_same_images(config, split)
    except RunError as error:
        return str(error)
    if trained_on and split == config.data.split and images.record['sha256'] != trained_on['sha256']:
        return (
            f'the {len(images)} images of config.data.source={config.data.source} are not the {trained_on["count"]} '
            'that the run was trained on'
        )
    plan.known[key] = images, reference(config, network, images, split, devices, flip=flip)
    return plan.known[key]


def find_copies(
    network: Network,
    images: Any,
    features: np.ndarray,
    output: str,
    training: tuple[data.Images, Reference] | str,
    held_out: tuple[data.Images, Reference] | str,
    level: float,
    folder: str,
) -> dict[str, Any]:
    """Find samples that are copies of training images, and draw the closest pairs: samples above, training below.

    Args:
        network: whose features are compared.
        images: (N, H, W, C) uint8, the samples.
        features: (N, D), theirs.
        output: of the network.
        training: the training images and their features, or why there are none.
        held_out: the same of images that were not trained on.
        level: probability of an alarm if the samples are independent of the training images.
        folder: where the picture is written.
    """
    entry: dict[str, Any] = {'features': network.features, 'dialect': network.dialect}
    if isinstance(training, str):
        return entry | {'copies': None, 'why': training}
    null = None if isinstance(held_out, str) else held_out[1].vectors[output]
    vectors = training[1].vectors[output]
    found = memorization.report(features, vectors, null, level=level)
    closest = np.argsort(found.distances, kind='stable')[:CLOSEST]
    # Of very many training images, only every second, third, … has its features kept.
    originals = found.indices[closest] * math.ceil(len(training[0]) / len(vectors))
    picture = os.path.join(folder, f'closest-{network.features}.png')
    with workdir.writing(folder):
        pairs = np.concatenate([images[closest], training[0][originals]])
        save_grid(picture, pairs, columns=len(closest))
    return entry | {
        'copies': found.copies,
        'training_images': len(training[0]),
        'searched': len(vectors),
        'median_distance': found.medians[0],
        'median_distance_held_out': found.medians[1],
        'held_out': held_out if isinstance(held_out, str) else held_out[1].record,
        'closest': [
            {
                'sample': int(sample),
                'training_image': int(original),
                'distance': float(found.distances[sample]),
                'p_value': None if found.p_values is None else float(found.p_values[sample]),
            }
            for sample, original in zip(closest, originals, strict=True)
        ],
        'picture': picture,
    }


def extract_all(
    config: ConfigDict,
    plan: Plan,
    network: Network,
    images: Any,
    count: int,
    devices: Mesh,
    outputs: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Compute the features of images, (N, D) float32 by output. All hosts have to call it; the first one reads images.

    Returns:
        {output: (N, D)} on the first host, {} on the others.
    """
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    size = min(config.metrics.batch_size, count)
    program = str(network), outputs, size
    if program not in plan.known:
        plan.known[program] = extractor(network, devices, shape, outputs, size)
    found: dict[str, np.ndarray] = {}
    doing = f'features ({network})'
    with progress(total=count, doing=doing, unit='image', hidden=not hosts.is_first()) as bar:
        for start in range(0, count, size):
            stop = min(start + size, count)
            batch = images[start:stop] if hosts.is_first() else np.zeros((stop - start, *shape), np.uint8)
            for output, values in plan.known[program](hosts.from_first(np.asarray(batch))).items():
                if hosts.is_first():
                    found.setdefault(output, np.empty((count, values.shape[1]), np.float32))[start:stop] = values
            bar.update(stop - start)
    return found


def in_full(name: str, entry: dict[str, Any]) -> str:
    """Return the name of a metric with the features and the dialect of an entry."""
    return f'{name} ({entry["features"]}, {entry["dialect"]})'


def tell(found: dict[str, Any]) -> None:
    """Print what `measure` found, one line a metric, and what is left out."""
    for entry in found['metrics']:
        if 'label' in entry:
            continue
        bias = f' (biased {entry["bias"]})' if 'bias' in entry else ''
        against = f', against {_name(entry["reference"])}' if 'reference' in entry else ''
        value = with_error(entry['value'], entry['standard_error'])
        say(f'{in_full(entry["name"], entry)}: {value}{bias}, n = {entry["n"]}{against}')
    of_classes: dict[str, list[dict[str, Any]]] = {}
    for entry in found['metrics']:
        if 'label' in entry:
            of_classes.setdefault(in_full(f'{entry["name"]} by class', entry), []).append(entry)
    for name, entries in of_classes.items():
        values = [
            f'{entry["class"]} {with_error(entry["value"], entry["standard_error"])} (n = {entry["n"]})'
            for entry in entries
        ]
        shown = ', '.join(values[:SHOWN]) + (', …' if len(values) > SHOWN else '')
        say(f'{name}: {shown}')
    for names, why in grouped(found['left_out']).items():
        say(f'{names}: left out, because {why}')
    for entry in found['memorization']:
        say(_about_copies(entry))


def _about_copies(entry):
    """One line on the copies in one space."""
    features, copies = entry['features'], entry['copies']
    if copies is None:
        return f'copies of training images ({features}): not looked for, because {entry["why"]}'
    median, null = entry['median_distance'], entry['median_distance_held_out']
    if null is None:
        return (
            f'copies of training images ({features}): not judged, because there are no held-out images '
            f'({entry["held_out"]}); the median distance is {median:.4g}; {entry["picture"]}'
        )
    distances = f'median distance {median:.4g}, of held-out images {null:.4g}; {entry["picture"]}'
    if entry['searched'] < entry['training_images']:
        distances = f'only {entry["searched"]} of {entry["training_images"]} training images were searched; {distances}'
    if not copies:
        return f'copies of training images ({features}): none; {distances}'
    first = ', '.join(map(str, copies[:CLOSEST])) + (', …' if len(copies) > CLOSEST else '')
    return f'warning: {len(copies)} samples are copies of training images ({features}): {first}; {distances}'


def _name(reference):
    """A reference in a few words."""
    count = '' if reference.get('count') is None else f'{reference["count"]} images of '
    if 'vectors' in reference:
        count = f'{reference["vectors"]} of the {count}'
    flips = ', mirrored ones included' if reference.get('flip') else ''
    return reference.get('file') or f'{count}{reference["source"]}, {reference["split"]} split{flips}'

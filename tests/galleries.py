"""Folders, zip files and TFDS datasets of pictures, made by Pillow, zipfile and array_record, without TensorFlow."""

import io
import json
import zipfile

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2


def encoded(array, kind='png', **options):
    """Return the bytes of a picture file of an array or a Pillow image."""
    if not isinstance(array, Image.Image):
        array = Image.fromarray(array[..., 0] if array.shape[-1:] == (1,) and array.ndim == 3 else array)
    buffer = io.BytesIO()
    array.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(count, *shape, seed=0):
    """Return `count` random uint8 arrays of a shape."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def fill(folder, files):
    """Write {name: bytes} below a folder, and return it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(path, files):
    """Write {name: bytes} to a zip file, and return its path."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def feature(kind, **fields):
    """Return one entry of features.json."""
    module = {'Image': 'image_feature', 'ClassLabel': 'class_label_feature', 'Scalar': 'scalar'}[kind]
    return {'pythonClassName': f'tensorflow_datasets.core.features.{module}.{kind}', **fields}


def picture_feature(height='-1', width='-1', channels='3'):
    """Return the entry of an image feature in features.json; −1 stands for any size."""
    return feature('Image', image={'dtype': 'uint8', 'shape': {'dimensions': [height, width, channels]}})


def write_records(path, records, options):
    """Write an array_record file, and return its path."""
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_tfds(root, name, splits, *, version='1.0.0', image=None, classes=None, extra=None, shards=1, **info):
    """Write {split: [(bytes, label), …]} as tensorflow-datasets prepares it, and return the dataset's folder.

    Args:
        root: the folder of all datasets.
        name: 'NAME' or 'NAME/CONFIG'.
        splits: the examples of each split; labels are used only with `classes`.
        version: of the dataset.
        image: the image feature's entry in features.json.
        classes: the names of the labels.
        extra: {name: feature} of integers that each example contains beside the picture; all are 1.
        shards: number of array_record files of each split.
        **info: changes of dataset_info.json.
    """
    folder = root / name / version
    folder.mkdir(parents=True)
    features = {'image': image or picture_feature()} | (extra or {})
    if classes:
        features['label'] = feature('ClassLabel', classLabel={'numClasses': str(len(classes))})
        (folder / 'label.labels.txt').write_text(''.join(f'{name}\n' for name in classes))
    (folder / 'features.json').write_text(
        json.dumps(
            {
                'pythonClassName': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
                'featuresDict': {'features': features},
            }
        )
    )
    described = []
    for split, examples in splits.items():
        parts = [examples[len(examples) * i // shards : len(examples) * (i + 1) // shards] for i in range(shards)]
        for i, part in enumerate(parts):
            file = folder / f'{name.partition("/")[0]}-{split}.array_record-{i:05d}-of-{shards:05d}'
            records = []
            for content, label in part:
                example = tf_example_pb2.Example()
                example.features.feature['image'].bytes_list.value.append(content)
                for key in extra or ():
                    example.features.feature[key].int64_list.value.append(1)
                if classes:
                    example.features.feature['label'].int64_list.value.append(label)
                records.append(example.SerializeToString())
            write_records(file, records, 'group_size:1')
        described.append(
            {
                'name': split,
                'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                'numBytes': str(sum(len(content) for content, _ in examples)),
                'shardLengths': [str(len(part)) for part in parts],
            }
        )
    record = {
        'name': name.partition('/')[0],
        'version': version,
        'fileFormat': 'array_record',
        'moduleName': 'tensorflow_datasets.core.dataset_builders.adhoc_builder',
        'splits': described,
    }
    (folder / 'dataset_info.json').write_text(json.dumps(record | info))
    return folder

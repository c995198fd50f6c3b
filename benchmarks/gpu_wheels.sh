#!/usr/bin/env bash
# Fill a folder with what benchmarks/gpu_all.sh needs on a machine without network:
#
#     bash benchmarks/gpu_wheels.sh FOLDER [PICTURES.zip] [PYTHON_VERSION]
#
# Wheels of the packages that an image with JAX and PyTorch lacks, for Python 3.12 unless said otherwise; and of a zip
# file of pictures as many as fit in 50 MB, evenly over its train/ folder. The folder may have 64 MiB.
set -euo pipefail
folder=$1 pictures=${2:-} version=${3:-3.12}
mkdir -p "$folder"
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest "$folder" \
  diffusers ml-collections tensorboardX importlib-metadata

if [ -n "$pictures" ]; then
  python3 - "$pictures" "$folder/pictures.zip" <<'PYTHON'
import sys
import zipfile

MOST = 50_000_000
with zipfile.ZipFile(sys.argv[1]) as all_pictures:
    train = [info for info in all_pictures.infolist() if info.filename.startswith('train/') and not info.is_dir()]
    if not train:
        sys.exit(f'{sys.argv[1]} has no pictures in a folder train/')
    size = sum(info.compress_size + 2 * len(info.filename) + 120 for info in train)
    step = max(1, size / MOST)
    chosen = [train[int(i * step)] for i in range(int(len(train) / step))]
    with zipfile.ZipFile(sys.argv[2], 'w') as some:
        for info in chosen:
            some.writestr(info.filename, all_pictures.read(info))
print(f'{len(chosen)} of {len(train)} pictures')
PYTHON
fi
du -sh "$folder"
if (($(du -s --block-size=1 --apparent-size "$folder" | cut -f1) > 64 * 1024 * 1024)); then
  echo "$folder is larger than 64 MiB: empty it first, or take fewer pictures" >&2
  exit 1
fi

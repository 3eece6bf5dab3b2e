"""`vitds data …`: make a .beton data file, and look into one."""

from __future__ import annotations

from typing import Literal


def data_build(
    *sources: str,
    out: str,
    storage: Literal["auto", "raw", "jpg"] = "auto",
    side: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    split: str | None = None,
    classes_are_folders: bool = False,
    test_fraction: float | None = None,
    classes_from: str | None = None,
    strict: bool = False,
    root: str | None = None,
    download: bool = False,
    per_class: int | None = None,
    classes: int | None = None,
    total: int | None = None,
    seed: int | None = None,
    list: str | None = None,
) -> None:
    """Make a .beton data file from folders of images.

    A source is a folder with a folder a class, a flat folder of images (no labels), a tar of either, or a
    name: `digits` (the embedded set), or one of the published sets flowers102, pets, dtd, aircraft, cars,
    cub200, indoor67, cifar10, cifar100, imagenet, which lie under --root. Named sets have a split of their
    own: they give F-train.beton and F-test.beton, or one file with --split.

    Args:
        sources: folders and tars are taken together, classes by name; a named set stands alone
        out: the file to write, F.beton
        storage: raw pixels (fast, large), JPEG, or auto: raw where the set or its images are small
        side: larger images are scaled down to this short side, in pixels
        quality: of JPEGs that have to be written anew, 1 to 100 (default 90)
        workers: processes (default one a core)
        split: the folder of this name within each source, as in SOURCE/train; of a named set, the part to
            take
        classes_are_folders: the first folders are the classes, even if they look like splits or like a folder
            around the classes
        test_fraction: write F-train.beton and F-test.beton instead, this share of every class for the test
        classes_from: take the class list of this .beton file, so that train and test agree
        strict: stop if anything about the images is broken or odd, instead of counting and naming it
        root: where a published set lies, as its publisher ships it
        download: fetch a published set into --root
        per_class: of a published set, this many images of every class
        classes: of a published set, this many classes
        total: of a published set, this many images
        seed: of the choice that --test_fraction, --per_class, --classes and --total make (default 0)
        list: take exactly the images that a list names; a sample's list is written beside its file
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.data import build

    with as_flags(data_build):
        build(
            sources,
            out=out,
            storage=storage,
            side_px=side,
            quality=quality,
            workers=workers,
            split=split,
            classes_are_folders=classes_are_folders,
            test_fraction=test_fraction,
            classes_from=classes_from,
            strict=strict,
            root=root,
            download=download,
            per_class=per_class,
            classes=classes,
            total=total,
            seed=seed,
            list=list,
        )


def data_info(file: str, *, json: bool = False) -> None:
    """Show what a .beton file holds.

    Images, classes, storage, sizes, mean and deviation, content hash, and what was odd about the images when
    it was built.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data_check import info

    info(file, as_json=json)


def data_list(file: str, *, json: bool = False) -> None:
    """List the images of a .beton file: number, class, photograph.

    A line an image, with tabs between. So an image that a message, a neighbour or a prediction speaks of can
    be found, and who is in the test half can be listed. A dash stands for no label, or for a name that was
    not kept.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data_check import list_images

    list_images(file, as_json=json)


def data_verify(file: str, *, json: bool = False) -> None:
    """Read every image of a .beton file back, for instance after a copy.

    Args:
        file: a .beton file
        json: print one JSON object and nothing else
    """
    from vitds.jobs.data_check import verify

    verify(file, as_json=json)


def data_preview(
    file: str,
    *,
    recipe: str | None = None,
    out: str = "preview.png",
    images: int = 4,
    seed: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Draw exactly what the network will see.

    A labelled grid: originals, each view, and the mixed crops with their targets' weights.

    Args:
        file: a .beton file
        recipe: a recipe's name or a YAML file (default idmm_digits, for the embedded digits alone)
        out: the picture to write
        images: how many of the first step's images
        seed: of every random draw (default the recipe's)
        set: one setting, as in --set views.crop_px=96; may be repeated
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.preview import preview

    with as_flags(data_preview):
        preview(file, recipe=recipe, out=out, images=images, seed=seed, set=set)

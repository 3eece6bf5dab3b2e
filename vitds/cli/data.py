"""`vitds data …`: make a .beton data file, and look into one."""

from __future__ import annotations

from vitds.config.flags import BuildFlags
from vitds.words import takes


@takes(BuildFlags)
def data_build(*sources: str, flags: BuildFlags) -> None:
    """Make a .beton data file from folders of images.

    A source is a folder with a folder a class, a flat folder of images (no labels, or labels by --labels or
    --label_from), a tar or zip of either, or a name: `digits` (the embedded set), or one of the published
    sets flowers102, pets, dtd, aircraft, cars, cub200, indoor67, cifar10, cifar100, imagenet, which lie under
    --root. Named sets have a split of their own: they give F-train.beton and F-test.beton, or one file with
    --split.

    Args:
        sources: folders, tars and zips are taken together, classes by name; a named set stands alone
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.data import build

    with as_flags(data_build):
        build(sources, flags)


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

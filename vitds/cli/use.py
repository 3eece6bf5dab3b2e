"""`vitds predict`, `embed`, `similar` and `export …`: a trained run in use."""

from __future__ import annotations


def predict(run: str, *images: str, out: str | None = None, workers: int | None = None) -> None:
    """Name the classes of images, by a fine-tuned run.

    A row an image, in the order given: file, class, probability, class_2, probability_2, class_3,
    probability_3, reason. An image that cannot be read is a row with the reason. Without --out the rows are
    printed as CSV.

    Args:
        run: a fine-tuned run directory, or one of its checkpoints
        images: image files, folders, archives, .beton files
        out: the file to write; its name ends in .csv, .json or .parquet
        workers: processes that decode (default one a core)
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.predict import predict_files

    with as_flags(predict):
        predict_files(run, images, out=out, workers=workers)


def embed(run: str, *images: str, out: str, workers: int | None = None) -> None:
    """Write the features of images, with their file names.

    An .npz holds `features` (images, width) and `files`, and what could not be read as `unreadable_files` and
    `reasons`. The tables have a row an image.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        images: image files, folders, archives, .beton files
        out: the file to write; its name ends in .npz, .csv or .parquet
        workers: processes that decode (default one a core)
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.embed import embed_files

    with as_flags(embed):
        embed_files(run, images, out=out, workers=workers)


def similar(
    run: str,
    image: str,
    *,
    in_: str,
    count: int = 7,
    out: str = "similar.png",
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Find the images that are nearest to one: a picture sheet, and a list.

    Nearness is the cosine of the features. The image itself is left out where it is among the others.

    Args:
        run: a run directory, one of its checkpoints, or a timm model's name
        image: the image file that is asked about
        in_: the folder, archive or .beton file to look through
        count: how many images to find
        out: the picture sheet to write; its name ends in .png, .jpg or .webp
        workers: processes that decode (default one a core)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.similar import find_similar

    with as_flags(similar):
        find_similar(run, image, among=in_, count=count, out=out, workers=workers, as_json=json)


def export_timm(run: str, *, out: str) -> None:
    """Write a folder that timm loads.

    timm.create_model("local-dir:DIR", pretrained=True) gives the network, with its class head where the run
    has one. config.json has the side, mean, deviation, interpolation, crop and class names; README.md is a
    model card.

    Args:
        run: a run directory, or one of its checkpoints
        out: the folder to make
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.export import export

    with as_flags(export_timm):
        export("timm", run, out=out)


def export_hf(run: str, *, out: str) -> None:
    """Write a folder that Hugging Face's transformers loads.

    For backbones that are its ViT (vit_* and deit_* of timm that pool by the class token) or its ResNet. With
    an image processor and a model card.

    Args:
        run: a run directory, or one of its checkpoints
        out: the folder to make
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.export import export

    with as_flags(export_hf):
        export("hf", run, out=out)


def export_onnx(run: str, *, out: str, int8: bool = False) -> None:
    """Write a folder with an ONNX model.

    Its input is a batch of uint8 pixels, its outputs are features and, where the run has a class head,
    logits. The batch may have any size. With a model card.

    Args:
        run: a run directory, or one of its checkpoints
        out: the folder to make
        int8: also write a model with 8-bit weights, and measure both on the run's test file
    """
    from vitds.jobs.as_flags import as_flags
    from vitds.jobs.export import export

    with as_flags(export_onnx):
        export("onnx", run, out=out, int8=int8)

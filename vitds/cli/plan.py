"""`vitds plan` and `vitds bench …`: what a training needs, by arithmetic and by measurement."""

from __future__ import annotations

from typing import Literal


def plan(
    *,
    model: str | None = None,
    rows: int,
    batch: int | None = None,
    gpus: int = 1,
    ds_config: str | None = None,
    recipe: str | None = None,
    set: tuple[str, ...] = (),
    images_per_s: float | None = None,
    hours: bool = False,
    json: bool = False,
) -> None:
    """Memory of one GPU, traffic and hours of a pretraining, by arithmetic.

    No GPU is needed, and nothing is trained but with --hours.

    Args:
        model: a timm model (default the recipe's)
        rows: N, the images; each is a row of the head where the method has one
        batch: images a step, over all GPUs (default the recipe's)
        gpus: ranks
        ds_config: a DeepSpeed JSON file, or the name of a packaged one (default zero0)
        recipe: a recipe of pretraining (default idmm_deit_tiny)
        set: one setting, as in --set batch.micro_images=128; may be repeated
        images_per_s: of all GPUs together; gives hours
        hours: measure images a second here, on one device
        json: print one JSON object and nothing else
    """
    from vitds.jobs.plan import plan

    plan(
        model=model,
        rows=rows,
        batch=batch,
        gpus=gpus,
        ds_config=ds_config,
        recipe=recipe,
        set=set,
        images_per_s=images_per_s,
        hours=hours,
        as_json=json,
    )


def bench_loader(
    *, data: str | None = None, recipe: str | None = None, workers: int = 1, json: bool = False
) -> None:
    """Images and crops a second and core of the input pipeline.

    Beside ours, on the same images and in the same run: the reference (PIL and torchvision), FFCV with one
    pipeline a view, and FFCV's decode with torch's kernel.

    Args:
        data: a .beton file, or a folder or tar of images (default photographs in ../shared/data, else the
            embedded digits)
        recipe: whose crops are made (default idmm_deit_tiny, for the digits idmm_digits)
        workers: threads of the loader
        json: print one JSON object and nothing else
    """
    from vitds.bench.loader import bench_loader

    bench_loader(data=data, recipe=recipe, workers=workers, as_json=json)


def bench_augment(*, data: str | None = None, json: bool = False) -> None:
    """Time of every augmentation, beside PIL, torchvision and kornia.

    Args:
        data: a .beton file, or a folder or tar of images (default photographs in ../shared/data, else the
            embedded digits)
        json: print one JSON object and nothing else
    """
    from vitds.bench.augment import bench_augment

    bench_augment(data=data, as_json=json)


def bench_step(
    *,
    recipe: str | None = None,
    data: str | None = None,
    ds_config: str | None = None,
    rounds: int = 3,
    json: bool = False,
) -> None:
    """Time of a whole training step, beside a bare loop on synthetic tensors.

    Args:
        recipe: a recipe of pretraining (default idmm_digits)
        data: a .beton file (default the embedded digits)
        ds_config: a DeepSpeed JSON file, or the name of a packaged one (default zero0)
        rounds: of an epoch of ours and as many bare steps, in turn
        json: print one JSON object and nothing else
    """
    from vitds.bench.step import bench_step

    bench_step(recipe=recipe, data=data, ds_config=ds_config, rounds=rounds, as_json=json)


def bench_backbone(
    *,
    recipe: str | None = None,
    set: tuple[str, ...] = (),
    images: int = 64,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Time of a backbone as timm makes it, and with what a run adds.

    Forward and backward, each way with all that the ways before it have: freed memory is kept (on a CPU), the
    channels of a pixel lie side by side, bf16.

    Args:
        recipe: whose backbone and side of crops are taken (default finetune_photos_cpu)
        set: one setting, as in --set backbone.name=mobilenetv3_small_100; may be repeated
        images: in a batch, one crop each
        rounds: of one pass each way, in turn
        json: print one JSON object and nothing else
    """
    from vitds.bench.backbone import bench_backbone

    bench_backbone(recipe=recipe, set=set, images=images, rounds=rounds, as_json=json)


def bench_head(
    *,
    rows: int,
    dim: int,
    batch: int,
    ranks: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    bf16_rows: bool = False,
    rounds: int = 3,
    keep_mb: int = 64,
    json: bool = False,
) -> None:
    """Time, memory and traffic of the instance head, beside others' ways.

    Loss and gradients of one step, forward and backward: ours dense and sharded, torch's linear and
    cross_entropy, the same in tiles, Liger and Cut Cross-Entropy where they are installed and run, and the
    four bare products that none of them can do without.

    Args:
        rows: N, the instances
        dim: D, the features' width
        batch: M, the features of one step, of all ranks together
        ranks: also spread the rows over so many processes on this machine
        precision: of the products
        bf16_rows: rows and their gradient are bfloat16 too, as with head.row_dtype=bf16; float32 otherwise
        rounds: of every way, in turn; the best counts
        keep_mb: of ours, head.keep_mb: logits up to this size are kept for the backward pass
        json: print one JSON object and nothing else
    """
    from vitds.bench.head import bench_head

    bench_head(
        rows=rows,
        dim=dim,
        batch=batch,
        ranks=ranks,
        precision=precision,
        bf16_rows=bf16_rows,
        rounds=rounds,
        keep_mb=keep_mb,
        as_json=json,
    )


def bench_gpu(*, out: str, parts: str | None = None, data: str | None = None, toy: bool = False) -> None:
    """Ten minutes on a new GPU: are its numbers right, is it used as it should be.

    Each part is a process with a time limit: a part that fails is a line, and the next one goes on. Every
    result is a line of results.jsonl at once; at the end there are a table and summary.json.

    Args:
        out: folder of results.jsonl, summary.json, profile.txt, train-metrics.jsonl and log.txt
        parts: some of machine,numbers,resume,speed,head,train,memory,resume_compiled (default all)
        data: a folder or archive of images (default photographs in ../shared/data, else the embedded digits)
        toy: the digits in small sizes, which also a CPU does in minutes
    """
    from vitds.bench.gpu import bench_gpu

    bench_gpu(out=out, parts=parts, data=data, toy=toy)

"""`python -m tests.kernels.timed_mix`: mix.c beside torch's operations, processor time on one thread."""

from __future__ import annotations

import time

import torch

from tests.kernels.mixing import SCALE, SHIFT
from vitds.augment.images import write_by_torch
from vitds.augment.mix import draw_mixing
from vitds.config.tree import Mix, ViewGroup, Views
from vitds.kernels.mix import write_images

K = 64  # images of a chunk
# Images, views, side in pixels, runs.
SIZES = ((256, 3, 112, 5), (64, 1, 64, 200))


def main() -> None:
    """Prints the least milliseconds of each way; they take turns. Memory is new each time, as in a step."""
    torch.set_num_threads(1)
    for images, views_count, side, runs in SIZES:
        views = Views(crop_px=side, groups=(ViewGroup(name="global", views=views_count),))
        crops = torch.randint(0, 256, (images, views_count, 3, side, side), dtype=torch.uint8)
        for kind in ("none", "cutmix", "mixup"):
            is_real = torch.ones(images, dtype=torch.bool).numpy()
            mixing = draw_mixing(is_real, 0, 5, 0, views, Mix(kind=kind), chunk_images=K, seed=0)
            least: dict[str, float] = {}
            for _ in range(runs):
                for dtype in (torch.float32, torch.bfloat16):
                    for write in (write_by_torch, write_images):
                        began = time.thread_time()
                        out = torch.empty(images * views_count, 3, side, side, dtype=dtype)
                        write(crops, out, SCALE, SHIFT, mixing, chunk_images=K)
                        name, took = f"{write.__name__} {dtype}", 1e3 * (time.thread_time() - began)
                        least[name] = min(took, least.get(name, took))
            shown = ", ".join(f"{name} {took:.2f}" for name, took in least.items())
            print(f"{images} x {views_count}, {side} px, {kind}: {shown} ms", flush=True)


if __name__ == "__main__":
    main()

"""Traps of FFCV's executor, one test each, that they do not happen to our users."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.small_files import VIEWS, expected_views, settings_for, spoil, write_file
from vitds.data.draws import draw_views
from vitds.data.ffcv_import import Compiler, PipelineSpec, ffcv
from vitds.data.loader import TrainLoader, eval_batches
from vitds.data.operation import CutViews
from vitds.data.order import epoch_order
from vitds.errors import DataError, ShapeError

RUN = settings_for()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("data") / "x.beton")


@pytest.fixture(params=["middle", "head"])
def damaged(request, tmp_path):
    """A file whose image 3 does not decode."""
    file = write_file(tmp_path / "damaged.beton")
    spoil(file, 3, request.param)
    return file


def loader_of(file, run=RUN, micro=2):
    return TrainLoader(file, run, rank=0, ranks=1, micro_images=micro)


def crops_of(batches):
    return [batch.crops.clone() for batch in batches]


def all_equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def cutting_threads():
    return [
        thread
        for thread in threading.enumerate()
        if type(thread).__name__ == "RunIterator" or thread.name.startswith("vitds-cut")
    ]


# --------------------------------------------------------------------------------- an exception in a pipeline


def test_an_exception_in_the_pipeline_reaches_the_consumer_and_ends_the_thread(file, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room for specs")

    monkeypatch.setattr("vitds.data.loader.draw_views", fail)
    with pytest.raises(MemoryError, match="no room for specs"):
        next(loader_of(file).batches(0, 3))
    assert not cutting_threads()


def test_an_exception_in_the_schedule_reaches_the_consumer(file, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room for an order")

    monkeypatch.setattr("vitds.data.loader.epoch_order", fail)
    with pytest.raises(MemoryError, match="no room for an order"):
        next(loader_of(file).batches(0, 3))
    assert not cutting_threads()


def test_a_spec_that_is_wrong_is_never_taken_for_a_damaged_image(file, monkeypatch):
    def outside(views, heights, widths, **key):
        specs = draw_views(views, heights, widths, **key)
        specs["left"] += 1000
        return specs

    monkeypatch.setattr("vitds.data.loader.draw_views", outside)
    with pytest.raises(
        ShapeError, match=r"x.beton, image \d: a view spec's box or window reaches outside its picture"
    ):
        next(loader_of(file, settings_for(damaged="skip")).batches(0, 3))


def test_an_exception_in_the_consumer_ends_the_thread(file):
    with pytest.raises(ZeroDivisionError):
        for _ in loader_of(file).batches(0, 300):
            raise ZeroDivisionError
    gc.collect()
    assert not cutting_threads()


# -------------------------------------------------------------------------------------- torch's thread number


@pytest.fixture(scope="module")
def fresh_process(file):
    """What a new process sees of itself.

    Torch's threads after the import and at each batch, shared memory, and how often numba compiled.
    """
    script = """
import json, sys, torch
from numba.core import event
torch.set_num_threads(2)
with event.install_recorder("numba:compile") as recorder:
    from vitds.config.tree import Views
    from vitds.data.beton import open_beton
    from vitds.data.loader import eval_batches
    threads = [torch.get_num_threads()]
    for batch in eval_batches(open_beton(sys.argv[1]), Views(crop_px=32), batch_images=2, workers=2):
        threads.append(torch.get_num_threads())
        shared = [line for line in open("/proc/self/maps") if "/dev/shm" in line and "(deleted)" not in line]
    compiled = len(recorder.buffer)
    import numba
    numba.njit(lambda x: x + 1)(1)
ours = len(recorder.buffer) - compiled
print(json.dumps({"threads": threads, "shared": shared, "compiled": compiled, "compiled by us": ours}))
"""
    return json.loads(run_script(script, file.path).stdout)


def test_torch_keeps_its_thread_number_on_import_and_while_loading(fresh_process):
    assert fresh_process["threads"] == [2] * 6


def test_numba_compiles_nothing_on_the_way_to_the_batches(fresh_process):
    assert fresh_process["compiled"] == 0 < fresh_process["compiled by us"]


def test_there_is_no_shared_memory_that_could_be_left_behind(fresh_process):
    assert fresh_process["shared"] == []


def test_a_stock_loader_in_the_same_process_leaves_torchs_threads_alone(file):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Compiler.set_num_threads(1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------- an order begun in mid-epoch


def test_a_start_in_mid_epoch_does_not_shorten_later_epochs(file):
    steps = [(batch.epoch, batch.step) for batch in loader_of(file, micro=4).batches(2, 9)]
    assert steps == [(0, 2)] + [(1, step) for step in (3, 4, 5)] + [(2, step) for step in (6, 7, 8)]


def test_a_start_in_mid_epoch_reads_nothing_of_what_came_before(tmp_path):
    file = write_file(tmp_path / "x.beton")
    spoil(file, int(epoch_order(10, RUN.seed, 0)[2]))  # of the first step; its first two pad the last one
    with pytest.raises(DataError):
        list(loader_of(file).batches(0, 1))
    assert len(list(loader_of(file).batches(1, 3))) == 4


# ---------------------------------------------------------------------------------------- undecodable samples


def test_a_damaged_image_is_fatal_by_default_and_named(damaged):
    with pytest.raises(DataError, match=r"damaged.beton: image 3: .*--set data.damaged=skip"):
        for _ in loader_of(damaged).batches(0, 3):
            pass
    assert not cutting_threads()


def test_a_skipped_image_is_not_real_grey_named_once_and_disturbs_no_other(damaged, caplog):
    loader = loader_of(damaged, settings_for(damaged="skip"))
    with caplog.at_level(logging.WARNING):
        batches = [
            (batch.index, batch.is_real, batch.crops.clone(), batch.real_images)
            for batch in loader.batches(0, 6)
        ]
    for place, (index, is_real, crops, _) in enumerate(batches):
        for row, image in enumerate(index.tolist()):
            if image == 3:
                assert not is_real[row] and (crops[row] == 128).all()
            else:
                np.testing.assert_array_equal(crops[row], expected_views(damaged, RUN, image, place // 6))
    assert sum(int(is_real.sum()) for _, is_real, _, _ in batches) == 18
    assert [real for _, _, _, real in batches[::2]] == [
        4,
        4,
        2,
    ] * 2  # the step's divisor stays as the order has it
    assert list(loader.damaged) == [3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{damaged.path}: image 3 is left out: {loader.damaged[3]} (1 so far)"
    ]


def test_evaluation_stops_at_a_damaged_image_or_leaves_it_out_and_says_so(damaged, caplog):
    with pytest.raises(DataError, match=r"damaged.beton: image 3: "):
        list(eval_batches(damaged, VIEWS, batch_images=5))
    with caplog.at_level(logging.WARNING):
        batches = eval_batches(damaged, VIEWS, batch_images=5, damaged="skip")
        seen = [(batch.index.tolist(), len(batch.crops), len(batch.label)) for batch in batches]
    assert seen == [([0, 1, 2, 4], 4, 4), ([5, 6, 7, 8, 9], 5, 5)]
    assert "cannot be decoded: image 3" in caplog.text


def test_a_jpeg_of_another_size_than_recorded_is_seen_and_named(tmp_path):
    file = write_file(tmp_path / "x.beton", images=2, sizes=((40, 60),))
    other = write_file(tmp_path / "y.beton", images=2, sizes=((60, 40),))
    start, size = int(file.offsets[1]), int(file.sizes[1])
    picture = other.path.read_bytes()[int(other.offsets[1]) :][:size]
    with file.path.open("r+b") as stream:
        stream.seek(start)
        stream.write(picture)
    with pytest.raises(
        DataError, match=r"image 1: the picture's size differs from the one that was recorded"
    ):
        list(eval_batches(file, VIEWS, batch_images=2))


# ---------------------------------------------------------------------------------------- the ring of buffers


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(file):
    for batch in loader_of(file).batches(0, 6):
        kept = batch.crops.clone()
        time.sleep(0.02)  # the thread fills every free slot of the ring meanwhile
        assert torch.equal(batch.crops, kept)


def test_the_ring_does_not_grow_with_the_set_or_the_run(file):
    running = loader_of(file)._loader.run([])
    ((pixels, status),) = running.memory_allocations["operation"].values()
    assert pixels.shape == (4, 2, 3, 3, 32, 32) and status.shape == (4, 2)  # 4 batches of 2 images, 3 views
    running.close()


# --------------------------------------------------------------------------- frozen captures, stale addresses


def test_epochs_0_1_0_from_one_loader_are_equal_different_equal(file):
    loader, epochs = loader_of(file), []
    for epoch in (0, 1, 0):
        epochs.append({})
        for batch in loader.batches(3 * epoch, 3 * epoch + 3):
            epochs[-1] |= zip(batch.index.tolist(), batch.crops.clone(), strict=True)
    for image in range(10):
        assert torch.equal(epochs[0][image], epochs[2][image]) and not torch.equal(
            epochs[0][image], epochs[1][image]
        )


def test_nothing_goes_stale_over_many_starts_and_collections(file):
    loader = loader_of(file)
    first = crops_of(loader.batches(0, 3))
    for start in range(20):
        if start % 5 == 0:
            gc.collect()
        assert all_equal(crops_of(loader.batches(0, 3)), first)


def stock_batches(loader):
    """An epoch of a stock loader, which waits for ever where its thread fails: after a minute queue.Empty."""
    iterator = iter(loader)
    while (item := iterator.output_queue.get(timeout=60)) is not None:
        ((crops, status),) = item[1]
        yield crops.copy(), status.copy()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_operation_works_in_stock_ffcv_over_epochs(file, num_workers):
    def specs_of(images, epochs):
        return draw_views(
            RUN.views, file.heights[images], file.widths[images], seed=RUN.seed, epoch=epochs, images=images
        )

    operation = CutViews(file, specs_of, views=RUN.views.count, crop_px=RUN.views.crop_px)
    pipelines = {"image": PipelineSpec("image", decoder=operation), "index": None, "label": None}
    loader = ffcv.Loader(
        str(file.path), batch_size=4, num_workers=num_workers, drop_last=False, pipelines=pipelines
    )
    for epoch in (0, 1, 0):
        operation.epoch = epoch
        crops, status = (np.concatenate(parts) for parts in zip(*stock_batches(loader), strict=True))
        assert not status.any()
        for image in range(10):
            np.testing.assert_array_equal(crops[image], expected_views(file, RUN, image, epoch))


# ---------------------------------------------------------------------------------------- two loaders at once


def test_training_and_evaluation_run_at_once_with_several_workers_each(file):
    run = settings_for(workers=2)
    alone = (
        crops_of(loader_of(file, run).batches(0, 12)),
        crops_of(eval_batches(file, VIEWS, batch_images=2, workers=2)),
    )
    training, together = loader_of(file, run).batches(0, 12), ([], [])
    for batch in training:
        together[0].append(batch.crops.clone())
        evaluation = crops_of(eval_batches(file, VIEWS, batch_images=2, workers=2))
        assert all_equal(evaluation, alone[1])
    assert all_equal(together[0], alone[0])


# ------------------------------------------------------------------------------------- an iterator left early


def test_iterators_left_early_never_disturb_the_next_one(file):
    loader = loader_of(file, settings_for(workers=2))
    whole, left = crops_of(loader.batches(0, 6)), []
    for number in range(50):
        iterator = loader.batches(0, 600)
        for _ in range(number % 3 + 1):
            next(iterator)
        left.append(iterator)  # neither closed nor collected
    assert all_equal(crops_of(loader.batches(0, 6)), whole)
    assert not cutting_threads()
    with pytest.raises(RuntimeError, match="closed, by its owner or because its loader was started again"):
        next(left[-1])


def test_a_closed_iterator_leaves_no_thread_and_no_open_file(file):
    loader, opened = loader_of(file, settings_for(workers=3)), len(os.listdir("/proc/self/fd"))
    iterator = loader.batches(0, 600)
    next(iterator)
    assert len(cutting_threads()) > 1 and len(os.listdir("/proc/self/fd")) > opened
    iterator.close()
    assert not cutting_threads() and len(os.listdir("/proc/self/fd")) == opened


# ------------------------------------------------------------------------------------------------------ leaks


def resident_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def test_memory_does_not_grow_over_hundreds_of_epochs_or_evaluations(file):
    loader = loader_of(file, micro=4)

    def train(epochs):
        for _ in loader.batches(0, epochs * 3):
            pass

    def evaluate(times):
        for _ in range(times):
            list(eval_batches(file, VIEWS, batch_images=10))

    for grow, warm, count in ((train, 100, 400), (evaluate, 30, 100)):
        grow(warm)
        gc.collect()
        before = resident_kb()
        grow(count)
        gc.collect()
        assert resident_kb() - before < 1024


# ---------------------------------------------------------------------------------------- orderly end, Ctrl-C

ENDLESS = """
import sys, time
from vitds.config.tree import Settings
from vitds.data.beton import open_beton
from vitds.data.loader import TrainLoader
file, settings = open_beton(sys.argv[1]), Settings.model_validate_json(sys.argv[2])
for batch in TrainLoader(file, settings, rank=0, ranks=1, micro_images=2).batches(0, 10**6):
    {body}
"""


def run_script(script, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_a_process_whose_training_fails_ends_at_once_with_the_error(file):
    done = run_script(ENDLESS.format(body="1 / 0"), file.path, settings_for(workers=2).model_dump_json())
    assert done.returncode == 1 and done.stderr.strip().endswith("ZeroDivisionError: division by zero")
    assert "Exception ignored" not in done.stderr


def test_ctrl_c_ends_the_process_in_order(file):
    script = ENDLESS.format(body="print(batch.step, flush=True); time.sleep(0.01)")
    arguments = [sys.executable, "-c", script, str(file.path), settings_for(workers=2).model_dump_json()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and errors.strip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in errors and errors.count("Traceback") == 1


def test_a_damaged_image_is_named_by_its_photograph_and_its_number_in_the_file(damaged, caplog):
    names = "\n".join(f"cat/{number}.jpg" for number in range(10))
    named = replace(damaged, manifest=replace(damaged.manifest, names=names))
    part = named.take(np.array([5, 3]))  # image 3 is the damaged one
    with pytest.raises(DataError, match=r"damaged\.beton: image 3 \(cat/3\.jpg\): .*the JPEG data are"):
        list(eval_batches(part, VIEWS, batch_images=2))
    with caplog.at_level(logging.WARNING):
        list(eval_batches(part, VIEWS, batch_images=2, damaged="skip"))
    assert "cannot be decoded: image 3 (cat/3.jpg)" in caplog.text

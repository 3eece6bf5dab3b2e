"""The loader delivers the right pixels of the right images in the right order, from any step on any ranks."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as F

from tests.data.small_files import VIEWS, expected_views, settings_for, write_file
from vitds.config.tree import ViewGroup, Views
from vitds.data import executor
from vitds.data.loader import TrainLoader, eval_batches
from vitds.data.order import epoch_order, page_order
from vitds.errors import SettingsError


@pytest.fixture(scope="module", params=["jpg", "raw"])
def file(request, tmp_path_factory):
    """10 photographs of different sizes, as JPEG and as raw pixels."""
    return write_file(tmp_path_factory.mktemp("data") / f"{request.param}.beton", storage=request.param)


def collect(file, run, start_step=0, stop_step=6, *, rank=0, ranks=1, micro=2):
    """Copies of all batches of one rank."""
    loader = TrainLoader(file, run, rank=rank, ranks=ranks, micro_images=micro)
    return [
        {
            "crops": batch.crops.clone(),
            **{
                name: getattr(batch, name)
                for name in ("index", "label", "is_real", "epoch", "step", "first_chunk", "real_images")
            },
        }
        for batch in loader.batches(start_step, stop_step)
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():
            assert np.array_equal(value, other[name]), name


def test_batches_hold_the_drawn_views_of_the_ordered_images(file):
    run = settings_for()
    batches = collect(
        file, run
    )  # 2 epochs of 3 steps of 2 micro batches; the last step of an epoch has 2 real images
    assert [(batch["epoch"], batch["step"], batch["first_chunk"]) for batch in batches[::2]] == [
        (s // 3, s, 0) for s in range(6)
    ]
    assert [batch["first_chunk"] for batch in batches] == [0, 1] * 6
    assert [batch["real_images"] for batch in batches[::2]] == [4, 4, 2] * 2
    for epoch in range(2):
        own = batches[6 * epoch : 6 * epoch + 6]
        assert (
            torch.cat([batch["index"][batch["is_real"]] for batch in own]).tolist()
            == epoch_order(10, 5, epoch).tolist()
        )
        assert torch.cat([batch["is_real"] for batch in own]).tolist() == [True] * 10 + [False] * 2
        for batch in own:
            assert batch["label"].tolist() == [file.labels[index] for index in batch["index"]]
            for index, crops in zip(batch["index"].tolist(), batch["crops"], strict=True):
                np.testing.assert_array_equal(crops, expected_views(file, run, index, epoch))


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_a_run_begun_in_the_middle_equals_the_rest_of_the_whole_one(file, start):
    assert_same(collect(file, settings_for(), start, 8), collect(file, settings_for(), 0, 8)[2 * start :])


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (1, 8), (2, 2), (2, 4), (4, 2)])
def test_ranks_and_micro_batches_see_the_same_samples_and_draws_in_each_step(file, ranks, micro):
    run = settings_for(images_a_step=8)
    whole = collect(file, run, 0, 4, micro=8)
    by_rank = [collect(file, run, 0, 4, rank=rank, ranks=ranks, micro=micro) for rank in range(ranks)]
    accumulation = 8 // (ranks * micro)
    for step in range(4):
        parts = [batch for own in by_rank for batch in own[step * accumulation : (step + 1) * accumulation]]
        assert [part["first_chunk"] for part in parts] == list(range(0, 4, micro // 2))
        for name in ("crops", "index", "label", "is_real"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[step][name]), name


@pytest.mark.parametrize("workers", [2, 3])
def test_pixels_do_not_depend_on_the_number_of_workers(file, workers):
    assert_same(collect(file, settings_for(workers=workers)), collect(file, settings_for(workers=1)))


def test_epochs_differ_and_the_same_seed_repeats(file):
    run = settings_for()
    first, again = collect(file, run), collect(file, run)
    assert_same(first, again)
    by_epoch = [{}, {}]
    for batch in first:
        by_epoch[batch["epoch"]] |= zip(batch["index"].tolist(), batch["crops"], strict=True)
    assert not any(torch.equal(by_epoch[0][image], by_epoch[1][image]) for image in range(10))
    other = collect(file, settings_for(seed=6))
    assert not torch.equal(
        torch.cat([batch["index"] for batch in first]), torch.cat([batch["index"] for batch in other])
    )


def test_data_order_pages_takes_the_page_order(file):
    batches = collect(file, settings_for(order="pages"), 0, 3)
    order = torch.cat([batch["index"][batch["is_real"]] for batch in batches])
    assert order.tolist() == page_order(file.offsets, 5, 0).tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_image_is_seen_once_an_epoch_whatever_the_shape_of_the_run(tmp_path_factory, data):
    images, ranks, accumulation, chunks, chunk = (
        data.draw(st.integers(1, high)) for high in (10, 4, 3, 2, 3)
    )
    file = write_file(tmp_path_factory.mktemp("any") / "x.beton", images=images)
    micro = chunks * chunk
    run = settings_for(images_a_step=ranks * accumulation * micro, chunk=chunk)
    steps = -(-images // (ranks * accumulation * micro))
    seen, start = [], data.draw(st.integers(0, 2)) * steps
    for rank in range(ranks):
        batches = collect(file, run, start, start + steps, rank=rank, ranks=ranks, micro=micro)
        assert len(batches) == steps * accumulation
        seen += [index for batch in batches for index in batch["index"][batch["is_real"]].tolist()]
    assert sorted(seen) == list(range(images))


def test_fewer_images_than_ranks_leave_some_ranks_only_padding(tmp_path):
    file = write_file(tmp_path / "x.beton", images=3)
    run = settings_for(images_a_step=4, chunk=1)
    batches = [collect(file, run, 0, 2, rank=rank, ranks=4, micro=1) for rank in range(4)]
    assert [batch["is_real"].tolist() for own in batches for batch in own] == [[True]] * 6 + [[False]] * 2
    for batch in batches[3]:
        np.testing.assert_array_equal(
            batch["crops"][0], expected_views(file, run, int(batch["index"][0]), batch["epoch"])
        )


@pytest.mark.parametrize("storage", ["jpg", "raw"])
def test_pictures_of_any_shape_give_crops(tmp_path, storage):
    shapes = ((1, 1), (1, 50), (50, 1), (2, 100), (300, 6), (3, 2), (31, 32), (600, 600))
    file = write_file(tmp_path / "x.beton", images=8, storage=storage, sizes=shapes)
    run = settings_for(images_a_step=8, chunk=8)
    (batch,) = collect(file, run, 0, 1, micro=8)
    for index, crops in zip(batch["index"].tolist(), batch["crops"], strict=True):
        np.testing.assert_array_equal(crops, expected_views(file, run, index, 0))
    seen = [index for each in eval_batches(file, VIEWS, batch_images=3) for index in each.index.tolist()]
    assert seen == list(range(8))


def test_one_fine_tuning_view_comes_with_policy_and_bicubic(file):
    views = Views(
        crop_px=48,
        filter="bicubic",
        groups=(ViewGroup(name="train"),),
        policy="randaugment",
        colour=0.4,
        brightness=0.4,
    )
    run = settings_for(views=views)
    for batch in collect(file, run, 0, 2):
        assert batch["crops"].shape == (2, 1, 3, 48, 48)
        for index, crops in zip(batch["index"].tolist(), batch["crops"], strict=True):
            np.testing.assert_array_equal(crops, expected_views(file, run, index, 0))


def test_ranks_that_do_not_divide_the_step_are_refused(file):
    with pytest.raises(SettingsError, match=r"3 ranks cannot share the 2 chunks of a step"):
        TrainLoader(file, settings_for(), rank=0, ranks=3, micro_images=2)


def stored_picture(file, image):
    """The decoded picture as PIL sees it."""
    raw = file.path.read_bytes()[int(file.offsets[image]) : int(file.offsets[image] + file.sizes[image])]
    size = (int(file.widths[image]), int(file.heights[image]))
    return Image.open(io.BytesIO(raw)) if file.is_jpeg[image] else Image.frombytes("RGB", size, raw)


def test_evaluation_views_are_pils_bicubic_resize_and_centre_crop(file):
    views = Views(crop_px=56)
    (batch,) = eval_batches(file, views, batch_images=10)
    assert batch.crops.shape == (10, 3, 56, 56)
    for image in range(10):
        resized = F.resize(stored_picture(file, image), 64, F.InterpolationMode.BICUBIC)
        reference = np.asarray(F.center_crop(resized, [56, 56]), np.int16).transpose(2, 0, 1)
        difference = np.abs(batch.crops[image].numpy().astype(np.int16) - reference)
        assert difference.mean() < 0.6 and np.quantile(difference, 0.99) <= 3, image


def test_evaluation_goes_through_the_file_in_order_with_a_short_last_batch(file):
    batches = [
        (batch.index.tolist(), batch.label.tolist(), len(batch.crops))
        for batch in eval_batches(file, VIEWS, batch_images=4)
    ]
    assert batches == [([0, 1, 2, 3], [0, 1, 2, 0], 4), ([4, 5, 6, 7], [1, 2, 0, 1], 4), ([8, 9], [2, 0], 2)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_evaluation_ranks_share_the_chosen_images_without_overlap(file, ranks):
    chosen = np.array([7, 1, 1, 9, 3])
    seen = [
        batch.index.tolist()
        for rank in range(ranks)
        for batch in eval_batches(file, VIEWS, batch_images=2, rank=rank, ranks=ranks, indices=chosen)
    ]
    assert sum(seen, []) == chosen.tolist()


def test_evaluation_pixels_do_not_depend_on_workers(file):
    one, two = (
        [batch.crops.clone() for batch in eval_batches(file, VIEWS, batch_images=4, workers=workers)]
        for workers in (1, 2)
    )
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_a_part_of_a_file_is_trained_and_evaluated_as_a_file_of_its_own(file):
    part = file.take(np.array([8, 2, 5]))
    run = settings_for(images_a_step=2, chunk=1)
    seen = [batch for batch in collect(part, run, 0, 2, micro=2)]
    real = [index for batch in seen for index in batch["index"][batch["is_real"]].tolist()]
    assert part.images == 3 and sorted(real) == [0, 1, 2]
    (ours,) = eval_batches(part, VIEWS, batch_images=4)
    crops = ours.crops.clone()
    (whole,) = eval_batches(file, VIEWS, batch_images=10)
    assert (
        torch.equal(crops, whole.crops[[8, 2, 5]]) and ours.label.tolist() == file.labels[[8, 2, 5]].tolist()
    )


def test_the_loaders_threads_take_the_card_of_the_thread_that_starts_them(monkeypatch):
    taken = []
    monkeypatch.setattr(executor, "IS_CUDA", True)  # there is no card here
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda card: taken.append((card, threading.current_thread().name))
    )
    first = executor.on_device_of_this_thread()
    with ThreadPoolExecutor(1, thread_name_prefix="cut", initializer=first) as pool:
        pool.submit(int).result()
    assert taken == [(3, "cut_0")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_could_not_be_pinned_is_told():
    ring = (np.zeros(3_000_000, np.uint8), np.zeros(10, np.int32))
    note = executor.unpinned_note({"operation": {0: ring, 1: None}, "shared": {2: ring[0]}})
    assert note.startswith("6 MB of the loader's memory could not be pinned")
    assert executor.unpinned_note({"operation": {1: None}}) is None

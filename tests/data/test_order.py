"""The order of an epoch: every image once, each on one rank, resumable, in runs of pages if asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitds.data.order import (
    accumulation_steps,
    epoch_order,
    evaluation_batches,
    page_order,
    rank_positions,
    steps_per_epoch,
    training_batches,
)
from vitds.errors import SettingsError


@st.composite
def runs(draw):
    """N, R, A, m, K, with G = R·A·m·K; N below, at and above whole steps, and below R."""
    ranks, accumulation, chunks_a_micro, chunk = (draw(st.integers(1, high)) for high in (5, 3, 3, 8))
    images = draw(st.integers(1, 400))
    return images, ranks, accumulation, chunks_a_micro * chunk, chunk


def all_ranks(order, ranks, accumulation, micro, start_step=0):
    """(R, T, B) index and is_real of all ranks."""
    step = {
        "global_images": ranks * accumulation * micro,
        "ranks": ranks,
        "micro_images": micro,
        "start_step": start_step,
    }
    index, is_real = zip(*(rank_positions(order, rank=rank, **step) for rank in range(ranks)), strict=True)
    return np.stack(index), np.stack(is_real)


@given(runs(), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_image_comes_exactly_once_an_epoch_over_all_ranks(run, seed, epoch):
    images, ranks, accumulation, micro, _ = run
    index, is_real = all_ranks(epoch_order(images, seed, epoch), ranks, accumulation, micro)
    assert sorted(index[is_real]) == list(range(images))
    assert index.shape == (ranks, accumulation * steps_per_epoch(images, ranks * accumulation * micro), micro)


@given(runs())
def test_padding_fills_the_last_step_with_the_epochs_first_images(run):
    images, ranks, accumulation, micro, _ = run
    order = epoch_order(images, 0, 0)
    index, is_real = all_ranks(order, ranks, accumulation, micro)
    by_step = is_real.reshape(ranks, -1, accumulation, micro).sum(axis=(0, 2, 3))
    global_images = ranks * accumulation * micro
    assert (by_step[:-1] == global_images).all() and by_step[-1] == images - global_images * (
        len(by_step) - 1
    ) > 0
    # Different ones, as far as there are: the statistics of a BatchNorm see them too.
    padding = index[~is_real]
    assert len(set(padding)) == min(len(padding), images)
    assert set(padding) <= set(order[: len(padding)])


@given(runs())
def test_a_rank_takes_its_run_of_chunks_of_each_step_in_order(run):
    images, ranks, accumulation, micro, chunk = run
    order = epoch_order(images, 3, 4)
    global_images = ranks * accumulation * micro
    steps = -(-images // global_images)
    padded = (list(order) * (1 + global_images))[: steps * global_images]
    index, _ = all_ranks(order, ranks, accumulation, micro)
    for step in range(steps):  # the rule of the module, spelled out chunk by chunk
        own = padded[step * global_images : (step + 1) * global_images]
        chunks = [own[start : start + chunk] for start in range(0, global_images, chunk)]
        m = micro // chunk
        for rank in range(ranks):
            for a in range(accumulation):
                first = rank * accumulation * m + a * m
                assert index[rank, step * accumulation + a].tolist() == sum(chunks[first : first + m], [])


@given(runs(), st.data())
def test_an_epoch_begun_in_the_middle_is_the_rest_of_the_whole_one(run, data):
    images, ranks, accumulation, micro, _ = run
    order = epoch_order(images, 1, 2)
    start = data.draw(st.integers(0, steps_per_epoch(images, ranks * accumulation * micro)))
    whole, rest = (
        all_ranks(order, ranks, accumulation, micro),
        all_ranks(order, ranks, accumulation, micro, start),
    )
    for all_steps, late in zip(whole, rest, strict=True):
        np.testing.assert_array_equal(all_steps[:, start * accumulation :], late)


@given(runs(), st.data())
def test_a_runs_batches_are_its_epochs_positions_with_their_place_in_the_run(run, data):
    images, ranks, accumulation, micro, _ = run
    step = {"global_images": ranks * accumulation * micro, "ranks": ranks, "micro_images": micro}
    rank, steps = data.draw(st.integers(0, ranks - 1)), steps_per_epoch(images, step["global_images"])
    start, count = data.draw(st.integers(0, 2 * steps)), data.draw(st.integers(0, 2 * steps))
    wanted = []
    for epoch in range(4):
        positions = rank_positions(epoch_order(images, 8, epoch), rank=rank, **step)
        for number, (index, is_real) in enumerate(zip(*positions, strict=True)):
            in_epoch, micro_step = divmod(number, accumulation)
            wanted.append((index.tolist(), is_real.tolist(), epoch, epoch * steps + in_epoch, micro_step))
    batches = training_batches(
        lambda epoch: epoch_order(images, 8, epoch), images, start, start + count, rank=rank, **step
    )
    got = [(batch.images.tolist(), batch.is_real.tolist(), *batch[2:]) for batch in batches]
    assert got == wanted[start * accumulation : (start + count) * accumulation]


def test_an_epochs_order_is_made_only_when_its_first_batch_is_asked_for():
    asked = []

    def order_of(epoch):
        asked.append(epoch)
        return np.arange(4)

    batches = training_batches(order_of, 4, 0, 10**9, global_images=2, rank=0, ranks=1, micro_images=2)
    assert [next(batches).epoch for _ in range(3)] == [0, 0, 1] and asked == [0, 1]


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_has_the_given_images_once_in_their_order_over_all_ranks(images, batch_images, ranks):
    batches = [
        batch
        for rank in range(ranks)
        for batch in evaluation_batches(
            np.array(images, int), batch_images=batch_images, rank=rank, ranks=ranks
        )
    ]
    assert [image for batch in batches for image in batch.images.tolist()] == images
    assert all(1 <= len(batch.images) <= batch_images and batch.is_real.all() for batch in batches)


@given(st.integers(1, 300), st.integers(1, 6))
def test_one_two_and_four_ranks_see_the_same_images_in_each_step(images, quarter):
    order = epoch_order(images, 5, 6)
    seen = []
    for ranks in (1, 2, 4):
        index, is_real = all_ranks(order, ranks, 1, 4 * quarter // ranks)
        seen.append(
            (
                np.moveaxis(index, 0, 1).reshape(index.shape[1], -1),
                np.moveaxis(is_real, 0, 1).reshape(index.shape[1], -1),
            )
        )
    for other in seen[1:]:
        np.testing.assert_array_equal(seen[0], other)


def test_epochs_and_seeds_have_unrelated_orders():
    orders = {(seed, epoch): epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)}
    for key, order in orders.items():
        for other_key, other in orders.items():
            if key != other_key:
                assert (order == other).sum() < 10  # 1 on average


def test_every_permutation_of_four_images_is_equally_likely():
    counts = np.unique([epoch_order(4, 0, epoch) for epoch in range(4800)], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-squared, 23 degrees of freedom, 0.1 %


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 4), st.integers(0, 50))
def test_page_order_has_every_image_once_and_reads_runs_of_whole_pages(sizes, pages_a_run, epoch):
    offsets = np.cumsum([0, *sizes[:-1]]) + 77
    order = page_order(offsets, 0, epoch, page_bytes=512, pages_a_run=pages_a_run)
    assert sorted(order) == list(range(len(sizes)))
    pages = offsets[order] // 512
    distinct = len(set(pages))
    runs, left = [], list(pages)
    while left:  # cut where the next run of pages must begin: after all images of pages_a_run pages
        run = set(list(dict.fromkeys(left))[:pages_a_run]) if len(set(left)) > pages_a_run else set(left)
        size = sum(page in run for page in pages)
        assert set(left[:size]) == run
        runs.append(run)
        left = left[size:]
    assert sum(len(run) for run in runs) == distinct


def test_page_order_differs_by_epoch_and_mixes_within_a_run():
    offsets = np.arange(4000) * 100
    orders = [page_order(offsets, 0, epoch, page_bytes=5000, pages_a_run=8) for epoch in range(2)]
    assert not np.array_equal(*orders)
    steps = [len(set(order[start : start + 200] // 50)) for order in orders for start in range(0, 4000, 200)]
    assert min(steps) >= 7  # a step of 200 images meets (nearly) all 8 pages of its run of 400 images
    first_runs = [set(order[:400] // 50) for order in orders]
    assert first_runs[0] != first_runs[1]


@pytest.mark.parametrize(
    ("ranks", "micro", "accumulation"), [(1, 256, 1), (1, 64, 4), (2, 64, 2), (4, 64, 1), (2, 128, 1)]
)
def test_a_step_divides_into_ranks_and_micro_batches(ranks, micro, accumulation):
    assert accumulation_steps(256, chunk_images=64, ranks=ranks, micro_images=micro) == accumulation


def test_ranks_that_do_not_divide_a_step_are_refused_with_those_that_do():
    with pytest.raises(
        SettingsError, match=r"3 ranks cannot share the 4 chunks of a step .*Start \[1, 2, 4\] ranks"
    ):
        accumulation_steps(256, chunk_images=64, ranks=3, micro_images=64)


@pytest.mark.parametrize("micro", [32, 96, 192])
def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do(micro):
    with pytest.raises(
        SettingsError, match=rf"batch.micro_images {micro} does not cut .*it may be \[64, 128\]"
    ):
        accumulation_steps(256, chunk_images=64, ranks=2, micro_images=micro)

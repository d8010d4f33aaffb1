import random

import pytest
import torch

from litevae.data.buckets import BucketImage, collate_images
from litevae.latents.batch_queue import BatchQueue


def images(sizes, numbers=None):
    numbers = range(len(sizes)) if numbers is None else numbers
    return collate_images(
        [
            BucketImage(number, torch.full((3, *sizes[number]), number, dtype=torch.uint8), None, None)
            for number in numbers
        ]
    )


def collect(queue):
    batches = [(batch.numbers, tuple(batch.pixels.shape)) for batch in queue.ready]
    for batch in queue.ready:
        for number, pixels in zip(batch.numbers, batch.pixels, strict=True):
            assert (pixels == number).all()
    queue.ready.clear()
    return batches


def test_images_wait_for_others_of_their_size():
    queue = BatchQueue(batch_size=2, size=8)
    a, b, none = (8, 8), (4, 16), (0, 0)
    assert queue.add(images([a, b, none, a, a])) == 4
    assert collect(queue) == [([0, 3], (2, 3, 8, 8))]
    queue.flush()
    assert collect(queue) == [([1], (1, 3, 4, 16)), ([4], (1, 3, 8, 8))]
    assert queue.add(images([none, none])) == 0
    queue.flush()
    assert not queue.ready
    assert not queue.waiting


def test_a_batch_has_no_more_pixels_than_squares():
    queue = BatchQueue(batch_size=4, size=8)
    assert [queue.capacity(*size) for size in ((8, 8), (4, 16), (4, 4), (8, 32), (8, 24), (16, 64))] == [
        4,
        4,
        4,
        1,
        1,
        1,
    ]
    queue.add(images([(8, 16)] * 5))
    assert [numbers for numbers, _ in collect(queue)] == [[0, 1], [2, 3]]


def test_a_full_batch_of_one_size_is_not_copied():
    queue, batch = BatchQueue(3, 8), images([(8, 8)] * 3)
    queue.add(batch)
    assert queue.ready[0].pixels.data_ptr() == batch.pixels.data_ptr()
    assert queue.ready[0].pixels.shape == (3, 3, 8, 8)


def test_an_image_that_waits_keeps_no_other_in_memory():
    queue = BatchQueue(3, 8)
    queue.add(images([(8, 8), (8, 16)]))
    for size, [(_, pixels)] in queue.waiting.items():
        assert pixels.untyped_storage().nbytes() == 3 * size[0] * size[1]


def test_the_fullest_batch_goes_when_too_much_waits(monkeypatch):
    monkeypatch.setattr("litevae.latents.batch_queue.MAX_WAITING", 3 * 64 * 5)
    queue = BatchQueue(batch_size=4, size=8)
    queue.add(images([(8, 8), (4, 16), (4, 16), (16, 4), (8, 8), (8, 8)]))
    assert collect(queue) == [([0, 4, 5], (3, 3, 8, 8))]
    assert sum(map(len, queue.waiting.values())) == 3


@pytest.mark.parametrize("seed", range(20))
def test_batches_stay_the_same_after_an_interruption_and_in_other_parts(monkeypatch, seed):
    monkeypatch.setattr("litevae.latents.batch_queue.MAX_WAITING", 3 * 64 * 9)
    draw = random.Random(seed)
    choices = [(8, 8), (4, 16), (16, 4), (8, 12), (12, 8), (4, 20), (0, 0)]
    sizes = draw.choices(choices, draw.choices(range(1, 9), k=len(choices)), k=80)

    def run(numbers, part, stop=None):
        """Encodes like a shard's run: a batch at a time, of as few images as necessary; ends after `stop` batches."""
        queue, encoded = BatchQueue(4, 8), []
        parts = [numbers[start : start + part] for start in range(0, len(numbers), part)]
        while len(encoded) != stop:
            while parts and not queue.ready:
                queue.add(images(sizes, parts.pop(0)))
            if not parts:
                queue.flush()
            if not queue.ready:
                break
            encoded.append(queue.ready.popleft().numbers)
        return encoded

    whole = run(range(80), 4)
    assert sorted(number for batch in whole for number in batch) == [
        i for i in range(80) if sizes[i] != (0, 0)
    ]
    assert any(len(batch) < 4 for batch in whole[: len(whole) // 2])  # too much waited
    for _ in range(5):
        done, more = [], True
        while more:
            rest = [i for i in range(80) if not any(i in batch for batch in done)]
            more = run(rest, draw.randint(1, 9), draw.choice([1, 2, 5, None]))
            done += more
        assert done == whole

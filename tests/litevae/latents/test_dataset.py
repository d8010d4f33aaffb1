import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from litevae.errors import UserError
from litevae.latents import LatentDataset, ShapeBatchSampler, sample_latents


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_images_and_then_their_mirrored_copies(folder, workers):
    dataset = LatentDataset(folder)
    assert (len(dataset), dataset.count) == (20, 10)
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    expected = torch.cat([shard[name] for name in ("moments", "moments_mirrored") for shard in shards])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(DataLoader(dataset, 3, sampler=order, num_workers=workers))
    moments = torch.cat([batch.moments for batch in batches])
    assert moments.dtype == torch.float32
    assert torch.equal(moments, expected[order].float())
    labels = [0] * 4 + [1] * 3 + [2] * 3
    assert torch.cat([batch.label for batch in batches]).tolist() == [labels[i % 10] for i in order]
    assert dataset.name(13) == dataset.name(3) == "a/03.png"
    plain = LatentDataset(folder, mirrored=False)
    assert len(plain) == 10
    with pytest.raises(IndexError, match="item 10 of 10"):
        plain[10]


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(-3, None),
        slice(None, None, -7),
        slice(5, 5),
        [3, -1],
        [],
        torch.tensor([19, 0, 0]),
        torch.arange(20) % 2 == 0,
        np.array([12, 4]),
    ],
    ids=str,
)
def test_several_items_are_those_of_a_tensor(folder, index):
    dataset = LatentDataset(folder, check=False)
    items = [dataset[i] for i in range(20)]
    positions = np.arange(20)[
        index if isinstance(index, slice) else np.asarray(index, dtype=None if len(index) else int)
    ]
    found = dataset[index]
    assert found.moments.shape == (len(positions), 8, 8, 8)
    assert found.label.dtype == torch.int64
    for row, position in enumerate(positions):
        assert torch.equal(found.moments[row], items[position].moments)
        assert found.label[row] == items[position].label


@pytest.mark.parametrize("index", [-1, -20, np.int64(-1), torch.tensor(-1), torch.tensor(3)])
def test_one_item_counts_from_either_end(folder, index):
    dataset = LatentDataset(folder, check=False)
    item = dataset[index]
    assert isinstance(item.label, int)
    assert torch.equal(item.moments, dataset[int(index) % 20].moments)


EMPTY = np.empty(0)
WITHOUT_ITEM = [20, -21, 2**70, -(10**5000), [20], torch.tensor([-21]), np.array([2**63], np.uint64)]
WRONG_MASK = [[True], torch.ones(19, dtype=torch.bool), np.zeros(21, bool), np.empty(0, bool)]
NO_INDEX = [
    1.0,
    1e400,
    float("nan"),
    1j,
    None,
    ...,
    True,
    False,
    np.True_,
    np.float64(1),
    "1",
    b"1",
    "",
    {},
    {1: 2},
]
NO_INDEX += [{1}, object(), [1.0], [None], ["1"], [1, "1"], [[1]], [[1], [1, 2]], slice(1.0), EMPTY]
NO_INDEX += [np.zeros((2, 2), int), np.array(1.0), np.array(True), np.empty((0, 2), int), [[]]]
NO_INDEX += [
    torch.tensor(1.0),
    torch.tensor(True),
    torch.tensor([1.0]),
    torch.empty(0),
    torch.ones(2, 20) > 0,
]
NO_INDEX += [
    torch.zeros(1, 1, dtype=torch.int64),
    torch.ones(2, requires_grad=True),
    torch.ones(2).bfloat16(),
]
NO_INDEX += [torch.zeros(2, dtype=torch.int64, device="meta"), torch.eye(2).to_sparse()]


@pytest.mark.parametrize(
    ("index", "error"),
    [
        *((index, IndexError) for index in (*WITHOUT_ITEM, *WRONG_MASK)),
        *((index, TypeError) for index in NO_INDEX),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_index_that_selects_no_items_is_refused_in_one_line(folder, index, error):
    dataset = LatentDataset(folder, check=False)
    for use in (dataset.__getitem__, *([dataset.name] * (error is TypeError or isinstance(index, int)))):
        with pytest.raises(error) as caught:
            use(index)
        assert "\n" not in str(caught.value)
        assert 0 < len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int32, np.uint64, torch.int16, torch.uint8, torch.int32]
)
def test_whole_numbers_of_any_type_are_indices(folder, kind):
    dataset = LatentDataset(folder, check=False)
    many = torch.tensor([3, 7], dtype=kind) if isinstance(kind, torch.dtype) else np.array([3, 7], kind)
    assert torch.equal(dataset[many].moments, torch.stack([dataset[3].moments, dataset[7].moments]))
    assert torch.equal(dataset[many[1]].moments, dataset[7].moments)
    assert dataset.name(many[1]) == dataset.name(7) == dataset.name(-13)


def test_a_copy_for_another_process_maps_the_files_itself(folder):
    dataset = LatentDataset(folder, check=False)
    first = dataset[0]
    assert dataset.files
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy.files
    assert torch.equal(copy[0].moments, first.moments)


def test_samples_are_scaled_draws_from_the_posterior(folder):
    dataset = LatentDataset(folder)
    moments = torch.stack([dataset[i].moments for i in range(3)])
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5)).double()
    expected = (mean + (logvar / 2).exp() * noise - 0.25) * 0.5  # the shift and scaling factors of the model
    found = dataset.sample(moments, torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=8 * 2**-24 * expected.abs().max().item()
    )
    plain = sample_latents(moments, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close((plain - 0.25) * 0.5, found, rtol=0, atol=0)


def test_lengths_are_checked_in_any_case(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: has "):
        LatentDataset(folder, check=False)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        LatentDataset(tmp_path / "nowhere")


class TestShapes:
    """A folder of whole images, whose latents have several shapes."""

    @pytest.fixture
    def dataset(self, bucketed):
        return LatentDataset(bucketed)

    def test_items_are_in_the_order_of_the_images(self, dataset, bucketed, shaped):
        paths = [
            path for path in sorted(shaped.iterdir()) if path.name not in ("04-long.png", "08-broken.png")
        ]
        assert [dataset.name(i) for i in range(dataset.count)] == [path.name for path in paths]
        assert dataset.shape is None
        assert len(dataset) == 2 * dataset.count == 2 * len(paths)
        stored = {}
        for path in sorted(bucketed.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                stored.setdefault(name, []).append(tensor)
        seen = {}
        for i in range(len(dataset)):
            channels, height, width = dataset[i].moments.shape
            assert channels == 8
            name = f"moments{'_mirrored' * (i >= dataset.count)}_{height}x{width}"
            row = seen[name] = seen.get(name, -1) + 1
            assert torch.equal(dataset[i].moments, torch.cat(stored[name])[row].float())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_gets_batches_of_one_shape(self, dataset, workers):
        sampler = ShapeBatchSampler(dataset, 2)
        epochs = []
        for _ in range(2):
            batches = list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
            assert len(batches) == len(sampler)
            found = sorted(tuple(item.flatten().tolist()) for batch in batches for item in batch.moments)
            assert found == sorted(
                tuple(item.moments.flatten().tolist())
                for item in map(dataset.__getitem__, range(len(dataset)))
            )
            assert all(
                dataset.sample(batch.moments).shape == (len(batch.label), 4, *batch.moments.shape[2:])
                for batch in batches
            )
            epochs.append([tuple(batch.moments.shape) for batch in batches])
        assert epochs[0] != epochs[1]  # the batches of all shapes are shuffled anew

    def test_the_order_depends_on_the_seed_and_the_epoch(self, dataset):
        sampler = ShapeBatchSampler(dataset, 2, seed=3)
        epochs = [list(sampler) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        again = ShapeBatchSampler(dataset, 2, seed=3)
        again.set_epoch(2)
        assert list(again) == epochs[2]
        assert list(ShapeBatchSampler(dataset, 2, seed=4)) != epochs[0]
        in_order = ShapeBatchSampler(dataset, 100, shuffle=False)
        assert list(in_order) == [items.tolist() for items in dataset.items_by_shape().values()]

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_incomplete_batches_may_be_left_out(self, dataset, size):
        groups = [len(items) for items in dataset.items_by_shape().values()]
        assert sum(groups) == len(dataset)
        sampler = ShapeBatchSampler(dataset, size, drop_last=True)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [size] * len(sampler)
        assert len(batches) == sum(count // size for count in groups)

    def test_accelerate_shares_the_batches(self, dataset):
        batches = list(ShapeBatchSampler(dataset, 2, drop_last=True))
        shares = [
            list(BatchSamplerShard(ShapeBatchSampler(dataset, 2, drop_last=True), 2, process))
            for process in range(2)
        ]
        assert [batch for pair in zip(*shares, strict=True) for batch in pair] == batches[
            : len(batches) // 2 * 2
        ]

    def test_several_items_must_have_one_shape(self, dataset):
        (items, *_) = (items for items in dataset.items_by_shape().values() if len(items) > 2)
        assert torch.equal(dataset[items].moments, torch.stack([dataset[i].moments for i in items]))
        assert dataset[:0].moments.shape == (0, 8, 0, 0)
        with pytest.raises(ValueError, match=r"items of different shapes make no batch .*ShapeBatchSampler"):
            dataset[:]

    @pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
    def test_batch_size_is_a_whole_number(self, dataset, size):
        with pytest.raises(ValueError, match="batch_size must be a whole number from 1, got"):
            ShapeBatchSampler(dataset, size)

    @pytest.mark.parametrize("seed", [-1, 0.5, None, False])
    def test_seed_is_a_whole_number(self, dataset, seed):
        with pytest.raises(ValueError, match="seed must be a whole number from 0, got"):
            ShapeBatchSampler(dataset, 2, seed=seed)

    def test_numbers_of_numpy_are_whole_numbers(self, dataset):
        found = ShapeBatchSampler(dataset, np.uint8(2), seed=np.int64(3))
        assert list(found) == list(ShapeBatchSampler(dataset, 2, seed=3))


def test_middle_squares_are_one_shape(folder):
    dataset = LatentDataset(folder)
    assert dataset.shape == (8, 8, 8)
    ((shape, items),) = dataset.items_by_shape().items()
    assert shape == dataset.shape
    assert items.tolist() == list(range(20))

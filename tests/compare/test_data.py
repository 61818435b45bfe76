"""Reading images from everywhere, and what is said when something is wrong with them."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from heed.data.idx import read_idx
from heed.data.images import ImageData, load_images, patch_size

pytestmark = pytest.mark.filterwarnings("ignore:.*has no test split")


def write_idx(path, array, code=0x08):
    content = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_pairs(folder, images, prefix="", suffix=".gz", code=0x08):
    labels = (np.arange(len(images)) % 2).astype("u1")
    write_idx(folder / f"{prefix}images-idx3-ubyte{suffix}", images, code)
    write_idx(folder / f"{prefix}labels-idx1-ubyte{suffix}", labels)


def write_images(folder, classes=("cat", "dog"), count=5, size=(12, 10), mode="RGB"):
    pixels = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1] + i, size[0], 3) if mode == "RGB" else (size[1] + i, size[0])
            Image.fromarray(pixels.integers(0, 128, shape, dtype="u1") + 100 * label).save(folder / name / f"{i}.png")


def test_digits():
    data = load_images("digits")
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.classes == tuple("0123456789")
    assert data.fingerprint() == load_images("digits").fingerprint()
    mean, std = data.statistics()
    pixels = data.train_images.double() / 255
    torch.testing.assert_close(mean.double(), pixels.mean().view(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(std.double(), pixels.std(correction=0).view(1), atol=1e-5, rtol=0)


def test_saving(tmp_path):
    data = load_images("digits")
    data.save(tmp_path / "data.safetensors")
    again = ImageData.load(tmp_path / "data.safetensors")
    assert again.fingerprint() == data.fingerprint()
    assert (again.name, again.classes, again.notes) == (data.name, data.classes, data.notes)


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (28, 2), (32, 4), (64, 8), (224, 16)])
def test_patch_size(side, patch):
    assert patch_size(side) == patch


class TestIdx:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_train_and_test(self, tmp_path, suffix):
        images = np.arange(10 * 8 * 8, dtype="u1").reshape(10, 8, 8)
        write_pairs(tmp_path, images, "train-", suffix)
        write_pairs(tmp_path, images[:4], "t10k-", suffix)
        data = load_images(str(tmp_path))
        assert data.train_images.shape == (10, 1, 8, 8)
        assert torch.equal(data.test_images[:, 0], torch.from_numpy(images[:4]))
        assert data.test_labels.tolist() == [0, 1, 0, 1]

    def test_one_pair_is_split_by_class(self, tmp_path):
        write_pairs(tmp_path, np.zeros((20, 28, 28), "u1"))
        data = load_images(str(tmp_path))
        assert data.train_labels.bincount().tolist() == [8, 8]
        assert data.test_labels.bincount().tolist() == [2, 2]
        assert "only set of images" in data.notes[0]

    def test_floats_are_scaled(self, tmp_path):
        images = np.linspace(-1, 3, 10 * 64).reshape(10, 8, 8)
        write_pairs(tmp_path, images.astype(">f4"), code=0x0D)
        data = load_images(str(tmp_path))
        together = torch.cat([data.train_images, data.test_images])
        assert (together.min(), together.max()) == (0, 255)

    def test_nan_is_named(self, tmp_path):
        images = np.ones((10, 8, 8), ">f4")
        images[3, 2, 2] = np.nan
        write_pairs(tmp_path, images, code=0x0D)
        with pytest.warns(UserWarning, match="image 3: it contains NaN"):
            data = load_images(str(tmp_path))
        assert len(data.train_labels) + len(data.test_labels) == 9
        with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz image 3: it contains NaN"):
            load_images(str(tmp_path), strict=True)

    def test_broken_files_are_named(self, tmp_path):
        images = np.zeros((10, 8, 8), "u1")
        write_pairs(tmp_path, images, suffix="")
        file = tmp_path / "images-idx3-ubyte"
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        with pytest.raises(ValueError, match=r"images-idx3-ubyte holds 651 bytes where its header promises 656"):
            load_images(str(tmp_path))
        file.write_bytes(b"hello")
        with pytest.raises(ValueError, match="is not an idx file"):
            read_idx(file)
        file.write_bytes(whole)
        (tmp_path / "labels-idx1-ubyte").unlink()
        with pytest.raises(ValueError, match="has no labels beside it"):
            load_images(str(tmp_path))

    def test_truncated_gzip(self, tmp_path):
        write_pairs(tmp_path, np.zeros((10, 8, 8), "u1"))
        file = tmp_path / "images-idx3-ubyte.gz"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match="not a readable gzip file"):
            load_images(str(tmp_path))


class TestFolder:
    def test_sizes_are_made_equal(self, tmp_path):
        write_images(tmp_path)
        data = load_images(str(tmp_path))
        assert data.classes == ("cat", "dog")
        assert data.train_images.shape == (8, 3, 12, 12)
        assert any("resized to 12 x 12" in note for note in data.notes)
        assert load_images(str(tmp_path), image_size=32).side == 32

    def test_grey_images_have_one_channel(self, tmp_path):
        write_images(tmp_path, mode="L")
        assert load_images(str(tmp_path)).channels == 1

    def test_train_and_test_folders(self, tmp_path):
        write_images(tmp_path / "train")
        write_images(tmp_path / "test", count=2)
        data = load_images(str(tmp_path), strict=True)
        assert (len(data.train_labels), len(data.test_labels)) == (10, 4)

    def test_a_corrupt_image_is_named_and_left_out(self, tmp_path):
        write_images(tmp_path)
        (tmp_path / "cat" / "0.png").write_bytes(b"no image")
        whole = (tmp_path / "dog" / "1.png").read_bytes()
        (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
        with pytest.warns(UserWarning, match=r"2 unusable .*cat/0\.png.*dog/1\.png"):
            data = load_images(str(tmp_path))
        assert len(data.train_labels) + len(data.test_labels) == 8
        with pytest.raises(ValueError, match=r"cat/0\.png"):
            load_images(str(tmp_path), strict=True)

    def test_an_empty_class_is_named(self, tmp_path):
        write_images(tmp_path)
        (tmp_path / "emu").mkdir()
        with pytest.warns(UserWarning, match="emu holds no images"):
            assert load_images(str(tmp_path)).classes == ("cat", "dog")
        with pytest.raises(ValueError, match="emu holds no images"):
            load_images(str(tmp_path), strict=True)

    def test_missing_splits(self, tmp_path):
        write_images(tmp_path / "train")
        with pytest.raises(ValueError, match="has no test split"):
            load_images(str(tmp_path), strict=True)
        (tmp_path / "train").rename(tmp_path / "test")
        with pytest.raises(ValueError, match="none named 'train'"):
            load_images(str(tmp_path))

    def test_no_classes(self, tmp_path):
        with pytest.raises(ValueError, match="0 class folder"):
            load_images(str(tmp_path))
        write_images(tmp_path, classes=("cat",))
        with pytest.raises(ValueError, match="1 class folder"):
            load_images(str(tmp_path))

    def test_nothing_readable(self, tmp_path):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.png").write_bytes(b"")
        with pytest.raises(ValueError, match="none of the 2 images can be read"):
            load_images(str(tmp_path))


class TestDatasets:
    @pytest.fixture
    def dataset(self):
        datasets = pytest.importorskip("datasets")
        pixels = np.random.default_rng(0).integers(0, 255, (10, 9, 9), dtype="u1")
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
        rows = {"img": [Image.fromarray(p) for p in pixels], "label": [i % 2 for i in range(10)]}
        return datasets.Dataset.from_dict(rows, features=features)

    def test_saved_to_disk(self, tmp_path, dataset):
        datasets = pytest.importorskip("datasets")
        splits = datasets.DatasetDict({"train": dataset, "test": dataset.select(range(4))})
        splits.save_to_disk(str(tmp_path / "saved"))
        data = load_images(str(tmp_path / "saved"), strict=True)
        assert data.classes == ("no", "yes")
        assert data.train_images.shape == (10, 1, 8, 8)
        assert data.test_labels.tolist() == [0, 1, 0, 1]

    def test_parquet_without_a_test_split(self, tmp_path, dataset):
        dataset.to_parquet(str(tmp_path / "rows.parquet"))
        data = load_images(str(tmp_path / "rows.parquet"))
        assert (len(data.train_labels), len(data.test_labels)) == (8, 2)

    def test_no_labels(self, tmp_path, dataset):
        dataset.remove_columns("label").save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match="none is the label"):
            load_images(str(tmp_path / "saved"))


def test_no_such_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot open it locally"):
        load_images("no_such_dataset_xyz")

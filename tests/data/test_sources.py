"""Where files are sought, in which order, and what the user is told when they are nowhere."""

import hashlib
import shutil

import numpy as np
import pooch
import pytest

import qlab.data
from qlab.data.idx import MNIST, FashionMNIST
from qlab.data.sources import RemoteFile, find
from qlab.errors import DataNotFoundError
from tests.data.writers import mnist_arrays, write_mnist


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """A machine without QLAB_DATA, without the Debian package, without a network; and no test writes into the real cache."""
    monkeypatch.delenv("QLAB_DATA", raising=False)
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FashionMNIST, "packages", ())
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **options: refuse)


def refuse(url, output_file, pooch):
    raise ConnectionError(f"no route to {url}")


class LocalServer:
    """Stands for pooch's downloader: "downloads" from a folder and notes what was asked for."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def __call__(self, url, output_file, pooch):
        self.asked.append(url)
        shutil.copyfile(self.folder / url.rpartition("/")[2], output_file)


def marked(value):
    """MNIST arrays whose first training pixel tells where they come from."""
    arrays = mnist_arrays()
    arrays["train-images-idx3-ubyte"][0, 0, 0] = value
    return arrays


def mark(data):
    return int(data.split("train").x[0, 0, 0, 0])


def published(monkeypatch, folder, dataset=MNIST):
    """Let the files in `folder` be those that are published."""
    files = {
        key: RemoteFile(file.name, hashlib.sha256((folder / file.name).read_bytes()).hexdigest(), file.urls)
        for key, file in dataset.files.items()
    }
    monkeypatch.setattr(dataset, "files", files)
    server = LocalServer(folder)
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **options: server)
    return server


def load(**options):
    return qlab.data.load("fashion_mnist", val_fraction=0, **options)


def test_root_comes_first_then_qlab_data_then_the_package_then_the_network(monkeypatch, tmp_path):
    places = {name: tmp_path / name for name in ("root", "data", "package", "web")}
    for value, (name, folder) in enumerate(places.items()):
        write_mnist(folder / "fashion_mnist" if name == "data" else folder, marked(value))
    published(monkeypatch, places["web"], FashionMNIST)
    assert mark(load()) == 3
    monkeypatch.setattr(FashionMNIST, "packages", (places["package"],))
    assert mark(load()) == 2
    monkeypatch.setenv("QLAB_DATA", str(places["data"]))
    assert mark(load()) == 1
    assert mark(load(root=str(places["root"]))) == 0


@pytest.mark.parametrize("folder", ["fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST"])
@pytest.mark.parametrize("option", ["root", "QLAB_DATA"])
def test_the_usual_folder_names_are_known(monkeypatch, tmp_path, folder, option):
    write_mnist(tmp_path / folder, marked(9), compress=False)
    if option == "root":
        assert mark(load(root=str(tmp_path))) == 9
    else:
        monkeypatch.setenv("QLAB_DATA", str(tmp_path))
        assert mark(load()) == 9


def test_files_directly_in_qlab_data_are_not_taken_for_any_of_the_three_mnists(monkeypatch, tmp_path):
    write_mnist(tmp_path, mnist_arrays())
    monkeypatch.setenv("QLAB_DATA", str(tmp_path))
    for name in ("mnist", "fashion_mnist", "kmnist"):
        with pytest.raises(DataNotFoundError):
            qlab.data.load(name).setup()


def test_a_root_without_the_file_is_an_error_although_the_file_is_elsewhere(monkeypatch, tmp_path):
    write_mnist(tmp_path / "data" / "mnist", mnist_arrays())
    monkeypatch.setenv("QLAB_DATA", str(tmp_path / "data"))
    with pytest.raises(DataNotFoundError, match=r"correct root=.*or leave it out") as caught:
        qlab.data.load("mnist", root=str(tmp_path / "elsewhere")).setup()
    assert "http" not in str(caught.value).partition("To get it")[0]


def test_the_error_names_the_file_every_place_and_every_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMNIST, "packages", (tmp_path / "package",))
    with pytest.raises(DataNotFoundError) as caught:
        load().setup()
    message = str(caught.value)
    assert "train-images-idx3-ubyte.gz was not found" in message
    assert "$QLAB_DATA (not set)" in message
    assert str(tmp_path / "package") in message
    for url in FashionMNIST.files["train-images"].urls:
        assert f"{url} (no route to" in message
    assert "set QLAB_DATA=F" in message
    assert "apt install dataset-fashion-mnist" in message

    monkeypatch.setenv("QLAB_DATA", str(tmp_path / "data"))
    with pytest.raises(DataNotFoundError) as caught:
        load().setup()
    assert str(tmp_path / "data" / "fashion_mnist") in str(caught.value)
    assert "not set" not in str(caught.value)


def test_the_error_for_cifar_says_which_archive_is_needed():
    with pytest.raises(DataNotFoundError, match=r"cifar-10-binary.tar.gz was not found[\s\S]*never opens"):
        qlab.data.load("cifar10").setup()


def test_a_download_is_checked_kept_and_not_repeated(monkeypatch, tmp_path):
    write_mnist(tmp_path / "web", marked(5))
    server = published(monkeypatch, tmp_path / "web")
    data = qlab.data.load("mnist", val_fraction=0)
    data.prepare_data()
    assert [url.rpartition("/")[2] for url in server.asked] == [file.name for file in MNIST.files.values()]
    assert mark(data) == 5
    assert mark(qlab.data.load("mnist", val_fraction=0)) == 5
    assert len(server.asked) == 4
    assert (tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz").is_file()


def test_a_download_with_another_hash_is_refused_and_not_kept(monkeypatch, tmp_path):
    write_mnist(tmp_path / "web", mnist_arrays())
    server = published(monkeypatch, tmp_path / "web")
    write_mnist(tmp_path / "web", marked(1) | {"train-labels-idx1-ubyte": np.zeros(30, np.uint8)})
    with pytest.raises(DataNotFoundError, match=r"SHA256 hash of downloaded file"):
        qlab.data.load("mnist").setup()
    assert len(server.asked) == 2, "both addresses were tried"
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_the_next_address_is_tried_when_one_fails(monkeypatch, tmp_path):
    write_mnist(tmp_path, mnist_arrays())
    file = RemoteFile(
        "train-images-idx3-ubyte.gz",
        hashlib.sha256((tmp_path / "train-images-idx3-ubyte.gz").read_bytes()).hexdigest(),
        ("http://first/train-images-idx3-ubyte.gz", "http://second/train-images-idx3-ubyte.gz"),
    )
    server = LocalServer(tmp_path)

    def flaky(url, output_file, pooch):
        (refuse if "first" in url else server)(url, output_file, pooch)

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **options: flaky)
    assert find("some", file, None, ("some",)).is_file()
    assert server.asked == ["http://second/train-images-idx3-ubyte.gz"]


def test_every_published_file_has_a_sha256_and_an_address():
    from qlab.data.cifar import CIFAR10, CIFAR100
    from qlab.data.idx import KMNIST

    files = [CIFAR10.archive, CIFAR100.archive]
    for dataset in (MNIST, FashionMNIST, KMNIST):
        files += dataset.files.values()
    assert len({file.sha256 for file in files}) == len(files) == 14
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert all(url.endswith(f"/{file.name}") for url in file.urls)

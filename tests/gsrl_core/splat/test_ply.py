import numpy as np
import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import read_ply, write_ply

NAMES = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
NAMES += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]


def write_ascii(path, names, rows, encoding="ascii"):
    header = ["ply", f"format {encoding} 1.0", "comment by hand", f"element vertex {len(rows)}"]
    header += [f"property float {name}" for name in names] + ["end_header"]
    path.write_text("\n".join(header + [" ".join(map(str, row)) for row in rows]) + "\n")


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_round_trip_is_exact(tmp_path, degree, count, random_gaussians):
    gaussians = random_gaussians(count, degree)
    write_ply(tmp_path / "a.ply", gaussians)
    for a, b in zip(gaussians.tensors(), read_ply(tmp_path / "a.ply").tensors(), strict=True):
        assert torch.equal(a, b)


def test_file_has_the_channel_major_inria_layout(tmp_path, random_gaussians):
    gaussians = random_gaussians(2, 3)
    write_ply(tmp_path / "a.ply", gaussians)
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property")]
    assert names[:10] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "f_rest_0"]
    row = dict(zip(names, np.frombuffer(body, "<f4").reshape(2, 62)[1], strict=True))
    # f_rest_15 is the first green coefficient: basis function 1 of channel 1.
    assert row["f_rest_15"] == gaussians.harmonics[1, 1, 1].item()
    assert row["f_rest_44"] == gaussians.harmonics[1, 15, 2].item()
    assert row["rot_0"] == gaussians.quats[1, 0].item()


def test_gsplats_exporter_and_this_reader_agree(tmp_path, random_gaussians):
    exporter = pytest.importorskip("gsplat.exporter")
    gaussians = random_gaussians(5, 3)
    means, quats, log_scales, opacities, harmonics = gaussians.tensors()
    exporter.export_splats(
        means, log_scales, quats, opacities, harmonics[:, :1], harmonics[:, 1:], format="ply",
        save_to=str(tmp_path / "g.ply"),
    )  # fmt: skip
    for a, b in zip(gaussians.tensors(), read_ply(tmp_path / "g.ply").tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_ascii_big_endian_and_extra_or_reordered_properties_are_read(tmp_path):
    names = ["extra", *reversed(NAMES)]
    row = [9, 0.4, 0.3, 0.2, 0.1, -3, -2, -1, 0.5, 0.03, 0.02, 0.01, 3, 2, 1]
    write_ascii(tmp_path / "a.ply", names, [row])
    header = (tmp_path / "a.ply").read_text().split("end_header")[0].replace("ascii", "binary_big_endian")
    (tmp_path / "b.ply").write_bytes(header.encode() + b"end_header\n" + np.array(row, ">f4").tobytes())
    for path in (tmp_path / "a.ply", tmp_path / "b.ply"):
        gaussians = read_ply(path)
        torch.testing.assert_close(gaussians.means, torch.tensor([[1.0, 2.0, 3.0]]))
        torch.testing.assert_close(gaussians.quats, torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        torch.testing.assert_close(gaussians.log_scales, torch.tensor([[-1.0, -2.0, -3.0]]))
        torch.testing.assert_close(gaussians.harmonics, torch.tensor([[[0.01, 0.02, 0.03]]]))
        assert gaussians.logit_opacities.item() == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_property_is_named(tmp_path, name):
    write_ascii(tmp_path / "a.ply", [n for n in NAMES if n != name], [[0.5] * (len(NAMES) - 1)])
    with pytest.raises(SceneError, match=f"property {name} is missing"):
        read_ply(tmp_path / "a.ply")


def test_a_truncated_body_tells_expected_and_found_bytes(tmp_path, random_gaussians):
    write_ply(tmp_path / "a.ply", random_gaussians(10, 0))
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content[:-5])
    with pytest.raises(SceneError, match=r"truncated.*680 bytes.*found 675"):
        read_ply(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PLY"),
        (b"PK\x03\x04zip", "not a PLY"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\n", "end_header"),
        (b"ply\nformat weird 1.0\nelement vertex 0\nend_header\n", "weird"),
        (b"ply\nformat ascii 1.0\nelement face 0\nproperty list uchar int v\nend_header\n", "face"),
        (b"ply\nformat ascii 1.0\nelement vertex 0\nproperty list uchar int v\nend_header\n", "not a number"),
        (b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float x\nend_header\n", "twice"),
    ],
)
def test_files_that_are_no_splats_are_refused(tmp_path, content, message):
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(SceneError, match=message):
        read_ply(tmp_path / "a.ply")


def test_other_defects_are_refused(tmp_path):
    path = tmp_path / "a.ply"
    good = [0.1] * len(NAMES)
    write_ascii(path, NAMES, [good, [*good[:-1]]])
    with pytest.raises(SceneError, match="truncated"):
        read_ply(path)
    write_ascii(path, NAMES, [["red", *good[1:]]])
    with pytest.raises(SceneError, match="not a number"):
        read_ply(path)
    write_ascii(path, [*NAMES, "f_rest_0"], [[*good, 0.1]])
    with pytest.raises(SceneError, match="1 f_rest"):
        read_ply(path)
    write_ascii(path, NAMES, [[*good[:-4], 0, 0, 0, 0]])
    with pytest.raises(SceneError, match="zero quaternion"):
        read_ply(path)
    with pytest.raises(SceneError, match="cannot be read"):
        read_ply(tmp_path / "missing.ply")


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_counted(tmp_path, column, value, random_gaussians):
    tensors = [tensor.clone() for tensor in random_gaussians(8, 1).tensors()]
    tensors[column][3] = value
    write_ply(tmp_path / "a.ply", Gaussians(*tensors))
    with pytest.raises(SceneError, match=r"1 of 8 Gaussians.*row 3"):
        read_ply(tmp_path / "a.ply")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, random_gaussians):
    path = tmp_path / "a.ply"
    write_ply(path, random_gaussians(3, 0, seed=1))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_ply(path, random_gaussians(3, 0, seed=2))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

"""Learning the matrices that bring keys of adjacent layers together."""

import struct
import zlib

import pytest

numpy = pytest.importorskip("numpy")

from kvern import calibrate  # noqa: E402


def keys(seed: int, heads: int = 2, tokens: int = 300, dim: int = 16):
    return numpy.random.default_rng(seed).standard_normal((heads, tokens, dim)).astype(numpy.float32)


def orthogonal(seed: int, n: int):
    return numpy.linalg.qr(numpy.random.default_rng(seed).standard_normal((n, n)))[0].astype(numpy.float32)


def test_a_rotation_between_layers_is_found():
    x = keys(1)
    joined = x.transpose(1, 0, 2).reshape(300, 32)
    y = (joined @ orthogonal(2, 32)).reshape(300, 2, 16).transpose(1, 0, 2)
    pair = calibrate.align(x, y)
    assert numpy.allclose(pair["whole"], orthogonal(2, 32), atol=1e-4)
    assert pair["angle"] > 80
    assert pair["whole_angle"] < 0.1
    # Heads by themselves cannot undo what mixes them.
    assert pair["blocks_angle"] > 20


def test_rotations_of_single_heads_are_found_by_both():
    x = keys(3)
    y = numpy.stack([x[head] @ orthogonal(4 + head, 16) for head in range(2)])
    pair = calibrate.align(x, y)
    assert pair["whole_angle"] < 0.1
    assert pair["blocks_angle"] < 0.1
    assert numpy.allclose(pair["blocks"][1], orthogonal(5, 16), atol=1e-4)


def test_the_first_tokens_are_left_out():
    x = keys(6)
    y = x.copy()
    y[:, : calibrate.SINKS] *= -1e4
    assert calibrate.align(x, y)["whole_angle"] < 0.1


def test_profile_is_laid_out_as_documented():
    pair = calibrate.align(keys(7), keys(8))
    data = calibrate.encode_profile("model", 12, {6: pair})
    assert data[:8] == b"KVERNPRF"
    assert struct.unpack_from("<6I", data, 8) == (1, 5, 12, 2, 16, 1)
    assert data[32:37] == b"model"
    assert struct.unpack_from("<Iff", data, 37)[0] == 6
    assert len(data) == 37 + 12 + 4 * (32 * 32 + 2 * 16 * 16) + 4
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    assert calibrate.profile_name("a model/7B", data) == f"a_model_7B-{zlib.crc32(data[:-4]):08x}"


def test_positions_are_taken_out_of_keys():
    torch = pytest.importorskip("torch")
    rows = torch.tensor(keys(9))
    angles = torch.outer(torch.arange(300.0), 10000 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    first, second = rows[..., :4], rows[..., 4:8]
    turned = rows[..., :8] * cos + torch.cat((-second, first), dim=-1) * sin
    got = calibrate.unrotated(torch.cat((turned, rows[..., 8:]), dim=-1), cos * 1.2, sin * 1.2)
    assert torch.allclose(got, rows, atol=1e-4)


def test_the_command_says_how_it_is_called(monkeypatch, capsys):
    from kvern import programs

    monkeypatch.setattr("sys.argv", ["kvern"])
    with pytest.raises(SystemExit, match="(?s)usage: kvern COMMAND.*calibrate"):
        programs.kvern()
    monkeypatch.setattr("sys.argv", ["kvern", "calibrate", "--help"])
    with pytest.raises(SystemExit):
        programs.kvern()
    assert "--text" in capsys.readouterr().out

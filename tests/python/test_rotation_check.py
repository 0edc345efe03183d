"""Engines test at their start how the model turns its keys, and make no compact caches where it is otherwise."""

import types

import fake_native
import mini_engine
import pytest
import torch
from mini_engine import DIM, turned

from kvern import rotation_check
from test_compact_requests import compact, told
from test_scheduler_side import assert_at_rest, prompt_of


def wish(engine, **options) -> dict:
    one = engine(**options)
    answer = told(one, one.generate(prompt_of(300), max_tokens=1, params=compact()))
    assert_at_rest(one)
    return answer


def neighbours_turned(keys, positions):
    order = torch.arange(DIM).view(2, -1).T.flatten()  # 0, 2, 1, 3
    return turned(keys[..., order.argsort()], positions)[..., order]


def scaled_afterwards(keys, positions):
    return turned(keys, positions) * torch.linspace(0.5, 1.5, DIM)


MISTAKEN = {
    "not at all": lambda keys, positions: keys,
    "in neighbouring pairs": neighbours_turned,
    "at another speed": lambda keys, positions: turned(keys, positions, theta=10500.0),
    "the other way": lambda keys, positions: turned(keys, -positions),
    "by half the positions": lambda keys, positions: turned(keys, positions / 2),
    "and scaled": scaled_afterwards,
    "into nothing": lambda keys, positions: keys * float("nan"),
}


def test_a_model_that_turns_its_keys_as_configured_has_compact_caches(engine):
    assert wish(engine)["state"] == "pending"


@pytest.mark.parametrize("how", MISTAKEN)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_layer_that_turns_them_otherwise_is_noticed(engine, how, trusted):
    answer = wish(engine, windows=(0,), turns={0: MISTAKEN[how]}, options={"kvern.trust_rotation": trusted})
    assert answer["state"] == "refused"
    assert "layer model.layers.0.attn does not turn its keys" in answer["reason"]


def test_a_model_of_16_bits_passes_with_rounded_cosines():
    torch.manual_seed(1)
    before = torch.randn(16, 2, DIM)
    moves = torch.arange(16) * 50
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = moves[:, None, None] * frequencies
    cosines, sines = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    first, second = before.to(torch.bfloat16).chunk(2, dim=-1)
    after = torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)
    error = rotation_check._largest_error(before.to(torch.bfloat16).double(), after.double(), angles, False)
    assert 0 < error < rotation_check._TOLERANCE_16_BIT / 4


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("how", ["raises", "is not found"])
def test_a_model_that_cannot_be_run_is_trusted_only_where_told(engine, monkeypatch, how, trusted):
    def refuse(self, input_ids, positions):
        raise RuntimeError("takes other arguments")

    if how == "raises":
        monkeypatch.setattr(mini_engine.Model, "forward", refuse)
    else:
        monkeypatch.setattr(rotation_check, "engine_model", lambda: None)
    answer = wish(engine, options={"kvern.trust_rotation": trusted})
    if trusted:
        assert answer["state"] == "pending"
    else:
        assert "it could not be tested how the model turns its keys" in answer["reason"]
        assert "kvern.trust_rotation" in answer["reason"]


def test_the_layers_run_their_own_attention_afterwards(engine, monkeypatch):
    one = engine()
    for layer in one.attention[0].values():
        assert "forward" not in vars(layer.impl)


def test_ranks_run_the_model_together_whatever_befalls_one_of_them(engine, store, monkeypatch):
    runs = []
    forward = mini_engine.Model.forward
    monkeypatch.setattr(mini_engine.Model, "forward", lambda *given, **named: runs.append(1) or forward(*given, **named))
    store.refuse_layout = "not this one"
    engine(ranks=2)
    assert len(runs) == 2 * 2


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"lora_config": object()}, "adapters"),
        ({"parallel_config": types.SimpleNamespace(data_parallel_size=2, is_moe_model=True)}, "experts"),
        ({"parallel_config": types.SimpleNamespace(data_parallel_size=2, is_moe_model=None)}, "experts"),
    ],
)
def test_a_model_that_must_not_be_run_now_is_not(change, reason):
    facts = {"lora_config": None, "parallel_config": types.SimpleNamespace(data_parallel_size=1), **change}

    def model(**_):
        raise AssertionError("it was run")

    observed = rotation_check.observe(model, {}, "style=neox,theta=10000,dim=4", types.SimpleNamespace(**facts))
    assert reason in observed.problem
    check = rotation_check.RotationCheck(observed, fake_native.rotation_frequencies)
    assert check.problem and not check.certain


def test_a_model_without_a_rotation_is_refused_for_certain():
    observed = rotation_check.observe(None, {}, "", types.SimpleNamespace())
    check = rotation_check.RotationCheck(observed, fake_native.rotation_frequencies)
    assert "does not turn its keys" in check.problem and check.certain


def test_a_rotation_that_no_daemon_undoes_is_refused(engine, model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    other = mini_engine.write_checkpoint(model.parent / "dynamic", rope_parameters=rope)
    answer = wish(engine, folder=other, options={"kvern.trust_rotation": True})
    assert answer["state"] == "refused" and "length of the prompt" in answer["reason"]

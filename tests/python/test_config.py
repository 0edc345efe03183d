import pytest

from kvern.config import OptionError, Options, RequestOptions, parse_size


def test_no_options_at_all_are_fine():
    options = Options.from_extra_config({})
    assert options.address == "" and options.store_generated and options.data_plane == "auto"


def test_keys_of_others_are_left_alone():
    assert Options.from_extra_config({"lmcache.chunk_size": 256, "enable_cross_layers_blocks": "True"}) == Options()


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"kvern.adress": "unix:///x"}, ["kvern.adress", "Did you mean kvern.address", "kvern.threads"]),
        ({"address": "unix:///x"}, ["'address'", "Did you mean kvern.address"]),
        ({"kvern.address": "localhost:7070"}, ["kvern.address", "unix:///"]),
        ({"kvern.address": 7}, ["kvern.address", "string"]),
        ({"kvern.data_plane": "rdma"}, ["auto, shm, ucx"]),
        ({"kvern.staging": "1 potato"}, ["kvern.staging", "256MiB"]),
        ({"kvern.staging": "1KiB"}, ["kvern.staging", "at least"]),
        ({"kvern.staging": True}, ["kvern.staging"]),
        ({"kvern.threads": -1}, ["kvern.threads", "0 to 64"]),
        ({"kvern.threads": 1.5}, ["kvern.threads"]),
        ({"kvern.store_generated": "perhaps"}, ["true or false"]),
        ({"kvern.codec": "int8; raw"}, ["kvern.codec", "int8"]),
        ({"kvern.client_key_file": "/nowhere/key"}, ["not a file", "keygen"]),
        ({"kvern.address": "tcp://host:7070"}, ["server_key_file", "insecure"]),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(extra, words):
    with pytest.raises(OptionError) as error:
        Options.from_extra_config(extra)
    for word in words:
        assert word in str(error.value)


def test_values_are_taken(tmp_path):
    key = tmp_path / "key"
    key.write_text("k")
    options = Options.from_extra_config(
        {
            "kvern.address": "tcp://host:7070",
            "kvern.server_key_file": str(key),
            "kvern.client_key_file": str(key),
            "kvern.staging": "64MiB",
            "kvern.store_generated": "false",
            "kvern.threads": "3",
            "kvern.codec": "unrotate | int8(group=64)",
            "kvern.embedded_dram": "1.5GiB",
        }
    )
    assert options.staging == 64 << 20 and not options.store_generated and options.worker_threads() == 3
    assert options.embedded_dram == 3 << 29


def test_sizes():
    assert parse_size("k", 5) == 5 and parse_size("k", "2 KiB") == 2048 and parse_size("k", "1GB") == 10**9


@pytest.mark.parametrize(
    "given", [None, 7, "text", [1], {"kvern": None}, {"kvern": "x"}, {"kvern": {"load": 1, "max_load_tokens": -1}}]
)
def test_a_requests_wishes_never_raise(given):
    options = RequestOptions.from_request(given)
    assert options.load and options.store and options.max_load_tokens is None and options.codec == ""


def test_a_wish_for_a_compact_cache_may_leave_the_how_to_the_engine():
    wish = {"kvern": {"compact": True, "ttl_seconds": 60}}
    taken = RequestOptions.from_request(wish, "snapkv(budget=25%)")
    assert (taken.compact, taken.ttl_seconds, taken.compact_refusal) == ("snapkv(budget=25%)", 60, "")
    refused = RequestOptions.from_request(wish)
    assert refused.compact == "" and "kvern.compact" in refused.compact_refusal
    none = RequestOptions.from_request({"kvern": {"compact": False}}, "snapkv(budget=25%)")
    assert (none.compact, none.compact_refusal, none.problem) == ("", "", "")


def test_a_requests_wishes_are_bounded():
    options = RequestOptions.from_request({"kvern": {f"key{i}": "x" * 10_000 for i in range(100)}})
    assert len(options.problem) < 2000

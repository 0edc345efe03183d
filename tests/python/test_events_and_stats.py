import pickle

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from test_scheduler_side import BLOCK, assert_at_rest, prompt_of, side_of
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats

from kvern.stats import KvernPromMetrics, KvernStats, Recorder
from kvern.vllm import KvernConnector


def stored(events, medium):
    return [event for event in events if isinstance(event, BlockStored) and event.medium == medium]


def hashes(events):
    return [block for event in events for block in event.block_hashes]


def test_stored_chunks_are_announced_as_vllm_announces_its_own_blocks(engine):
    one = engine(events=True)
    one.generate(prompt_of(500), cache_salt="tenant-1")
    ours, theirs = stored(one.events, "CPU"), stored(one.events, "GPU")
    assert len(hashes(ours)) == 500 // BLOCK
    assert all(event.locality == "LOCAL" and event.block_size == BLOCK for event in ours)
    assert len([token for event in ours for token in event.token_ids]) == 480
    assert ours[0].parent_block_hash is None and ours[1].parent_block_hash == ours[0].block_hashes[-1]
    assert ours[0].extra_keys[:2] == theirs[0].extra_keys[:2] == [("tenant-1",), None]
    assert hashes(ours) == hashes(theirs)[: len(hashes(ours))]
    assert ours[0].token_ids == theirs[0].token_ids[: len(ours[0].token_ids)]


def test_nothing_is_announced_before_it_is_stored(engine, store):
    one = engine(events=True)
    store.drop_stores = True
    one.generate(prompt_of(500))
    assert not stored(one.events, "CPU")
    assert_at_rest(one)


def test_evicted_chunks_are_withdrawn_and_superseded_ones_are_not(engine, store):
    one = engine(events=True)
    prompt = prompt_of(330)
    one.generate(prompt)  # a chunk and a tail of two blocks
    one.generate(prompt_of(330) + prompt_of(300, seed=2))
    one.events.clear()
    side = side_of(one)
    namespace = side._client.id_of(0)
    keys = sorted(store.chunks, key=lambda key: len(store.chunks[key].hashes))
    short, full = keys[0], next(k for k in keys if len(store.chunks[k].hashes) == 8)
    store.removed = [(namespace, 0, store.chunks[short].hashes, "superseded")]
    one.generate(prompt_of(60, seed=5))
    gone = hashes(event for event in one.events if isinstance(event, BlockRemoved))
    store.removed = [(namespace, 0, store.chunks[full].hashes, "evicted")]
    one.generate(prompt_of(60, seed=6))
    gone = hashes(event for event in one.events if isinstance(event, BlockRemoved) and event.medium == "CPU")
    assert len(gone) >= 8 and len(set(gone)) == len(gone)


def test_after_a_reconnect_the_daemons_snapshot_decides(engine, store):
    one = engine(events=True)
    one.generate(prompt_of(500))
    one.events.clear()
    full = next(key for key in store.chunks if len(store.chunks[key].hashes) == 8)
    kept = {full: store.chunks[full]}
    store.chunks = kept
    store.session_count += 1
    one.generate(prompt_of(20, seed=7))
    again, gone = stored(one.events, "CPU"), [e for e in one.events if isinstance(e, BlockRemoved) and e.medium == "CPU"]
    assert len(hashes(again)) == 8 and len(hashes(gone)) == 500 // BLOCK - 8


def test_a_snapshot_that_is_not_complete_withdraws_nothing(engine, store):
    one = engine(events=True)
    one.generate(prompt_of(500))
    one.events.clear()
    full = next(key for key in store.chunks if len(store.chunks[key].hashes) == 8)
    every, store.chunks = store.chunks, {full: store.chunks[full]}
    store.complete_snapshots = False
    store.session_count += 1
    one.generate(prompt_of(20, seed=7))
    again = stored(one.events, "CPU")
    assert len(hashes(again)) == 8 and not any(isinstance(e, BlockRemoved) and e.medium == "CPU" for e in one.events)
    store.chunks, store.complete_snapshots = every, True
    one.events.clear()
    store.session_count += 1
    one.generate(prompt_of(20, seed=8))
    assert len(hashes(stored(one.events, "CPU"))) == 500 // BLOCK, "what was not in it is not forgotten"


def test_a_reset_withdraws_everything(engine):
    one = engine(events=True)
    one.generate(prompt_of(500))
    one.events.clear()
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.generate(prompt_of(40, seed=7))
    gone = [e for e in one.events if isinstance(e, BlockRemoved) and e.medium == "CPU"]
    assert len(hashes(gone)) == 500 // BLOCK


# ---------------------------------------------------------------- stats


def test_stats_add_up_and_survive_the_way_between_processes():
    one, two = Recorder(), Recorder()
    for recorder in (one, two):
        recorder.count("loads")
        recorder.count("load_failures", label="late")
        recorder.observe("load_seconds", 0.5)
    first = pickle.loads(pickle.dumps(one.take()))
    total = first.aggregate(two.take())
    assert total.data["counters"] == {"loads": 2, "load_failures|late": 2}
    assert total.reduce()["kvern mean load seconds"] == 0.5
    assert KvernStats(total.to_dict()).data == total.data
    assert one.take() is None and KvernStats().is_empty()


def test_a_change_of_a_gauge_alone_is_told_and_not_logged():
    recorder = Recorder()
    recorder.gauge("held_blocks", 3)
    recorder.count("stores")
    assert recorder.take().data["gauges"] == {"held_blocks": 3}
    recorder.gauge("held_blocks", 3)
    assert recorder.take() is None
    recorder.gauge("held_blocks", 0)
    update = pickle.loads(pickle.dumps(recorder.take()))
    assert not update.is_empty() and update.data == {"counters": {}, "gauges": {"held_blocks": 0}, "observations": {}}
    lines, log = [], KVConnectorLogging.__new__(KVConnectorLogging)
    log.connector_cls = KvernConnector
    log.reset()
    log.observe(update.to_dict())
    log.log(lines.append)
    assert not lines
    recorder.gauge("held_blocks", 1)
    beside = MultiKVConnectorStats({"KvernConnector": update})  # as beside other connectors
    assert not beside.is_empty()
    total = beside.aggregate(MultiKVConnectorStats({"KvernConnector": recorder.take()}))
    assert total.to_dict()["KvernConnector"]["gauges"] == {"held_blocks": 1}


def test_the_end_of_the_last_store_reaches_the_metrics(engine, store):
    """Through vLLM's scheduler, which drops what is empty."""
    one = engine()
    told = []
    make_stats = one.scheduler.make_stats

    def spy(*arguments, **named):
        stats = make_stats(*arguments, **named)
        told.append(stats.kv_connector_stats)
        return stats

    one.scheduler.make_stats = spy
    store.hold = True
    one.run(one.add(prompt_of(500)))
    store.hold = False
    one.settle()
    gauges = [data["gauges"] for data in told if data and data["gauges"]]
    assert any(one["held_blocks"] for one in gauges)
    assert gauges[-1]["held_blocks"] == gauges[-1]["jobs_in_flight"] == 0


def test_labels_do_not_grow_without_end():
    recorder = Recorder()
    for i in range(1000):
        recorder.count("misses", label=f"reason {i}")
    assert len(recorder.take().data["counters"]) <= 51


def test_metrics_appear_on_vllms_endpoint(engine):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    one.generate(prompt)
    side = side_of(one)
    registry = CollectorRegistry()
    bound = {kind: (lambda kind: lambda **kw: kind(registry=registry, **kw))(kind) for kind in (Gauge, Counter, Histogram)}
    metrics = KvernPromMetrics(one.config, bound, ["engine"], {0: ["0"]})
    side._recorder.count("misses", label="not stored")
    side._recorder.count("hit_tokens", 480)
    stats = side.take_stats()
    one.workers[0]._worker._recorder.observe("load_seconds", 0.1)
    worker_stats = one.workers[0].get_kv_connector_stats()
    metrics.observe(stats.to_dict(), 0)
    metrics.observe(worker_stats.to_dict(), 0)
    text = generate_latest(registry).decode()
    assert 'vllm:kvern_hit_tokens_total{engine="0"} 480.0' in text
    assert 'vllm:kvern_misses_total{engine="0",reason="not stored"}' in text
    assert 'vllm:kvern_connected{engine="0"} 1.0' in text
    assert 'vllm:kvern_load_seconds_count{engine="0"} 1.0' in text


def test_a_step_costs_little_when_nothing_is_due(engine):
    """Counts calls rather than time: a decode step of an idle store asks the native side for no block table and no hash."""
    one = engine()
    request = one.add(prompt_of(100), max_tokens=60)
    for _ in range(3):
        one.step()
    side = side_of(one)
    calls = []
    side._registered_namespace = lambda *_: calls.append(1)
    for _ in range(20):
        one.step()
    assert not calls
    del side._registered_namespace
    one.run(request)
    assert_at_rest(one)

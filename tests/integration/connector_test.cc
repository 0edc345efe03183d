#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "connector/client.h"
#include "connector/prefix_matcher.h"
#include "connector/transfer_worker.h"
#include "tests/integration/connector_fixture.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;
using test::PageModel;
using testing::client_config;
using testing::Daemon;
using testing::eventually;
using testing::ids;
using testing::joined;
using testing::kChunkBlocks;
using testing::kHashBytes;
using testing::kPatienceMs;
using testing::namespace_of;
using testing::prompt;
using testing::Rank;

PageModel::Options packed(PagePacking packing, DType dtype = DType::kBFloat16) {
  PageModel::Options options;
  options.packing = packing;
  options.dtype = dtype;
  options.blocks = 40;
  if (packing == PagePacking::kOpaque) options.heads = options.model_heads = 1;
  return options;
}

class ConnectorPackings : public ::testing::TestWithParam<std::pair<PagePacking, DType>> {};

TEST_P(ConnectorPackings, bytes_come_back_to_another_client_in_other_blocks) {
  Daemon daemon;
  const auto options = packed(GetParam().first, GetParam().second);
  Rank writer("unix://" + daemon.socket(), options, 1);
  Rank reader("unix://" + daemon.socket(), options, 2);
  const auto hashes = prompt(1, 20);  // two whole cells and a short one
  EXPECT_EQ(writer.store(hashes, ids(3, 20)), (std::vector<std::uint32_t>{0, 1, 2}));
  const auto result = reader.load(hashes, ids(15, 20));
  EXPECT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_EQ(reader.canonical(ids(15, 20)), writer.canonical(ids(3, 20)));
  EXPECT_EQ(result.raw_bytes, writer.canonical(ids(3, 20)).size());
}

INSTANTIATE_TEST_SUITE_P(Connector, ConnectorPackings,
                         ::testing::Values(std::pair{PagePacking::kRows, DType::kFloat16},
                                           std::pair{PagePacking::kCpuVec, DType::kBFloat16},
                                           std::pair{PagePacking::kCpuVec, DType::kFloat32},
                                           std::pair{PagePacking::kCpuAmx, DType::kBFloat16},
                                           std::pair{PagePacking::kOpaque, DType::kOpaqueBytes}));

TEST(Connector, a_part_of_a_chunk_can_be_loaded_and_null_blocks_stay_untouched) {
  Daemon daemon;
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  Rank reader("unix://" + daemon.socket(), packed(PagePacking::kCpuAmx), 2);
  const auto hashes = prompt(1, 16);
  writer.store(hashes, ids(1, 16));
  const std::vector<BlockHash> middle(hashes.begin() + 3, hashes.begin() + 13);
  auto targets = ids(20, 10);
  targets[4] = 0;
  const auto untouched = reader.canonical({0, 24});
  const auto result = reader.load(middle, targets, 3);
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_EQ(reader.canonical({20, 21, 22, 23, 25, 26, 27, 28, 29}), writer.canonical({4, 5, 6, 7, 9, 10, 11, 12, 13}));
  EXPECT_EQ(reader.canonical({0, 24}), untouched);
}

TEST(Connector, a_piece_that_spans_several_stored_chunks_is_put_together) {
  Daemon daemon;
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  Rank reader("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 2);
  const auto hashes = prompt(1, 8);
  // As after a window that has freed blocks: the later half alone, then the earlier one.
  writer.store({hashes.begin() + 4, hashes.end()}, ids(5, 4));
  writer.store({hashes.begin(), hashes.begin() + 4}, ids(1, 4));
  const auto result = reader.load(hashes, ids(20, 8));
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_EQ(reader.canonical(ids(20, 8)), writer.canonical(ids(1, 8)));
}

PageModel::Options rank_of(std::uint32_t rank, std::uint32_t ranks) {
  auto options = packed(PagePacking::kCpuVec);
  options.model_heads = 4;
  options.heads = 4 / ranks;
  options.head_begin = rank * options.heads;
  return options;
}

TEST(Connector, what_two_ranks_stored_one_rank_restores_and_only_when_both_have) {
  Daemon daemon;
  const std::string address = "unix://" + daemon.socket();
  Rank left(address, rank_of(0, 2), 1);
  Rank right(address, rank_of(1, 2), 2);
  Rank whole(address, rank_of(0, 1), 3);
  const auto hashes = prompt(1, 8);
  // One half is no chunk that others can read, whoever counts as its storer.
  const auto half = left.finish(left.submit_store(hashes, ids(1, 8)));
  ASSERT_EQ(half.size(), 2U);
  EXPECT_EQ(whole.load(hashes, ids(1, 8)).event, JobEvent::kLoadFailed);
  right.store(hashes, ids(1, 8));
  const auto result = whole.load(hashes, ids(1, 8));
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  for (std::uint32_t head = 0; head < 4; ++head) {
    PageModel& from = head < 2 ? left.model() : right.model();
    for (const Part part : {Part::kKey, Part::kValue}) {
      EXPECT_EQ(*whole.model().element(1, part, head, 5, 7, 11), *from.element(1, part, head % 2, 5, 7, 11));
    }
  }
}

TEST(Connector, what_one_rank_stored_two_ranks_restore) {
  Daemon daemon;
  const std::string address = "unix://" + daemon.socket();
  Rank whole(address, rank_of(0, 1), 1);
  Rank left(address, rank_of(0, 2), 2);
  Rank right(address, rank_of(1, 2), 3);
  const auto hashes = prompt(1, 8);
  whole.store(hashes, ids(1, 8));
  ASSERT_EQ(left.load(hashes, ids(9, 8)).event, JobEvent::kLoaded);
  ASSERT_EQ(right.load(hashes, ids(9, 8)).event, JobEvent::kLoaded);
  for (std::uint32_t head = 0; head < 4; ++head) {
    PageModel& to = head < 2 ? left.model() : right.model();
    for (std::uint32_t token = 0; token < 32; ++token) {
      EXPECT_EQ(*to.element(1, Part::kValue, head % 2, 13, token, 3),
                *whole.model().element(1, Part::kValue, head, 5, token, 3));
    }
  }
}

TEST(Connector, int8_comes_back_smaller_and_close) {
  Daemon daemon;
  const auto options = packed(PagePacking::kCpuVec, DType::kFloat32);
  Rank writer("unix://" + daemon.socket(), options, 1);
  Rank reader("unix://" + daemon.socket(), options, 2);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (auto& layer : writer.model().memory()) {
    for (std::size_t i = 0; i + 4 <= layer.size(); i += 4) {
      const float value = normal(random);
      std::memcpy(layer.data() + i, &value, sizeof value);
    }
  }
  const auto hashes = prompt(1, 8);
  writer.store(hashes, ids(1, 8), "int8");
  const auto result = reader.load(hashes, ids(1, 8));
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_LT(result.encoded_bytes, result.raw_bytes / 3);
  const auto in = writer.canonical(ids(1, 8));
  const auto out = reader.canonical(ids(1, 8));
  double error = 0;
  double energy = 0;
  for (std::size_t i = 0; i < in.size(); i += 4) {
    float a = 0;
    float b = 0;
    std::memcpy(&a, in.data() + i, 4);
    std::memcpy(&b, out.data() + i, 4);
    error += (a - b) * (a - b);
    energy += a * a;
  }
  EXPECT_LT(error, energy * 1e-3);
  EXPECT_GT(error, 0);
}

TEST(Connector, a_store_that_is_larger_than_staging_ends_whole) {
  Daemon daemon;
  auto options = packed(PagePacking::kCpuVec);
  options.layers = options.group_layers = 32;  // 4 MiB per chunk, 32 MiB of staging
  options.blocks = 161;
  Rank writer("unix://" + daemon.socket(), options, 1);
  Rank reader("unix://" + daemon.socket(), options, 2, {.threads = 2});
  const auto hashes = prompt(1, 160);
  EXPECT_EQ(writer.store(hashes, ids(1, 160)).size(), 20U);
  const auto result = reader.load(hashes, ids(1, 160));
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_TRUE(reader.canonical(ids(1, 160)) == writer.canonical(ids(1, 160)));
}

TEST(Connector, what_is_stored_already_counts_as_stored) {
  Daemon daemon;
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  const auto hashes = prompt(1, 16);
  EXPECT_EQ(writer.store(hashes, ids(1, 16)).size(), 2U);
  EXPECT_EQ(writer.store(hashes, ids(17, 16)).size(), 2U);
}

TEST(Connector, malformed_jobs_fail_in_a_sentence_and_touch_nothing) {
  Daemon daemon;
  Rank rank("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  const auto before = rank.model().memory();
  const auto hashes = prompt(1, 8);
  EXPECT_EQ(rank.load(hashes, ids(1000, 8)).event, JobEvent::kLoadFailed);
  EXPECT_EQ(rank.load({}, {}).event, JobEvent::kLoadFailed);
  auto events = rank.finish(rank.submit_store(hashes, ids(36, 8)));
  ASSERT_EQ(events.size(), 2U);
  EXPECT_NE(events[1].reason, "");
  EXPECT_TRUE(events[1].stored_chunks.empty());
  events = rank.finish(rank.submit_store(hashes, ids(0, 8)));
  ASSERT_EQ(events.size(), 2U);
  EXPECT_TRUE(events[1].stored_chunks.empty());
  EXPECT_TRUE(rank.model().memory() == before);
}

TEST(Connector, bytes_that_were_flipped_in_the_store_are_never_loaded_and_leave_it) {
  Daemon daemon;
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  Rank reader("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 2);
  PrefixMatcher matcher(reader.shared_client(), {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}});
  const auto hashes = prompt(1, 8);
  writer.store(hashes, ids(1, 8));
  {
    // As a stray write would: bytes that look like data, in the middle of every stored plane.
    std::fstream slab(daemon.slab(), std::ios::in | std::ios::out | std::ios::binary);
    ASSERT_TRUE(slab) << daemon.slab();
    std::vector<char> bytes(2U << 20);
    slab.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    for (std::size_t at = 8192 + 17; at < bytes.size(); at += 16384) bytes[at] = static_cast<char>(bytes[at] ^ 1);
    slab.seekp(0);
    slab.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  const auto result = reader.load(hashes, ids(9, 8));
  EXPECT_EQ(result.event, JobEvent::kLoadFailed);
  EXPECT_NE(result.reason.find("checksum"), std::string::npos) << result.reason;
  EXPECT_TRUE(reader.all_zero(ids(9, 8)));
  EXPECT_FALSE(reader.all_zero(ids(17, 8)));
  const std::string text = joined(hashes);
  EXPECT_TRUE(eventually([&] {
    return matcher.match("r", reader.handle(), text, kHashBytes, 0, 256, 300).tokens == 0;
  })) << "the chunk was not quarantined";
}

TEST(Connector, a_claim_keeps_what_was_found_until_it_is_released) {
  Daemon daemon(8U << 20);
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  Rank reader("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 2);
  PrefixMatcher matcher(reader.shared_client(), {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}});
  const auto claimed = prompt(1, 16);
  const auto unclaimed = prompt(2, 16);
  writer.store(claimed, ids(1, 16));
  writer.store(unclaimed, ids(1, 16));
  EXPECT_EQ(matcher.match("r", reader.handle(), joined(claimed), kHashBytes, 0, 512, 600).tokens, 512U);
  EXPECT_EQ(matcher.claims(), 1U);
  const auto flood = [&](std::uint64_t first) {  // 2 x 8 MiB through a store of 8 MiB
    for (std::uint64_t seed = first; seed < first + 16; ++seed) writer.store(prompt(seed, 32), ids(1, 32));
  };
  flood(100);
  auto result = reader.load(claimed, ids(1, 16));
  EXPECT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_EQ(reader.canonical(ids(1, 16)), writer.canonical(ids(1, 16)));
  const auto before = reader.canonical(ids(17, 16));
  result = reader.load(unclaimed, ids(17, 16));
  EXPECT_EQ(result.event, JobEvent::kLoadFailed);
  EXPECT_EQ(reader.canonical(ids(17, 16)), before) << "nothing was there to be written";
  matcher.release("r");
  EXPECT_EQ(matcher.claims(), 0U);
  flood(200);
  EXPECT_EQ(matcher.match("r", reader.handle(), joined(claimed), kHashBytes, 0, 512, 600).tokens, 0U);
  EXPECT_EQ(matcher.claims(), 0U);
}

TEST(Connector, look_ups_count_what_the_engine_has_and_stop_where_it_asks) {
  Daemon daemon;
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  PrefixMatcher matcher(writer.shared_client(), {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}});
  const auto hashes = prompt(1, 20);
  writer.store(hashes, ids(1, 20));
  auto longer = hashes;
  for (const BlockHash& hash : prompt(2, 10)) longer.push_back(hash);
  const auto tokens = [&](std::uint32_t local, std::uint32_t most) {
    return matcher.match("r", writer.handle(), joined(longer), kHashBytes, local, most, 1000).tokens;
  };
  EXPECT_EQ(tokens(0, 960), 640U);
  EXPECT_EQ(tokens(0, 400), 384U);
  EXPECT_EQ(tokens(320, 960), 640U);
  EXPECT_EQ(tokens(640, 960), 0U);
  EXPECT_EQ(matcher.claims(), 0U);
  EXPECT_EQ(matcher.match("r", writer.handle(), "odd", kHashBytes, 0, 960, 1000).tokens, 0U);
}

TEST(Connector, a_daemon_killed_during_loads_fails_them_soon_and_the_client_comes_back) {
  Daemon daemon;
  auto options = packed(PagePacking::kCpuVec);
  options.layers = options.group_layers = 32;
  options.blocks = 161;
  Rank writer("unix://" + daemon.socket(), options, 1);
  Rank reader("unix://" + daemon.socket(), options, 2, {.threads = 2});
  PrefixMatcher matcher(reader.shared_client(), {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}});
  const auto hashes = prompt(1, 40);
  ASSERT_EQ(writer.store(hashes, ids(1, 40)).size(), 5U);
  EXPECT_EQ(matcher.match("r", reader.handle(), joined(hashes), kHashBytes, 0, 1280, 1300).tokens, 1280U);
  std::vector<std::uint64_t> jobs;
  for (int round = 0; round < 200; ++round) {
    for (std::uint32_t part = 0; part < 4; ++part) jobs.push_back(reader.submit_load(hashes, ids(1 + 40 * part, 40)));
  }
  ASSERT_TRUE(eventually([&] { return reader.worker().in_flight() < 790; }));
  daemon.kill();
  std::size_t failed = 0;
  for (const std::uint64_t job : jobs) {
    const auto events = reader.finish(job);
    ASSERT_EQ(events.size(), 1U);
    if (events[0].event == JobEvent::kLoadFailed) ++failed;
  }
  EXPECT_GT(failed, 0U);
  const auto stored = writer.canonical(ids(1, 40));
  for (const std::uint32_t first : {1U, 41U, 81U, 121U}) {
    EXPECT_TRUE(reader.all_zero(ids(first, 40)) || reader.canonical(ids(first, 40)) == stored)
        << "a failed load left a part of what it had written";
  }
  EXPECT_TRUE(eventually([&] { return reader.client().session() == nullptr; }));
  EXPECT_EQ(matcher.match("r", reader.handle(), joined(hashes), kHashBytes, 0, 1280, 1300).reason, "no daemon");
  EXPECT_EQ(matcher.claims(), 0U);
  const auto dropped = reader.finish(reader.submit_store(hashes, ids(1, 40)));
  ASSERT_EQ(dropped.size(), 2U);
  EXPECT_TRUE(dropped[1].stored_chunks.empty());

  daemon.start();
  ASSERT_TRUE(eventually([&] { return writer.client().session_count() == 2 && writer.client().session(); }));
  ASSERT_TRUE(eventually([&] { return reader.client().session_count() == 2 && reader.client().session(); }));
  const auto after = prompt(3, 8);
  EXPECT_EQ(writer.store(after, ids(1, 8)).size(), 1U);
  const auto result = reader.load(after, ids(1, 8));
  EXPECT_EQ(result.event, JobEvent::kLoaded) << result.reason;
}

TEST(Connector, a_client_that_started_before_the_daemon_finds_it) {
  Daemon daemon;
  daemon.kill();
  Client client(client_config("unix://" + daemon.socket()));
  client.add_namespace(namespace_of(packed(PagePacking::kCpuVec)));
  EXPECT_FALSE(client.wait_ready(100));
  EXPECT_NE(client.problem(), "");
  daemon.start();
  EXPECT_TRUE(client.wait_ready(kPatienceMs)) << client.problem();
  EXPECT_EQ(client.problem(), "");
}

TEST(Connector, a_refused_namespace_leaves_the_session_ready_and_says_why) {
  Daemon daemon;
  Client client(client_config("unix://" + daemon.socket()));
  auto spec = namespace_of(packed(PagePacking::kCpuVec));
  const int good = client.add_namespace(spec);
  spec.fields["dtype"] = "fp3";
  spec.fields.erase("rope");
  const int bad = client.add_namespace(spec);
  ASSERT_TRUE(client.wait_ready(kPatienceMs)) << client.problem();
  const auto session = client.session();
  EXPECT_TRUE(session->namespace_id(good).has_value());
  EXPECT_FALSE(session->namespace_id(bad).has_value());
  EXPECT_NE(session->refusal(bad), "");
  // One more, later: the same session learns it.
  spec = namespace_of(packed(PagePacking::kCpuVec));
  spec.fields["model"] = "another";
  const int late = client.add_namespace(spec);
  ASSERT_TRUE(client.wait_ready(kPatienceMs));
  EXPECT_TRUE(client.session()->namespace_id(late).has_value());
  EXPECT_NE(client.session()->namespace_id(late), client.session()->namespace_id(good));
  EXPECT_EQ(client.session_count(), 1U);
}

TEST(Connector, a_cancelled_load_ends_once_and_leaves_all_or_nothing) {
  Daemon daemon;
  auto options = packed(PagePacking::kCpuVec);
  options.layers = options.group_layers = 32;
  options.blocks = 81;
  Rank rank("unix://" + daemon.socket(), options, 1);
  const auto hashes = prompt(1, 40);
  rank.store(hashes, ids(1, 40));
  ASSERT_EQ(rank.load(hashes, ids(41, 40)).event, JobEvent::kLoaded);
  std::vector<std::uint64_t> jobs;
  for (int i = 0; i < 50; ++i) jobs.push_back(rank.submit_load(hashes, ids(41, 40)));
  for (const std::uint64_t job : jobs) rank.worker().cancel_load(job);
  JobResult last;
  std::size_t cancelled = 0;
  for (const std::uint64_t job : jobs) {
    const auto events = rank.finish(job);
    ASSERT_EQ(events.size(), 1U);
    last = events[0];
    if (last.reason == "cancelled") ++cancelled;
  }
  EXPECT_GT(cancelled, 0U);
  EXPECT_EQ(last.event, JobEvent::kLoadFailed);
  EXPECT_TRUE(rank.all_zero(ids(41, 40)) || rank.canonical(ids(41, 40)) == rank.canonical(ids(1, 40)));
}

TEST(Connector, removals_and_snapshots_reach_the_scheduler) {
  Daemon daemon(8U << 20);
  Rank writer("unix://" + daemon.socket(), packed(PagePacking::kCpuVec), 1);
  EventFeed& events = writer.client().events();
  const auto hashes = prompt(1, 8);
  writer.store(hashes, ids(1, 8));
  events.request_snapshot(writer.handle());
  std::optional<NamespaceSnapshot> snapshot;
  ASSERT_TRUE(eventually([&] { return (snapshot = events.take_snapshot()).has_value(); }));
  ASSERT_EQ(snapshot->chunks.size(), 1U);
  EXPECT_EQ(snapshot->chunks[0].hashes, hashes);
  EXPECT_EQ(snapshot->chunks[0].tokens, 256U);
  for (std::uint64_t seed = 100; seed < 116; ++seed) writer.store(prompt(seed, 32), ids(1, 32));
  bool removed = false;
  ASSERT_TRUE(eventually([&] {
    for (const RemovedBlocks& blocks : events.take_removed().removed) {
      removed = removed || (blocks.hashes == hashes &&
                            blocks.namespace_id == *writer.client().session()->namespace_id(writer.handle()));
    }
    return removed;
  }));
}

ClientConfig remote_config(const std::string& address) {
  ClientConfig config = client_config(address);
  config.insecure = true;
  return config;
}

/// Where the daemon says that it listens: "… tcp=tcp://<address>:<port>" at the end of the line.
std::uint16_t port_of(Daemon& daemon) {
  const std::string& text = daemon.process().text();
  const auto at = text.find("tcp=tcp://");
  if (at == std::string::npos) return 0;
  const std::string line = text.substr(at, text.find('\n', at) - at);
  return static_cast<std::uint16_t>(std::stoi(line.substr(line.rfind(':') + 1)));
}

/// A daemon for other hosts, reached over the loopback device.
struct UcxDaemon {
  explicit UcxDaemon(std::size_t dram_bytes) {
    ::setenv("KVERN_UCX_MODULE", KVERN_UCX_PATH, 1);
    daemon.emplace(dram_bytes, std::vector<std::string>{"--server.tcp_listen=127.0.0.1:0", "--server.insecure=true",
                                                        "--server.ucx_listen=127.0.0.1"});
    const std::uint16_t port = port_of(*daemon);
    EXPECT_NE(port, 0) << daemon->process().text();
    address = "tcp://127.0.0.1:" + std::to_string(port);
  }

  std::optional<Daemon> daemon;
  std::string address;
};

// An engine's threads read the environment whenever they like (every line of a log asks for the time zone), and who
// changes it beside them frees what they read.
TEST(Connector, a_client_changes_the_environment_in_its_constructor_alone) {
  const UcxDaemon daemon(64U << 20);
  const Client client(remote_config(daemon.address));
  char** const before = environ;
  const char* const segment = std::getenv("UCX_TCP_TX_SEG_SIZE");
  ASSERT_NE(segment, nullptr);
  ASSERT_TRUE(client.wait_ready(kPatienceMs)) << client.problem();
  ASSERT_TRUE(client.session()->data_plane->name().starts_with("ucx"));
  EXPECT_EQ(environ, before);
  EXPECT_EQ(std::getenv("UCX_TCP_TX_SEG_SIZE"), segment);
}

TEST(Connector, a_remote_client_stores_finds_and_loads_over_ucx) {
  const UcxDaemon daemon(256U << 20);
  const auto options = packed(PagePacking::kCpuVec);
  Rank writer(daemon.address, options, 1, {}, remote_config);
  Rank reader(daemon.address, options, 2, {}, remote_config);
  EXPECT_TRUE(reader.client().session()->data_plane->name().starts_with("ucx"));
  const auto hashes = prompt(1, 20);
  EXPECT_EQ(writer.store(hashes, ids(1, 20)).size(), 3U);
  PrefixMatcher matcher(
      reader.shared_client(),
      {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}, .remote_deadline_ms = 10'000});
  PrefixMatcher::Answer answer;
  ASSERT_TRUE(eventually([&] {
    answer = matcher.match("r", reader.handle(), joined(hashes), kHashBytes, 0, 640, 700);
    return answer.known;
  }));
  EXPECT_EQ(answer.tokens, 640U) << answer.reason;
  EXPECT_EQ(matcher.claims(), 1U);
  const auto result = reader.load(hashes, ids(15, 20));
  ASSERT_EQ(result.event, JobEvent::kLoaded) << result.reason;
  EXPECT_EQ(reader.canonical(ids(15, 20)), writer.canonical(ids(1, 20)));
  matcher.release("r");
  EXPECT_EQ(matcher.claims(), 0U);
}

TEST(Connector, who_is_patient_waits_for_a_slow_daemon_and_others_do_not) {
  const UcxDaemon daemon(64U << 20);
  Rank rank(daemon.address, packed(PagePacking::kCpuVec), 1, {}, remote_config);
  const auto hashes = prompt(1, 8);
  rank.store(hashes, ids(1, 8));
  // No daemon answers in no time.
  PrefixMatcher matcher(
      rank.shared_client(),
      {.block_tokens = 32, .chunk_blocks = kChunkBlocks, .groups = {{0, 0}}, .remote_deadline_ms = 0});
  const auto answer_of = [&](const std::string& request, std::chrono::milliseconds patience) {
    PrefixMatcher::Answer answer;
    EXPECT_TRUE(eventually([&] {
      answer = matcher.match(request, rank.handle(), joined(hashes), kHashBytes, 0, 256, 300, {}, patience);
      return answer.known;
    }));
    return answer;
  };
  const auto hasty = answer_of("hasty", {});
  EXPECT_EQ(hasty.tokens, 0U);
  EXPECT_NE(hasty.reason.find("no answer within"), std::string::npos) << hasty.reason;
  EXPECT_EQ(answer_of("patient", std::chrono::milliseconds(kPatienceMs)).tokens, 256U);
}

}  // namespace
}  // namespace kvern

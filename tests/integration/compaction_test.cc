#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "connector/compaction.h"
#include "kernels/compaction.h"
#include "kernels/element.h"
#include "tests/integration/connector_fixture.h"
#include "transport/compact_handle.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;
using test::PageModel;
using testing::client_config;
using testing::Daemon;
using testing::eventually;
using testing::ids;
using testing::kChunkBlocks;
using testing::kHashBytes;
using testing::kPatienceMs;
using testing::Rank;

constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kTokens = 601;  // four chunks of 128 and a fifth whose last block holds 9 tokens
constexpr std::uint32_t kBlocks = (kTokens + kBlockTokens - 1) / kBlockTokens;
constexpr std::uint32_t kLayers = 3, kHeads = 2, kQueryHeads = 4, kDim = 32;
constexpr std::uint32_t kFirstBlock = 1;       // of the prompt in the engine that computed it
constexpr std::uint32_t kFirstSlotBlock = 50;  // of the cache in the one that decodes
constexpr milliseconds kTimeout{kPatienceMs};

PageModel::Options model(DType dtype, std::uint32_t rank = 0, std::uint32_t ranks = 1) {
  PageModel::Options options;
  options.packing = PagePacking::kCpuVec;
  options.dtype = dtype;
  options.page_tokens = kBlockTokens;
  options.blocks = 100;
  options.model_heads = kHeads;
  options.heads = kHeads / ranks;
  options.head_begin = rank * options.heads;
  options.layers = options.group_layers = kLayers;
  options.key_dim = options.value_dim = kDim;
  return options;
}

float to_float(const std::byte* element, DType dtype) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, element, dtype_bytes(dtype));
  return dtype == DType::kBFloat16 ? from_bfloat16(static_cast<std::uint16_t>(bits)) : std::bit_cast<float>(bits);
}

void put_float(std::byte* element, DType dtype, float value) {
  const std::uint32_t bits = dtype == DType::kBFloat16 ? to_bfloat16(value) : std::bit_cast<std::uint32_t>(value);
  std::memcpy(element, &bits, dtype_bytes(dtype));
}

/// A handle for the spec, different at every call.
CompactHandle handle_of(const std::string& spec, std::int64_t seconds = 3600, std::uint32_t tokens = kTokens) {
  static int number = 0;
  char digits[65];
  std::snprintf(digits, sizeof digits, "%064x", ++number);
  const auto terms = compaction_terms(spec, tokens);
  EXPECT_TRUE(terms) << terms.error().message();
  return CompactHandle::parse("kvc1." + std::to_string(tokens) + "." + std::to_string(terms->slots) + "." +
                              std::to_string(std::time(nullptr) + seconds) + "." + digits)
      .value();
}

/// An engine's rank that has computed a prompt: finite rows in its pages, NaN behind the last token, and its queries.
class Engine {
 public:
  Engine(const std::string& address, const PageModel::Options& options, std::uint32_t seed)
      : options_(options), rank_(address, options, seed), random_(seed) {
    std::normal_distribution<float> normal;
    PageModel& pages = rank_.model();
    for (std::uint32_t layer = 0; layer < options.layers; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        for (std::uint32_t head = 0; head < options.heads; ++head) {
          for (std::uint32_t token = 0; token < kBlocks * kBlockTokens; ++token) {
            for (std::uint32_t dim = 0; dim < kDim; ++dim) {
              put_float(pages.element(layer, part, head, kFirstBlock + token / kBlockTokens, token % kBlockTokens, dim),
                        options.dtype, token < kTokens ? normal(random_) : NAN);
            }
          }
        }
      }
    }
  }

  Rank& rank() { return rank_; }

  /// Queries of all layers, the same at every call.
  std::vector<std::string> queries(std::uint32_t rows) const {
    std::mt19937 random(7 + options_.head_begin);
    std::normal_distribution<float> normal;
    const std::uint32_t heads = kQueryHeads * options_.heads / kHeads;
    std::vector<std::string> layers;
    for (std::uint32_t layer = 0; rows > 0 && layer < kLayers; ++layer) {
      std::string& bytes = layers.emplace_back(rows * heads * kDim * dtype_bytes(options_.dtype), '\0');
      for (std::size_t at = 0; at < bytes.size(); at += dtype_bytes(options_.dtype)) {
        put_float(reinterpret_cast<std::byte*>(bytes.data()) + at, options_.dtype, normal(random));
      }
    }
    return layers;
  }

  CompactionJob job(const CompactHandle& handle, const std::string& spec) {
    const auto terms = compaction_terms(spec, handle.prompt_tokens).value();
    CompactionJob job;
    job.id = 1'000'000 + ++jobs_;
    job.namespace_handle = rank_.handle();
    job.handle = handle.text;
    job.spec = terms.spec;
    job.prompt_tokens = handle.prompt_tokens;
    job.slots = handle.slots;
    job.expires_at = handle.expires_at;
    job.hash_bytes = kHashBytes;
    job.source_hashes = handle.source_hashes(kBlockTokens, kHashBytes);
    job.slot_hashes = handle.slot_hashes(kBlockTokens, kHashBytes);
    job.query_rows = terms.query_rows;
    job.query_heads = kQueryHeads * options_.heads / kHeads;
    job.queries = queries(terms.query_rows);
    return job;
  }

  void store_source(const CompactHandle& handle) {
    rank_.finish(rank_.submit_store(handle.source_hashes(kBlockTokens, kHashBytes), ids(kFirstBlock, kBlocks), "raw"));
  }
  JobResult submit(CompactionJob job) {
    const std::uint64_t id = job.id;
    rank_.worker().submit_compaction(std::move(job));
    const auto events = rank_.finish(id);
    EXPECT_EQ(events.size(), 1U);
    return events.empty() ? JobResult{} : events[0];
  }
  JobResult compact(const CompactHandle& handle, const std::string& spec) {
    store_source(handle);
    return submit(job(handle, spec));
  }

  CompactionInfo info(const CompactHandle& handle, milliseconds wait = kTimeout) {
    return ask_compaction(rank_.client().session().get(), handle.text, wait, false, kTimeout);
  }
  JobResult load(const CompactHandle& handle) {
    const auto hashes = handle.slot_hashes(kBlockTokens, kHashBytes);
    return rank_.load(hashes, ids(kFirstSlotBlock, static_cast<std::uint32_t>(hashes.size())));
  }
  std::size_t stored_chunks() {
    wire::ControlRequest request;
    wire::ControlReply reply;
    const auto session = rank_.client().session();
    request.set_session_token(session->token);
    request.mutable_status();
    EXPECT_TRUE(session->control->call(request, &reply, kTimeout));
    const auto store = nlohmann::json::parse(reply.status_report().json()).at("store");
    return store.at("chunks").get<std::size_t>() + store.at("incomplete_chunks").get<std::size_t>();
  }

  const PageModel::Options& options() const { return options_; }

 private:
  const PageModel::Options options_;
  Rank rank_;
  std::mt19937 random_;
  std::uint64_t jobs_ = 0;
};

/// [head][token][dim] of one layer of the prompt.
std::vector<std::byte> prompt_rows(PageModel& pages, std::uint32_t layer, Part part, DType dtype) {
  std::vector<std::byte> rows;
  for (std::uint32_t head = 0; head < kHeads; ++head) {
    for (std::uint32_t token = 0; token < kTokens; ++token) {
      for (std::uint32_t dim = 0; dim < kDim; ++dim) {
        const std::byte* from =
            pages.element(layer, part, head, kFirstBlock + token / kBlockTokens, token % kBlockTokens, dim);
        rows.insert(rows.end(), from, from + dtype_bytes(dtype));
      }
    }
  }
  return rows;
}

/// What the decoding engine should find in its pages, by the library alone.
struct Expected {
  std::vector<CompactLayer> layers;
  double error_mean = 0;
};

Expected expected(Engine& engine, const std::string& spec) {
  const DType dtype = engine.options().dtype;
  const auto plan = CompactionPlan::make(spec, kTokens).value();
  const auto queries = engine.queries(plan.query_rows);
  const auto rotation =
      rope::Parameters::from(CodecStep::parse("unrotate(style=neox,theta=10000,dim=32)").value()).value();
  Expected result;
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto keys = prompt_rows(engine.rank().model(), layer, Part::kKey, dtype);
    const auto values = prompt_rows(engine.rank().model(), layer, Part::kValue, dtype);
    PromptLayer prompt;
    prompt.keys = HeadRows::contiguous(keys.data(), dtype, kHeads, kTokens, kDim);
    prompt.values = HeadRows::contiguous(values.data(), dtype, kHeads, kTokens, kDim);
    const std::size_t row = kDim * dtype_bytes(dtype);
    if (plan.query_rows > 0) {
      prompt.queries = {reinterpret_cast<const std::byte*>(queries[layer].data()),
                        dtype,
                        kQueryHeads,
                        plan.query_rows,
                        kDim,
                        row,
                        kQueryHeads * row};
    }
    auto made = compact_layer(plan, prompt, nullptr).value();
    if (plan.query_rows > 0) result.error_mean += attention_error(prompt, made.kept, nullptr).value() / kLayers;
    const auto kept = HeadRows::contiguous(made.keys.data(), dtype, kHeads, plan.slots, kDim);
    EXPECT_TRUE(place_keys(kept, plan.shift(0), rotation, made.keys.data(), nullptr));
    result.layers.push_back(std::move(made));
  }
  return result;
}

/// Largest difference between the pages of the decoding engine and what is expected, as a share of the largest
/// magnitude of its layer, part and head; infinite when a slot behind the last is not zero.
double difference(PageModel& pages, const Expected& wanted, DType dtype, std::uint32_t slots) {
  const std::size_t size = dtype_bytes(dtype);
  double worst = 0;
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      const auto& rows = part == Part::kKey ? wanted.layers[layer].keys : wanted.layers[layer].values;
      for (std::uint32_t head = 0; head < kHeads; ++head) {
        double largest = 0, off = 0;
        for (std::uint32_t slot = 0; slot < (slots + kBlockTokens - 1) / kBlockTokens * kBlockTokens; ++slot) {
          for (std::uint32_t dim = 0; dim < kDim; ++dim) {
            const double got = to_float(
                pages.element(layer, part, head, kFirstSlotBlock + slot / kBlockTokens, slot % kBlockTokens, dim),
                dtype);
            const std::size_t at = ((std::size_t{head} * slots + slot) * kDim + dim) * size;
            const double want = slot < slots ? to_float(rows.data() + at, dtype) : 0;
            largest = std::max(largest, std::abs(want));
            off = std::max(off, slot < slots || got == 0 ? std::abs(want - got) : INFINITY);
          }
        }
        worst = std::max(worst, off / largest);
      }
    }
  }
  return worst;
}

struct Case {
  std::string spec;
  DType dtype;
  double tolerance;
};

class CompactionOfMethods : public ::testing::TestWithParam<Case> {};

TEST_P(CompactionOfMethods, SlotsComeBackThroughAnOrdinaryLoad) {
  const auto& [spec, dtype, tolerance] = GetParam();
  Daemon daemon;
  Engine prefill("unix://" + daemon.socket(), model(dtype), 1);
  Engine decode("unix://" + daemon.socket(), model(dtype), 2);
  const auto handle = handle_of(spec);
  ASSERT_NE(handle.slots % kBlockTokens, 0U) << "choose another budget";
  const auto taken = prefill.compact(handle, spec);
  ASSERT_EQ(taken.event, JobEvent::kCompacting) << taken.reason;

  const CompactionInfo info = decode.info(handle);
  ASSERT_EQ(info.state, CompactionState::kReady) << info.reason;
  const Expected wanted = expected(prefill, spec);
  EXPECT_EQ(info.prompt_tokens, kTokens);
  EXPECT_EQ(info.slots, handle.slots);
  EXPECT_EQ(info.expires_at, handle.expires_at);
  EXPECT_EQ(info.namespace_id, decode.rank().client().session()->namespace_id(decode.rank().handle()));
  EXPECT_EQ(info.owner, "default/connector test");
  EXPECT_EQ(info.raw_bytes, std::size_t{kTokens} * kLayers * kHeads * 2 * kDim * dtype_bytes(dtype));
  EXPECT_GT(info.stored_bytes, 0U);
  EXPECT_LT(info.stored_bytes, info.raw_bytes);
  ASSERT_EQ(info.error_mean.has_value(), wanted.error_mean > 0);
  if (info.error_mean) {
    EXPECT_NEAR(*info.error_mean, wanted.error_mean, 1e-9);
  }

  const auto loaded = decode.load(handle);
  ASSERT_EQ(loaded.event, JobEvent::kLoaded) << loaded.reason;
  EXPECT_LE(difference(decode.rank().model(), wanted, dtype, handle.slots), tolerance);
  // The prompt's own chunks are gone.
  const std::size_t slot_chunks = (handle.slots + kBlockTokens * kChunkBlocks - 1) / (kBlockTokens * kChunkBlocks);
  EXPECT_EQ(decode.stored_chunks(), slot_chunks);
}

// int8 rounds to 1/254 of a group's largest magnitude, and bfloat16 to 1/256 of the value.
INSTANTIATE_TEST_SUITE_P(Methods, CompactionOfMethods,
                         ::testing::Values(Case{"cake(budget=12%)", DType::kFloat32, 0},
                                           Case{"cake(budget=203) | int8", DType::kBFloat16, 0.01},
                                           Case{"snapkv(budget=130)", DType::kBFloat16, 0},
                                           Case{"windowkv(budget=25%)", DType::kFloat32, 0},
                                           Case{"windowkv(budget=25%) | int8", DType::kFloat32, 0.01},
                                           Case{"streaming(budget=77) | raw | zstd", DType::kBFloat16, 0},
                                           Case{"knorm(budget=25%)", DType::kFloat32, 0},
                                           Case{"keydiff(budget=131) | unrotate | int8", DType::kFloat32, 0.02}));

TEST(Compaction, RanksAskForTheirShardsAndTheCacheIsMadeWhenAllHave) {
  const std::string spec = "cake(budget=12%)";
  Daemon daemon;
  const std::string address = "unix://" + daemon.socket();
  Engine left(address, model(DType::kFloat32, 0, 2), 1);
  Engine right(address, model(DType::kFloat32, 1, 2), 2);
  const auto handle = handle_of(spec);
  ASSERT_EQ(left.compact(handle, spec).event, JobEvent::kCompacting);
  EXPECT_EQ(left.info(handle, milliseconds(0)).state, CompactionState::kPending);
  const auto again = left.submit(left.job(handle, spec));
  EXPECT_EQ(again.event, JobEvent::kCompactionFailed);
  EXPECT_NE(again.reason.find("already"), std::string::npos) << again.reason;
  ASSERT_EQ(right.compact(handle, spec).event, JobEvent::kCompacting);
  ASSERT_EQ(left.info(handle).state, CompactionState::kReady);

  // Each rank finds its own heads, cut by its own queries.
  for (Engine* engine : {&left, &right}) {
    ASSERT_EQ(engine->load(handle).event, JobEvent::kLoaded);
    const auto plan = CompactionPlan::make(spec, kTokens).value();
    const auto queries = engine->queries(plan.query_rows);
    std::vector<std::byte> values;
    std::vector<std::byte> keys;
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t token = 0; token < kTokens; ++token) {
        for (std::uint32_t dim = 0; dim < kDim; ++dim) {
          const std::byte* from =
              engine->rank().model().element(0, part, 0, kFirstBlock + token / kBlockTokens, token % kBlockTokens, dim);
          auto& rows = part == Part::kKey ? keys : values;
          rows.insert(rows.end(), from, from + sizeof(float));
        }
      }
    }
    const std::uint32_t heads = kQueryHeads / 2;
    const std::size_t row = kDim * sizeof(float);
    const PromptLayer prompt{HeadRows::contiguous(keys.data(), DType::kFloat32, 1, kTokens, kDim),
                             HeadRows::contiguous(values.data(), DType::kFloat32, 1, kTokens, kDim),
                             {reinterpret_cast<const std::byte*>(queries[0].data()), DType::kFloat32, heads,
                              plan.query_rows, kDim, row, heads * row}};
    const auto made = compact_layer(plan, prompt, nullptr).value();
    for (std::uint32_t slot = 0; slot < handle.slots; ++slot) {
      const std::byte* got = engine->rank().model().element(0, Part::kValue, 0, kFirstSlotBlock + slot / kBlockTokens,
                                                            slot % kBlockTokens, 3);
      // kCpuVec holds rows of values side by side.
      EXPECT_EQ(std::memcmp(got, made.values.data() + slot * row + 3 * sizeof(float), sizeof(float)), 0) << slot;
    }
  }
}

TEST(Compaction, FailsWithTheReasonWhenThePromptIsNotThere) {
  const std::string spec = "keydiff(budget=130)";
  Daemon daemon;
  Engine engine("unix://" + daemon.socket(), model(DType::kBFloat16), 1);
  const auto handle = handle_of(spec);
  auto hashes = handle.source_hashes(kBlockTokens, kHashBytes);
  hashes.resize(2 * kChunkBlocks);  // the rest is missing
  engine.rank().store(hashes, ids(kFirstBlock, 2 * kChunkBlocks), "raw");
  ASSERT_EQ(engine.submit(engine.job(handle, spec)).event, JobEvent::kCompacting);
  const auto info = engine.info(handle);
  EXPECT_EQ(info.state, CompactionState::kFailed);
  EXPECT_NE(info.reason.find("256"), std::string::npos) << info.reason;
  EXPECT_EQ(engine.load(handle).event, JobEvent::kLoadFailed);
  EXPECT_EQ(engine.stored_chunks(), 0U);
}

TEST(Compaction, ADeletedCacheIsGone) {
  const std::string spec = "streaming(budget=77)";
  Daemon daemon;
  Engine engine("unix://" + daemon.socket(), model(DType::kBFloat16), 1);
  const auto session = engine.rank().client().session();
  const auto kept = handle_of(spec);
  const auto handle = handle_of(spec);
  for (const auto* each : {&kept, &handle}) {
    ASSERT_EQ(engine.compact(*each, spec).event, JobEvent::kCompacting);
    ASSERT_EQ(engine.info(*each).state, CompactionState::kReady);
  }
  EXPECT_EQ(list_compactions(*session, kTimeout)->size(), 2U);
  EXPECT_EQ(delete_compaction(*session, handle.text, kTimeout), true);
  EXPECT_EQ(delete_compaction(*session, handle.text, kTimeout), false);
  EXPECT_EQ(engine.info(handle).state, CompactionState::kUnknown);
  EXPECT_EQ(engine.load(handle).event, JobEvent::kLoadFailed);
  EXPECT_EQ(engine.load(kept).event, JobEvent::kLoaded);
  EXPECT_EQ(engine.stored_chunks(), 1U);
}

TEST(Compaction, AnExpiredCacheIsGoneByItself) {
  const std::string spec = "streaming(budget=77)";
  Daemon daemon;
  Engine engine("unix://" + daemon.socket(), model(DType::kBFloat16), 1);
  const auto handle = handle_of(spec, 3);
  engine.compact(handle, spec);
  EXPECT_TRUE(eventually([&] { return engine.info(handle).state == CompactionState::kUnknown; }));
  EXPECT_TRUE(eventually([&] { return engine.stored_chunks() == 0; }));
  EXPECT_EQ(engine.load(handle).event, JobEvent::kLoadFailed);
  const auto late = engine.submit(engine.job(handle, spec));
  EXPECT_EQ(late.event, JobEvent::kCompactionFailed);
  EXPECT_NE(late.reason.find("expired"), std::string::npos) << late.reason;
}

TEST(Compaction, ARestartKeepsWhatIsReadyAndTellsOfWhatWasNot) {
  const std::string spec = "cake(budget=12%) | int8";
  Daemon daemon;
  const std::string address = "unix://" + daemon.socket();
  const auto ready = handle_of(spec);
  const auto pending = handle_of(spec);
  Expected wanted;
  {
    Engine engine(address, model(DType::kFloat32), 1);
    Engine half(address, model(DType::kFloat32, 0, 2), 1);
    ASSERT_EQ(engine.compact(ready, spec).event, JobEvent::kCompacting);
    ASSERT_EQ(engine.info(ready).state, CompactionState::kReady);
    // The blocks are there, the other rank's queries are not.
    engine.store_source(pending);
    ASSERT_EQ(half.submit(half.job(pending, spec)).event, JobEvent::kCompacting);
    wanted = expected(engine, spec);
    daemon.kill();
  }
  daemon.start();
  Engine engine(address, model(DType::kFloat32), 2);
  const auto info = engine.info(ready);
  EXPECT_EQ(info.state, CompactionState::kReady) << info.reason;
  EXPECT_TRUE(info.error_mean.has_value());
  EXPECT_EQ(engine.load(ready).event, JobEvent::kLoaded);
  EXPECT_LE(difference(engine.rank().model(), wanted, DType::kFloat32, ready.slots), 0.01);
  const auto failed = engine.info(pending);
  EXPECT_EQ(failed.state, CompactionState::kFailed);
  EXPECT_NE(failed.reason.find("restarted"), std::string::npos) << failed.reason;
  EXPECT_EQ(engine.stored_chunks(), 1U);  // nothing of the other one
}

TEST(Compaction, ADaemonThatIsKilledWhileItWorksLeavesNothingBehind) {
  const std::string spec = "cake(budget=12%)";
  Daemon daemon;
  for (std::size_t accepted = 1; accepted <= 4; ++accepted) {
    std::vector<CompactHandle> handles;
    {
      Engine engine(daemon.address(), model(DType::kFloat32), 1);
      for (std::size_t i = 0; i < accepted; ++i) {
        handles.push_back(handle_of(spec));
        ASSERT_EQ(engine.compact(handles.back(), spec).event, JobEvent::kCompacting);
      }
      daemon.kill();
    }
    daemon.start();
    Engine engine(daemon.address(), model(DType::kFloat32), 2);
    std::size_t ready = 0;
    for (const CompactHandle& handle : handles) {
      const auto info = engine.info(handle);
      ASSERT_NE(info.state, CompactionState::kUnknown) << info.reason;
      const bool is_ready = info.state == CompactionState::kReady;
      ready += is_ready ? 1 : 0;
      EXPECT_EQ(engine.load(handle).event, is_ready ? JobEvent::kLoaded : JobEvent::kLoadFailed) << info.reason;
    }
    EXPECT_EQ(engine.stored_chunks(), ready);  // each has one
    for (const CompactHandle& handle : handles) {
      EXPECT_EQ(delete_compaction(*engine.rank().client().session(), handle.text, kTimeout), true);
    }
    EXPECT_EQ(engine.stored_chunks(), 0U);
  }
}

TEST(Compaction, LivesOnInALowerTier) {
  const std::string spec = "knorm(budget=25%) | int8";
  const auto folder = std::filesystem::temp_directory_path() / ("kvern-compact-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const std::vector<std::string> flags{"--nvme.files=" + (folder / "log").string(), "--nvme.bytes=64MiB",
                                       "--compact.state_dir=" + (folder / "state").string(),
                                       "--store.warm_restart=false"};
  Daemon daemon(256U << 20, flags);
  const std::string address = "unix://" + daemon.socket();
  const auto handle = handle_of(spec);
  {
    Engine engine(address, model(DType::kFloat32), 1);
    ASSERT_EQ(engine.compact(handle, spec).event, JobEvent::kCompacting);
    ASSERT_EQ(engine.info(handle).state, CompactionState::kReady);
    daemon.process().signal(SIGTERM);
    EXPECT_EQ(daemon.process().wait(), 0);
  }
  daemon.start();
  Engine engine(address, model(DType::kFloat32), 2);
  EXPECT_EQ(engine.info(handle).state, CompactionState::kReady);
  EXPECT_EQ(engine.stored_chunks(), 0U);  // not in DRAM: the look-up brings it up
  const auto session = engine.rank().client().session();
  wire::HotRequest request;
  wire::Match* match = request.mutable_match();
  const auto id = *session->namespace_id(engine.rank().handle());
  match->set_namespace_id(id.bytes.data(), id.bytes.size());
  match->set_hash_bytes(kHashBytes);
  match->set_block_hashes(testing::joined(handle.slot_hashes(kBlockTokens, kHashBytes)));
  match->set_lease_id(1);
  match->set_prefetch(true);
  EXPECT_TRUE(eventually([&] {
    wire::HotReply reply;
    return session->channel->call(request, &reply, kTimeout) && !reply.matched().pending();
  }));
  const auto loaded = engine.load(handle);
  EXPECT_EQ(loaded.event, JobEvent::kLoaded) << loaded.reason;
  EXPECT_EQ(delete_compaction(*session, handle.text, kTimeout), true);
  std::filesystem::remove_all(folder);
}

/// What kvernctl compact prints, and its exit code.
std::pair<std::string, int> kvernctl(const Daemon& daemon, std::vector<std::string> words) {
  std::vector<std::string> command{KVERNCTL_PATH, "--address", daemon.address(), "compact"};
  command.insert(command.end(), words.begin(), words.end());
  testing::ChildProcess process(command);
  const int code = process.wait().value_or(-1);
  return {process.text(), code};
}

TEST(Compaction, OperatorsListShowAndDelete) {
  const std::string spec = "cake(budget=12%) | int8";
  Daemon daemon;
  Engine engine(daemon.address(), model(DType::kFloat32), 1);
  const auto handle = handle_of(spec);
  ASSERT_EQ(engine.compact(handle, spec).event, JobEvent::kCompacting);
  const auto [shown, good] = kvernctl(daemon, {"show", handle.text, "--wait", "30"});
  EXPECT_EQ(good, 0) << shown;
  for (const char* part : {"ready", "73 of 601 tokens", "default/connector test", "max over the layers"}) {
    EXPECT_NE(shown.find(part), std::string::npos) << part << " is not in " << shown;
  }
  const auto [listed, all] = kvernctl(daemon, {"ls"});
  EXPECT_EQ(all, 0);
  EXPECT_NE(listed.find(handle.text + "  ready"), std::string::npos) << listed;
  EXPECT_EQ(kvernctl(daemon, {"rm", handle.text}).second, 0);
  EXPECT_EQ(kvernctl(daemon, {"rm", handle.text}).second, 1);
  EXPECT_EQ(kvernctl(daemon, {"show", handle.text}).second, 1);
  EXPECT_EQ(kvernctl(daemon, {"show", "kvc1.no.handle"}).second, 2);
  EXPECT_EQ(kvernctl(daemon, {"ls"}).first, "0 compact caches\n");
}

TEST(Compaction, OtherNamespacesDoNotFindTheSlots) {
  const std::string spec = "streaming(budget=77)";
  Daemon daemon;
  Engine engine("unix://" + daemon.socket(), model(DType::kBFloat16), 1);
  auto other_model = model(DType::kBFloat16);
  other_model.value_dim = 64;
  Rank other("unix://" + daemon.socket(), other_model, 2);
  const auto handle = handle_of(spec);
  ASSERT_EQ(engine.compact(handle, spec).event, JobEvent::kCompacting);
  ASSERT_EQ(engine.info(handle).state, CompactionState::kReady);
  const auto hashes = handle.slot_hashes(kBlockTokens, kHashBytes);
  EXPECT_EQ(other.load(hashes, ids(1, static_cast<std::uint32_t>(hashes.size()))).event, JobEvent::kLoadFailed);
  EXPECT_NE(engine.info(handle).namespace_id, other.client().session()->namespace_id(other.handle()));
}

TEST(Compaction, RefusesWhatDoesNotFitAndTellsWhy) {
  Daemon daemon(256U << 20, {"--compact.job_bytes=1MiB", "--compact.max_ttl_seconds=100"});
  Engine engine("unix://" + daemon.socket(), model(DType::kFloat32), 1);
  const std::string spec = "cake(budget=12%)";
  const auto refusal = [&](const CompactionJob& job) {
    const auto result = engine.submit(job);
    EXPECT_EQ(result.event, JobEvent::kCompactionFailed);
    return result.reason;
  };
  const auto handle = handle_of(spec, 50);
  EXPECT_NE(refusal(engine.job(handle_of(spec, 1000), spec)).find("compact.max_ttl_seconds"), std::string::npos);
  EXPECT_NE(refusal(engine.job(handle_of(spec, 50, 20'000), spec)).find("compact.job_bytes"), std::string::npos);
  auto job = engine.job(handle, spec);
  job.slots += 1;
  EXPECT_NE(refusal(job).find("not those of the handle"), std::string::npos);
  job = engine.job(handle, spec);
  std::swap(job.source_hashes, job.slot_hashes);
  EXPECT_NE(refusal(job).find("hashes"), std::string::npos);
  job = engine.job(handle, spec);
  EXPECT_EQ(engine.info(handle).state, CompactionState::kUnknown);
  engine.store_source(handle);
  job.queries.pop_back();
  EXPECT_NE(refusal(job).find("queries"), std::string::npos);
  EXPECT_EQ(engine.info(handle).state, CompactionState::kFailed);
  EXPECT_NE(engine.info(handle).reason.find("queries"), std::string::npos);
  EXPECT_EQ(engine.stored_chunks(), 0U);
}

}  // namespace
}  // namespace kvern

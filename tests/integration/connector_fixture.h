#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "connector/client.h"
#include "connector/transfer_worker.h"
#include "tests/connector/page_model.h"
#include "tests/integration/daemon_process.h"

namespace kvern::testing {

using test::PageModel;

constexpr std::uint32_t kHashBytes = 32;  // of prompt()
constexpr std::uint32_t kPatienceMs = 30'000;
constexpr std::uint32_t kChunkBlocks = 8;

/// A real kvernd with files of its own.
class Daemon : public DaemonProcess {
 public:
  explicit Daemon(std::uint64_t dram_bytes = 256U << 20, std::vector<std::string> more = {})
      : DaemonProcess(KVERND_PATH, with_memory(dram_bytes, std::move(more))) {}

 private:
  static std::vector<std::string> with_memory(std::uint64_t dram_bytes, std::vector<std::string> more) {
    more.push_back("--store.dram_bytes=" + std::to_string(dram_bytes));
    return more;
  }
};

inline ClientConfig client_config(const std::string& address) {
  ClientConfig config;
  config.address = address;
  config.client_name = "connector test";
  config.staging_bytes = 32U << 20;
  config.backoff_min_ms = 10;
  config.backoff_max_ms = 200;
  return config;
}

inline NamespaceSpec namespace_of(const PageModel::Options& options) {
  const std::string kv_dtype(dtype_name(options.dtype));
  const std::string dtype = options.dtype == DType::kOpaqueBytes ? "bfloat16" : kv_dtype;
  NamespaceSpec spec;
  spec.fields = {{"model", "connector-test"},
                 {"weights", "00"},
                 {"dtype", dtype},
                 {"kv_dtype", kv_dtype},
                 {"block_tokens", std::to_string(options.page_tokens * options.pages_per_block)},
                 {"chunk_tokens", std::to_string(options.page_tokens * options.pages_per_block * kChunkBlocks)},
                 {"hash_algorithm", "random"},
                 {"hash_seed", "00"},
                 {"layers", std::to_string(options.group_layers)},
                 {"kv_heads", std::to_string(options.model_heads)},
                 {"key_dim", std::to_string(options.key_dim)},
                 {"value_dim", std::to_string(options.value_dim)},
                 {"groups", "full:" + std::to_string(options.group_layers)},
                 {"rope", "theta=10000"},
                 {"rotation", "style=neox,theta=10000,dim=" + std::to_string(options.key_dim)}};
  return spec;
}

inline std::string joined(const std::vector<BlockHash>& hashes) {
  std::string text;
  for (const BlockHash& hash : hashes) text.append(reinterpret_cast<const char*>(hash.bytes().data()), hash.size());
  return text;
}

/// One rank of an engine: pages, a client and a worker.
class Rank {
 public:
  Rank(const std::string& address, const PageModel::Options& options, std::uint32_t seed, WorkerConfig worker = {},
       ClientConfig (*configure)(const std::string&) = client_config)
      : options_(options), model_(options, seed), client_(std::make_shared<Client>(configure(address))) {
    handle_ = client_->add_namespace(namespace_of(options));
    EXPECT_TRUE(client_->wait_ready(kPatienceMs)) << client_->problem();
    EXPECT_EQ(client_->session() ? client_->session()->refusal(handle_) : "no session", "");
    worker_ = std::make_unique<TransferWorker>(client_, worker);
    EXPECT_EQ(worker_->register_group(model_.pages()).message(), "");
  }

  std::uint64_t submit_store(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks,
                             const std::string& codec = "") {
    StoreJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    job.codec_spec = codec;
    for (std::size_t i = 0; i < hashes.size(); i += kChunkBlocks) {
      const auto end = static_cast<std::ptrdiff_t>(std::min<std::size_t>(hashes.size(), i + kChunkBlocks));
      const auto begin = static_cast<std::ptrdiff_t>(i);
      job.chunks.push_back({{hashes.begin() + begin, hashes.begin() + end},
                            {blocks.begin() + begin, blocks.begin() + end},
                            i * model_.pages().block_tokens});
    }
    worker_->submit_store(std::move(job));
    return last_job_;
  }
  std::uint64_t submit_load(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks,
                            std::uint32_t first_block = 0) {
    LoadJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    for (std::size_t i = 0; i < hashes.size();) {
      const std::size_t before = (first_block + i) % kChunkBlocks;
      const std::size_t count = std::min(hashes.size() - i, kChunkBlocks - before);
      LoadPiece piece;
      piece.blocks_before = static_cast<std::uint32_t>(before);
      for (std::size_t k = i; k < i + count; ++k) {
        piece.hashes.push_back(hashes[k]);
        piece.block_ids.push_back(blocks[k]);
      }
      job.pieces.push_back(std::move(piece));
      i += count;
    }
    worker_->submit_load(std::move(job));
    return last_job_;
  }
  /// The events of a job, once nothing runs.
  std::vector<JobResult> finish(std::uint64_t job) {
    EXPECT_TRUE(worker_->drain(kPatienceMs));
    for (JobResult& event : worker_->poll()) events_[event.id].push_back(std::move(event));
    return events_[job];
  }
  std::vector<std::uint32_t> store(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks,
                                   const std::string& codec = "") {
    const auto events = finish(submit_store(hashes, blocks, codec));
    EXPECT_EQ(events.size(), 2U);
    if (events.size() != 2) return {};
    EXPECT_EQ(events[0].event, JobEvent::kGathered);
    EXPECT_EQ(events[1].event, JobEvent::kStored);
    EXPECT_EQ(events[1].reason, "");
    return events[1].stored_chunks;
  }
  JobResult load(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks,
                 std::uint32_t first_block = 0) {
    const auto events = finish(submit_load(hashes, blocks, first_block));
    EXPECT_EQ(events.size(), 1U);
    return events.empty() ? JobResult{} : events[0];
  }

  PageModel& model() { return model_; }
  Client& client() { return *client_; }
  std::shared_ptr<Client> shared_client() { return client_; }
  TransferWorker& worker() { return *worker_; }
  int handle() const { return handle_; }
  std::vector<std::byte> canonical(const std::vector<std::uint32_t>& blocks) { return model_.canonical(blocks); }
  bool all_zero(const std::vector<std::uint32_t>& blocks) {
    return std::ranges::all_of(canonical(blocks), [](std::byte byte) { return byte == std::byte{0}; });
  }

 private:
  PageModel::Options options_;
  PageModel model_;
  std::shared_ptr<Client> client_;
  std::unique_ptr<TransferWorker> worker_;
  int handle_ = 0;
  std::uint64_t last_job_ = 0;
  std::map<std::uint64_t, std::vector<JobResult>> events_;
};

}  // namespace kvern::testing

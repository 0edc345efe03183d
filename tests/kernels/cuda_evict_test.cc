#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>

#include "kernels/cuda/key_scores.h"
#include "kernels/cuda/observation.h"
#include "kernels/cuda/selection.h"
#include "kernels/key_scores.h"
#include "kernels/selection.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/evict_samples.h"

namespace kvern::evict {
namespace {

/// Device memory that lives as long as the test.
class CudaEvict : public CudaTest {
 protected:
  void TearDown() override { release(); }
  /// Frees what there is before the test ends.
  void release() {
    for (void* memory : memory_) cudaFree(memory);
    memory_.clear();
  }
  template <typename T>
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)) != cudaSuccess) {
      throw std::runtime_error("no device memory");
    }
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <typename T>
  T* upload(const T* from, std::size_t count) {
    T* memory = allocate<T>(count);
    if (cudaMemcpy(memory, from, count * sizeof(T), cudaMemcpyHostToDevice) != cudaSuccess) {
      throw std::runtime_error("copy");
    }
    return memory;
  }
  template <typename T>
  std::vector<T> download(const T* from, std::size_t count) {
    std::vector<T> out(count);
    if (cudaMemcpy(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost) != cudaSuccess) {
      throw std::runtime_error("copy");
    }
    return out;
  }
  HeadRows upload(HeadRows rows) {
    rows.data = upload(rows.data, rows.head_stride_bytes * rows.heads);
    return rows;
  }

 private:
  std::vector<void*> memory_;
};

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, float absolute, float relative,
                 const char* what) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;  // -infinity, too
    ASSERT_NEAR(got[i], expected[i], absolute + relative * std::abs(expected[i])) << what << " at " << i;
  }
}

/// observe() and cake_scores() on the device against the CPU; the device twice, for the same bits.
class CudaObserves : public CudaEvict {
 protected:
  void compare(const SampleRows& queries, const SampleRows& keys, std::optional<std::uint32_t> columns = {}) {
    ObservationOptions options;
    options.columns = columns;
    const Observation expected = observed(queries.view(), keys.view(), options);
    const std::uint32_t kv_heads = keys.view().heads;
    const std::size_t statistics = expected.mean.size();
    const HeadRows device_queries = upload(queries.view());
    const HeadRows device_keys = upload(keys.view());
    const CudaObservation out{allocate<float>(expected.lse.size()), allocate<float>(statistics),
                              allocate<float>(statistics), allocate<double>(2), allocate<std::uint64_t>(1)};
    auto* scratch = allocate<std::byte>(cuda_observation_bytes(device_queries, device_keys));
    const float scale = 1 / std::sqrt(static_cast<float>(keys.view().dim));
    const auto observe = [&] {
      ASSERT_TRUE(cuda_observe(device_queries, device_keys, expected.columns, scale, scratch, out, nullptr));
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    };
    observe();
    const auto lse = download(out.lse, expected.lse.size());
    const auto mean = download(out.mean, statistics);
    const auto variance = download(out.variance, statistics);
    const auto totals = download(out.dispersion, 2);
    expect_near(lse, expected.lse, 1e-4F, 1e-5F, "lse");
    expect_near(mean, expected.mean, 1e-8F, 1e-4F, "mean");
    expect_near(variance, expected.variance, 1e-10F, 5e-4F, "variance");
    EXPECT_NEAR(totals[0], expected.dispersion, 1e-3 + 1e-4 * expected.dispersion);
    EXPECT_NEAR(totals[1], expected.shift, 1e-7 + 5e-4 * expected.shift);
    EXPECT_EQ(download(out.not_finite, 1)[0], expected.not_finite);
    observe();
    EXPECT_EQ(download(out.lse, lse.size()), lse);
    EXPECT_EQ(download(out.mean, statistics), mean);
    EXPECT_EQ(download(out.variance, statistics), variance);
    EXPECT_EQ(download(out.dispersion, 2), totals);
    if (expected.columns == 0) return;
    auto* scores = allocate<float>(std::size_t{kv_heads} * expected.columns);
    ASSERT_TRUE(cuda_cake_scores(out.mean, out.variance, expected.query_heads, kv_heads, expected.columns, kCakeGamma,
                                 {}, scores, nullptr));
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const auto expected_scores = cake_scores(expected, kv_heads, kCakeGamma, {}, nullptr);
    expect_near(download(scores, expected_scores->values.size()), expected_scores->values, 1e-6F, 2e-4F, "scores");
  }
};

TEST_F(CudaObserves, AsTheCpu) {
  struct Shape {
    std::uint32_t query_heads, kv_heads, rows, tokens, dim;
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Shape& s : {Shape{9, 3, 32, 300, 64}, Shape{32, 8, 16, 1000, 128}, Shape{2, 2, 256, 700, 256},
                           Shape{4, 1, 1, 2000, 80}, Shape{7, 1, 48, 49, 112}, Shape{2, 1, 5, 5, 64}}) {
      const SampleRows queries(dtype, s.query_heads, s.rows, s.dim, 1);
      SampleRows keys(dtype, s.kv_heads, s.tokens, s.dim, 2);
      if (s.tokens == 1000) keys.set(3, 70, 5, std::numeric_limits<float>::quiet_NaN());
      compare(queries, keys);
    }
  }
}

TEST_F(CudaObserves, ElementsOf16BitsAsTheCpu) {
  struct Shape {
    std::uint32_t kv_heads, sharing, rows, tokens, dim, columns;
  };
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    // Windows of a part of a fragment up to several units; columns up to the window, fewer, more, and none.
    for (const Shape& s :
         {Shape{2, 1, 32, 777, 64, 745}, Shape{2, 3, 13, 500, 128, 300}, Shape{1, 4, 8, 1000, 256, 992},
          Shape{1, 7, 16, 193, 128, 177}, Shape{2, 4, 1, 200, 64, 199}, Shape{2, 7, 32, 1500, 128, 1468},
          Shape{1, 9, 32, 300, 64, 268}, Shape{1, 3, 100, 400, 64, 300}, Shape{1, 4, 33, 130, 48, 130},
          Shape{2, 2, 32, 32, 128, 32}, Shape{1, 2, 20, 333, 96, 0}, Shape{1, 1, 256, 600, 64, 344},
          Shape{1, 8, 32, 100, 256, 64}, Shape{1, 1, 1, 1, 16, 1}}) {
      const SampleRows queries(dtype, s.kv_heads * s.sharing, s.rows, s.dim, 3);
      const SampleRows keys(dtype, s.kv_heads, s.tokens, s.dim, 4);
      SCOPED_TRACE(testing::Message() << s.sharing << " x " << s.rows << " rows, " << s.tokens << " tokens of " << s.dim
                                      << ", " << s.columns << " columns");
      compare(queries, keys, s.columns);
    }
  }
}

TEST_F(CudaObserves, ManyTokensInSeveralPieces) {
  const SampleRows queries(DType::kBFloat16, 4, 32, 64, 5);
  const SampleRows keys(DType::kBFloat16, 2, 40000, 64, 6);
  compare(queries, keys);
  compare(queries, keys, 20001);
}

TEST_F(CudaObserves, DamagedRowsAsTheCpu) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const std::uint32_t rows : {8U, 13U, 32U}) {
      SampleRows queries(dtype, 6, rows, 128, 7);
      SampleRows keys(dtype, 2, 300, 128, 8);
      keys.set(0, 3, 100, kInfinity);
      keys.set(0, 64, 0, std::numeric_limits<float>::quiet_NaN());
      keys.set_row(1, 200, -kInfinity);
      keys.set(1, 298, 7, kInfinity);  // that most rows do not see
      queries.set(1, 5, 127, std::numeric_limits<float>::quiet_NaN());
      compare(queries, keys);
    }
  }
}

TEST_F(CudaObserves, RowsAtAnyAddress) {
  const SampleRows queries(DType::kBFloat16, 6, 16, 64, 9, 3);
  const SampleRows keys(DType::kBFloat16, 3, 300, 64, 10);
  compare(queries, keys);
  compare(SampleRows(DType::kBFloat16, 6, 16, 64, 9), SampleRows(DType::kBFloat16, 3, 300, 64, 10, 8));
}

TEST_F(CudaEvict, ScoresWindowsAsTheCpu) {
  const SampleRows queries(DType::kFloat32, 6, 16, 64, 1);
  const SampleRows keys(DType::kFloat32, 3, 500, 64, 2);
  const Observation seen = observed(queries.view(), keys.view());
  const float* means = upload(seen.mean.data(), seen.mean.size());
  for (const WindowRule rule : {WindowRule{8, 8}, WindowRule{8, 4}, WindowRule{32, 16}, WindowRule{1000, 1}}) {
    const auto expected = window_scores(seen, rule, nullptr);
    auto* scores = allocate<float>(expected->size());
    ASSERT_TRUE(cuda_window_scores(means, 6, seen.columns, 16, rule, scores, nullptr));
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    expect_near(download(scores, expected->size()), *expected, 1e-7F, 1e-5F, "window scores");
  }
}

TEST_F(CudaEvict, ScoresKeysAsTheCpu) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::uint32_t dim : {64U, 80U, 256U}) {
      SampleRows keys(dtype, 3, 1100, dim, dim, 5);
      keys.set_row(1, 7, 0);
      keys.set(2, 9, 3, std::numeric_limits<float>::infinity());
      const HeadRows device_keys = upload(keys.view());
      auto* scores = allocate<float>(std::size_t{3} * 1100);
      auto* scratch = allocate<std::byte>(cuda_keydiff_bytes(device_keys));
      const auto compare = [&](const TokenScores& expected) {
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        const auto got = download(scores, expected.values.size());
        for (std::size_t i = 0; i < got.size(); ++i) {
          ASSERT_EQ(std::isnan(got[i]), std::isnan(expected.values[i])) << i;
          if (!std::isnan(got[i])) {
            ASSERT_NEAR(got[i], expected.values[i], 2e-6F + 1e-5F * std::abs(expected.values[i])) << i;
          }
        }
      };
      ASSERT_TRUE(cuda_knorm_scores(device_keys, scores, nullptr));
      compare(*knorm_scores(keys.view(), nullptr));
      ASSERT_TRUE(cuda_keydiff_scores(device_keys, scratch, scores, nullptr));
      compare(*keydiff_scores(keys.view(), nullptr));
    }
  }
}

TEST_F(CudaEvict, SelectsAndGathersWhatTheCpuDoes) {
  for (const std::uint32_t tokens : {1U, 31U, 1024U, 5000U}) {
    TokenScores scores{3, tokens, {}};
    std::mt19937 generator(tokens);
    for (std::uint32_t i = 0; i < 3 * tokens; ++i) {
      const auto value = static_cast<float>(generator() % 50);
      scores.values.push_back(value == 49 ? std::numeric_limits<float>::quiet_NaN() : value - 20);
    }
    constexpr std::uint32_t kTail = 7;
    const SampleRows rows(DType::kBFloat16, 3, tokens + kTail, 80, 1, tokens % 2 == 0 ? 8 : 3);
    const HeadRows device_rows = upload(rows.view());
    const float* device_scores = upload(scores.values.data(), scores.values.size());
    for (const std::uint32_t count : {0U, 1U, tokens / 3, tokens, tokens + 5}) {
      const auto expected = select_best(scores, std::span(&count, 1), kTail, nullptr);
      const std::uint32_t per_head = std::min(count, tokens) + kTail;
      auto* kept = allocate<std::uint32_t>(expected->tokens.size());
      auto* scratch = allocate<std::byte>(cuda_selection_bytes(3, tokens));
      ASSERT_TRUE(cuda_select_best(device_scores, 3, tokens, count, kTail, scratch, kept, nullptr));
      std::vector<std::byte> compact(gathered_bytes(rows.view(), *expected));
      auto* device_compact = allocate<std::byte>(compact.size());
      ASSERT_TRUE(cuda_gather_rows(device_rows, kept, per_head, device_compact, nullptr));
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      EXPECT_EQ(download(kept, expected->tokens.size()), expected->tokens);
      ASSERT_TRUE(gather_rows(rows.view(), *expected, compact, nullptr));
      EXPECT_EQ(download(device_compact, compact.size()), compact);
    }
  }
}

TEST_F(CudaEvict, SelectsAmongManyWhatTheCpuDoes) {
  const std::vector<float> special = {0.0F,
                                      -0.0F,
                                      std::numeric_limits<float>::infinity(),
                                      -std::numeric_limits<float>::infinity(),
                                      std::numeric_limits<float>::quiet_NaN(),
                                      std::numeric_limits<float>::denorm_min(),
                                      -1.0F,
                                      1.0F};
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const std::vector<std::function<float()>> kinds = {
      [] { return 0.25F; },
      [&] { return static_cast<float>(generator() % 3); },
      [&] { return special[generator() % special.size()]; },
      [&] { return normal(generator); },
      // Scores that differ in their last bits alone.
      [&] { return std::bit_cast<float>(static_cast<std::uint32_t>(0x3F800000U + generator() % 2000)); },
  };
  for (const std::uint32_t heads : {1U, 8U}) {
    for (const std::uint32_t tokens : {1U, 8191U, 8193U, 131072U + 13}) {
      for (const auto& kind : kinds) {
        TokenScores scores{heads, tokens, {}};
        scores.values.resize(std::size_t{heads} * tokens);
        std::ranges::generate(scores.values, kind);
        const float* device_scores = upload(scores.values.data(), scores.values.size());
        auto* scratch = allocate<std::byte>(cuda_selection_bytes(heads, tokens));
        for (const std::uint32_t count : {0U, 1U, tokens / 30, tokens - 1, tokens}) {
          constexpr std::uint32_t kTail = 3;
          const auto expected = select_best(scores, std::span(&count, 1), kTail, nullptr);
          auto* kept = allocate<std::uint32_t>(expected->tokens.size());
          ASSERT_TRUE(cuda_select_best(device_scores, heads, tokens, count, kTail, scratch, kept, nullptr));
          ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
          ASSERT_EQ(download(kept, expected->tokens.size()), expected->tokens) << tokens << " tokens, " << count;
        }
        release();
      }
    }
  }
}

TEST(CudaEvictArguments, AreCheckedBeforeTheLaunch) {
  const HeadRows keys = HeadRows::contiguous(nullptr, DType::kFloat32, 2, 100, 64);
  const auto code = [&](const HeadRows& queries, std::uint32_t columns) {
    return cuda_observe(queries, keys, columns, 1, nullptr, {}, nullptr).code();
  };
  EXPECT_EQ(code(HeadRows::contiguous(nullptr, DType::kFloat32, 3, 8, 64), 92), Code::kInvalid);
  EXPECT_EQ(code(HeadRows::contiguous(nullptr, DType::kFloat32, 4, 8, 32), 92), Code::kInvalid);
  EXPECT_EQ(code(HeadRows::contiguous(nullptr, DType::kBFloat16, 4, 8, 64), 92), Code::kInvalid);
  EXPECT_EQ(code(HeadRows::contiguous(nullptr, DType::kFloat32, 4, 101, 64), 0), Code::kInvalid);
  EXPECT_EQ(code(HeadRows::contiguous(nullptr, DType::kFloat32, 4, 8, 64), 101), Code::kInvalid);
  EXPECT_EQ(cuda_cake_scores(nullptr, nullptr, 4, 2, 10, kCakeGamma, {}, nullptr, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(cuda_select_best(nullptr, 65536, 1, 1, 0, nullptr, nullptr, nullptr).code(), Code::kInvalid);
}

TEST(CudaEvictArguments, WithoutADeviceTheLaunchFailsInASentence) {
  if (cuda_available()) GTEST_SKIP() << "there is a CUDA device";
  const Status status = cuda_select_best(nullptr, 1, 4, 2, 0, nullptr, nullptr, nullptr);
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_FALSE(status.message().empty());
}

}  // namespace
}  // namespace kvern::evict

#include <gtest/gtest.h>

#include "kernels/cuda/nccl_score_reduction.h"
#include "tests/kernels/device_memory.h"

namespace kvern {
namespace {

using CudaScoreReduction = CudaTest;

TEST_F(CudaScoreReduction, OfOneRankLeavesWhatThereIs) {
  const auto id = make_nccl_id();
  if (!id && id.error().code() == Code::kUnavailable) GTEST_SKIP() << id.error().message();
  ASSERT_TRUE(id) << id.error().to_string();
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreate(&stream));
  {
    auto reduction = make_nccl_reduction(*id, 0, 1, stream);
    ASSERT_TRUE(reduction) << reduction.error().to_string();
    EXPECT_EQ((*reduction)->ranks(), 1U);
    const std::vector<double> preference = {1.5, -2.25};
    std::vector<float> scores(10000);
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i) / 7;
    const DeviceArray<double> sums(preference);
    const DeviceArray<float> means(scores);
    ASSERT_TRUE((*reduction)->sum({sums.data(), preference.size()}));
    ASSERT_TRUE((*reduction)->mean({means.data(), scores.size()}));
    check_cuda(cudaStreamSynchronize(stream));
    EXPECT_EQ(sums.get(), preference);
    EXPECT_EQ(means.get(), scores);
  }
  check_cuda(cudaStreamDestroy(stream));
}

TEST(CudaScoreReductionArguments, AreChecked) {
  const auto reduction = make_nccl_reduction({}, 1, 1, nullptr);
  ASSERT_FALSE(reduction);
  EXPECT_TRUE(reduction.error().code() == Code::kInvalid || reduction.error().code() == Code::kUnavailable)
      << reduction.error().to_string();
}

}  // namespace
}  // namespace kvern

#include <gtest/gtest.h>

#include "kernels/cuda/device.h"

namespace kvern {
namespace {

TEST(CudaAvailable, AnswersOnAnyMachineAndKeepsToIt) {
  const bool available = cuda_available();
  EXPECT_EQ(cuda_available(), available);
}

}  // namespace
}  // namespace kvern

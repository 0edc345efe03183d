#include <gtest/gtest.h>

#include "transport/data_plane.h"

namespace kvern {
namespace {

constexpr std::size_t kSlabBytes = 1 << 16;
constexpr std::size_t kStagingBytes = 1 << 14;

class ShmDataPlane : public ::testing::Test {
 protected:
  ShmDataPlane() {
    slab_ = SharedMemory::create_anonymous("kvern-test-slab", kSlabBytes).value();
    staging_ = SharedMemory::create_anonymous("kvern-test-staging", kStagingBytes).value();
    plane_ = make_shm_data_plane(SharedMemory::map(slab_.read_only_fd().value(), kSlabBytes, false).value(),
                                 SharedMemory::map(staging_.read_only_fd().value(), kStagingBytes, false).value());
  }
  SharedMemory slab_;
  SharedMemory staging_;
  std::unique_ptr<DataPlane> plane_;
};

TEST_F(ShmDataPlane, PullIsAViewOfTheSlab) {
  slab_.bytes()[1000] = std::byte{5};
  const auto pulled = plane_->pull(1, 1000, 10);
  ASSERT_TRUE(pulled);
  EXPECT_EQ(pulled->bytes().size(), 10u);
  EXPECT_EQ(pulled->bytes()[0], std::byte{5});
}

TEST_F(ShmDataPlane, StagingIsAViewOfTheStagingFile) {
  staging_.bytes()[64] = std::byte{6};
  const auto extent = plane_->staging(64, 128);
  ASSERT_TRUE(extent);
  EXPECT_EQ(extent->size(), 128u);
  EXPECT_EQ((*extent)[0], std::byte{6});
  EXPECT_TRUE(plane_->push(1, 64, 128).is_ok());
}

TEST_F(ShmDataPlane, ExtentsOutsideAreInvalid) {
  constexpr std::uint64_t kLargest = ~std::uint64_t{0};
  EXPECT_EQ(plane_->pull(1, kSlabBytes, 1).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->pull(1, 1, kSlabBytes).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->pull(1, kLargest, 2).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->pull(1, 2, kLargest).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->staging(kStagingBytes, 64).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->staging(kLargest - 63, 64).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->staging(8, 64).error().code(), Code::kInvalid);
  EXPECT_EQ(plane_->push(1, kStagingBytes, 64).code(), Code::kInvalid);
  EXPECT_TRUE(plane_->pull(1, 0, kSlabBytes));
  EXPECT_TRUE(plane_->staging(0, kStagingBytes));
}

TEST_F(ShmDataPlane, NothingIsHandedOutAfterClose) {
  const auto before = plane_->pull(1, 0, 8);
  plane_->close();
  EXPECT_EQ(plane_->pull(1, 0, 8).error().code(), Code::kUnavailable);
  EXPECT_EQ(plane_->staging(0, 64).error().code(), Code::kUnavailable);
  EXPECT_EQ(before->bytes()[0], std::byte{0});
}

}  // namespace
}  // namespace kvern

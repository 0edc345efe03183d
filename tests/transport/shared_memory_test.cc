#include "transport/shared_memory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>

namespace kvern {
namespace {

using ::testing::HasSubstr;

constexpr std::size_t kBytes = 1 << 16;

std::string fresh_path(const char* name) { return "/dev/shm/kvern-test-" + std::to_string(::getpid()) + "-" + name; }

TEST(SharedMemory, NamedFileIsZeroPrivateAndGoneWithItsCreator) {
  const std::string path = fresh_path("named");
  {
    auto memory = SharedMemory::create_named(path, kBytes);
    ASSERT_TRUE(memory) << memory.error().to_string();
    struct stat info {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
    EXPECT_EQ(static_cast<std::size_t>(info.st_size), kBytes);
    EXPECT_EQ(memory->bytes().size(), kBytes);
    for (const std::byte byte : memory->bytes()) ASSERT_EQ(byte, std::byte{0});
    const SharedMemory moved = std::move(*memory);
    EXPECT_EQ(moved.bytes().size(), kBytes);
    EXPECT_TRUE(std::filesystem::exists(path));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(SharedMemory, OldFileOfThatNameIsReplacedAndTheNewOneSurvivesTheOldOwner) {
  const std::string path = fresh_path("replaced");
  auto old_memory = SharedMemory::create_named(path, kBytes);
  ASSERT_TRUE(old_memory);
  old_memory->bytes()[0] = std::byte{7};
  auto new_memory = SharedMemory::create_named(path, kBytes);
  ASSERT_TRUE(new_memory);
  EXPECT_EQ(new_memory->bytes()[0], std::byte{0});
  EXPECT_EQ(old_memory->bytes()[0], std::byte{7});
  *old_memory = SharedMemory();
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST(SharedMemory, FullFileSystemIsAnErrorThatSaysWhatToDo) {
  const std::string path = fresh_path("huge");
  const auto memory = SharedMemory::create_named(path, std::size_t{1} << 50);
  ASSERT_FALSE(memory);
  EXPECT_EQ(memory.error().code(), Code::kRefused);
  EXPECT_THAT(memory.error().message(), HasSubstr("/dev/shm has "));
  EXPECT_THAT(memory.error().message(), HasSubstr("iB free, 1024 TiB are needed"));
  EXPECT_THAT(memory.error().message(), HasSubstr("--shm-size"));
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(SharedMemory, MissingDirectoryIsAnError) {
  const auto memory = SharedMemory::create_named("/nowhere/at/all", kBytes);
  ASSERT_FALSE(memory);
  EXPECT_THAT(memory.error().message(), HasSubstr("/nowhere/at/all"));
}

TEST(SharedMemory, HolderOfTheDescriptorCannotShrinkGrowOrUnsealAnonymousMemory) {
  auto memory = SharedMemory::create_anonymous("kvern-test", kBytes);
  ASSERT_TRUE(memory) << memory.error().to_string();
  EXPECT_NE(::ftruncate(memory->fd(), 0), 0);
  EXPECT_NE(::ftruncate(memory->fd(), 2 * kBytes), 0);
  EXPECT_NE(::fcntl(memory->fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
  struct stat info {};
  ASSERT_EQ(::fstat(memory->fd(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(SharedMemory, ReadOnlyDescriptorShowsTheBytesAndCannotBeMappedForWriting) {
  auto memory = SharedMemory::create_named(fresh_path("readonly"), kBytes);
  ASSERT_TRUE(memory);
  memory->bytes()[100] = std::byte{42};
  auto fd = memory->read_only_fd();
  ASSERT_TRUE(fd) << fd.error().to_string();
  EXPECT_EQ(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0), MAP_FAILED);
  EXPECT_NE(::ftruncate(fd->get(), 0), 0);
  EXPECT_EQ(::write(fd->get(), "x", 1), -1);
  auto view = SharedMemory::map(std::move(*fd), kBytes, false);
  ASSERT_TRUE(view) << view.error().to_string();
  EXPECT_EQ(view->bytes()[100], std::byte{42});
  memory->bytes()[101] = std::byte{43};
  EXPECT_EQ(view->bytes()[101], std::byte{43});
}

TEST(SharedMemory, MappingRefusesWhatIsTooSmallOrCanBeShrunk) {
  auto memory = SharedMemory::create_anonymous("kvern-test", kBytes);
  ASSERT_TRUE(memory);
  EXPECT_FALSE(SharedMemory::map(UniqueFd(::dup(memory->fd())), kBytes + 1, true));
  EXPECT_FALSE(SharedMemory::map(UniqueFd(::dup(memory->fd())), 0, true));
  EXPECT_FALSE(SharedMemory::map(UniqueFd(), kBytes, true));
  UniqueFd unsealed(::memfd_create("kvern-test-unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(unsealed.get(), kBytes), 0);
  const auto refused = SharedMemory::map(std::move(unsealed), kBytes, true);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kRefused);
  UniqueFd ends[2];
  int raw[2];
  ASSERT_EQ(::pipe(raw), 0);
  ends[0] = UniqueFd(raw[0]);
  ends[1] = UniqueFd(raw[1]);
  EXPECT_FALSE(SharedMemory::map(std::move(ends[0]), kBytes, false));
}

TEST(SharedMemory, WritesThroughOneMappingAreSeenThroughTheOther) {
  auto memory = SharedMemory::create_anonymous("kvern-test", kBytes);
  ASSERT_TRUE(memory);
  auto other = SharedMemory::map(UniqueFd(::dup(memory->fd())), kBytes, true);
  ASSERT_TRUE(other);
  std::memset(other->bytes().data(), 0x5a, kBytes);
  EXPECT_EQ(std::memcmp(memory->bytes().data(), other->bytes().data(), kBytes), 0);
}

TEST(SharedMemory, ReservingKeepsWhatIsThereAndMayBeRepeated) {
  constexpr std::size_t kLarge = (std::size_t{5} << 20) + 4096;
  constexpr std::chrono::milliseconds kPatience{1000};
  auto memory = SharedMemory::create_anonymous("kvern-test", kLarge);
  ASSERT_TRUE(memory) << memory.error().to_string();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory->bytes().data()) % (2 << 20), 0U);
  EXPECT_LE(memory->huge_page_bytes(), std::size_t{4} << 20);
  for (std::size_t at = 0; at < kLarge; at += 4096) {
    ASSERT_EQ(memory->bytes()[at], std::byte{0});
    memory->bytes()[at] = std::byte{static_cast<unsigned char>(at / 4096 % 251)};
  }
  EXPECT_EQ(memory->reserve(0, kLarge, kPatience), 0);
  EXPECT_EQ(memory->reserve(4096, kLarge - 4096, kPatience), 0);
  auto other = SharedMemory::map(UniqueFd(::dup(memory->fd())), kLarge, true);
  ASSERT_TRUE(other);
  EXPECT_EQ(other->reserve(0, kLarge, kPatience), 0);
  for (std::size_t at = 0; at < kLarge; at += 4096) {
    ASSERT_EQ(other->bytes()[at], std::byte{static_cast<unsigned char>(at / 4096 % 251)});
  }
}

TEST(UniqueFd, ClosesOnceAndMovesOwnership) {
  int raw[2];
  ASSERT_EQ(::pipe(raw), 0);
  const UniqueFd reader(raw[0]);
  {
    UniqueFd first(raw[1]);
    UniqueFd second(std::move(first));
    EXPECT_FALSE(first);  // NOLINT(bugprone-use-after-move): that is what is tested
    EXPECT_EQ(second.get(), raw[1]);
    UniqueFd third;
    third = std::move(second);
    EXPECT_EQ(third.get(), raw[1]);
  }
  EXPECT_EQ(::fcntl(raw[1], F_GETFD), -1);
}

}  // namespace
}  // namespace kvern

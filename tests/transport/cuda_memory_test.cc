#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <filesystem>
#include <memory>
#include <string>

#include "tests/integration/child_process.h"
#include "tests/transport/allocation_packet.h"
#include "tests/transport/cuda_allocation.h"
#include "transport/device_memory.h"

namespace kvern {
namespace {

using namespace testing;

constexpr std::size_t kBytes = 8U << 20;

/// A second process with memory of its own, and a socket to it.
class Peer {
 public:
  explicit Peer(const std::string& role, const std::string& kind = {}) {
    int ends[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) return;
    socket_ = UniqueFd(ends[0]);
    ::fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    const UniqueFd other(ends[1]);
    const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    std::vector<std::string> command{(folder / "cuda_peer").string(), role, std::to_string(ends[1])};
    if (!kind.empty()) {
      command.push_back(kind);
      command.push_back(std::to_string(kBytes));
    }
    process_ = std::make_unique<ChildProcess>(std::move(command));
    // Patience of a whole start of CUDA.
    const timeval limit{.tv_sec = kPatience.count(), .tv_usec = 0};
    ::setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  }
  int socket() const { return socket_.get(); }
  bool holds(char seed) const {
    const char question[2] = {'s', seed};
    char answer = 0;
    return ::write(socket(), question, 2) == 2 && ::read(socket(), &answer, 1) == 1 && answer == 'y';
  }
  void kill() { process_->kill(); }

 private:
  UniqueFd socket_;
  std::unique_ptr<ChildProcess> process_;
};

class CudaMemory : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
  }
};

TEST_P(CudaMemory, OfAnotherProcessIsReadAndWrittenInPlace) {
  Peer owner("owner", GetParam());
  ReceivedAllocation received;
  ASSERT_TRUE(receive_allocation(owner.socket(), &received));
  EXPECT_EQ(received.place.allocation.kind == DeviceHandleKind::kDescriptor, std::string(GetParam()) == "vmm");
  const auto device = cuda_device(received.uuid);
  ASSERT_TRUE(device) << device.error().message();
  const auto memory = (*device)->import(received.place.allocation);
  ASSERT_TRUE(memory) << memory.error().message();
  const auto bytes = (*memory)->bytes();
  ASSERT_GE(bytes.size(), kBytes);
  EXPECT_EQ(on_host(bytes.data(), kBytes), numbers(kBytes, 1));

  put(bytes.data() + received.place.offset, numbers(kBytes, 5));
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  EXPECT_TRUE(owner.holds(5));
  EXPECT_FALSE(owner.holds(1));
}

TEST_P(CudaMemory, OutlivesItsOwnerAndIsReleased) {
  Peer owner("owner", GetParam());
  ReceivedAllocation received;
  ASSERT_TRUE(receive_allocation(owner.socket(), &received));
  const auto device = cuda_device(received.uuid).value();
  std::size_t free_before = 0;
  std::size_t free_after = 0;
  std::size_t total = 0;
  {
    auto memory = device->import(received.place.allocation);
    ASSERT_TRUE(memory) << memory.error().message();
    received.place.allocation.descriptor = UniqueFd();
    owner.kill();
    EXPECT_EQ(on_host((*memory)->bytes().data(), kBytes), numbers(kBytes, 1));
    check(cudaMemGetInfo(&free_before, &total), "cudaMemGetInfo");
  }
  check(cudaMemGetInfo(&free_after, &total), "cudaMemGetInfo");
  EXPECT_GE(free_after, free_before + kBytes);
  check(cudaDeviceSynchronize(), "the device after its peer's death");
}

TEST_P(CudaMemory, SurvivesTheReadersDeath) {
  const CudaAllocation memory(GetParam(), kBytes);
  put(memory.data(), numbers(memory.bytes(), 3));
  const auto device = cuda_device_of(memory.data());
  ASSERT_TRUE(device) << device.error().message();
  const auto place = (*device)->share(memory.data(), memory.bytes());
  ASSERT_TRUE(place) << place.error().message();
  Peer reader("reader");
  ASSERT_TRUE(send_allocation(reader.socket(), **device, *place));
  char ready = 0;
  ASSERT_EQ(::read(reader.socket(), &ready, 1), 1);
  reader.kill();
  auto expected = numbers(memory.bytes(), 3);
  const std::size_t half = expected.size() / 2;
  const auto written = numbers(half, 9);
  std::copy(written.begin(), written.end(), expected.begin() + static_cast<std::ptrdiff_t>(half));
  EXPECT_EQ(on_host(memory.data(), memory.bytes()), expected);
  put(memory.data(), numbers(memory.bytes(), 4));
  EXPECT_EQ(on_host(memory.data(), memory.bytes()), numbers(memory.bytes(), 4));
}

TEST_P(CudaMemory, LiesAreRefused) {
  Peer owner("owner", GetParam());
  ReceivedAllocation received;
  ASSERT_TRUE(receive_allocation(owner.socket(), &received));
  const auto device = cuda_device(received.uuid).value();
  received.place.allocation.bytes *= 2;
  const auto larger = device->import(received.place.allocation);
  ASSERT_FALSE(larger);
  EXPECT_EQ(larger.error().code(), Code::kInvalid) << larger.error().message();

  SharedAllocation nonsense;
  nonsense.bytes = kBytes;
  nonsense.handle.assign(64, '\x55');
  EXPECT_FALSE(device->import(nonsense));
  nonsense.handle = "short";
  EXPECT_FALSE(device->import(nonsense));
  nonsense.kind = DeviceHandleKind::kDescriptor;
  nonsense.descriptor = UniqueFd(::memfd_create("no device memory", MFD_CLOEXEC));
  EXPECT_FALSE(device->import(nonsense));
  nonsense.descriptor = UniqueFd();
  EXPECT_FALSE(device->import(nonsense));
  check(cudaDeviceSynchronize(), "the device after lies");
}

TEST_P(CudaMemory, IsSharedOnlyWhole) {
  const CudaAllocation memory(GetParam(), kBytes);
  const auto device = cuda_device_of(memory.data()).value();
  EXPECT_TRUE(device->share(memory.data() + 4096, kBytes - 4096));
  EXPECT_EQ(device->share(memory.data() + 4096, kBytes - 4096)->offset % kBytes, 4096U);
  EXPECT_FALSE(device->share(memory.data(), std::uint64_t{1} << 40));
  std::vector<std::byte> host(64);
  EXPECT_FALSE(cuda_device_of(host.data()));
  EXPECT_FALSE(cuda_device("GPU-00000000-0000-0000-0000-000000000000"));
}

TEST_P(CudaMemory, ReachesPinnedHostMemory) {
  const CudaAllocation memory(GetParam(), kBytes);
  const auto device = cuda_device_of(memory.data()).value();
  auto file = SharedMemory::create_anonymous("kvern-pin", kBytes);
  ASSERT_TRUE(file);
  {
    const auto pinned = device->pin(file->bytes());
    ASSERT_TRUE(pinned) << pinned.error().message();
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, file->bytes().data()), "cudaPointerGetAttributes");
    EXPECT_EQ(attributes.type, cudaMemoryTypeHost);
  }
  EXPECT_TRUE(device->pin(file->bytes()));  // again, after it was given back
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaMemory, ::testing::Values("malloc", "vmm"),
                         [](const auto& each) { return std::string(each.param); });

}  // namespace
}  // namespace kvern

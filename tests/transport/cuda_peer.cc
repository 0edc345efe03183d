// The other process of cuda_memory_test.cc. `cuda_peer owner SOCKET malloc|vmm BYTES` shares memory full of numbers of
// seed 1 and answers each byte that it gets: 's' followed by a seed byte tells 'y' when the memory holds the numbers of
// that seed. `cuda_peer reader SOCKET` maps what it is sent, writes numbers of seed 9 to the second half and says 'r'.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "tests/transport/allocation_packet.h"
#include "tests/transport/cuda_allocation.h"

namespace {

using namespace kvern;
using namespace kvern::testing;

int fail(const Status& status) {
  std::fprintf(stderr, "cuda_peer: %s\n", status.to_string().c_str());
  return 1;
}

int own(int socket, const std::string& kind, std::size_t bytes) {
  const CudaAllocation memory(kind, bytes);
  put(memory.data(), numbers(memory.bytes(), 1));
  const auto device = cuda_device_of(memory.data());
  if (!device) return fail(device.error());
  const auto place = (*device)->share(memory.data(), memory.bytes());
  if (!place) return fail(place.error());
  if (!send_allocation(socket, **device, *place)) return 1;
  char question[2];
  while (::read(socket, question, sizeof question) == sizeof question) {
    const bool same =
        on_host(memory.data(), memory.bytes()) == numbers(memory.bytes(), static_cast<std::uint64_t>(question[1]));
    const char answer = same ? 'y' : 'n';
    if (::write(socket, &answer, 1) != 1) return 1;
  }
  return 0;
}

int read_others(int socket) {
  ReceivedAllocation received;
  if (!receive_allocation(socket, &received)) return 1;
  const auto device = cuda_device(received.uuid);
  if (!device) return fail(device.error());
  const auto memory = (*device)->import(received.place.allocation);
  if (!memory) return fail(memory.error());
  const auto half = (*memory)->bytes().subspan((*memory)->bytes().size() / 2);
  put(half.data(), numbers(half.size(), 9));
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const char ready = 'r';
  if (::write(socket, &ready, 1) != 1) return 1;
  ::pause();
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    if (count == 5 && std::string(words[1]) == "owner") return own(std::atoi(words[2]), words[3], std::stoul(words[4]));
    if (count == 3 && std::string(words[1]) == "reader") return read_others(std::atoi(words[2]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_peer: %s\n", error.what());
    return 1;
  }
  return 2;
}

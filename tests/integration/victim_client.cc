// A client that tests kill, stop and continue. Usage: victim_client SOCKET. It holds a lease, a claim and reservations,
// says "ready", and scribbles over its staging for ever. Once its session has expired it says "expired", opens another,
// stores a chunk, says "stored" and ends.
#include <iostream>
#include <string>

#include "tests/integration/local_client.h"

namespace {

using namespace kvern;
using namespace kvern::testing;

int fail(const Status& status) {
  std::cout << "failed: " << status.to_string() << std::endl;
  return 1;
}

int run(const std::string& socket) {
  auto client = LocalClient::connect(socket, "victim");
  if (!client) return fail(client.error());
  if (const auto lease = (*client)->fetch(1, 0); !lease) return fail(lease.error());
  if (const auto hit = (*client)->index().find((*client)->fingerprint(1, kBlocksPerChunk))) {
    (*client)->hazards().publish(hit->chunk);
  }
  const auto reserved = (*client)->reserve(77, 4);
  if (!reserved) return fail(reserved.error());
  std::cout << "ready" << std::endl;
  auto staging = (*client)->staging();
  for (std::uint64_t round = 0; (*client)->state() == SessionState::kLive; ++round) {
    fill_chunk(staging, round, round);
    (*client)->segment().header().client_heartbeat_ns.store(Clock::system().now_ns());
  }
  fill_chunk(staging, 666, 666);  // a stopped writer that wakes up
  std::cout << "expired" << std::endl;
  auto again = LocalClient::connect(socket, "victim again");
  if (!again) return fail(again.error());
  if (const Status status = (*again)->store(78, 1); !status) return fail(status);
  std::cout << "stored" << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return argc == 2 ? run(argv[1]) : 2; }

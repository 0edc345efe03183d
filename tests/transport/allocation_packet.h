#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "transport/device_memory.h"

namespace kvern::testing {

/// A shared allocation on its way through a Unix socket.
struct AllocationPacket {
  std::uint32_t kind = 0;
  std::uint32_t handle_bytes = 0;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  char uuid[64] = {};
  char handle[64] = {};
};

inline bool send_allocation(int socket, const DeviceMemory& device, const DeviceMemory::Place& place) {
  AllocationPacket packet;
  packet.kind = static_cast<std::uint32_t>(place.allocation.kind);
  packet.bytes = place.allocation.bytes;
  packet.offset = place.offset;
  packet.handle_bytes = static_cast<std::uint32_t>(place.allocation.handle.size());
  std::memcpy(packet.handle, place.allocation.handle.data(), packet.handle_bytes);
  std::memcpy(packet.uuid, device.uuid().data(), device.uuid().size());
  iovec part{.iov_base = &packet, .iov_len = sizeof packet};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (place.allocation.descriptor) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int descriptor = place.allocation.descriptor.get();
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof packet);
}

struct ReceivedAllocation {
  std::string uuid;
  DeviceMemory::Place place;
};

inline bool receive_allocation(int socket, ReceivedAllocation* received) {
  AllocationPacket packet;
  iovec part{.iov_base = &packet, .iov_len = sizeof packet};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof packet)) return false;
  received->uuid = packet.uuid;
  received->place.offset = packet.offset;
  received->place.allocation.kind = static_cast<DeviceHandleKind>(packet.kind);
  received->place.allocation.bytes = packet.bytes;
  received->place.allocation.handle.assign(packet.handle, packet.handle_bytes);
  if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
    int descriptor = -1;
    std::memcpy(&descriptor, CMSG_DATA(header), sizeof descriptor);
    received->place.allocation.descriptor = UniqueFd(descriptor);
  }
  return true;
}

}  // namespace kvern::testing

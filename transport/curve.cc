#include "transport/curve.h"

#include <zmq.h>

#include <array>

namespace kvern {

Result<CurveKeyPair> generate_curve_keys() {
  std::array<char, kCurveKeyCharacters + 1> public_key{};
  std::array<char, kCurveKeyCharacters + 1> secret_key{};
  if (zmq_curve_keypair(public_key.data(), secret_key.data()) != 0) {
    return failure(Code::kInternal, std::string("libzmq cannot make CURVE keys: ") + zmq_strerror(zmq_errno()));
  }
  return CurveKeyPair{public_key.data(), secret_key.data()};
}

bool is_curve_key(const std::string& key) {
  std::array<std::uint8_t, 32> decoded{};
  return key.size() == kCurveKeyCharacters && zmq_z85_decode(decoded.data(), key.c_str()) != nullptr;
}

std::string to_z85(const std::string& key_bytes) {
  std::string text(key_bytes.size() / 4 * 5 + 1, '\0');
  if (zmq_z85_encode(text.data(), reinterpret_cast<const std::uint8_t*>(key_bytes.data()), key_bytes.size()) ==
      nullptr) {
    return {};
  }
  text.pop_back();
  return text;
}

}  // namespace kvern

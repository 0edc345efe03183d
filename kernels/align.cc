#include "kernels/align.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#include "base/parallel.h"
#include "kernels/cpu/align.h"
#include "kernels/element.h"

namespace kvern::align {
namespace {

constexpr std::string_view kMagic = "KVERNPRF";
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kMaxLayers = 4096;
constexpr std::uint32_t kMaxWidth = 1U << 14;
constexpr std::uint32_t kMaxNameBytes = 4096;
/// Rows of an orthogonal matrix have length 1 and stand at right angles; learnt in fp64, stored in fp32.
constexpr float kOrthogonalError = 1e-3F;
/// Tokens per task: their rows share the loads of the matrix.
constexpr std::uint32_t kTaskTokens = 64;

/// CRC-32 (zlib's), which Python has too.
std::uint32_t crc32(std::span<const std::byte> bytes) {
  static constexpr auto kTable = [] {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t i = 0; i < table.size(); ++i) {
      std::uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xEDB88320U : 0U);
      table[i] = value;
    }
    return table;
  }();
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const std::byte byte : bytes) crc = (crc >> 8) ^ kTable[(crc ^ static_cast<std::uint32_t>(byte)) & 0xFFU];
  return ~crc;
}

/// Takes fields off the front; past the end everything is zero and good() is false.
class Fields {
 public:
  explicit Fields(std::span<const std::byte> bytes) : bytes_(bytes) {}
  bool take(void* to, std::size_t count) {
    good_ = good_ && count <= bytes_.size();
    if (!good_) return false;
    if (count > 0) std::memcpy(to, bytes_.data(), count);
    bytes_ = bytes_.subspan(count);
    return true;
  }
  template <typename T>
  T get() {
    T value{};
    take(&value, sizeof value);
    return value;
  }
  bool take_floats(std::vector<float>& out, std::size_t count) {
    good_ = good_ && count <= bytes_.size() / sizeof(float);
    if (!good_) return false;
    out.resize(count);
    return take(out.data(), count * sizeof(float));
  }
  bool good() const { return good_; }
  std::size_t left() const { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
  bool good_ = true;
};

/// Lengths of the rows of [n][n], and that neighbours are at right angles: enough to refuse what would blow keys up.
bool orthogonal(std::span<const float> matrix, std::size_t n) {
  for (std::size_t row = 0; row < n; ++row) {
    float length = 0;
    float product = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const float value = matrix[row * n + i];
      length += value * value;
      product += value * matrix[(row + 1) % n * n + i];
    }
    if (!(std::abs(length - 1) < kOrthogonalError)) return false;
    if (n > 1 && !(std::abs(product) < kOrthogonalError)) return false;
  }
  return true;
}

constexpr std::string_view kSuffix = ".kvernprofile";
constexpr const char* kFolderVariable = "KVERN_PROFILES";

/// Profiles by name; they stay until the process ends, since codecs of that name may come at any time.
struct Known {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<const ModelProfile>> profiles;
  std::string folder;
};
Known& known() {
  static Known all;
  return all;
}

std::string profile_folder() {
  {
    const std::lock_guard lock(known().mutex);
    if (!known().folder.empty()) return known().folder;
  }
  const char* named = std::getenv(kFolderVariable);
  return named == nullptr ? std::string() : named;
}

/// The checksum at the end of a profile, as names have it.
std::string checksum_text(std::span<const std::byte> bytes) {
  std::uint32_t checksum = 0;
  if (bytes.size() >= sizeof checksum) {
    std::memcpy(&checksum, bytes.data() + bytes.size() - sizeof checksum, sizeof checksum);
  }
  char text[9];
  std::snprintf(text, sizeof text, "%08x", checksum);
  return text;
}

float value_at(DType dtype, const std::byte* row, std::size_t index) {
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, row + index * sizeof value, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, row + index * sizeof bits, sizeof bits);
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

}  // namespace

Result<ModelProfile> ModelProfile::parse(std::span<const std::byte> bytes) {
  const auto corrupt = [](const char* why) { return failure(Code::kCorrupt, std::string("model profile: ") + why); };
  Fields fields(bytes);
  char magic[8] = {};
  fields.take(magic, sizeof magic);
  if (!fields.good() || std::string_view(magic, sizeof magic) != kMagic) return corrupt("it does not begin like one");
  const auto version = fields.get<std::uint32_t>();
  if (version > kVersion) {
    return failure(Code::kRefused, "the model profile has version " + std::to_string(version) +
                                       ", written by a newer Kvern; this one reads versions up to " +
                                       std::to_string(kVersion));
  }
  std::uint32_t checksum = 0;
  if (!fields.good() || fields.left() < sizeof checksum) return corrupt("it is cut off");
  const auto body = bytes.first(bytes.size() - sizeof checksum);
  std::memcpy(&checksum, bytes.data() + body.size(), sizeof checksum);
  if (crc32(body) != checksum) return corrupt("it fails its checksum");

  ModelProfile profile;
  const auto name_bytes = fields.get<std::uint32_t>();
  profile.layers = fields.get<std::uint32_t>();
  profile.heads = fields.get<std::uint32_t>();
  profile.dim = fields.get<std::uint32_t>();
  const auto pairs = fields.get<std::uint32_t>();
  if (profile.layers > kMaxLayers || pairs > profile.layers || profile.heads == 0 || profile.dim == 0 ||
      profile.heads > kMaxWidth || profile.dim > kMaxWidth || profile.heads * profile.dim > kMaxWidth ||
      name_bytes > kMaxNameBytes) {
    return corrupt("its sizes are no model's");
  }
  profile.model.resize(name_bytes);
  fields.take(profile.model.data(), name_bytes);
  const std::size_t width = std::size_t{profile.heads} * profile.dim;
  const std::size_t block = std::size_t{profile.dim} * profile.dim;
  for (std::uint32_t i = 0; i < pairs; ++i) {
    Pair pair;
    pair.layer = fields.get<std::uint32_t>();
    pair.whole_angle_degrees = fields.get<float>();
    pair.blocks_angle_degrees = fields.get<float>();
    fields.take_floats(pair.whole, width * width);
    fields.take_floats(pair.blocks, profile.heads * block);
    if (!fields.good()) return corrupt("it is cut off");
    if (pair.layer + 1 >= profile.layers || (i > 0 && pair.layer <= profile.pairs.back().layer + 1)) {
      return corrupt("its pairs are not layers in order, each in one pair");
    }
    bool good = orthogonal(pair.whole, width);
    for (std::uint32_t head = 0; head < profile.heads; ++head) {
      good = good && orthogonal(std::span(pair.blocks).subspan(head * block, block), profile.dim);
    }
    if (!good) return corrupt("a matrix is not orthogonal");
    profile.pairs.push_back(std::move(pair));
  }
  if (!fields.good() || fields.left() != sizeof checksum) return corrupt("it does not have the size of its parts");
  return profile;
}

const Pair* ModelProfile::find(std::uint32_t layer) const {
  const auto pair = std::ranges::lower_bound(pairs, layer, {}, &Pair::layer);
  return pair != pairs.end() && pair->layer == layer ? &*pair : nullptr;
}

void set_profile_folder(std::string folder) {
  const std::lock_guard lock(known().mutex);
  known().folder = std::move(folder);
}

Result<std::string> add_profile(const std::string& prefix, std::span<const std::byte> bytes) {
  auto profile = ModelProfile::parse(bytes);
  if (!profile) return failure(profile.error());
  std::string name = prefix + "-" + checksum_text(bytes);
  const std::lock_guard lock(known().mutex);
  known().profiles.try_emplace(name, std::make_shared<const ModelProfile>(*std::move(profile)));
  return name;
}

Result<std::shared_ptr<const ModelProfile>> find_profile(const std::string& name) {
  const auto in_memory = [&]() -> std::shared_ptr<const ModelProfile> {
    const std::lock_guard lock(known().mutex);
    const auto found = known().profiles.find(name);
    return found == known().profiles.end() ? nullptr : found->second;
  };
  if (auto profile = in_memory()) return profile;
  const std::string folder = profile_folder();
  if (folder.empty()) {
    return failure(Code::kNotFound, "there is no model profile " + name + "; set codec.profiles (kvernd), " +
                                        "kvern.profiles (engines) or " + kFolderVariable + " to the folder with " +
                                        name + std::string(kSuffix));
  }
  const std::string path = folder + "/" + name + std::string(kSuffix);
  std::ifstream file(path, std::ios::binary);
  if (!file) return failure(Code::kNotFound, "there is no model profile " + path);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto bytes = std::as_bytes(std::span(text));
  const std::string checksum = checksum_text(bytes);
  if (!name.ends_with("-" + checksum)) {
    return failure(Code::kCorrupt, "the model profile " + path + " has the checksum " + checksum);
  }
  const auto added = add_profile(name.substr(0, name.size() - checksum.size() - 1), bytes);
  if (!added) return failure(added.error().code(), path + ": " + added.error().message());
  return in_memory();
}

Status multiply_rows(const HeadRows& rows, std::span<const float> matrix, std::span<float> out, Executor* executor) {
  const std::size_t n = std::size_t{rows.heads} * rows.dim;
  if (rows.dtype == DType::kOpaqueBytes || n == 0 || n % 16 != 0 || n > kMaxWidth) {
    return {Code::kInvalid, "aligning takes numbers whose elements over all heads are a multiple of 16"};
  }
  if (matrix.size() != n * n || out.size() != n * rows.tokens) {
    return {Code::kInvalid, "aligning: the matrix or the output does not have the size of the rows"};
  }
  parallel_for(executor, (rows.tokens + kTaskTokens - 1) / kTaskTokens, [&](std::size_t task) {
    const auto first = static_cast<std::uint32_t>(task) * kTaskTokens;
    const std::uint32_t count = std::min(kTaskTokens, rows.tokens - first);
    std::vector<float> from(count * n);
    std::vector<float> to(count * n);
    for (std::uint32_t head = 0; head < rows.heads; ++head) {
      for (std::uint32_t token = 0; token < count; ++token) {
        const std::byte* row = rows.row(head, first + token);
        float* at = from.data() + token * n + std::size_t{head} * rows.dim;
        for (std::uint32_t i = 0; i < rows.dim; ++i) at[i] = value_at(rows.dtype, row, i);
      }
    }
    multiply(from.data(), count, matrix.data(), static_cast<std::uint32_t>(n), to.data());
    for (std::uint32_t head = 0; head < rows.heads; ++head) {
      for (std::uint32_t token = 0; token < count; ++token) {
        const float* at = to.data() + token * n + std::size_t{head} * rows.dim;
        std::copy_n(at, rows.dim, out.data() + (std::size_t{head} * rows.tokens + first + token) * rows.dim);
      }
    }
  });
  return Status::ok();
}

std::vector<float> transposed(std::span<const float> matrix, std::uint32_t n) {
  std::vector<float> out(matrix.size());
  for (std::size_t row = 0; row < n; ++row) {
    for (std::size_t column = 0; column < n; ++column) out[column * n + row] = matrix[row * n + column];
  }
  return out;
}

}  // namespace kvern::align

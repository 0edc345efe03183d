#include "service/namespaces.h"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

namespace kvern {
namespace {

constexpr std::size_t kMaxFields = 128;
constexpr std::size_t kMaxNameBytes = 64;
constexpr std::size_t kMaxValueBytes = 4096;
constexpr std::string_view kExtraPrefix = "extra.";
constexpr std::string_view kTenant = "tenant";

// Beyond these a number is a mistake. Their product, with 8 bytes per element for K and V, stays below 2^60.
constexpr std::uint32_t kMaxLayers = 1U << 12;
constexpr std::uint32_t kMaxHeads = 1U << 12;
constexpr std::uint32_t kMaxDim = 1U << 15;
constexpr std::uint32_t kMaxChunkTokens = 1U << 17;

struct Number {
  const char* name;
  std::uint32_t NamespaceShape::*member;
  std::uint32_t min;
  std::uint32_t max;
};
constexpr Number kNumbers[] = {
    {"block_tokens", &NamespaceShape::block_tokens, 1, kMaxChunkTokens},
    {"chunk_tokens", &NamespaceShape::chunk_tokens, 1, kMaxChunkTokens},
    {"layers", &NamespaceShape::layers, 1, kMaxLayers},
    {"kv_heads", &NamespaceShape::kv_heads, 1, kMaxHeads},
    {"key_dim", &NamespaceShape::key_dim, 1, kMaxDim},
    {"value_dim", &NamespaceShape::value_dim, 0, kMaxDim},  // 0: K and V share their rows (latent attention)
};
constexpr std::string_view kRequiredTexts[] = {"model",          "weights",   "dtype",  "kv_dtype",
                                               "hash_algorithm", "hash_seed", "groups", "rope"};
constexpr std::string_view kOptional[] = {"rotation", "lora", "quantization", "kv_scales", "epoch", "max_position"};

bool is_known(std::string_view name) {
  const auto names_it = [&](std::string_view known) { return known == name; };
  return std::ranges::any_of(kRequiredTexts, names_it) || std::ranges::any_of(kOptional, names_it) ||
         std::ranges::any_of(kNumbers, [&](const Number& number) { return number.name == name; }) || name == kTenant ||
         (name.starts_with(kExtraPrefix) && name.size() > kExtraPrefix.size());
}

bool is_plain_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes && std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
           c == '-';
  });
}

Status unknown_fact(const std::string& name) {
  std::string why = "the namespace is refused: this daemon does not know the fact \"";
  why.append(name).append("\" and cannot ignore it; send it as extra.").append(name).append(" or use a newer kvernd");
  return {Code::kRefused, std::move(why)};
}

std::array<unsigned char, SHA256_DIGEST_LENGTH> sha256(const std::string& text) {
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

Status refused(const std::string& why) { return Status(Code::kRefused, "the namespace is refused: " + why); }

}  // namespace

Status NamespaceShape::accepts(const ShardShape& shard, std::uint32_t group_layers, std::uint32_t model_heads) const {
  const auto wrong = [](const std::string& why) {
    return Status(Code::kInvalid, "the shard does not fit its namespace: " + why);
  };
  if (shard.dtype != kv_dtype && shard.dtype != DType::kOpaqueBytes) {
    return wrong("its dtype is " + std::string(dtype_name(shard.dtype)) + ", kv_dtype is " +
                 std::string(dtype_name(kv_dtype)));
  }
  if (model_heads != kv_heads) {
    return wrong("it says that the model has " + std::to_string(model_heads) + " KV heads, kv_heads is " +
                 std::to_string(kv_heads));
  }
  if (group_layers == 0 || group_layers > layers) {
    return wrong("its group has " + std::to_string(group_layers) + " layers, layers is " + std::to_string(layers));
  }
  if (shard.layers == 0 || shard.layers > group_layers || shard.layer_begin > group_layers - shard.layers) {
    return wrong("its layers are not within the group's");
  }
  if (shard.heads == 0 || shard.heads > kv_heads || shard.head_begin > kv_heads - shard.heads) {
    return wrong("its heads are not within the model's");
  }
  if (shard.tokens == 0 || shard.tokens > chunk_tokens || shard.tokens % block_tokens != 0) {
    return wrong("it has " + std::to_string(shard.tokens) + " tokens; whole blocks of " + std::to_string(block_tokens) +
                 " up to " + std::to_string(chunk_tokens) + " make a chunk");
  }
  if (shard.dtype == DType::kOpaqueBytes) {
    // Bytes of unknown layout: the rows are as long as the engine says.
    if (shard.key_dim == 0 || shard.key_dim > 4 * kMaxDim || shard.value_dim > 4 * kMaxDim) {
      return wrong("its opaque rows have an impossible length");
    }
  } else if (shard.key_dim != key_dim || shard.value_dim != value_dim) {
    return wrong("its rows have " + std::to_string(shard.key_dim) + " and " + std::to_string(shard.value_dim) +
                 " elements, key_dim and value_dim are " + std::to_string(key_dim) + " and " +
                 std::to_string(value_dim));
  }
  return Status::ok();
}

const std::string& Namespace::fact(const std::string& name) const {
  static const std::string none;
  const auto found = facts.find(name);
  return found == facts.end() ? none : found->second;
}

std::string canonical_text(const std::map<std::string, std::string>& facts) {
  std::string text;
  for (const auto& [name, value] : facts) {
    text += name;
    text += '=';
    for (const char c : value) {
      switch (c) {
        case '\\':
          text += "\\\\";
          break;
        case '\n':
          text += "\\n";
          break;
        case '\r':
          text += "\\r";
          break;
        default:
          text += c;
      }
    }
    text += '\n';
  }
  return text;
}

NamespaceId namespace_id_of(const std::string& tenant, const std::string& canonical_text) {
  constexpr std::size_t kTenantBytes = NamespaceId::kTenantBytes;
  NamespaceId id;
  std::memcpy(id.bytes.data(), sha256(tenant).data(), kTenantBytes);
  std::memcpy(id.bytes.data() + kTenantBytes, sha256(canonical_text).data(), id.bytes.size() - kTenantBytes);
  return id;
}

NamespaceSet namespaces_of_tenant(const std::string& tenant) {
  return NamespaceSet::of_tenant(namespace_id_of(tenant, ""));
}

Result<NamespaceShape> check_facts(const std::map<std::string, std::string>& facts) {
  for (const auto& [name, value] : facts) {
    if (!is_plain_name(name)) return failure(refused("a fact has a name that is empty, too long or not plain ASCII"));
    if (!is_known(name)) return failure(unknown_fact(name));
    if (value.size() > kMaxValueBytes) {
      return failure(refused("the fact \"" + name + "\" is longer than " + std::to_string(kMaxValueBytes) + " bytes"));
    }
  }
  const auto value_of = [&](std::string_view name) -> const std::string* {
    const auto found = facts.find(std::string(name));
    return found == facts.end() || found->second.empty() ? nullptr : &found->second;
  };
  for (const auto name : kRequiredTexts) {
    if (value_of(name) == nullptr)
      return failure(refused("the fact \"" + std::string(name) + "\" is missing or empty"));
  }
  NamespaceShape shape;
  for (const Number& number : kNumbers) {
    const std::string* text = value_of(number.name);
    if (text == nullptr) return failure(refused("the fact \"" + std::string(number.name) + "\" is missing or empty"));
    std::uint32_t value = 0;
    const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
    if (error != std::errc() || end != text->data() + text->size() || value < number.min || value > number.max) {
      return failure(refused(std::string(number.name) + " must be a whole number from " + std::to_string(number.min) +
                             " to " + std::to_string(number.max) + ", not \"" + *text + "\""));
    }
    shape.*number.member = value;
  }
  if (shape.chunk_tokens % shape.block_tokens != 0) {
    return failure(refused("chunk_tokens must be a multiple of block_tokens"));
  }
  const auto dtype = dtype_from_name(*value_of("dtype"));
  if (!dtype || *dtype == DType::kOpaqueBytes) {
    return failure(refused("dtype must be float32, float16 or bfloat16, not \"" + *value_of("dtype") + "\""));
  }
  const auto kv_dtype = dtype_from_name(*value_of("kv_dtype"));
  if (!kv_dtype) {
    return failure(refused("kv_dtype must be float32, float16, bfloat16 or opaque, not \"" + *value_of("kv_dtype") +
                           "\"; other caches can be stored as opaque bytes"));
  }
  shape.kv_dtype = *kv_dtype;
  if (value_of("weights")->find_first_of(" \t") != std::string::npos) {
    return failure(refused("weights must be a fingerprint, one word, not \"" + *value_of("weights") + "\""));
  }
  return shape;
}

Result<std::shared_ptr<const Namespace>> NamespaceRegistry::add(
    const std::vector<std::pair<std::string, std::string>>& fields, const std::string& tenant) {
  if (fields.size() > kMaxFields) {
    return failure(refused("it has " + std::to_string(fields.size()) + " facts, at most " + std::to_string(kMaxFields) +
                           " are allowed"));
  }
  auto space = std::make_shared<Namespace>();
  for (const auto& [name, value] : fields) {
    if (name == kTenant) return failure(refused("the tenant comes from the credential; do not send it"));
    if (!space->facts.emplace(name, value).second) {
      return failure(refused("the fact \"" + name + "\" is there twice"));
    }
  }
  auto shape = check_facts(space->facts);
  if (!shape) return failure(shape.error());
  space->shape = *shape;
  space->tenant = tenant;
  space->facts[std::string(kTenant)] = tenant;
  space->id = namespace_id_of(tenant, canonical_text(space->facts));
  auto terms = choose_terms_(space->facts);
  if (!terms) return failure(terms.error());
  space->codec_spec = std::move(terms->codec_spec);
  space->storage = std::move(terms->storage);
  space->storage.rotation = space->fact("rotation");

  std::lock_guard lock(mutex_);
  if (const auto found = by_id_.find(space->id); found != by_id_.end()) return found->second;
  if (by_id_.size() >= kMaxNamespaces)
    std::erase_if(by_id_, [](const auto& entry) { return entry.second.use_count() == 1; });
  if (by_id_.size() >= kMaxNamespaces) {
    return failure(Code::kBusy, "sessions hold " + std::to_string(kMaxNamespaces) + " namespaces already");
  }
  by_id_.emplace(space->id, space);
  return std::shared_ptr<const Namespace>(std::move(space));
}

std::shared_ptr<const Namespace> NamespaceRegistry::find(const NamespaceId& id) const {
  std::lock_guard lock(mutex_);
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<const Namespace>> NamespaceRegistry::all() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const Namespace>> result;
  result.reserve(by_id_.size());
  for (const auto& [id, space] : by_id_) result.push_back(space);
  return result;
}

}  // namespace kvern
